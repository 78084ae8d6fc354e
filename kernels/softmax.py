r"""Softmax over the last dimension: out = softmax(s), s = scale · x + bias.

    x, out, dout, dx, ds (B, H, rows, width), any strides
    mask (bool), bias: (B, H, rows, width), each dimension full or 1

s is −inf where the mask is False or, if causal, right of the diagonal: row i sees the columns up to
i + diagonal. A row that sees nothing, or only −inf, is 0.

Forward. One program takes ROWS rows of one head. Rows wider than a block pass twice: every lane
keeps the maximum m of its own columns and the sum l of exp(s − m), which is scaled by
exp(m_old − m_new) when m grows (Milakov and Gimelshein 2018); the lanes are combined at the end,
without a barrier on the way. Columns that no row of a program sees are not read.

Backward. Only out is needed, not s:   ds = out · (dout − Σ dout · out),   dx = scale · ds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FMA, LOG2E, broadcast_view, load_pairs, matrix, view
from .rowwise import at, programs, row_views, store, tile_of, work_item

if TYPE_CHECKING:
    from fusedattn.ops.softmax_config import SoftmaxBackwardCall, SoftmaxCall, SoftmaxConfig

# --- shared by the kernels -----------------------------------------------------------------------


@triton.jit
def columns_seen(first, width, diagonal, CAUSAL: tl.constexpr, ROWS: tl.constexpr):
    """The columns before this one are read; a multiple of 16, so that loads stay 16 bytes wide."""
    end = width
    if CAUSAL:
        last = (first + ROWS + diagonal + 15) // 16 * 16
        end = tl.where(last < width, last, width)
    return end


@triton.jit
def hidden_right(s, i, j, diagonal, fill, CAUSAL: tl.constexpr):
    """`fill` right of the diagonal."""
    if CAUSAL:
        s = tl.where(j[None, :] <= (i + diagonal)[:, None], s, fill)
    return s


# --- forward kernel ------------------------------------------------------------------------------


@triton.jit
def scores(x, mask, bias, i, j, rows, end, diagonal, scale, CAUSAL: tl.constexpr):
    """s of rows i and columns j; −inf from `end` on and outside."""
    inside = (i < rows)[:, None] & (j < end)[None, :]
    s = tl.load(at(x, i, j), mask=inside, other=0.0).to(tl.float32) * scale
    if bias is not None:
        s += load_pairs(bias, i[:, None], j[None, :], rows, end).to(tl.float32)
    if mask is not None:
        inside = inside & (load_pairs(mask, i[:, None], j[None, :], rows, end) != 0)
    return hidden_right(tl.where(inside, s, float("-inf")), i, j, diagonal, float("-inf"), CAUSAL)


@triton.jit
def exp_from(s, m):
    """exp(s − m), and 0 where both are −inf: nothing was seen."""
    return tl.exp2((s - tl.where(m == float("-inf"), 0.0, m)) * LOG2E)


@triton.jit(do_not_specialize=["heads", "rows", "diagonal"])
def forward_kernel(
    x,  # View (B, H, rows, width)
    mask,  # View of bool, or None
    bias,  # View, or None
    out,  # View
    scale,
    heads,
    rows,
    width,
    diagonal,  # row i sees columns up to i + diagonal
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    batch, head, first = work_item(rows, heads, ROWS)
    x, out = matrix(x, batch, head), matrix(out, batch, head)
    if mask is not None:
        mask = matrix(mask, batch, head)
    if bias is not None:
        bias = matrix(bias, batch, head)
    i = first + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK)
    end = columns_seen(first, width, diagonal, CAUSAL, ROWS)
    exists = (i < rows)[:, None]
    if WHOLE:
        s = scores(x, mask, bias, i, j, rows, end, diagonal, scale, CAUSAL)
        p = exp_from(s, tl.max(s, 1)[:, None])
        total = tl.sum(p, 1)
        inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
        store(out, i, j, p * inverse[:, None], exists & (j < width)[None, :])
    else:
        m = tl.full([ROWS, BLOCK], float("-inf"), tl.float32)
        l = tl.zeros([ROWS, BLOCK], tl.float32)  # noqa: E741
        for start in tl.range(0, end, BLOCK, num_stages=2):
            s = scores(x, mask, bias, i, start + j, rows, end, diagonal, scale, CAUSAL)
            m_new = tl.maximum(m, s)
            l = l * exp_from(m, m_new) + exp_from(s, m_new)  # noqa: E741
            m = m_new
        highest = tl.max(m, 1)[:, None]
        total = tl.sum(l * exp_from(m, highest), 1)
        inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
        for start in tl.range(0, width, BLOCK, num_stages=2):
            s = scores(x, mask, bias, i, start + j, rows, end, diagonal, scale, CAUSAL)
            p = exp_from(s, highest) * inverse[:, None]
            store(out, i, start + j, p, exists & (start + j < width)[None, :])


# --- backward kernel -----------------------------------------------------------------------------


@triton.jit
def weighted(dout, out, i, j, rows, end, diagonal, CAUSAL: tl.constexpr):
    """out and dout of rows i and columns j; 0 where the row does not see the column."""
    inside = (i < rows)[:, None] & (j < end)[None, :]
    p = tl.load(at(out, i, j), mask=inside, other=0.0).to(tl.float32)
    d = tl.load(at(dout, i, j), mask=inside, other=0.0).to(tl.float32)
    return p, hidden_right(d, i, j, diagonal, 0.0, CAUSAL)


@triton.jit
def store_gradient(dx, ds, value, i, j, rows, width, scale):
    inside = (i < rows)[:, None] & (j < width)[None, :]
    if ds is not None:
        store(ds, i, j, value, inside)
    if dx is not None:
        store(dx, i, j, value * scale, inside)


@triton.jit(do_not_specialize=["heads", "rows", "diagonal"])
def backward_kernel(
    dout,  # View (B, H, rows, width)
    out,  # View
    dx,  # View, or None
    ds,  # View of fp32, or None
    scale,
    heads,
    rows,
    width,
    diagonal,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    batch, head, first = work_item(rows, heads, ROWS)
    dout, out = matrix(dout, batch, head), matrix(out, batch, head)
    if dx is not None:
        dx = matrix(dx, batch, head)
    if ds is not None:
        ds = matrix(ds, batch, head)
    i = first + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK)
    end = columns_seen(first, width, diagonal, CAUSAL, ROWS)
    if WHOLE:
        p, d = weighted(dout, out, i, j, rows, end, diagonal, CAUSAL)
        total = tl.sum(p * d, 1)
        store_gradient(dx, ds, p * (d - total[:, None]), i, j, rows, width, scale)
    else:
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in tl.range(0, end, BLOCK, num_stages=2):
            p, d = weighted(dout, out, i, start + j, rows, end, diagonal, CAUSAL)
            sums += p * d
        total = tl.sum(sums, 1)
        for start in tl.range(0, width, BLOCK, num_stages=2):
            p, d = weighted(dout, out, i, start + j, rows, end, diagonal, CAUSAL)
            value = p * (d - total[:, None])
            store_gradient(dx, ds, value, i, start + j, rows, width, scale)


# --- launchers -----------------------------------------------------------------------------------


def _arguments(x: Tensor, sizes: list[int], per_thread: int, config: SoftmaxConfig) -> dict:
    """What both kernels are launched with; `x` is what is read most."""
    rows, width = sizes[2], x.shape[3]
    apart = x.stride(3) != 1 and x.stride(2) == 1
    tile = tile_of(rows, width, per_thread=per_thread, most=16384, apart=apart)
    return {
        "scale": config.scale,
        "heads": sizes[1],
        "rows": rows,
        "width": width,
        "diagonal": width - rows if config.causal == 2 else 0,
        "CAUSAL": config.causal != 0,
        "ROWS": tile.rows,
        "BLOCK": tile.block,
        "WHOLE": tile.whole,
        "num_warps": tile.warps,
        **FMA,
    }


def softmax_forward(call: SoftmaxCall, out: Tensor) -> None:
    """Write `out` (B, H, rows, width).

    fp16, bf16 and fp32, a bias of any of them; any strides; mask and bias have four dimensions,
    each full or 1.
    """
    x, mask, bias, _, config = call
    given = [view(x), broadcast_view(mask), broadcast_view(bias), view(out)]
    sizes, views = row_views(x, given, config.causal != 0)
    arguments = _arguments(x, sizes, 32, config)
    with torch.cuda.device_of(x):
        forward_kernel[programs(sizes, arguments["ROWS"])](*views, **arguments)


def softmax_backward(call: SoftmaxBackwardCall, dx: Tensor | None, ds: Tensor | None) -> None:
    """Write `dx` and `ds` (fp32), where not None; any strides."""
    dout, out, config = call.dout, call.out, call.config
    given = [view(dout), view(out), *(None if x is None else view(x) for x in (dx, ds))]
    sizes, views = row_views(out, given, config.causal != 0)
    arguments = _arguments(out, sizes, 16, config)
    with torch.cuda.device_of(out):
        backward_kernel[programs(sizes, arguments["ROWS"])](*views, **arguments)
