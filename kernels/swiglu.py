r"""SwiGLU and its kin: out = act(gate) · up, each element by itself.

    silu x·σ(x)    gelu x·Φ(x)    gelu_tanh x·σ(2√(2/π)·(x + 0.044715·x³))    relu max(x, 0)

    dgate = dout · up · act'(gate),   dup = dout · act(gate)          all (B, H, rows, width)

An activation but relu is x·s(x) with a smooth step s from 0 to 1, and its slope is s + x·s'. One
program takes ROWS rows of one head and BLOCK columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FMA, LOG2E, matrix, view
from .rowwise import at, row_views, store, work_item

if TYPE_CHECKING:
    from fusedattn.ops.swiglu import SwigluBackwardCall, SwigluCall

WARPS = 4
ELEMENTS = 2048  # of a program: two loads of 16 bytes per thread from each tensor in half precision
WIDEST = 1024  # columns of a program

SILU, GELU, GELU_TANH, RELU = (tl.constexpr(i) for i in range(4))  # their places in ACTIVATIONS


# --- shared by the kernels -----------------------------------------------------------------------


@triton.jit
def step(x, ACTIVATION: tl.constexpr):
    """(s, s') of x."""
    if ACTIVATION == GELU:
        s = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = tl.exp2(x * x * (-0.5 * LOG2E)) * 0.3989422804014327
    else:
        inner = x
        if ACTIVATION == GELU_TANH:
            square = x * x
            inner = 1.5957691216057308 * x * (1.0 + 0.044715 * square)
        s = 1.0 / (1.0 + tl.exp2(-inner * LOG2E))
        slope = s * (1.0 - s)
        if ACTIVATION == GELU_TANH:
            # Cut off where the sigmoid is level.
            slope *= 1.5957691216057308 * (1.0 + 0.134145 * tl.minimum(square, 1e4))
    return s, slope


@triton.jit
def place(rows, width, heads, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(batch, head, rows, columns, which of them exist) of this program."""
    batch, head, first = work_item(rows, heads, ROWS)
    i = first + tl.arange(0, ROWS)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return batch, head, i, j, (i < rows)[:, None] & (j < width)[None, :]


@triton.jit
def load(x, i, j, inside):
    return tl.load(at(x, i, j), mask=inside, other=0.0).to(tl.float32)


# --- forward kernel ------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["heads", "rows"])
def swiglu_forward_kernel(
    gate,  # View (B, H, rows, width)
    up,  # View
    out,  # View
    heads,
    rows,
    width,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch, head, i, j, inside = place(rows, width, heads, ROWS, BLOCK)
    x = load(matrix(gate, batch, head), i, j, inside)
    u = load(matrix(up, batch, head), i, j, inside)
    if ACTIVATION == RELU:
        value = tl.where(x <= 0.0, 0.0, x)
    else:
        s, _ = step(x, ACTIVATION)
        value = x * s
    store(matrix(out, batch, head), i, j, value * u, inside)


# --- backward kernel -----------------------------------------------------------------------------


@triton.jit(do_not_specialize=["heads", "rows"])
def swiglu_backward_kernel(
    dout,  # View (B, H, rows, width)
    gate,  # View
    up,  # View
    dgate,  # View
    dup,  # View
    heads,
    rows,
    width,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch, head, i, j, inside = place(rows, width, heads, ROWS, BLOCK)
    d = load(matrix(dout, batch, head), i, j, inside)
    x = load(matrix(gate, batch, head), i, j, inside)
    pulled = d * load(matrix(up, batch, head), i, j, inside)
    if ACTIVATION == RELU:
        value = tl.where(x <= 0.0, 0.0, x)
        pulled = tl.where(x <= 0.0, 0.0, pulled)
    else:
        s, slope = step(x, ACTIVATION)
        value = x * s
        pulled *= s + x * slope
    store(matrix(dgate, batch, head), i, j, pulled, inside)
    store(matrix(dup, batch, head), i, j, d * value, inside)


# --- launchers -----------------------------------------------------------------------------------


def _launch(kernel: triton.JITFunction, tensors: list[Tensor], activation: int) -> None:
    like = tensors[0]
    sizes, views = row_views(like, [view(x) for x in tensors])
    batches, heads, rows = sizes
    width = like.shape[3]
    block = min(triton.next_power_of_2(width), WIDEST)
    together = min(triton.next_power_of_2(rows), max(1, ELEMENTS // block))
    grid = (batches * heads * triton.cdiv(rows, together), triton.cdiv(width, block))
    with torch.cuda.device_of(like):
        kernel[grid](
            *views, heads, rows, width, ACTIVATION=activation, ROWS=together, BLOCK=block,
            num_warps=WARPS, **FMA,
        )  # fmt: skip


def swiglu_forward(call: SwigluCall, out: Tensor) -> None:
    """Write `out` (B, H, rows, width) from gate and up of its shape; fp16, bf16 and fp32."""
    _launch(swiglu_forward_kernel, [call.gate, call.up, out], call.config.activation)


def swiglu_backward(call: SwigluBackwardCall, dgate: Tensor, dup: Tensor) -> None:
    """Write `dgate` and `dup` of the shape of gate and up."""
    _launch(swiglu_backward_kernel, [*call[:3], dgate, dup], call.config.activation)
