"""The rotary embedding's backends, its library ops, and how a call reaches a kernel.

`call` and `call_in_place` are what autograd uses. In plain eager mode they run the kernel at once;
where something watches or traces they go through `torch.ops.fusedattn`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference import functional as reference
from ._backends import cpu_refuses, cuda_refuses, emulated_refuses, stream_of, triton_refuses
from ._library import define, plain
from ._registry import Backend, Op
from .rotary_config import (
    RotaryCall,
    RotaryConfig,
    as_heads,
    validate_inputs,
    validate_positions,
    validate_tables,
)

# --- backends: forward(x, x2, cos, sin, positions, offset, out, out2, config) --------------------


def _native_kernels(module: Any) -> Any:
    rotate = module.rotary_forward
    return SimpleNamespace(forward=lambda x, *args: rotate(x, *args, stream_of(x)))


def _cpu_kernels() -> Any:
    return SimpleNamespace(forward=_native.cpu.rotary_forward)


def _triton_kernels() -> Any:
    from ..kernels.rotary import rotary_forward

    return SimpleNamespace(forward=rotary_forward)


def formula(x, cos, sin, positions, offset, config) -> Tensor:
    """The reference, differentiable to any order; half precision computes in float32."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    out = reference.apply_rotary(
        wide, cos, -sin if config.inverse else sin, interleaved=config.interleaved,
        positions=positions, offset=config.offset if offset is None else offset,
    )  # fmt: skip
    return out.to(x.dtype)


def _reference_kernels() -> Any:
    def forward(x, x2, cos, sin, positions, offset, out, out2, config):
        for source, target in ((x, out), (x2, out2)):
            if source is not None:
                target.copy_(formula(source, cos, sin, positions, offset, config))

    return SimpleNamespace(forward=forward)


op = Op(
    "apply_rotary",
    (
        Backend("cpu", lambda call, _: cpu_refuses(call.x), _cpu_kernels),
        Backend(
            "cuda", lambda call, _: cuda_refuses(call.x), lambda: _native_kernels(_native.cuda)
        ),
        Backend("triton", lambda call, named: triton_refuses(call.x, named), _triton_kernels),
        Backend(
            "cuda_emulated",
            lambda call, named: emulated_refuses(call.x, named),
            lambda: _native_kernels(_native.cuda_emulated()),
        ),
        Backend("reference", lambda call, _: None, _reference_kernels),
    ),
)

# --- library ops: on (B, H, S, D), tables (T, R/2) or (1 or B, T, R/2), positions (1 or B, S) ----

_REST = (
    "Tensor cos, Tensor sin, Tensor? positions, Tensor? start, str backend, bool interleaved, "
    "bool inverse, SymInt offset"
)


def _run(x, x2, cos, sin, positions, start, backend, config) -> tuple[Tensor, Tensor | None]:
    out, out2 = torch.empty_like(x), None if x2 is None else torch.empty_like(x2)
    _launch(x, x2, cos, sin, positions, start, out, out2, backend, config)
    return out, out2


def _launch(x, x2, cos, sin, positions, start, out, out2, backend, config) -> None:
    if x2 is not None and x2.numel() == 0:
        x2 = out2 = None
    if x.numel() == 0:
        if x2 is None:
            return
        x, out, x2, out2 = x2, out2, None, None
    op.kernels(backend).forward(x, x2, cos, sin, positions, start, out, out2, config)


def _run_in_place(x, x2, cos, sin, positions, start, backend, config) -> None:
    _launch(x, x2, cos, sin, positions, start, x, x2, backend, config)
    for changed in (x, x2):
        if changed is not None and not changed.is_inference():
            torch.autograd.graph.increment_version(changed)


def _check(x, x2, cos, sin, positions, start, backend, *options: Any) -> tuple[Any, ...]:
    """The arguments of a run, if the tensors fit together and the backend takes them.

    No position is looked at: one without a row gives NaN.
    """
    name, config = "apply_rotary", RotaryConfig(*options)
    validate_inputs(name, x, x2)
    for y in (x, x2):
        if y is not None and y.dim() != 4:
            raise ValueError(f"{name}: got x of shape {tuple(y.shape)}, expected (B, H, S, D)")
    validate_tables(name, x, cos, sin)
    offset = config.offset if start is None else start
    positions, start, _ = validate_positions(name, x, positions, offset)
    call = RotaryCall(x, x2, cos, sin, positions, start, config)
    return *call[:6], op.choose(backend, call), config


def _rotary(
    x: Tensor, x2: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None,
    start: Tensor | None, backend: str, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, out2 = _run(*_check(x, x2, cos, sin, positions, start, backend, *options))
    return out, x.new_empty(0) if out2 is None else out2


def _rotary_fake(x: Tensor, x2: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if x2 is None else torch.empty_like(x2)


def _rotary_in_place(
    x: Tensor, x2: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None,
    start: Tensor | None, backend: str, *options: Any,
) -> None:  # fmt: skip
    _run_in_place(*_check(x, x2, cos, sin, positions, start, backend, *options))


rotary_fwd = define(
    f"rotary_fwd(Tensor x, Tensor? x2, {_REST}) -> (Tensor out, Tensor out2)",
    _rotary, _rotary_fake,
)  # fmt: skip
rotary_ = define(
    f"rotary_(Tensor(a!) x, Tensor(b!)? x2, {_REST}) -> ()",
    _rotary_in_place, lambda *_: None,
)  # fmt: skip


def call(xs, cos, sin, positions, start, config, backend) -> tuple[Tensor, ...]:
    """The rotation of one or two tensors, in new ones of their shapes."""
    x, x2 = as_heads(xs[0]), as_heads(xs[1]) if len(xs) == 2 else None
    if plain(x, x2, cos, sin, positions, start):
        out, out2 = _run(x, x2, cos, sin, positions, start, backend, config)
    else:
        out, out2 = rotary_fwd(x, x2, cos, sin, positions, start, backend, *config)
    out = out if xs[0].dim() == 4 else out.view(xs[0].shape)
    if out2 is None or x2 is None:
        return (out,)
    return out, out2 if xs[1].dim() == 4 else out2.view(xs[1].shape)


def call_in_place(x, x2, cos, sin, positions, start, config, backend) -> None:
    """The rotation in the memory of x and x2 themselves, of at most four dimensions."""
    x, x2 = as_heads(x), None if x2 is None else as_heads(x2)
    if plain(x, x2, cos, sin, positions, start):
        _run_in_place(x, x2, cos, sin, positions, start, backend, config)
    else:
        rotary_(x, x2, cos, sin, positions, start, backend, *config)
