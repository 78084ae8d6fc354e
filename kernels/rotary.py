r"""Rotary embedding: pairs (a, b) of the first R features turn by the angle of their position.

    a, b   →   a·cos − b·sin,  b·cos + a·sin          x (B, H, S, D), cos and sin (1 or B, T, R/2)

    half:         0 …… R/2 …… R …… D         interleaved:   0 1 2 3 …… R …… D
                  a a a b b b  copied                       a b a b …… copied

One program takes BLOCK_H heads of BLOCK_S rows and one block of features: BLOCK_C pairs, or twice
as many features that are only copied. It reads cos and sin once for all of its heads, and all that
it reads before it writes, so that `out` may be x. The heads of a second tensor follow those of the
first in the same launch: q and k, say.

    program → (batch, rows, heads of x then of x2, block of pairs then of copied features), the
    last fastest: programs that run together share cos and sin, and rows where heads lie in rows

The gradient is the same with −sin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FMA, device_of, view
from .positions import load_positions, positions_view, sheets

if TYPE_CHECKING:
    from fusedattn.ops.rotary import RotaryCall

WARPS = 4
BYTES = 16 << 10  # what a program reads of x: eight loads of 16 bytes per thread
MOST_PAIRS = 512  # in one block of features


class Tile(NamedTuple):
    """Vectors of heads and of rows of one batch element, and how many of each there are."""

    batch: Any
    head: Any
    heads: Any
    row: Any
    rows: Any


class Angles(NamedTuple):
    """Tables (1 or B, T, R/2) and the positions of a tile's rows in them; length is T."""

    cos: Any
    sin: Any
    length: Any
    position: Any


# --- kernel --------------------------------------------------------------------------------------


@triton.jit
def _pointers(x, tile, col):
    """x[batch, head, row, col] for a tile and a vector of columns."""
    base = x.data + tile.batch.to(tl.int64) * x.batch
    heads = tile.head.to(tl.int64)[:, None, None] * x.head
    return base + heads + tile.row.to(tl.int64)[None, :, None] * x.row + col[None, None, :] * x.col


@triton.jit
def _inside(tile, col, COLUMNS: tl.constexpr):
    rows = (tile.head < tile.heads)[:, None] & (tile.row < tile.rows)[None, :]
    return rows[:, :, None] & (col < COLUMNS)[None, None, :]


@triton.jit
def _load_table(table, angles, batch, pair, HALF: tl.constexpr):
    """(1, rows, pairs) of cos or sin in fp32; NaN for a position that the table does not have."""
    position = angles.position
    inside = (position >= 0) & (position < angles.length)
    pointers = table.data + batch.to(tl.int64) * table.sheet + position[:, None] * table.row
    mask = inside[:, None] & (pair < HALF)[None, :]
    values = tl.load(pointers + pair[None, :] * table.col, mask=mask, other=float("nan"))
    return values.to(tl.float32)[None, :, :]


@triton.jit
def _load_angles(angles, batch, pair, HALF: tl.constexpr, INVERSE: tl.constexpr):
    cos = _load_table(angles.cos, angles, batch, pair, HALF)
    sin = _load_table(angles.sin, angles, batch, pair, HALF)
    if INVERSE:
        sin = -sin
    return cos, sin


@triton.jit
def _copy(x, out, tile, first, D: tl.constexpr, WIDTH: tl.constexpr):
    """Features first … first + WIDTH as they are."""
    col = (first + tl.arange(0, WIDTH)).to(tl.int64)
    mask = _inside(tile, col, D)
    tl.store(_pointers(out, tile, col), tl.load(_pointers(x, tile, col), mask=mask), mask=mask)


@triton.jit
def _turn_halves(x, out, tile, angles, pair, HALF: tl.constexpr, INVERSE: tl.constexpr):
    mask = _inside(tile, pair, HALF)
    # x before the tables: a barrier may follow theirs, and holds back what is loaded after it.
    a = tl.load(_pointers(x, tile, pair), mask=mask).to(tl.float32)
    b = tl.load(_pointers(x, tile, pair + HALF), mask=mask).to(tl.float32)
    cos, sin = _load_angles(angles, tile.batch, pair, HALF, INVERSE)
    first, second = a * cos - b * sin, b * cos + a * sin
    dtype = out.data.dtype.element_ty
    tl.store(_pointers(out, tile, pair), first.to(dtype), mask=mask)
    tl.store(_pointers(out, tile, pair + HALF), second.to(dtype), mask=mask)


@triton.jit
def _turn_neighbours(
    x, out, tile, angles, pair, first, HALF: tl.constexpr, INVERSE: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    shape: tl.constexpr = [tile.head.shape[0], tile.row.shape[0], PAIRS, 2]
    col = (2 * first + tl.arange(0, 2 * PAIRS)).to(tl.int64)
    mask = _inside(tile, col, 2 * HALF)
    values = tl.load(_pointers(x, tile, col), mask=mask)
    a, b = tl.split(tl.reshape(values.to(tl.float32), shape))
    cos, sin = _load_angles(angles, tile.batch, pair, HALF, INVERSE)
    turned = tl.join(a * cos - b * sin, b * cos + a * sin).to(out.data.dtype.element_ty)
    tl.store(_pointers(out, tile, col), tl.reshape(turned, values.shape), mask=mask)


@triton.jit
def _features(
    x, out, tile, angles, block, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One block of features of a tile."""
    turned: tl.constexpr = (HALF + BLOCK_C - 1) // BLOCK_C
    if block < turned:
        first = block * BLOCK_C
        pair = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
        if INTERLEAVED:
            _turn_neighbours(x, out, tile, angles, pair, first, HALF, INVERSE, BLOCK_C)
        else:
            _turn_halves(x, out, tile, angles, pair, HALF, INVERSE)
    else:
        first = 2 * HALF + (block - turned) * (2 * BLOCK_C)
        _copy(x, out, tile, first, D, 2 * BLOCK_C)


@triton.jit(do_not_specialize=["start", "heads", "heads2", "rows", "length", "blocks"])
def rotary_kernel(
    x,  # View (B, H, S, D)
    x2,  # View (B, H2, S, D), or None
    cos,  # Sheets (1 or B, T, R/2)
    sin,  # Sheets (1 or B, T, R/2)
    positions,  # Positions (B, S)
    start,  # added to them, unless positions.offset is
    out,  # View (B, H, S, D), may be x
    out2,  # View (B, H2, S, D), or None
    heads,  # H
    heads2,  # H2
    rows,  # S
    length,  # T
    blocks,  # of features
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    groups = tl.cdiv(heads, BLOCK_H)
    all_groups = groups + tl.cdiv(heads2, BLOCK_H)
    program, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    program, group = program // all_groups, program % all_groups
    tiles = tl.cdiv(rows, BLOCK_S)
    batch, index = program // tiles, program % tiles
    row = index * BLOCK_S + tl.arange(0, BLOCK_S)
    position = load_positions(positions, start, batch, row, rows)
    # Rows past the end have made-up positions: −1 is in no table.
    angles = Angles(cos, sin, length, tl.where(row < rows, position, -1))
    head = tl.arange(0, BLOCK_H)
    if group < groups:
        tile = Tile(batch, group * BLOCK_H + head, heads, row, rows)
        _features(x, out, tile, angles, block, D, HALF, INTERLEAVED, INVERSE, BLOCK_C)
    elif x2 is not None:
        tile2 = Tile(batch, (group - groups) * BLOCK_H + head, heads2, row, rows)
        _features(x2, out2, tile2, angles, block, D, HALF, INTERLEAVED, INVERSE, BLOCK_C)


# --- launcher ------------------------------------------------------------------------------------


def _power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << (n - 1).bit_length()


def rotary_forward(call: RotaryCall, out: Tensor, out2: Tensor | None) -> None:
    """Write `out` as x (B, H, S, D) turned, and `out2` as x2 turned; `out` may be x itself.

    fp16, bf16 and fp32, any strides; cos and sin of any float dtype. Where a position has no
    row in the tables NaN is written, and nothing outside them is read.
    """
    x, x2, cos, sin, positions, start, config = call
    batches, heads, rows, dim = x.shape
    heads2 = 0 if x2 is None else x2.shape[1]
    length, half = cos.shape[-2:]
    pairs = BYTES // (2 * x.element_size())  # in a program
    block_c = min(_power_of_two(half), MOST_PAIRS)
    # The rows first: a quarter of the program is one load of 16 bytes of each half per thread.
    block_s = min(_power_of_two(rows), max(1, pairs // (4 * block_c)))
    block_h = min(_power_of_two(max(heads, heads2)), max(1, pairs // (block_s * block_c)))
    in_place = out.data_ptr() == x.data_ptr()
    copied = 0 if in_place else -(-(dim - 2 * half) // (2 * block_c))
    blocks = -(-half // block_c) + copied
    tiles = batches * -(-rows // block_s) * blocks
    # Fewer heads at a time where the GPU would not be full.
    while block_h > 1 and tiles * (heads + heads2) < 2 * block_h * device_of(x).processors:
        block_h //= 2
    programs = tiles * (-(-heads // block_h) + -(-heads2 // block_h))
    with torch.cuda.device_of(x):
        rotary_kernel[(programs,)](
            view(x),
            None if x2 is None else view(x2),
            sheets(cos),
            sheets(sin),
            positions_view(positions, start),
            config.offset,
            view(out),
            None if out2 is None else view(out2),
            heads,
            heads2,
            rows,
            length,
            blocks,
            D=dim,
            HALF=half,
            INTERLEAVED=config.interleaved,
            INVERSE=config.inverse,
            BLOCK_H=block_h,
            BLOCK_S=block_s,
            BLOCK_C=block_c,
            num_warps=WARPS,
            **FMA,
        )
