"""Softmax's backends in order of preference, and the four-dimensional views that they work on.

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
from ._registry import Backend, Refusal
from .softmax_config import SoftmaxCall

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


def _cpu_refuses(call: SoftmaxCall, requested: bool) -> Refusal | None:
    return cpu_refuses(call.x, "x")


def _cuda_refuses(call: SoftmaxCall, requested: bool) -> Refusal | None:
    return cuda_refuses(call.x, "x")


def _emulated_refuses(call: SoftmaxCall, requested: bool) -> Refusal | None:
    return emulated_refuses(call.x, requested)


def _cpu_kernels() -> Any:
    native = _native.cpu
    return SimpleNamespace(
        forward=native.softmax_forward, backward=native.softmax_backward, any_rank=True
    )


def _cuda_kernels(native: Any) -> Any:
    def forward(x, mask, bias, out, config):
        native.softmax_forward(x, mask, bias, out, config, stream_of(x))

    def backward(dout, out, dx, ds, config):
        native.softmax_backward(dout, out, dx, ds, config, stream_of(out))

    return SimpleNamespace(forward=forward, backward=backward, any_rank=True)


# --- triton: kernels/softmax.py ------------------------------------------------------------------


def _triton_refuses(call: SoftmaxCall, requested: bool) -> Refusal | None:
    return triton_refuses(call.x, requested, "x")


def _triton_kernels() -> Any:
    from ..kernels.softmax import softmax_backward, softmax_forward

    return SimpleNamespace(forward=softmax_forward, backward=softmax_backward, any_rank=False)


# --- reference: reference/functional.py ----------------------------------------------------------


def _reference_refuses(call: SoftmaxCall, requested: bool) -> Refusal | None:
    return None


def _reference_kernels() -> Any:
    def wide(x: Any) -> Any:
        """Half precision computes in float32, as the kernels do. Torch sums in an order that
        depends on strides: a contiguous copy keeps them out of the result."""
        if x is None:
            return None
        return (x.float() if x.dtype in HALVES else x).contiguous()

    def forward(x, mask, bias, out, config):
        with torch.autocast(x.device.type, enabled=False):
            found = reference.softmax(
                wide(x), mask=mask, bias=wide(bias), scale=config.scale, causal=config.causal_name
            )
        out.copy_(found)

    def backward(dout, out, dx, ds, config):
        found = reference.softmax_backward(wide(dout), wide(out), scale=config.scale)
        for grad, value in zip((dx, ds), found, strict=True):
            if grad is not None:
                grad.copy_(value)

    return SimpleNamespace(forward=forward, backward=backward, any_rank=False)


BACKENDS = (
    Backend("cpu", _cpu_refuses, _cpu_kernels),
    Backend("cuda", _cuda_refuses, lambda: _cuda_kernels(_native.cuda)),
    Backend("triton", _triton_refuses, _triton_kernels),
    Backend("cuda_emulated", _emulated_refuses, lambda: _cuda_kernels(_native.cuda_emulated())),
    Backend("reference", _reference_refuses, _reference_kernels),
)
