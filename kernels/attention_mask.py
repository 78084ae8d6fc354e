"""Which keys the masks show at all: tiles before and after them are skipped.

One pass over dense masks and masks by rule a call finds for each query the first key that it sees
and the last, or for each key those of the queries; a program takes the least and the largest of its
rows. So a causal mask, a window, padding and packed documents cost what they show, dense or by
rule. Between the two bounds the masks are read tile by tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .attention_scores import Masks, sequence_of, shown
from .common import View, matrix
from .plans import Launches


class Bounds(NamedTuple):
    """Of the columns that the rows of a mask show: int32, each a `View` (B, H, rows, 1)."""

    first: Any
    past: Any


@triton.jit
def bounds_kernel(
    masks,  # of attention_scores.py
    first,  # int32 (B, H, rows): the first column that a row shows, `columns` if none
    past,  # int32 (B, H, rows): one more than the last, 0 if none
    heads,  # H
    rows,
    columns,
    seq_q,
    seq_k,
    OF_KEYS: tl.constexpr,  # rows are keys and columns queries
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(rows, BLOCK_M)
    flat, index = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, head = flat // heads, flat % heads
    sequence = sequence_of(index, batch, seq_q, seq_k, None, None, None)
    row = index * BLOCK_M + tl.arange(0, BLOCK_M)
    least = tl.full([BLOCK_M], 0, tl.int32) + columns
    most = tl.zeros([BLOCK_M], tl.int32)
    for start in tl.range(0, columns, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        if OF_KEYS:
            seen = shown(masks, batch, head, sequence, column[None, :], row[:, None])
        else:
            seen = shown(masks, batch, head, sequence, row[:, None], column[None, :])
        least = tl.minimum(least, tl.min(tl.where(seen, column[None, :], columns), 1))
        most = tl.maximum(most, tl.max(tl.where(seen, column[None, :] + 1, 0), 1))
    at = flat.to(tl.int64) * rows + row
    tl.store(first + at, least, mask=row < rows)
    tl.store(past + at, most, mask=row < rows)


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
    launches: Launches,
    masks: Masks,
    shape: tuple[int, int, int, int],
    lengths: tuple[int, int],
    *,
    of_keys: bool = False,
) -> Bounds:
    """The bounds of the queries' keys, or `of_keys` those of the keys' queries.

    shape: of what the masks show, each dimension 1 or that of the scores; lengths: Sq and Sk.
    """
    batch, heads, *sides = shape
    rows, columns = (sides[1], lengths[0]) if of_keys else (sides[0], lengths[1])
    first, past = (launches.empty((batch, heads, rows), torch.int32) for _ in range(2))
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4}
    grid = (batch * heads * triton.cdiv(rows, tile["BLOCK_M"]),)
    launches.launch(
        bounds_kernel, grid, masks, first, past, heads, rows, columns, *lengths, OF_KEYS=of_keys,
        **tile,
    )  # fmt: skip
    steps = (0 if n == 1 else s for n, s in zip(first.shape, first.stride(), strict=True))
    steps = (*steps, 0)
    return Bounds(View(first, *steps), View(past, *steps))
