"""Which keys a dense mask shows at all: tiles before and after them are skipped.

One pass over the mask a call finds for each query the first key that it sees and the last, or for
each key those of the queries; a program takes the least and the largest of its rows. So a causal
mask, a window, padding and packed documents that come as dense masks cost what they show. Between
the two bounds the mask is read tile by tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import View, broadcast_view, load_pairs, matrix
from .plans import Launches


class Bounds(NamedTuple):
    """Of the columns that the rows of a mask show: int32, each a `View` (B, H, rows, 1)."""

    first: Any
    past: Any


@triton.jit
def bounds_kernel(
    mask,  # View (B, H, rows, columns) of bool
    first,  # int32 (B, H, rows): the first column that a row shows, `columns` if none
    past,  # int32 (B, H, rows): one more than the last, 0 if none
    heads,  # H
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(rows, BLOCK_M)
    flat, index = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    head = matrix(mask, flat // heads, flat % heads)
    i = index * BLOCK_M + tl.arange(0, BLOCK_M)
    least = tl.full([BLOCK_M], 0, tl.int32) + columns
    most = tl.zeros([BLOCK_M], tl.int32)
    for start in tl.range(0, columns, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        seen = load_pairs(head, i[:, None], j[None, :], rows, columns) != 0
        least = tl.minimum(least, tl.min(tl.where(seen, j[None, :], columns), 1))
        most = tl.maximum(most, tl.max(tl.where(seen, j[None, :] + 1, 0), 1))
    at = flat.to(tl.int64) * rows + i
    tl.store(first + at, least, mask=i < rows)
    tl.store(past + at, most, mask=i < rows)


@triton.jit
def within(bounds, batch, head, i, rows, begin, end, BLOCK: tl.constexpr):
    """begin and end of what rows i of a mask may show, no wider; begin a multiple of BLOCK."""
    inside = i < rows
    at = i.to(tl.int64)
    of_head = matrix(bounds.first, batch, head)
    least = tl.min(tl.load(of_head.data + at * of_head.row, mask=inside, other=2**30), 0)
    of_head = matrix(bounds.past, batch, head)
    most = tl.max(tl.load(of_head.data + at * of_head.row, mask=inside, other=0), 0)
    return tl.maximum(begin, least // BLOCK * BLOCK), tl.minimum(end, most)


def mask_bounds(
    launches: Launches, mask: Tensor | None, seq_q: int, seq_k: int, *, of_keys: bool = False
) -> Bounds | None:
    """The bounds of the queries' keys, or `of_keys` those of the keys' queries.

    mask: bool, four dimensions, each 1 or that of the scores.
    """
    if mask is None:
        return None
    batch, heads, *rest = mask.shape
    seen, rows, columns = broadcast_view(mask), rest[0], seq_k
    if of_keys:
        seen, rows, columns = seen._replace(row=seen.col, col=seen.row), rest[1], seq_q
    first, past = (launches.empty((batch, heads, rows), torch.int32) for _ in range(2))
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4}
    grid = (batch * heads * triton.cdiv(rows, tile["BLOCK_M"]),)
    launches.launch(bounds_kernel, grid, seen, first, past, heads, rows, columns, **tile)
    steps = (0 if n == 1 else s for n, s in zip(first.shape, first.stride(), strict=True))
    steps = (*steps, 0)
    return Bounds(View(first, *steps), View(past, *steps))
