r"""Layer norm and RMS norm, backward: the gradients of z, of x before it, of weight and bias.

    dout, dz, z, dx, dresidual (rows, width)   weight, dweight, dbias (width,)   mean, rstd (rows,)

With n = (z − mean) · rstd, d = dout and g = d · (weight_offset + weight),

    total = (g − mean of g − n · mean of (g · n)) · rstd + dz      (mean of g: 0 for RMS)
    dresidual = total, dx = dropout(total), dweight = Σ d · n, dbias = Σ d over rows

A fixed number of programs walks over all rows, and each keeps its part of dweight and dbias in
registers; a second kernel adds the parts, always in the same order. The longest rows that fit are
worked on as two blocks, which between them pad a width of 12288 by nothing, and in two passes, of
which the second begins from what was loaded: two numbers of 16 bits take one register. Rows longer
still get the two means from a kernel of their own; then programs take columns, of which they need
no sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_cuda

from .common import INTERPRETED, Device, block_width, device_of
from .dropout import NO_DROPOUT, dropout_of
from .plans import Launches, planned
from .rowwise import (
    MOST_WARPS,
    Tile,
    at,
    dropout,
    matrix_of,
    registers,
    store,
    tile_of,
)

if TYPE_CHECKING:
    from fusedattn.ops.norm_config import NormBackwardCall

# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def load_rows(x, row, col, rows, width):
    """A tile as it is stored, 0 outside; None of None."""
    inside = (row < rows)[:, None] & (col < width)[None, :]
    return None if x is None else tl.load(at(x, row, col), mask=inside, other=0.0)


@triton.jit
def load_columns(weight, col, width):
    """Weights as they are stored; None of None."""
    return None if weight is None else tl.load(weight + col, mask=col < width, other=0.0)


@triton.jit
def anew(x, zero):
    """`x` where `zero`, an int32, is 0, as it is, which no compiler knows; None: `x` itself.

    So what follows from 16-bit numbers is computed again, and not kept in twice the registers.
    """
    if zero is not None and is_cuda() and not INTERPRETED:  # noqa: SIM102
        if x.dtype.primitive_bitwidth == 16:
            other = tl.zeros_like(x).to(tl.int16, bitcast=True) + zero.to(tl.int16)
            x = tl.inline_asm_elementwise(
                "xor.b32 $0, $1, $2;", "=r,r,r", [x, other], dtype=x.dtype, is_pure=True, pack=2
            )
    return x


@triton.jit
def gradients(dout, z, weight, weight_offset, mean, rstd, row, rows, zero, weight_zero):
    """Tiles of d, g and n (see the top), from those of dout and z; d and g are 0 outside."""
    value = anew(z, zero).to(tl.float32)
    if mean is not None:
        value = value - tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
    value = value * tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
    d = tl.zeros_like(value) if dout is None else anew(dout, zero).to(tl.float32)
    g = d
    if weight is not None:
        w = anew(weight, weight_zero).to(tl.float32)
        if weight_offset is not None:
            w += weight_offset
        g = d * w[None, :]
    return d, g, value


@triton.jit(do_not_specialize=["rows"])
def means_kernel(
    dout,
    z,
    weight,
    mean,
    rstd,
    means,  # fp32 (2, rows): of g · n, and of g (not written for RMS)
    weight_offset,  # None for 0
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
        w = load_columns(weight, first + col, width)
        z_tile = load_rows(z, row, first + col, rows, width)
        dout_tile = load_rows(dout, row, first + col, rows, width)
        _, g, n = gradients(dout_tile, z_tile, w, weight_offset, mean, rstd, row, rows, None, None)
        slope += g * n
        level += g
    tl.store(means + row, tl.sum(slope, 1) / width, mask=row < rows)
    if mean is not None:
        tl.store(means + rows + row, tl.sum(level, 1) / width, mask=row < rows)


@triton.jit
def write_gradients(
    dz, dx, dresidual, g, n, slope, level, rstd, seed, limit, keep_scale,
    row, first, rows, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """dresidual and dx of BLOCK columns from `first` on; `level` is None for RMS."""
    col = first + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    total = g - n * slope[:, None]
    if level is not None:
        total = total - level[:, None]
    total = total * tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
    if dz is not None:
        total += tl.load(at(dz, row, col), mask=inside, other=0.0).to(tl.float32)
    if dresidual is not None:
        store(dresidual, row, col, total, inside)
    if seed is not None:
        total = dropout(total, seed, row, first, limit, keep_scale, BLOCK)
    store(dx, row, col, total, inside)


@triton.jit
def write_part(parts, part, col, width, sums):
    """A program's sums over its rows."""
    tl.store(parts + part.to(tl.int64) * width + col, tl.sum(sums, 0), mask=col < width)


@triton.jit(do_not_specialize=["rows", "limit", "columns"])
def backward_kernel(
    dout,  # Matrix (rows, width), or None: zero
    dz,  # Matrix, or None: zero
    z,  # Matrix
    weight,  # (width,), or None
    mean,  # fp32 (rows,), None for RMS
    rstd,  # fp32 (rows,)
    seed,  # int64 (1,), or None
    means,  # fp32 (2, rows) of means_kernel; None where a program has whole rows
    dx,  # Matrix
    dresidual,  # Matrix, or None
    dweight,  # fp32 (parts, width), or None
    dbias,  # fp32 (parts, width), or None
    weight_offset,  # None for 0
    limit,
    keep_scale,
    rows,
    width,
    columns,  # blocks of a row; 1 for whole rows
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,  # columns of a whole row after BLOCK, or 0
    STAGES: tl.constexpr,
):
    part = tl.program_id(0) // columns
    first = tl.program_id(0) % columns * BLOCK
    col = first + tl.arange(0, BLOCK)
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    w = load_columns(weight, col, width)
    if REST:
        rest = BLOCK + tl.arange(0, REST)
        rest_weight_sum = tl.zeros([ROWS, REST], tl.float32)
        rest_bias_sum = tl.zeros([ROWS, REST], tl.float32)
        rest_w = load_columns(weight, rest, width)
    # The second pass over two blocks begins from what was loaded; two sums of 16384 leave no room
    # for that either.
    AGAIN: tl.constexpr = REST > 0 and (dbias is None or REST < BLOCK)
    parts = tl.num_programs(0) // columns
    tiles = tl.cdiv(rows, ROWS)
    if seed is not None:
        seed = tl.load(seed)
    for tile in tl.range(part, tiles, parts, num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        z_tile = load_rows(z, row, col, rows, width)
        dout_tile = load_rows(dout, row, col, rows, width)
        zero = tile >> 31 if AGAIN else None
        if REST:
            rest_z = load_rows(z, row, rest, rows, width)
            rest_dout = load_rows(dout, row, rest, rows, width)
        d, g, n = gradients(dout_tile, z_tile, w, weight_offset, mean, rstd, row, rows, None, zero)
        if means is None:
            slope = tl.sum(g * n, 1)
            level = tl.sum(g, 1)
            if REST:
                rest_d, rest_g, rest_n = gradients(
                    rest_dout, rest_z, rest_w, weight_offset, mean, rstd, row, rows, None, zero
                )
                slope += tl.sum(rest_g * rest_n, 1)
                level += tl.sum(rest_g, 1)
            slope = slope / width
            level = level / width
        else:
            slope = tl.load(means + row, mask=row < rows, other=0.0)
            level = slope
            if mean is not None:
                level = tl.load(means + rows + row, mask=row < rows, other=0.0)
        if mean is None:
            level = None
        if dweight is not None:
            weight_sum += d * n
        if dbias is not None:
            bias_sum += d
        if REST:
            if dweight is not None:
                rest_weight_sum += rest_d * rest_n
            if dbias is not None:
                rest_bias_sum += rest_d
        if AGAIN:
            later = tl.sum((slope != slope).to(tl.int32), 0)  # of a row that becomes NaN 1
            _, g, n = gradients(
                dout_tile, z_tile, w, weight_offset, mean, rstd, row, rows, later, later
            )
        write_gradients(
            dz, dx, dresidual, g, n, slope, level, rstd, seed, limit, keep_scale,
            row, first, rows, width, BLOCK,
        )  # fmt: skip
        if AGAIN:
            _, rest_g, rest_n = gradients(
                rest_dout, rest_z, rest_w, weight_offset, mean, rstd, row, rows, later, later
            )
        if REST:
            write_gradients(
                dz, dx, dresidual, rest_g, rest_n, slope, level, rstd, seed, limit, keep_scale,
                row, BLOCK, rows, width, REST,
            )  # fmt: skip
    if dweight is not None:
        write_part(dweight, part, col, width, weight_sum)
    if dbias is not None:
        write_part(dbias, part, col, width, bias_sum)
    if REST:
        if dweight is not None:
            write_part(dweight, part, rest, width, rest_weight_sum)
        if dbias is not None:
            write_part(dbias, part, rest, width, rest_bias_sum)


@triton.jit
def sum_of_parts(parts, out, col, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        pointers = parts + row.to(tl.int64)[:, None] * width + col[None, :]
        inside = (row < count)[:, None] & (col < width)[None, :]
        total += tl.load(pointers, mask=inside, other=0.0)
    tl.store(out + col, tl.sum(total, 0).to(out.dtype.element_ty), mask=col < width)


@triton.jit(do_not_specialize=["count"])
def parts_kernel(
    weight_parts,  # fp32 (count, width), or None
    bias_parts,  # fp32 (count, width), or None
    dweight,  # (width,), or None
    dbias,  # (width,), or None
    count,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if dweight is not None:
        sum_of_parts(weight_parts, dweight, col, count, width, ROWS, BLOCK)
    if dbias is not None:
        sum_of_parts(bias_parts, dbias, col, count, width, ROWS, BLOCK)


# --- launcher ------------------------------------------------------------------------------------

MOST_AT_ONCE = 8192  # columns; a thread's registers do not hold twice as many


def _blocks(tile: Tile, width: int) -> tuple[int, int]:
    """BLOCK and REST of the kernel."""
    if not tile.whole or tile.block <= MOST_AT_ONCE:
        return tile.block, 0
    return MOST_AT_ONCE, block_width(width - MOST_AT_ONCE)


def _stages(elements: int, device: Device, *read: Tensor | None) -> int:
    """2 where so many more of each tensor fit into shared memory while these are worked on."""
    size = sum(x.element_size() for x in read if x is not None)
    return 2 if elements * size <= device.shared - 4096 else 1


def _parts(rows: int, columns: int, tile: Tile, device: Device) -> int:
    """Into how many parts the rows are split, where a program sums over all rows of its part.

    As many programs as run at once: each writes a part of the sums, as wide as a row in fp32.
    """
    programs = device.processors * (MOST_WARPS // tile.warps)
    return max(1, min(programs // columns, triton.cdiv(rows, tile.rows)))


def _add_parts(
    launches: Launches,
    weight_parts: Tensor | None,
    bias_parts: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    device: Device,
) -> None:
    """Sums over the first dimension of (parts, width); both of each pair are None or neither."""
    given = bias_parts if weight_parts is None else weight_parts
    if given is None:
        return
    count, width = given.shape
    # 32 columns are a line of memory; more only where that still keeps every processor busy.
    block = min(1024, max(32, triton.next_power_of_2(width // (2 * device.processors))))
    launches.launch(
        parts_kernel, (triton.cdiv(width, block),), weight_parts, bias_parts, dweight, dbias,
        count, width, ROWS=2048 // block, BLOCK=block, num_warps=8,
    )  # fmt: skip


@planned()
def norm_backward(
    launches: Launches,
    call: NormBackwardCall,
    dx: Tensor,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """Write `dx` and, where not None, `dresidual`, `dweight` and `dbias`; no atomics."""
    dout, dz, z, weight, mean, rstd, seed = call[:7]
    config = call.config
    rows, width = z.shape
    device = device_of(z)
    tile = tile_of(rows, width, per_thread=16, most=16384)
    drop = dropout_of(config.dropout_p)
    tensors = {
        "dout": matrix_of(dout),
        "z": matrix_of(z),
        "weight": launches.vector(weight),
        "mean": launches.vector(mean),
        "rstd": launches.vector(rstd),
    }
    sizes = {"weight_offset": config.weight_offset or None, "rows": rows, "width": width}
    means = None
    if not tile.whole:
        means = launches.empty((2, rows))
        launches.launch(
            means_kernel, (triton.cdiv(rows, tile.rows),), means=means, **tensors, **sizes,
            ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps,
        )  # fmt: skip
    block, rest = _blocks(tile, width)
    columns = 1 if rest else triton.cdiv(width, block)
    stages = _stages(tile.rows * (block + rest), device, z, dout, dz)
    parts = _parts(rows, columns, tile, device)
    wanted = [x is not None for x in (dweight, dbias)]
    memory = iter(launches.empties(sum(wanted), (parts, width)) if any(wanted) else ())
    sums = [next(memory) if x else None for x in wanted]
    limit, keep_scale = drop or NO_DROPOUT
    launches.launch(
        backward_kernel, (parts * columns,), dz=matrix_of(dz), means=means,
        seed=None if drop is None else launches.vector(seed), dx=matrix_of(dx),
        dresidual=matrix_of(dresidual), dweight=sums[0], dbias=sums[1], limit=limit,
        keep_scale=keep_scale, columns=columns, **tensors, **sizes,
        ROWS=tile.rows, BLOCK=block, REST=rest, STAGES=stages, num_warps=tile.warps,
        **registers(device, 128),
    )  # fmt: skip
    _add_parts(launches, *sums, dweight, dbias, device)
