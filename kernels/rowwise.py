"""Shared by the kernels that work row by row: addresses, dropout, the size of a tile.

A tile is ROWS rows by BLOCK columns. Whole rows are kept in registers while they are short enough;
longer ones are walked over in blocks and read again, from L2, once their statistics are known.
Narrow rows share a program, so that it has as many bytes under way as one with a wide row.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .common import Device, Matrix, View, block_width, with_data
from .dropout import kept

# --- device functions ----------------------------------------------------------------------------


@triton.jit
def work_item(rows, heads, ROWS: tl.constexpr):
    """(batch, head, first row) of this program."""
    tiles = tl.cdiv(rows, ROWS)
    flat = tl.program_id(0) // tiles
    return flat // heads, flat % heads, tl.program_id(0) % tiles * ROWS


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

    The halves of the row's number are the counter.
    """
    low = (row & 0xFFFFFFFF)[:, None]
    high = (row >> 32)[:, None]
    keep = kept(seed, limit, first, low, high, tl.zeros_like(high), BLOCK)
    return tl.where(keep, value * keep_scale, 0.0)


# --- launching -----------------------------------------------------------------------------------


def _merged(
    sizes: list[int], steps: list[tuple[int, ...]]
) -> tuple[list[int], list[tuple[int, ...]]]:
    """Neighbouring dimensions as one, where that is one step in every tensor; none of size 1."""
    found_sizes: list[int] = []
    found_steps: list[tuple[int, ...]] = []
    for size, step in zip(sizes, steps, strict=True):
        if size == 1:
            continue
        one_step = found_sizes and found_steps[-1] == tuple(size * inner for inner in step)
        if one_step and found_sizes[-1] * size < 2**31:
            found_sizes[-1] *= size
            found_steps[-1] = step
        else:
            found_sizes.append(size)
            found_steps.append(step)
    return found_sizes, found_steps


def row_views(
    like: Tensor, tensors: list[View | None], causal: bool = False
) -> tuple[list[int], list[View | None]]:
    """(B, H, rows) and the tensors with as many rows as possible in a head: they share programs.

    Rows stay what they are where a diagonal counts them.
    """
    given = [x for x in tensors if x is not None]
    kept = 2 if causal else 3
    steps = [tuple(x[1 + dim] for x in given) for dim in range(3)]
    sizes, merged = _merged(list(like.shape[:kept]), steps[:kept])
    sizes, merged = sizes + list(like.shape[kept:3]), merged + steps[kept:]
    sizes = [1] * (3 - len(sizes)) + sizes
    merged = [(0,) * len(given)] * (3 - len(merged)) + merged
    found = iter(zip(*merged, strict=True))
    views = []
    for x in tensors:
        if x is not None:
            batch, head, row = next(found)
            x = View(x.data, batch, head, row, x.col)
        views.append(x)
    return sizes, views


def programs(sizes: list[int], rows: int) -> tuple[int]:
    """One for each tile of `rows` rows of a head."""
    return (sizes[0] * sizes[1] * triton.cdiv(sizes[2], rows),)


def matrix_of(x: Tensor | None) -> Matrix | None:
    """(rows, width) with unit column stride."""
    return None if x is None else Matrix(with_data(x), x.stride(0), 1)


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
