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

from .common import Device, Matrix, block_width, with_data

# --- device functions ----------------------------------------------------------------------------


@triton.jit
def at(x, row, col):
    """Pointers to x[row, col] of a matrix, for vectors of rows and of columns."""
    return x.data + row.to(tl.int64)[:, None] * x.row + col.to(tl.int64)[None, :] * x.col


@triton.jit
def load_weight(weight, col, width, weight_offset):
    """weight_offset + weight, (1, columns); None without a weight."""
    if weight is None:
        return None
    w = tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32)
    if weight_offset is not None:
        w += weight_offset
    return w[None, :]


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
    a, b, c, d = tl.philox(seed, quad, low, high, tl.zeros_like(high))
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return tl.where(words > limit.to(tl.uint32), value * keep_scale, 0.0)


# --- launching -----------------------------------------------------------------------------------


def matrix_of(x: Tensor | None) -> Matrix | None:
    """(rows, width) with unit column stride."""
    return None if x is None else Matrix(with_data(x), x.stride(0), 1)


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
    warps = together * block // (32 * (per_thread if whole else 16))
    return Tile(together, block, whole, min(MOST_WARPS, max(1, warps)))


def registers(device: Device, most: int) -> dict[str, int]:
    """A limit that keeps more programs on a processor; ptxas would spend registers on latency."""
    return {"maxnreg": most} if device.arch else {}
