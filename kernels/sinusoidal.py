r"""Sinusoidal positions added in one pass, without a table.

    out[b, s, 2i] = scale·x + sin(p / base^(2i/W)),  cos in the odd features          x (B, S, W)

p / base^(2i/W) radians are p·f turns with f = base^(−2i/W) / 2π. Only the fraction of a turn
matters, so f is held as a 64-bit fixed-point fraction (from one fp64 exp2 per pair of columns) and
p·f is an integer product that wraps around: exact, however large p is. What remains of it after
whole quarters, |t| ≤ 1/8 turn, becomes fp32, where two short polynomials give sin and cos to an
ulp; the quarters say which of them is which, and with what sign.

One program takes BLOCK_S rows and 2·PAIRS columns of several batch elements, which share their
encoding unless each has its own positions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FMA
from .positions import load_positions, positions_view, sheets

if TYPE_CHECKING:
    from fusedattn.ops.sinusoidal import SinusoidalCall

WARPS = 4
BYTES = 8 << 10  # of x in a program: four loads of 16 bytes per thread
BATCHES = 8  # that share an encoding in a program
WIDEST = 1024  # columns of a program


@triton.jit
def sincos(phase):
    """sin and cos of a phase in turns, an int64 fraction of 2⁶⁴, to an fp32 ulp.

    sin 2πt = 2πt + t·u(s0 + s1·u + s2·u²) and cos 2πt = 1 + u(c0 + …) with u = t², fitted at
    Chebyshev points over |t| ≤ 1/8; 2π is split in two so that its rounding does not count.
    """
    quarter = (phase + (1 << 61)) >> 62
    t = (phase - (quarter << 62)).to(tl.float32) * 2.0**-64
    u = t * t
    sin = tl.fma(u, -75.72653198242188, 81.59952545166016)
    sin = tl.fma(sin, u, -41.341697692871094)
    sin = tl.fma(sin, u, -1.7484555314695172e-07)
    sin = tl.fma(t, 6.2831854820251465, t * sin)
    cos = tl.fma(u, 59.424224853515625, -85.44882202148438)
    cos = tl.fma(cos, u, 64.93936920166016)
    cos = tl.fma(cos, u, -19.739208221435547)
    cos = tl.fma(cos, u, 1.0)
    quarter = quarter.to(tl.int32)
    odd = (quarter & 1) != 0
    turned_sin, turned_cos = tl.where(odd, cos, sin), tl.where(odd, sin, cos)
    turned_sin = tl.where((quarter & 2) != 0, -turned_sin, turned_sin)
    turned_cos = tl.where(((quarter + 1) & 2) != 0, -turned_cos, turned_cos)
    return turned_sin, turned_cos


@triton.jit
def frequencies(first, PAIRS: tl.constexpr, EXPONENT: tl.constexpr):
    """2⁶⁴·base^(−2i/W) / 2π for pairs i from `first` on, without whole turns.

    fp64 is slow on most GPUs: one exp2 serves four neighbours, each a constant factor apart.
    """
    pair = first + 4 * tl.arange(0, PAIRS // 4)
    turns = tl.exp2(pair.to(tl.float64) * tl.full([], EXPONENT, tl.float64))
    turns = turns * tl.full([], 0.15915494309189535, tl.float64)
    turns = tl.reshape(tl.join(turns, turns * tl.full([], 4.0**EXPONENT, tl.float64)), [PAIRS // 2])
    turns = tl.reshape(tl.join(turns, turns * tl.full([], 2.0**EXPONENT, tl.float64)), [PAIRS])
    if EXPONENT > 0:
        turns = turns - tl.floor(turns + 0.5)
    return (turns * 2.0**64).to(tl.int64)


@triton.jit(do_not_specialize=["start", "batches", "rows", "share"])
def sinusoidal_kernel(
    x,  # Sheets (B, S, W)
    positions,  # Positions (B, S)
    start,  # added to them, unless positions.offset is
    out,  # Sheets (B, S, W)
    scale,
    batches,  # B
    rows,  # S
    share,  # how many batch elements a program takes
    WIDTH: tl.constexpr,
    EXPONENT: tl.constexpr,  # −2·log₂(base) / W
    BLOCK_S: tl.constexpr,
    PAIRS: tl.constexpr,
):
    blocks: tl.constexpr = (WIDTH + 2 * PAIRS - 1) // (2 * PAIRS)
    program, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    tiles = tl.cdiv(rows, BLOCK_S)
    batch, tile = program // tiles * share, program % tiles
    row = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    col = (block * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)).to(tl.int64)
    col_inside = (col < WIDTH)[None, :]
    inside = (row < rows)[:, None] & col_inside
    wide_row = row.to(tl.int64)[:, None]
    source = x.data + wide_row * x.row + col[None, :] * x.col
    target = out.data + wide_row * out.row + col[None, :] * out.col
    # Always one batch element ahead: the first is on its way while the encoding is computed.
    values = tl.load(source + batch.to(tl.int64) * x.sheet, mask=inside)

    position = load_positions(positions, start, batch, row, rows)
    turns = frequencies(block * PAIRS, PAIRS, EXPONENT)
    sin, cos = sincos(position[:, None] * turns[None, :])
    encoding = tl.reshape(tl.join(sin, cos), [BLOCK_S, 2 * PAIRS])
    end = tl.minimum(batch + share, batches)
    for each in range(batch, end):
        following = tl.cast(each + 1, tl.int64)
        wanted = tl.where(following < end, rows, 0)
        ahead = tl.load(source + following * x.sheet, mask=(row < wanted)[:, None] & col_inside)
        values = tl.fma(values.to(tl.float32), scale, encoding).to(out.data.dtype.element_ty)
        tl.store(target + tl.cast(each, tl.int64) * out.sheet, values, mask=inside)
        values = ahead


# --- launcher ------------------------------------------------------------------------------------


def _power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << (n - 1).bit_length()


def _columns(width: int) -> int:
    """Columns of a program: a power of two that leaves few of the threads idle."""
    columns = max(8, min(_power_of_two(width), WIDEST))
    while columns > 128 and 8 * (-width % columns) > width:
        columns //= 2
    return columns


def sinusoidal_forward(call: SinusoidalCall, out: Tensor) -> None:
    """Write `out` (B, S, W) in the dtype of x; fp16, bf16 and fp32, any strides."""
    x, positions, start, config = call
    batches, rows, width = x.shape
    columns = _columns(width)
    block_s = min(_power_of_two(rows), BYTES // (x.element_size() * columns))
    own_positions = positions is not None and positions.shape[0] > 1
    share = 1 if own_positions else min(batches, BATCHES)
    programs = -(-batches // share) * -(-rows // block_s) * -(-width // columns)
    with torch.cuda.device_of(x):
        sinusoidal_kernel[(programs,)](
            sheets(x),
            positions_view(positions, start),
            config.offset,
            sheets(out),
            config.scale,
            batches,
            rows,
            share,
            WIDTH=width,
            EXPONENT=-2.0 * math.log2(config.base) / width,
            BLOCK_S=block_s,
            PAIRS=columns // 2,
            num_warps=WARPS,
            **FMA,
        )
