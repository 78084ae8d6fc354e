"""Tensors of any rank as rows of four dimensions, which is what the row-wise kernels work on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


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
