"""Shared by the kernels: tensors as views, tiles of them, the device.

A tensor crosses into a kernel as a `View`, pointer and strides together; `matrix` picks one head
of it and `load_tile` reads a block of rows. Strides are multiplied in 64 bits: a view of a small
part of a large buffer passes 2³¹ elements long before its own size does.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class View(NamedTuple):
    """A 4-D tensor as a kernel sees it; a stride is 0 where it is broadcast."""

    data: Any
    batch: Any
    head: Any
    row: Any
    col: Any


class Matrix(NamedTuple):
    """One head of a `View`: (rows, columns)."""

    data: Any
    row: Any
    col: Any


def with_data(x: Tensor) -> Tensor:
    """`x`, after a check that a kernel can read it.

    Raises:
        RuntimeError: the storage was freed, so that torch gives the offset into it as the address.
    """
    address = x.data_ptr()
    if address >> 40 == 0 and address == x.storage_offset() * x.element_size() and x.numel() != 0:
        raise RuntimeError(
            f"fusedattn: got a tensor of shape {tuple(x.shape)} that has elements but no data: its "
            "storage was freed"
        )
    return x


def view(x: Tensor) -> View:
    """A tensor with its strides."""
    return View(with_data(x), *x.stride())


def optional_view(x: Tensor | None) -> View | None:
    """`view`, of a tensor that may be absent."""
    return None if x is None else view(x)


def row_view(x: Tensor | None) -> View | None:
    """(B, H, rows) as (B, H, 1, rows)."""
    if x is None:
        return None
    batch, head, row = x.stride()
    return View(with_data(x), batch, head, 0, row)


def broadcast_view(x: Tensor | None) -> View | None:
    """A tensor that is broadcast along its dimensions of size 1."""
    if x is None:
        return None
    batch, head, row, col = (0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))
    return View(with_data(x), batch, head, row, col)


def aligned(*tensors: Tensor) -> bool:
    """Whether each row starts a multiple of 16 bytes after the tensor; one row starts with it."""
    return all(
        step * x.element_size() % 16 == 0
        for x in tensors
        for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True)
        if size > 1
    )


def describable(*tensors: Tensor) -> bool:
    """Whether `described` can take their rows: what TMA asks of an address and of strides."""
    return all(
        x.stride(-1) == 1
        and x.stride(-2) > 0
        and (x.data_ptr() | x.stride(-2) * x.element_size()) % 16 == 0
        and aligned(x)
        for x in tensors
    )


# --- device functions ----------------------------------------------------------------------------


@triton.jit
def matrix(x, batch, head):
    data = x.data + batch.to(tl.int64) * x.batch + head.to(tl.int64) * x.head
    return Matrix(data, x.row, x.col)


@triton.jit
def rows_from(x, batch, head, first, ALIGNED: tl.constexpr):
    """One head of a `View`, from its row `first` on; ALIGNED: as `aligned` says of the tensor."""
    row = tl.cast(x.row, tl.int64)
    before = batch.to(tl.int64) * x.batch + head.to(tl.int64) * x.head
    before += tl.cast(first, tl.int64) * row
    if ALIGNED:
        # Of a stride Triton itself sees whether it is a multiple of 16 elements, and nothing less.
        VECTOR: tl.constexpr = 128 // x.data.dtype.element_ty.primitive_bitwidth
        row = tl.multiple_of(row, VECTOR)
        before = tl.multiple_of(before, VECTOR)
    return Matrix(x.data + before, row, x.col)


@triton.jit
def _tile(x, first, rows, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Pointers to rows first … first + BLOCK, and which of them are inside (rows, WIDTH)."""
    row = tl.arange(0, BLOCK)[:, None]
    col = tl.arange(0, PADDED)[None, :]
    start = x.data + tl.cast(first, tl.int64) * x.row
    inside = row < rows - first
    if WIDTH < PADDED:
        inside = inside & (col < WIDTH)
    return start + row.to(tl.int64) * x.row + col.to(tl.int64) * x.col, inside


@triton.jit
def described(x, rows, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """A `Matrix` (rows, WIDTH) as a tensor descriptor, of which `load_tile` takes tiles by TMA.

    A program writes it to memory first; then it has no addresses and no masks to keep.
    """
    shape = [tl.maximum(rows, 1), WIDTH]  # CUDA knows no extent of 0
    return tl.make_tensor_descriptor(x.data, shape, [x.row, 1], [BLOCK, PADDED])


@triton.jit
def load_tile(x, first, rows, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """(BLOCK, PADDED) of a matrix (rows, WIDTH), 0 outside it, whatever is stored there.

    x: a `Matrix`, or what `described` makes of it.
    """
    if isinstance(x, tl.tensor_descriptor):
        tile = x.load([first, 0])
    else:
        pointers, inside = _tile(x, first, rows, BLOCK, WIDTH, PADDED)
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(
    x, tile, first, rows, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """Write a (BLOCK, PADDED) tile to a matrix (rows, WIDTH), in its dtype."""
    pointers, inside = _tile(x, first, rows, BLOCK, WIDTH, PADDED)
    tl.store(pointers, tile.to(x.data.dtype.element_ty), mask=inside)


@triton.jit
def load_pairs(x, i, j, rows, cols):
    """x[i, j], 0 outside (rows, cols); one of i and j is a column, the other a row of indices."""
    offsets = i.to(tl.int64) * x.row + j.to(tl.int64) * x.col
    return tl.load(x.data + offsets, mask=(i < rows) & (j < cols), other=0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32; acc may be None."""
    if INTERPRETED:
        # The interpreter stores bf16 as integers and would multiply those.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


# --- launching -----------------------------------------------------------------------------------


class Device(NamedTuple):
    """What decides a launch: compute capability × 10, shared memory per block, L2, processors."""

    arch: int
    shared: int
    l2: int
    processors: int


@functools.cache
def _cuda_device(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    shared = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    arch = 0 if torch.version.hip else found.major * 10 + found.minor
    return Device(arch, shared, found.L2_cache_size, found.multi_processor_count)


def device_of(x: Tensor) -> Device:
    """The device of a tensor; a small made-up one for CPU tensors, which are interpreted."""
    if x.is_cuda:
        return _cuda_device(x.device.index)
    return Device(arch=0, shared=64 << 10, l2=1 << 20, processors=4)


def dot_precision(x: Tensor) -> str:
    """fp32 products are IEEE unless torch was told otherwise.

    `fp32_precision` also shows what was set through `allow_tf32`, which itself may refuse to be
    read once the newer setting was used.
    """
    if x.dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def block_width(width: int) -> int:
    """The padded extent of a head dim: a power of two that the tensor cores take."""
    return max(16, triton.next_power_of_2(width))


def bucket(length: int, most: int) -> int:
    """Lengths that share a tuning: up to the next power of two, all alike from `most` on."""
    return min(triton.next_power_of_2(length), most)
