"""Softmax's kernels: what they write to, the views that they work on, and the backends.

Kernels are objects with

    forward(call, out)              call a `SoftmaxCall`
    backward(call, dx, ds)          call a `SoftmaxBackwardCall`

on tensors (B, H, rows, width) of any strides; a mask or a bias may have size 1 or stride 0 where it
is broadcast. They write every element of out, dx and ds; nothing is empty. dx and ds, which is
contiguous and float32 (float64 for float64), are None where they are not wanted. With `any_rank`
tensors may lack leading dimensions.
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
from ._rows import views
from .softmax_config import (
    SoftmaxBackwardCall,
    SoftmaxCall,
    check_backward_call,
    check_call,
)

# --- triton: kernels/softmax.py ------------------------------------------------------------------


def _triton_kernels() -> Any:
    from ..kernels.softmax import softmax_backward, softmax_forward

    return SimpleNamespace(forward=softmax_forward, backward=softmax_backward, any_rank=False)


# --- reference: reference/functional.py ----------------------------------------------------------


def _reference_kernels() -> Any:
    def wide(x: Any) -> Any:
        """Half precision computes in float32, as the kernels do. Torch sums in an order that
        depends on strides: a contiguous copy keeps them out of the result."""
        if x is None:
            return None
        return (x.float() if x.dtype in HALVES else x).contiguous()

    def forward(call: SoftmaxCall, out: Tensor) -> None:
        x, mask, bias, _, config = call
        with torch.autocast(x.device.type, enabled=False):
            found = reference.softmax(
                wide(x), mask=mask, bias=wide(bias), scale=config.scale, causal=config.causal_name
            )
        out.copy_(found)

    def backward(call: SoftmaxBackwardCall, dx: Any, ds: Any) -> None:
        dout, out = wide(call.dout), wide(call.out)
        found = reference.softmax_backward(dout, out, scale=call.config.scale)
        for grad, value in zip((dx, ds), found, strict=True):
            if grad is not None:
                grad.copy_(value)

    return SimpleNamespace(forward=forward, backward=backward, any_rank=False)


def _given(call: Any) -> Tensor:
    """What every backend looks at."""
    return call.x if isinstance(call, SoftmaxCall) else call.out


BACKENDS = standard_backends("softmax", _given, _triton_kernels, _reference_kernels, "x")

# --- what runs -----------------------------------------------------------------------------------


def _is_last(x: Tensor, dim: int) -> bool:
    return dim in (-1, x.dim() - 1)


def _run_forward(call: SoftmaxCall, kernels: Any) -> tuple[Tensor]:
    x, mask, bias, dim, config = call
    out = torch.empty_like(x)
    if x.numel() == 0:
        return (out,)
    if kernels.any_rank and x.dim() <= 4 and _is_last(x, dim):
        kernels.forward(call, out)
        return (out,)
    for o, a, m, b in views((out, x, mask, bias), dim, config.causal):
        kernels.forward(SoftmaxCall(a, m, b, -1, config), o)
    return (out,)


def _empty_gradients(call: SoftmaxBackwardCall) -> tuple[Tensor | None, Tensor | None]:
    """dx and ds, in whose memory `dim` is the last dimension."""
    out, dim = call.out, call.dim
    dx = torch.empty_like(out) if call.x_grad else None
    if not call.bias_grad:
        return dx, None
    stat = torch.float32 if out.dtype in HALVES else out.dtype
    if _is_last(out, dim):
        return dx, out.new_empty(out.shape, dtype=stat)
    return dx, out.new_empty(out.movedim(dim, -1).shape, dtype=stat).movedim(-1, dim)


def _run_backward(call: SoftmaxBackwardCall, kernels: Any) -> tuple[Tensor | None, Tensor | None]:
    dout, out, dim, *_, config = call
    dx, ds = _empty_gradients(call)
    if out.numel() != 0:
        if kernels.any_rank and out.dim() <= 4 and _is_last(out, dim):
            kernels.backward(call, dx, ds)
        else:
            for o, g, a, s in views((out, dout, dx, ds), dim, config.causal):
                kernels.backward(call._replace(dout=g, out=o, dim=-1), a, s)
    return dx, ds


def _usual_backward(call: SoftmaxBackwardCall, native: Any) -> Any:
    if not call.x_grad or call.bias_grad:
        return None
    dx = native.usual_softmax_backward(call.dout, call.out, call.dim, call.config)
    return None if dx is None else (dx, None)


# --- library ops ---------------------------------------------------------------------------------

softmax_fwd = LibraryOp(
    "softmax_fwd", SoftmaxCall, ("out",),
    allocate=lambda call: (torch.empty_like(call.x),), run=_run_forward, check=check_call,
)  # fmt: skip
softmax_bwd = LibraryOp(
    "softmax_bwd", SoftmaxBackwardCall, ("dx", "ds"),
    allocate=_empty_gradients, run=_run_backward, check=check_backward_call,
    wanted=lambda call: (call.x_grad, call.bias_grad),
    usual=_usual_backward,
)  # fmt: skip
