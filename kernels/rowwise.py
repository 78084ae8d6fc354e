"""Shared by the kernels that work row by row: addresses, dropout, the size of a tile.

A tile is ROWS rows by BLOCK columns. Whole rows are kept in registers while they are short enough;
longer ones are walked over in blocks and read again, from L2, once their statistics are known.
Narrow rows share a program, so that it has as many bytes under way as one with a wide row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .common import Device, block_width

# --- device functions ----------------------------------------------------------------------------


@triton.jit
def at(x, row, col):
    """Pointers to x[row, col] of a matrix, for vectors of rows and of columns."""
    return x.data + row.to(tl.int64)[:, None] * x.row + col.to(tl.int64)[None, :] * x.col


@triton.jit
def store(x, row, col, value, inside):
    """x[row, col] = value, in the dtype of x."""
    tl.store(at(x, row, col), value.to(x.data.dtype.element_ty), mask=inside)


@triton.jit
def dropout(value, seed, row, first, limit, keep_scale, BLOCK: tl.constexpr):
    """Dropout of columns first … first + BLOCK; limit and keep_scale are those of a `Dropout`.

    Four columns share a Philox counter, one word each: interleaved, so that a thread makes the
    words of its own columns and none is made twice.
    """
    quad = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)[None, :]
    low = (row & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = (row >> 32).to(tl.uint32)[:, None]
    a, b, c, d = tl.philox(tl.load(seed), quad, low, high, tl.zeros_like(high))
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return tl.where(words > limit.to(tl.uint32), value * keep_scale, 0.0)


@triton.jit
def sum_of_parts(parts, out, col, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        pointers = parts + row.to(tl.int64)[:, None] * width + col[None, :]
        inside = (row < count)[:, None] & (col < width)[None, :]
        total += tl.load(pointers, mask=inside, other=0.0)
    tl.store(out + col, tl.sum(total, 0).to(out.dtype.element_ty), mask=col < width)


@triton.jit(do_not_specialize=["count"])
def parts_kernel(
    weight_parts,  # fp32 (count, width), or None
    bias_parts,  # fp32 (count, width), or None
    dweight,  # (width,), or None
    dbias,  # (width,), or None
    count,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if dweight is not None:
        sum_of_parts(weight_parts, dweight, col, count, width, ROWS, BLOCK)
    if dbias is not None:
        sum_of_parts(bias_parts, dbias, col, count, width, ROWS, BLOCK)


# --- launching -----------------------------------------------------------------------------------


class Dropout(NamedTuple):
    """A word above `limit` keeps its element, times `keep_scale`."""

    limit: int
    keep_scale: float


NO_DROPOUT = Dropout(0, 1.0)  # what a kernel gets that has no seed


def dropout_of(p: float) -> Dropout | None:
    """None where every element is kept as it is, if only because p is less than a word can tell."""
    limit = math.floor(p * 2**32) - 1
    if limit < 0:
        return None
    return Dropout(limit, 1.0 / (1.0 - p) if p < 1.0 else 0.0)


class Tile(NamedTuple):
    """The launch options of a kernel that works on tiles of rows."""

    rows: int
    block: int
    whole: bool  # a block is a whole row
    warps: int


# One load of every thread in a warp takes 512 bytes. With 4096 elements a program has two to four
# loads per thread under way, and an SM at least 32 KB: its share of what HBM3e has in flight.
ELEMENTS = 4096
MOST_ROWS = 64
MOST_WARPS = 16


def tile_of(rows: int, width: int, *, per_thread: int, most: int, apart: bool = False) -> Tile:
    """The tile for matrices (rows, width).

    per_thread: elements that a thread keeps of one tensor; most: elements that a program can keep;
    apart: rows are next to each other in memory and columns are not, so a tile takes more rows.
    """
    padded = block_width(width)
    together = 32 if apart else min(MOST_ROWS, max(1, ELEMENTS // padded))
    together = min(together, triton.next_power_of_2(rows))
    whole = together * padded <= most
    block = padded if whole else max(16, min(padded, most // 2 // together))
    warps = min(MOST_WARPS, max(1, together * block // (32 * per_thread)))
    return Tile(together, block, whole, warps)


def parts_of(rows: int, columns: int, tile: Tile, device: Device) -> int:
    """Into how many parts the rows are split, where a program sums over all rows of its part.

    As many programs as run at once: each writes a part of the sums, as wide as a row in fp32.
    """
    programs = device.processors * (MOST_WARPS // tile.warps)
    return max(1, min(programs // columns, triton.cdiv(rows, tile.rows)))


def add_parts(
    weight_parts: Tensor | None,
    bias_parts: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    device: Device,
) -> None:
    """The sums over the first dimension of (parts, width); both of each pair are None or neither.

    On the current device.
    """
    given = bias_parts if weight_parts is None else weight_parts
    if given is not None:
        count, width = given.shape
        # 32 columns are a line of memory; more only where that still keeps every processor busy.
        block = min(1024, max(32, triton.next_power_of_2(width // (2 * device.processors))))
        parts_kernel[(triton.cdiv(width, block),)](
            weight_parts, bias_parts, dweight, dbias, count, width,
            ROWS=2048 // block, BLOCK=block, num_warps=8,
        )  # fmt: skip
