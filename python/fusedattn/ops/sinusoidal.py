"""Sinusoidal positions, added to x in one pass: no table in memory.

For feature 2i and 2i + 1 of W, at position p:

    out = scale · x + (sin, cos)(p / base^(2i/W))

The phase is computed in fp64 and reduced before its sine is taken, so that it is exact to an ulp at
position 10⁶ (Vaswani et al. 2017, §3.5). The gradient is dx = scale · dout.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from ..reference import functional as reference
from ._backends import cpu_refuses, cuda_refuses, emulated_refuses, stream_of, triton_refuses
from ._checks import check_number, check_offset, check_positions
from ._library import define, direct, plain, transformed
from ._registry import Backend, Op
from .rotary_config import validate_input


class SinusoidalConfig(NamedTuple):
    """The options of one call, in the order of the library op's schema."""

    base: float = 10000.0
    scale: float = 1.0
    offset: int = 0


class SinusoidalCall(NamedTuple):
    """One checked call: x (…, S, W), positions (1 or B, S) or None, an offset tensor or None."""

    x: Tensor
    positions: Tensor | None
    start: Tensor | None
    config: SinusoidalConfig


def prepare(
    x: Tensor, positions: Tensor | None, offset: int | Tensor, base: float, scale: float
) -> SinusoidalCall:
    """Check everything.

    Raises:
        TypeError: x is not a floating-point tensor, positions are not int32 or int64.
        ValueError: shapes or devices that do not fit together, or a base that is not above 0.
    """
    name = "add_sinusoidal"
    shape = validate_input(name, "x", x)
    if positions is not None:
        length = shape[-2]
        given = check_positions(name, positions, x)
        if given not in ((length,), (1, length), shape[:-1]):
            raise ValueError(
                f"{name}: got positions of shape {tuple(given)}, expected ({length},) or "
                f"{tuple(shape[:-1])}"
            )
        positions = positions.reshape(-1, length) if length else None
    base, scale = check_number(name, "base", base), check_number(name, "scale", scale)
    if not 0.0 < base < math.inf:
        raise ValueError(f"{name}: got base={base}, expected a finite number above 0")
    start, offset = check_offset(name, offset, x)
    return SinusoidalCall(x, positions, start, SinusoidalConfig(base, scale, offset))


# --- backends: forward(x, positions, offset, out, config) ----------------------------------------


def _native_kernels(module: Any) -> Any:
    add = module.sinusoidal_forward
    return SimpleNamespace(forward=lambda x, *args: add(x, *args, stream_of(x)))


def _cpu_kernels() -> Any:
    return SimpleNamespace(forward=_native.cpu.sinusoidal_forward)


def _triton_kernels() -> Any:
    from ..kernels.sinusoidal import sinusoidal_forward

    return SimpleNamespace(forward=sinusoidal_forward)


def _formula(x, positions, start, config) -> Tensor:
    """The reference, differentiable to any order; half precision computes in float32."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    out = reference.add_sinusoidal(
        wide, positions=positions, offset=config.offset if start is None else start,
        base=config.base, scale=config.scale,
    )  # fmt: skip
    return out.to(x.dtype)


def _reference_kernels() -> Any:
    return SimpleNamespace(
        forward=lambda x, positions, start, out, config: out.copy_(
            _formula(x, positions, start, config)
        )
    )


op = Op(
    "add_sinusoidal",
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

# --- library op: on (B, S, W), positions (1 or B, S) ---------------------------------------------


def _run(x, positions, start, backend, config) -> Tensor:
    out = torch.empty_like(x)
    if out.numel() != 0:
        op.kernels(backend).forward(x, positions, start, out, config)
    return out


def _sinusoidal(
    x: Tensor, positions: Tensor | None, start: Tensor | None, backend: str, *options: Any
) -> Tensor:
    return _run(x, positions, start, backend, SinusoidalConfig(*options))


sinusoidal_fwd = define(
    "sinusoidal_fwd(Tensor x, Tensor? positions, Tensor? start, str backend, float base, "
    "float scale, SymInt offset) -> Tensor",
    _sinusoidal, lambda x, *_: torch.empty_like(x), instead="fusedattn.add_sinusoidal",
)  # fmt: skip


def _as_rows(x: Tensor) -> Tensor:
    """(…, S, W) as (B, S, W)."""
    rank = x.dim()
    return x if rank == 3 else x.unsqueeze(0) if rank == 2 else x.flatten(0, -3)


def call(x, positions, start, config, backend) -> Tensor:
    """scale · x + positions in a new tensor of the shape of x."""
    flat = _as_rows(x)
    if plain(x):
        out = _run(flat, positions, start, backend, config)
    else:
        out = sinusoidal_fwd(flat, positions, start, backend, *config)
    return out if out.dim() == x.dim() else out.view(x.shape)


# --- autograd ------------------------------------------------------------------------------------


class SinusoidalFunction(torch.autograd.Function):
    """`fusedattn.add_sinusoidal` on arguments that it has already checked.

    apply(x, positions, start, config, backend) -> out: positions (1 or B, S) or None, start a
    tensor of one offset or None, config a `SinusoidalConfig`, backend a backend's name.
    """

    @staticmethod
    def forward(ctx: Any, x, positions, start, config, backend):
        ctx.scale = config.scale
        return call(x, positions, start, config, backend)

    @staticmethod
    def backward(ctx: Any, dout):
        return dout if ctx.scale == 1.0 else ctx.scale * dout, None, None, None, None


_Function = direct(SinusoidalFunction)

# --- public function -----------------------------------------------------------------------------


def add_sinusoidal(
    x: Tensor,
    *,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    base: float = 10000.0,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """scale · x + sinusoidal positions, in one pass.

    Exact to an ulp at position 10⁶, computed in float32 (float64 for float64) from fp64 phases
    whatever the dtype, and differentiable in x to any order.

    Args:
        x: (…, S, W) of two dimensions or more, float16, bfloat16, float32 or float64.
        positions: (S,) or the shape of x without W, int32 or int64; 0 to S − 1 by default.
        offset: added to the positions; an int, or a tensor of one int32 or int64 on x's device.
        base: the longest wavelength is 2π·base, nearly.
        scale: multiplies x, and the gradient; √W in the original transformer.
        backend: "auto", or the name of the one that must serve the call.

    Returns:
        A tensor like x.

    Raises:
        TypeError, ValueError: the arguments do not fit together; nothing has been launched.
        UnsupportedError: no backend (or not the one named) takes the call; lists every reason.
    """
    checked = prepare(x, positions, offset, base, scale)
    chosen = op.choose(backend, checked)
    if transformed():
        return _formula(_as_rows(x), *checked[1:]).view(x.shape)
    if x.requires_grad and torch.is_grad_enabled():
        return _Function.apply(*checked, chosen)
    return call(*checked, chosen)
