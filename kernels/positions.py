"""The position of each row, for the kernels that encode it: rotary and sinusoidal.

position[b, s] = (positions[b, s], or s where there are none) + offset
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Sheets(NamedTuple):
    """A 3-D tensor as a kernel sees it: sheets of rows and columns."""

    data: Any
    sheet: Any
    row: Any
    col: Any


class Positions(NamedTuple):
    """`data` int (B, S) or None; `offset` int (1,) or None, which replaces the number `start`."""

    data: Any
    batch: Any
    row: Any
    offset: Any
    start: Any


def sheets(x: Tensor) -> Sheets:
    """A 3-D tensor, read again and again along its first dimension where that is 1."""
    sheet, row, col = x.stride()
    return Sheets(x, 0 if x.shape[0] == 1 else sheet, row, col)


def positions_view(positions: Tensor | None, offset: Tensor | None, start: int) -> Positions:
    """What an op's options say about positions; positions (1 or B, S)."""
    if positions is None:
        return Positions(None, None, None, offset, start)
    batch, row = positions.stride()
    return Positions(positions, 0 if positions.shape[0] == 1 else batch, row, offset, start)


@triton.jit
def load_positions(positions, batch, row, rows):
    """int64 positions of a vector of rows; any number for a row at or after `rows`."""
    start = tl.cast(positions.start, tl.int64)
    if positions.offset is not None:
        start = tl.load(positions.offset).to(tl.int64)
    own = row.to(tl.int64)
    if positions.data is not None:
        pointers = positions.data + batch.to(tl.int64) * positions.batch + own * positions.row
        own = tl.load(pointers, mask=row < rows, other=0).to(tl.int64)
    return own + start
