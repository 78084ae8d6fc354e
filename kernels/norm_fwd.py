r"""Layer norm and RMS norm, forward, with dropout and a residual in front.

    x, residual, z, out (rows, width)   weight, bias (width,)   mean, rstd (rows,), fp32

    z = dropout(x) + residual, rounded to the dtype of z: what is returned is what is normalised
    n = (z − mean) · rstd,    rstd = 1 / √(mean of (z − mean)² + eps),    mean = 0 for RMS
    out = n · (weight_offset + weight) + bias

One program takes ROWS rows. The mean of a whole row is corrected by the mean of what is
left after it was subtracted, so that |mean| ≫ σ costs no more than the rounding of the mean. Rows
wider than a block pass twice: every lane collects the mean and the squares of its own columns
(Welford 1962), which are combined at the end (Chan et al. 1979), without a barrier on the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .common import device_of
from .dropout import NO_DROPOUT, dropout_of
from .plans import Launches, planned
from .rowwise import (
    at,
    dropout,
    load_weight,
    matrix_of,
    registers,
    store,
    tile_of,
)

if TYPE_CHECKING:
    from fusedattn.ops.norm_config import NormCall

# --- kernel --------------------------------------------------------------------------------------


@triton.jit
def normalised_input(
    x, residual, seed, z, row, first, inside, limit, keep_scale, BLOCK: tl.constexpr
):
    """A tile of z, 0 where it is not inside; stored where z is not x."""
    col = first + tl.arange(0, BLOCK)
    value = tl.load(at(x, row, col), mask=inside, other=0.0).to(tl.float32)
    if seed is not None:
        value = dropout(value, seed, row, first, limit, keep_scale, BLOCK)
    if residual is not None:
        value += tl.load(at(residual, row, col), mask=inside, other=0.0).to(tl.float32)
    if z is not None:
        value = value.to(z.data.dtype.element_ty)
        tl.store(at(z, row, col), value, mask=inside)
    return value.to(tl.float32)


@triton.jit
def moments(value, inside, width, EVEN: tl.constexpr):
    """Mean and variance of whole rows."""
    mean = tl.sum(value, 1) / width
    left = value - mean[:, None]
    if not EVEN:
        left = tl.where(inside, left, 0.0)
    shift = tl.sum(left, 1) / width
    variance = tl.sum(left * left, 1) / width - shift * shift
    return mean + shift, tl.maximum(variance, 0.0)


@triton.jit
def combined(lane_mean, squares, count, width):
    """Mean and variance of rows from those of their lanes, each of `count` elements."""
    mean = tl.sum(lane_mean * count, 1) / width
    left = lane_mean - mean[:, None]
    shift = tl.sum(left * count, 1) / width
    variance = tl.sum(squares + left * left * count, 1) / width - shift * shift
    return mean + shift, tl.maximum(variance, 0.0)


@triton.jit
def scaled(value, weight, bias, col, width, weight_offset):
    """value · (weight_offset + weight) + bias."""
    if weight is not None:
        value = value * load_weight(weight, col, width, weight_offset)
    if bias is not None:
        value += tl.load(bias + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit(do_not_specialize=["rows", "limit"])
def forward_kernel(
    x,  # Matrix (rows, width)
    residual,  # Matrix, or None
    weight,  # (width,), or None
    bias,  # (width,), or None
    seed,  # int64 (1,), or None
    out,  # Matrix
    z,  # Matrix, or None where it is x
    mean,  # fp32 (rows,), None for RMS
    rstd,  # fp32 (rows,)
    eps,
    weight_offset,  # None for 0
    limit,
    keep_scale,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,  # the row fills the block
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    exists = (row < rows)[:, None]
    if seed is not None:
        seed = tl.load(seed)
    if WHOLE:
        inside = exists if EVEN else exists & (col < width)[None, :]
        value = normalised_input(x, residual, seed, z, row, 0, inside, limit, keep_scale, BLOCK)
        if mean is not None:
            row_mean, variance = moments(value, inside, width, EVEN)
        else:
            variance = tl.sum(value * value, 1) / width
    else:
        lane_mean = tl.zeros([ROWS, BLOCK], tl.float32)
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for first in tl.range(0, width, BLOCK, num_stages=2):
            inside = exists & (first + col < width)[None, :]
            value = normalised_input(
                x, residual, seed, z, row, first, inside, limit, keep_scale, BLOCK
            )
            if mean is not None:
                step = tl.where(inside, value - lane_mean, 0.0)
                lane_mean += step * (1.0 / (first // BLOCK + 1))
                squares += step * (value - lane_mean)
            else:
                squares += value * value
        if mean is not None:
            count = tl.cdiv(width - col, BLOCK).to(tl.float32)[None, :]
            row_mean, variance = combined(lane_mean, squares, count, width)
        else:
            variance = tl.sum(squares, 1) / width
    if mean is not None:
        tl.store(mean + row, row_mean, mask=row < rows)
    row_rstd = 1.0 / tl.sqrt_rn(variance + eps)
    tl.store(rstd + row, row_rstd, mask=row < rows)

    if WHOLE:
        if mean is not None:
            value = value - row_mean[:, None]
        value = scaled(value * row_rstd[:, None], weight, bias, col, width, weight_offset)
        store(out, row, col, value, inside)
    else:
        tl.debug_barrier()  # z was written by other threads of this program
        for first in tl.range(0, width, BLOCK, num_stages=2):
            inside = exists & (first + col < width)[None, :]
            source = at(x if z is None else z, row, first + col)
            value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
            if mean is not None:
                value = value - row_mean[:, None]
            value = value * row_rstd[:, None]
            value = scaled(value, weight, bias, first + col, width, weight_offset)
            store(out, row, first + col, value, inside)


# --- launcher ------------------------------------------------------------------------------------


@planned()
def norm_forward(
    launches: Launches,
    call: NormCall,
    out: Tensor,
    z: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    """Write `out` and, where not None, `z`, `mean` (None for RMS) and `rstd`.

    Matrices have unit column stride and any row stride, and may each have their own dtype; mean
    and rstd are fp32. z is None only where it is x: no residual, no dropout.
    """
    x, residual, weight, bias, seed = call[:5]
    config = call.config
    rows, width = x.shape
    if rstd is None:  # the kernel tells the two norms apart by their statistics
        rstd = launches.empty((rows,))
        mean = launches.empty((rows,)) if config.centre else None
    tile = tile_of(rows, width, per_thread=32, most=16384)
    drop = dropout_of(config.dropout_p)
    device = device_of(x)
    # Three programs of eight warps on a processor; Blackwell's code spills there.
    most_registers = 80 if device.arch < 100 else 96
    launches.launch(
        forward_kernel, (triton.cdiv(rows, tile.rows),),
        matrix_of(x), matrix_of(residual), launches.vector(weight), launches.vector(bias),
        None if drop is None else launches.vector(seed), matrix_of(out), matrix_of(z), mean, rstd,
        config.eps, config.weight_offset or None, *(drop or NO_DROPOUT), rows, width,
        ROWS=tile.rows, BLOCK=tile.block, WHOLE=tile.whole, EVEN=tile.block == width,
        num_warps=tile.warps, **registers(device, most_registers),
    )  # fmt: skip
