"""Softmax's kernels: what they write to, the views that they work on, and the backends.

Kernels are objects with

    forward(x, mask, bias, out, config)
    backward(dout, out, dx, ds, config)

on tensors (B, H, rows, width) of any strides; a mask or a bias may have size 1 or stride 0 where it
is broadcast. They write every element of out, dx and ds; nothing is empty. dx and ds, which is
contiguous and float32 (float64 for float64), are None where they are not wanted. With `any_rank`
tensors may lack leading dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference import functional as reference
from ._backends import cpu_refuses, cuda_refuses, emulated_refuses, stream_of, triton_refuses
from ._checks import HALVES
from ._library import LibraryOp
from ._registry import Backend
from .softmax_config import (
    SoftmaxBackwardCall,
    SoftmaxCall,
    SoftmaxConfig,
    check_backward_call,
    check_call,
)

# --- views ---------------------------------------------------------------------------------------


def views(tensors: tuple[Tensor | None, ...], dim: int, causal: int) -> Iterator[tuple[Any, ...]]:
    """`tensors` as views (B, H, rows, width), width their dimension `dim`; nothing is copied.

    The first has the full shape; a mask or a bias may have fewer dimensions. More dimensions than
    four are merged where the strides allow it; where they do not, the call is several.
    """
    rank = tensors[0].dim()  # type: ignore[union-attr]
    last = dim in (-1, rank - 1)
    aligned = (None if t is None else t.view((1,) * (rank - t.dim()) + t.shape) for t in tensors)
    moved = tuple(t if t is None or last else t.movedim(dim, -1) for t in aligned)
    yield from _fit(moved, 2 if causal else 1)


def _fit(tensors: tuple[Tensor | None, ...], apart: int) -> Iterator[tuple[Any, ...]]:
    """Bring tensors of one rank to four dimensions; the last `apart` are never merged."""
    full = tensors[0]
    assert full is not None
    rank = full.dim()
    if rank <= 4:
        yield tuple(None if t is None else t.view((1,) * (4 - rank) + t.shape) for t in tensors)
        return
    spread = tuple(None if t is None else t.expand(full.shape) for t in tensors)
    for i in range(rank - apart - 1):
        if all(t is None or _mergeable(t, i) for t in spread):
            merged = tuple(None if t is None else t.flatten(i, i + 1) for t in spread)
            yield from _fit(merged, apart)
            return
    for i in range(full.shape[0]):
        yield from _fit(tuple(None if t is None else t[i] for t in spread), apart)


def _mergeable(t: Tensor, i: int) -> bool:
    """Whether dimensions i and i + 1 can be read as one."""
    return 1 in t.shape[i : i + 2] or t.stride(i) == t.size(i + 1) * t.stride(i + 1)


# --- cpu, cuda: csrc/cpu/rowwise/softmax.cpp, csrc/cuda/softmax.cu -------------------------------


def _native_kernels(native: Any) -> Any:
    def forward(
        x: Tensor, mask: Tensor | None, bias: Tensor | None, out: Tensor, config: SoftmaxConfig
    ) -> None:
        native.softmax_forward(x, mask, bias, out, config, stream_of(x))

    def backward(
        dout: Tensor, out: Tensor, dx: Tensor | None, ds: Tensor | None, config: SoftmaxConfig
    ) -> None:
        native.softmax_backward(dout, out, dx, ds, config, stream_of(out))

    return SimpleNamespace(forward=forward, backward=backward, any_rank=True)


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

    def forward(
        x: Tensor, mask: Tensor | None, bias: Tensor | None, out: Tensor, config: SoftmaxConfig
    ) -> None:
        with torch.autocast(x.device.type, enabled=False):
            found = reference.softmax(
                wide(x), mask=mask, bias=wide(bias), scale=config.scale, causal=config.causal_name
            )
        out.copy_(found)

    def backward(
        dout: Tensor, out: Tensor, dx: Tensor | None, ds: Tensor | None, config: SoftmaxConfig
    ) -> None:
        found = reference.softmax_backward(wide(dout), wide(out), scale=config.scale)
        for grad, value in zip((dx, ds), found, strict=True):
            if grad is not None:
                grad.copy_(value)

    return SimpleNamespace(forward=forward, backward=backward, any_rank=False)


def _given(call: Any) -> Tensor:
    """What every backend looks at."""
    return call.x if isinstance(call, SoftmaxCall) else call.out


BACKENDS = (
    Backend(
        "cpu",
        lambda call, named: cpu_refuses(_given(call), "x"),
        lambda: _native_kernels(_native.cpu),
    ),
    Backend(
        "cuda",
        lambda call, named: cuda_refuses(_given(call), "x"),
        lambda: _native_kernels(_native.cuda),
    ),
    Backend(
        "triton", lambda call, named: triton_refuses(_given(call), named, "x"), _triton_kernels
    ),
    Backend(
        "cuda_emulated",
        lambda call, named: emulated_refuses(_given(call), named),
        lambda: _native_kernels(_native.cuda_emulated()),
    ),
    Backend("reference", lambda call, named: None, _reference_kernels),
)

# --- what runs -----------------------------------------------------------------------------------


def _is_last(x: Tensor, dim: int) -> bool:
    return dim in (-1, x.dim() - 1)


def _run_forward(call: SoftmaxCall, kernels: Any) -> tuple[Tensor]:
    x, mask, bias, dim, config = call
    out = torch.empty_like(x)
    if x.numel() == 0:
        return (out,)
    if kernels.any_rank and x.dim() <= 4 and _is_last(x, dim):
        kernels.forward(x, mask, bias, out, config)
        return (out,)
    for o, a, m, b in views((out, x, mask, bias), dim, config.causal):
        kernels.forward(a, m, b, o, config)
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
    dout, out, dim, _, _, config = call
    dx, ds = _empty_gradients(call)
    if out.numel() != 0:
        if kernels.any_rank and out.dim() <= 4 and _is_last(out, dim):
            kernels.backward(dout, out, dx, ds, config)
        else:
            for o, g, a, s in views((out, dout, dx, ds), dim, config.causal):
                kernels.backward(g, o, a, s, config)
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
