"""Dropout as a function of a seed and an element's place: Philox-4x32-10 (Salmon et al. 2011).

The key is the seed, the counter (column // 4, and three numbers that say where the row is); of its
four words a column takes number column % 4, and is kept where that is above a limit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl

# --- device functions ----------------------------------------------------------------------------


@triton.jit
def kept(seed, limit, first, second, third, fourth, BLOCK: tl.constexpr):
    """Whether columns first … first + BLOCK are kept, (rows, BLOCK).

    first: a multiple of 4. limit: of a `Dropout`. second, third, fourth: of the counter, each
    (rows, 1) or one number. Four columns share a counter, one word each: interleaved, so that no
    word is made twice.
    """
    quad = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)[None, :]
    a, b, c, d = tl.philox(
        seed, quad, second.to(tl.uint32), third.to(tl.uint32), fourth.to(tl.uint32)
    )
    most = limit.to(tl.uint32)
    return tl.interleave(tl.interleave(a > most, c > most), tl.interleave(b > most, d > most))


# --- launching -----------------------------------------------------------------------------------


class Dropout(NamedTuple):
    """A word above `limit`, whose 32 bits stand in an int32, keeps its element, times `keep_scale`.

    An int32 whatever the probability is, since for an int64 a kernel would be compiled anew.
    """

    limit: int
    keep_scale: float


NO_DROPOUT = Dropout(0, 1.0)  # what a kernel gets that has no seed


def dropout_of(p: float) -> Dropout | None:
    """None where every element is kept as it is, if only because p is less than a word can tell."""
    limit = math.floor(p * 2**32) - 1
    if limit < 0:
        return None
    return Dropout(limit - (limit >> 31 << 32), 1.0 / (1.0 - p) if p < 1.0 else 0.0)
