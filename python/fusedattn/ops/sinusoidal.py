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

from ..reference import functional as reference
from ._backends import standard_backends
from ._checks import HALVES, check_number, check_offset, check_positions
from ._library import LibraryOp, hand_over, has_override, is_overridden
from ._op import Op
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


# --- backends: forward(call, out) ----------------------------------------------------------------


def _triton_kernels() -> Any:
    from ..kernels.sinusoidal import sinusoidal_forward

    return SimpleNamespace(forward=sinusoidal_forward)


def _formula(call: SinusoidalCall) -> tuple[Tensor]:
    """The reference, differentiable to any order; half precision computes in float32."""
    x, positions, start, config = call
    wide = x.float() if x.dtype in HALVES else x
    out = reference.add_sinusoidal(
        wide, positions=positions, offset=config.offset if start is None else start,
        base=config.base, scale=config.scale,
    )  # fmt: skip
    return (out.to(x.dtype),)


BACKENDS = standard_backends(
    "sinusoidal",
    lambda call: call.x,
    _triton_kernels,
    lambda: SimpleNamespace(forward=lambda call, out: out.copy_(_formula(call)[0])),
)

# --- library op: on (B, S, W), positions (1 or B, S) ---------------------------------------------


def _empty_outputs(call: SinusoidalCall) -> tuple[Tensor]:
    return (torch.empty_like(call.x),)


def _run(call: SinusoidalCall, kernels: Any) -> tuple[Tensor]:
    (out,) = _empty_outputs(call)
    if out.numel() != 0:
        kernels.forward(call, out)
    return (out,)


def _check_call(call: SinusoidalCall) -> SinusoidalCall:
    """A call from a traced or exported program, checked as the public function checks its own."""
    x, positions, start, (base, scale, offset) = call
    checked = prepare(x, positions, offset if start is None else start, base, scale)
    if x.dim() != 3:
        raise ValueError(f"add_sinusoidal: got x of shape {tuple(x.shape)}, expected (B, S, W)")
    return checked._replace(config=call.config)


sinusoidal_fwd = LibraryOp(
    "sinusoidal_fwd", SinusoidalCall, ("out",),
    allocate=_empty_outputs, run=_run, check=_check_call,
)  # fmt: skip

# --- autograd ------------------------------------------------------------------------------------


def _keep(call: SinusoidalCall, outputs: Any, wanted: Any) -> tuple[tuple[()], tuple[float]]:
    return (), (call.config.scale,)


def _pull_back(douts: Any, saved: Any, rest: Any, wanted: Any, run: Any) -> tuple[Any, ...]:
    (dout,), (scale,) = douts, rest
    return scale * dout, None, None


op = Op(
    "add_sinusoidal", BACKENDS, sinusoidal_fwd, _formula, differentiable=(0,), cotangents=1,
    keep=_keep, pull_back=_pull_back,
)  # fmt: skip


def _as_rows(x: Tensor) -> Tensor:
    """(…, S, W) as (B, S, W)."""
    rank = x.dim()
    return x if rank == 3 else x.unsqueeze(0) if rank == 2 else x.flatten(0, -3)


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
    if has_override(x, positions, offset) and is_overridden(locals()):
        return hand_over(add_sinusoidal, locals())
    call = prepare(x, positions, offset, base, scale)
    if x.dim() == 3:
        return op(call, backend)[0]
    return op(call._replace(x=_as_rows(x)), backend)[0].view(x.shape)
