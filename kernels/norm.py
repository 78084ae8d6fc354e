r"""Layer norm and RMS norm, with dropout and a residual in front.

    x, residual, z, out, dout, dz, dx, dresidual (rows, width)   weight, bias (width,)

    z = dropout(x) + residual, rounded to the dtype of z: what is returned is what is normalised
    n = (z − mean) · rstd,    rstd = 1 / √(mean of (z − mean)² + eps),    mean = 0 for RMS
    out = n · (weight_offset + weight) + bias

Forward. One program takes ROWS rows. The mean of a whole row is corrected by the mean of what is
left after it was subtracted, so that |mean| ≫ σ costs no more than the rounding of the mean. Rows
wider than a block pass twice: every lane collects the mean and the squares of its own columns
(Welford 1962), which are combined at the end (Chan et al. 1979), without a barrier on the way.

Backward. With d = dout and g = d · (weight_offset + weight),

    total = (g − mean of g − n · mean of (g · n)) · rstd + dz      (mean of g: 0 for RMS)
    dresidual = total, dx = dropout(total), dweight = Σ d · n, dbias = Σ d over rows

A fixed number of programs walks over all rows, and each keeps its part of dweight and dbias in
registers; a second kernel adds the parts, always in the same order. Rows wider than a block get
the two means from a kernel of their own; then programs take columns, of which they need no sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Matrix, device_of
from .rowwise import NO_DROPOUT, add_parts, at, dropout, dropout_of, parts_of, store, tile_of

if TYPE_CHECKING:
    from fusedattn.ops.norm_config import NormConfig

# --- forward kernel ------------------------------------------------------------------------------


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
def combine(mean, squares, count, width):
    """Mean and variance of rows from those of their lanes, each of `count` elements."""
    row_mean = tl.sum(mean * count, 1) / width
    left = mean - row_mean[:, None]
    shift = tl.sum(left * count, 1) / width
    variance = tl.sum(squares + left * left * count, 1) / width - shift * shift
    return row_mean + shift, tl.maximum(variance, 0.0)


@triton.jit
def scaled(value, weight, bias, col, width, weight_offset):
    """value · (weight_offset + weight) + bias."""
    if weight is not None:
        w = tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32)
        value = value * (weight_offset + w)[None, :]
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
    weight_offset,
    limit,
    keep_scale,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    exists = (row < rows)[:, None]
    if WHOLE:
        inside = exists & (col < width)[None, :]
        value = normalised_input(
            x, residual, seed, z, row, 0, inside, limit, keep_scale, BLOCK
        )
        lane_mean, squares, count = value, tl.zeros_like(value), inside.to(tl.float32)
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
        count = tl.cdiv(width - col, BLOCK).to(tl.float32)[None, :]
    if mean is not None:
        row_mean, variance = combine(lane_mean, squares, count, width)
        tl.store(mean + row, row_mean, mask=row < rows)
    elif WHOLE:
        variance = tl.sum(value * value, 1) / width
    else:
        variance = tl.sum(squares, 1) / width
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


# --- backward kernels ----------------------------------------------------------------------------


@triton.jit
def gradients(
    dout, z, weight, mean, rstd, row, col, rows, width, weight_offset, EVICTION: tl.constexpr
):
    """Tiles of d, g and n (see the top), 0 outside."""
    inside = (row < rows)[:, None] & (col < width)[None, :]
    value = tl.load(at(z, row, col), mask=inside, other=0.0, eviction_policy=EVICTION)
    value = value.to(tl.float32)
    if mean is not None:
        value = value - tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
    value = value * tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
    if dout is None:
        d = tl.zeros_like(value)
    else:
        d = tl.load(at(dout, row, col), mask=inside, other=0.0, eviction_policy=EVICTION)
        d = d.to(tl.float32)
    return d, scaled(d, weight, None, col, width, weight_offset), value


@triton.jit(do_not_specialize=["rows"])
def means_kernel(
    dout,
    z,
    weight,
    mean,
    rstd,
    means,  # fp32 (2, rows): of g · n, and of g (not written for RMS)
    weight_offset,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    slope = tl.zeros([ROWS, BLOCK], tl.float32)
    level = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(0, width, BLOCK, num_stages=2):
        _, g, n = gradients(
            dout, z, weight, mean, rstd, row, first + col, rows, width, weight_offset, "evict_last"
        )
        slope += g * n
        level += g
    tl.store(means + row, tl.sum(slope, 1) / width, mask=row < rows)
    if mean is not None:
        tl.store(means + rows + row, tl.sum(level, 1) / width, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "limit", "columns"])
def backward_kernel(
    dout,  # Matrix (rows, width), or None: zero
    dz,  # Matrix, or None: zero
    z,  # Matrix
    weight,  # (width,), or None
    mean,  # fp32 (rows,), None for RMS
    rstd,  # fp32 (rows,)
    seed,  # int64 (1,), or None
    means,  # fp32 (2, rows) of means_kernel; None where a block is a whole row
    dx,  # Matrix
    dresidual,  # Matrix, or None
    dweight,  # fp32 (parts, width), or None
    dbias,  # fp32 (parts, width), or None
    weight_offset,
    limit,
    keep_scale,
    rows,
    width,
    columns,  # blocks of a row
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    RELOAD: tl.constexpr,  # too much to keep: read it again, from L1
    STAGES: tl.constexpr,
):
    part = tl.program_id(0) // columns
    first = tl.program_id(0) % columns * BLOCK
    col = first + tl.arange(0, BLOCK)
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    parts = tl.num_programs(0) // columns
    tiles = tl.cdiv(rows, ROWS)
    for tile in tl.range(part, tiles, parts, num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < width)[None, :]
        d, g, n = gradients(
            dout, z, weight, mean, rstd, row, col, rows, width, weight_offset, "evict_last"
        )
        if means is None:
            slope = tl.sum(g * n, 1) / width
            level = tl.sum(g, 1) / width
        else:
            slope = tl.load(means + row, mask=row < rows, other=0.0)
            level = slope
            if mean is not None:
                level = tl.load(means + rows + row, mask=row < rows, other=0.0)
        if RELOAD:
            d, g, n = gradients(
                dout, z, weight, mean, rstd, row, col, rows, width, weight_offset, "evict_first"
            )
        if dweight is not None:
            weight_sum += d * n
        if dbias is not None:
            bias_sum += d
        total = g - n * slope[:, None]
        if mean is not None:
            total = total - level[:, None]
        total = total * tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        if dz is not None:
            total += tl.load(at(dz, row, col), mask=inside, other=0.0).to(tl.float32)
        if dresidual is not None:
            store(dresidual, row, col, total, inside)
        if seed is not None:
            total = dropout(total, seed, row, first, limit, keep_scale, BLOCK)
        store(dx, row, col, total, inside)
    place = part.to(tl.int64) * width + col
    if dweight is not None:
        tl.store(dweight + place, tl.sum(weight_sum, 0), mask=col < width)
    if dbias is not None:
        tl.store(dbias + place, tl.sum(bias_sum, 0), mask=col < width)


# --- launchers -----------------------------------------------------------------------------------


def _matrix(x: Tensor | None) -> Matrix | None:
    return None if x is None else Matrix(x, x.stride(0), 1)


def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    z: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    config: NormConfig,
) -> None:
    """Write `out`, `z` (where not None), `mean` (None for RMS) and `rstd`.

    Matrices have unit column stride and any row stride, and may each have their own dtype; mean
    and rstd are fp32. z is None only where it is x: no residual, no dropout.
    """
    rows, width = x.shape
    tile = tile_of(rows, width, per_thread=32, most=16384)
    drop = dropout_of(config.dropout_p)
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(rows, tile.rows),)](
            _matrix(x), _matrix(residual), weight, bias, None if drop is None else seed,
            _matrix(out), _matrix(z), mean, rstd, config.eps, config.weight_offset,
            *(drop or NO_DROPOUT), rows, width,
            ROWS=tile.rows, BLOCK=tile.block, WHOLE=tile.whole, num_warps=tile.warps,
        )  # fmt: skip


def norm_backward(
    dout: Tensor | None,
    dz: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    dx: Tensor,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    config: NormConfig,
) -> None:
    """Write `dx` and, where not None, `dresidual`, `dweight` and `dbias`; no atomics."""
    rows, width = z.shape
    device = device_of(z)
    tile = tile_of(rows, width, per_thread=16, most=16384)
    drop = dropout_of(config.dropout_p)
    tensors = {"dout": _matrix(dout), "z": _matrix(z), "weight": weight, "mean": mean, "rstd": rstd}
    sizes = {"weight_offset": config.weight_offset, "rows": rows, "width": width}
    with torch.cuda.device_of(z):
        means = None
        if not tile.whole:
            means = rstd.new_empty(2, rows)
            means_kernel[(triton.cdiv(rows, tile.rows),)](
                means=means, **tensors, **sizes,
                ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps,
            )  # fmt: skip
        columns = triton.cdiv(width, tile.block)
        parts = parts_of(rows, columns, tile, device)
        sums = [x if x is None else rstd.new_empty(parts, width) for x in (dweight, dbias)]
        limit, keep_scale = drop or NO_DROPOUT
        backward_kernel[(parts * columns,)](
            dz=_matrix(dz), seed=None if drop is None else seed, means=means, dx=_matrix(dx),
            dresidual=_matrix(dresidual), dweight=sums[0], dbias=sums[1], limit=limit,
            keep_scale=keep_scale, columns=columns, **tensors, **sizes,
            ROWS=tile.rows, BLOCK=tile.block, RELOAD=tile.whole and tile.block > 8192, STAGES=2,
            num_warps=tile.warps,
        )  # fmt: skip
        add_parts(*sums, dweight, dbias, device)
