"""Which tiles the masks show: the others are not even walked over.

Before a kernel of attention two small ones look through dense masks and masks by rule, in tiles of
that kernel's size: for each of its programs they write down which tiles show something, first those
of which some pairs are hidden, then those of which none is. So causal masks, windows, padding,
packed documents and holes cost what they show, dense or by rule, and of a tile that is seen in full
the masks are not read again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from .attention_scores import Rules, key_range, query_range, sequence_of, shown
from .common import View, broadcast_view, matrix
from .plans import Launches

if TYPE_CHECKING:
    from torch import Tensor

Tile = dict[str, int]  # BLOCK_M and BLOCK_N of the kernel that walks over a list
UNSPECIALISED = ["heads", "rows", "columns", "seq_q", "seq_k", "lower", "upper"]


class Sides(NamedTuple):
    """What the masks of a call cover, and which of it causal, window and lengths let be seen."""

    batch: int  # each dimension that of the scores, or 1
    heads: int
    rows: int
    columns: int
    lengths: tuple[int, int]  # Sq, Sk
    bounds: tuple[int | None, int | None]  # query i sees keys i + lower … i + upper
    kv_lengths: Tensor | None  # (B,), contiguous


@triton.jit
def tile_range(
    first, sequence, lower, upper, OF_KEYS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """(begin, whole, full, end) of the columns, for so many rows."""
    if OF_KEYS:
        return query_range(first, sequence, lower, upper, None, COLS, ROWS)
    return key_range(first, sequence, lower, upper, None, ROWS, COLS)


@triton.jit(do_not_specialize=UNSPECIALISED)
def shown_kernel(
    rules,  # of attention_scores.py
    parts,  # int8 (B, H, tiles of rows, tiles of columns): 0 hidden, 1 shown in part, 2 in full
    kv_lengths,  # int32 or int64 (B,), or None
    heads,  # H
    rows,  # tiles
    columns,
    seq_q,
    seq_k,
    lower,
    upper,
    OF_KEYS: tl.constexpr,  # rows are keys and columns queries
    ROWS: tl.constexpr,  # of a tile
    COLS: tl.constexpr,
    WALK: tl.constexpr,  # tiles of a program
):
    walks = tl.cdiv(columns, WALK)
    of_row, walk = tl.program_id(0) // walks, tl.program_id(0) % walks
    flat, index = of_row // rows, of_row % rows
    batch, head = flat // heads, flat % heads
    sequence = sequence_of(index, batch, seq_q, seq_k, kv_lengths)
    first = index * ROWS
    begin, whole, full, end = tile_range(first, sequence, lower, upper, OF_KEYS, ROWS, COLS)
    row = first + tl.arange(0, ROWS)
    at = parts + of_row.to(tl.int64) * columns
    past = tl.minimum(end, (walk + 1) * WALK * COLS)
    for start in tl.range(tl.maximum(begin, walk * WALK * COLS), past, COLS):
        column = start + tl.arange(0, COLS)
        if OF_KEYS:
            seen = shown(rules, batch, head, sequence, column[None, :], row[:, None])
            missing = row >= seq_k
        else:
            seen = shown(rules, batch, head, sequence, row[:, None], column[None, :])
            missing = row >= seq_q
        some = tl.max(tl.max(seen.to(tl.int32), 1), 0)
        # What a row that does not exist sees is not stored.
        every = tl.min(tl.min((seen | missing[:, None]).to(tl.int32), 1), 0)
        in_full = (every != 0) & (start >= whole) & (start < full)
        tl.store(at + start // COLS, (some + in_full.to(tl.int32)).to(tl.int8))


@triton.jit(do_not_specialize=UNSPECIALISED)
def list_kernel(
    parts,  # int8 (B, H, tiles of rows, tiles of columns): from shown_kernel
    lists,  # int32 (B, H, tiles of rows, 2 + tiles of columns): of `listed`
    kv_lengths,
    heads,
    rows,
    columns,
    seq_q,
    seq_k,
    lower,
    upper,
    OF_KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    of_row = tl.program_id(0)
    flat, index = of_row // rows, of_row % rows
    sequence = sequence_of(index, flat // heads, seq_q, seq_k, kv_lengths)
    begin, _, _, end = tile_range(index * ROWS, sequence, lower, upper, OF_KEYS, ROWS, COLS)
    at, to = parts + of_row.to(tl.int64) * columns, lists + of_row.to(tl.int64) * (2 + columns)
    count = 0
    for wanted in tl.static_range(1, 3):
        for start in tl.range(begin // COLS, tl.cdiv(end, COLS), BLOCK):
            tile = start + tl.arange(0, BLOCK)
            inside = tile < tl.cdiv(end, COLS)
            found = (tl.load(at + tile, mask=inside, other=0) == wanted).to(tl.int32)
            place = count + tl.cumsum(found, 0)
            tl.store(to + 1 + place, tile, mask=found != 0)
            count += tl.sum(found, 0)
        tl.store(to + wanted - 1, count)


@triton.jit
def listed(lists, batch, head, index):
    """(list, partial, all): the numbers of the tiles that the rows of tile `index` see; the first
    `partial` of them not in full."""
    of_head = matrix(lists, batch, head)
    row = of_head.data + index.to(tl.int64) * of_head.row
    return row + 2, tl.load(row), tl.load(row + 1)


WALK = 4  # tiles of a program that looks through the masks


def shown_tiles(
    rules: Rules, sides: Sides, *, of_keys: bool = False
) -> Callable[[Launches, Tile], View]:
    """Of a tile the lists of what the masks show the programs of a kernel, for `Launches.tuned`.

    Those have queries of their own, or `of_keys` keys. Each list is a row of an int32 `View` that
    `listed` reads.
    """

    def make(launches: Launches, tile: Tile) -> View:
        height, width = tile["BLOCK_M"], tile["BLOCK_N"]
        length, walked = sides.lengths
        rows = sides.rows
        if of_keys:
            height, width, length, walked, rows = width, height, walked, length, sides.columns
        batch, bounds = sides.batch, (*sides.bounds, sides.kv_lengths)
        if any(x is not None for x in bounds):  # which are not the same for all rows
            rows = length
        if sides.kv_lengths is not None:
            batch = sides.kv_lengths.shape[0]
        rows, columns = triton.cdiv(rows, height), triton.cdiv(walked, width)
        parts = launches.empty((batch, sides.heads, rows, columns), torch.int8)
        lists = launches.empty((batch, sides.heads, rows, 2 + columns), torch.int32)
        about = (sides.kv_lengths, sides.heads, rows, columns, *sides.lengths, *sides.bounds)
        constants = {"OF_KEYS": of_keys, "ROWS": height, "COLS": width, "num_warps": 8}
        programs = batch * sides.heads * rows
        launches.launch(
            shown_kernel, (programs * triton.cdiv(columns, WALK),), rules, parts, *about,
            WALK=WALK, **constants,
        )  # fmt: skip
        launches.launch(list_kernel, (programs,), parts, lists, *about, BLOCK=256, **constants)
        return broadcast_view(lists)

    return make
