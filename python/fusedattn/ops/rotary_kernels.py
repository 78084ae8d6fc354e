"""The rotary embedding's kernels: the backends in order of preference, and the library ops.

A kernel is forward(call, out, out2), call a `RotaryCall` on (B, H, S, D), tables (T, R/2) or
(1 or B, T, R/2), positions (1 or B, S); out may be x itself.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..reference import functional as reference
from ._backends import standard_backends
from ._checks import HALVES
from ._library import LibraryOp
from .rotary_config import RotaryCall, check_call

Outputs = tuple[Tensor, Tensor | None]

# --- backends ------------------------------------------------------------------------------------


def _triton_kernels() -> Any:
    from ..kernels.rotary import rotary_forward

    return SimpleNamespace(forward=rotary_forward)


def formula(call: RotaryCall) -> Outputs:
    """The reference, differentiable to any order; half precision computes in float32."""
    x, x2, cos, sin, positions, start, config = call

    def turned(y: Tensor) -> Tensor:
        return reference.apply_rotary(
            y.float() if y.dtype in HALVES else y, cos, -sin if config.inverse else sin,
            interleaved=config.interleaved, positions=positions,
            offset=config.offset if start is None else start,
        ).to(y.dtype)  # fmt: skip

    return turned(x), None if x2 is None else turned(x2)


def _reference_kernels() -> Any:
    def forward(call: RotaryCall, *outputs: Tensor | None) -> None:
        for target, found in zip(outputs, formula(call), strict=True):
            if target is not None and found is not None:
                target.copy_(found)

    return SimpleNamespace(forward=forward)


BACKENDS = standard_backends("rotary", lambda call: call.x, _triton_kernels, _reference_kernels)

# --- what runs -----------------------------------------------------------------------------------


def _empty_outputs(call: RotaryCall) -> Outputs:
    return torch.empty_like(call.x), None if call.x2 is None else torch.empty_like(call.x2)


def _launch(call: RotaryCall, out: Tensor, out2: Tensor | None, kernels: Any) -> None:
    x, x2 = call[:2]
    if x2 is not None and x2.numel() == 0:
        call, out2 = call._replace(x2=None), None
    elif x2 is not None and out2 is not None and x.numel() == 0:
        call, out, out2 = call._replace(x=x2, x2=None), out2, None
    if call.x.numel() != 0:
        kernels.forward(call, out, out2)


def _run(call: RotaryCall, kernels: Any) -> Outputs:
    out, out2 = _empty_outputs(call)
    _launch(call, out, out2, kernels)
    return out, out2


def _run_in_place(call: RotaryCall, kernels: Any) -> tuple[()]:
    _launch(call, call.x, call.x2, kernels)
    for changed in call[:2]:
        if changed is not None and not changed.is_inference():
            torch.autograd.graph.increment_version(changed)
    return ()


# --- library ops ---------------------------------------------------------------------------------

rotary_fwd = LibraryOp(
    "rotary_fwd", RotaryCall, ("out", "out2"),
    allocate=_empty_outputs, run=_run, check=check_call,
    wanted=lambda call: (True, call.x2 is not None),
)  # fmt: skip
rotary_ = LibraryOp(
    "rotary_", RotaryCall, (),
    allocate=lambda call: (), run=_run_in_place, check=check_call, mutates=2,
)  # fmt: skip
