"""The position of each row, for the kernels that encode it: rotary and sinusoidal.

position[b, s] = (positions[b, s], or s where there are none) + offset
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .common import with_data


class Sheets(NamedTuple):
    """A 3-D tensor as a kernel sees it: sheets of rows and columns."""

    data: Any
    sheet: Any
    row: Any
    col: Any


class Positions(NamedTuple):
    """`data` int (B, S) or None; `offset` int (1,), or None where it is a number."""

    data: Any
    batch: Any
    row: Any
    offset: Any


def sheets(x: Tensor) -> Sheets:
    """A 3-D tensor; a 2-D one, or one whose first dimension is 1, is read again and again."""
    *sheet, row, col = x.stride()
    return Sheets(with_data(x), sheet[0] if sheet and x.shape[0] != 1 else 0, row, col)


def positions_view(positions: Tensor | None, offset: Tensor | None) -> Positions:
    """positions (1 or B, S), or None where each row's number is its position."""
    offset = None if offset is None else with_data(offset)  # of one element
    if positions is None:
        return Positions(None, None, None, offset)
    batch, row = positions.stride()
    return Positions(with_data(positions), 0 if positions.shape[0] == 1 else batch, row, offset)


@triton.jit
def load_positions(positions, start, batch, row, rows):
    """int64 positions of a vector of rows; any number for a row at or after `rows`.

    `start` is the offset where it is a number, and a kernel argument of its own so that it is not
    compiled for.
    """
    start = tl.cast(start, tl.int64)
    if positions.offset is not None:
        start = tl.load(positions.offset).to(tl.int64)
    own = row.to(tl.int64)
    if positions.data is not None:
        pointers = positions.data + batch.to(tl.int64) * positions.batch + own * positions.row
        own = tl.load(pointers, mask=row < rows, other=0).to(tl.int64)
    return own + start
