"""Which tiles the attention kernels may use: for each kernel, kind of arithmetic and head dim.

"wgmma" is sm_90, "tcgen05" sm_100, "mma" every other GPU with half-precision tensor cores, "fp32"
the scalar units, since fp32 products are IEEE. "mma, 99 KB" has what differs on GPUs with as much
shared memory: sm_86, sm_89 and sm_120. A mask or a bias takes registers of its own, so "+ pairs"
has smaller tiles for head dims where that matters; so do "+ dropout", with them or without, and
"+ padded", for head dims like 72, of which each copy asks whether it is inside. The first tile of a
list is the best guess, taken where nothing may be timed.

mma.sync: a tile has at least as many rows as its result has columns, BLOCK_M ≥ D in the forward and
dQ, BLOCK_N ≥ D in dK/dV. Else Triton lays the warps along the columns, and what is between the
products crosses warps through shared memory. Copies are under way during the products from three
stages on; with two they are waited for as soon as they begin.

TMA: on sm_90 and sm_100, where the layout allows, tiles may come through tensor descriptors. The
loop is an eighth shorter, and but for dK/dV has 20 to 110 registers more to spare, so that larger
tiles fit, or two programs. No list begins with one: what it costs a program to write its
descriptors first, machine code does not tell. In dK/dV on sm_100 they save nothing.

Left out are tiles in which registers spill at head dims to 128 (tests/test_triton_compile.py) and
those that do not fit in the GPU's shared memory: 227 KB on sm_90 and sm_100, 163 KB on sm_80,
99 KB on sm_86, sm_89 and sm_120.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

from .common import INTERPRETED, Device

Tile = tuple[int | str, ...]  # queries, keys, warps, pipeline stages, constants that are set
Tiles = dict[str, dict[int, tuple[Tile, ...]]]  # by kind of arithmetic, then by padded head dim

APART, AHEAD = "MASKED_APART", "AHEAD"  # of dkdv_kernel, of forward_kernel
TMA = "TMA"  # of all three: what they walk over comes through tensor descriptors

FORWARD: Tiles = {
    "wgmma": {
        64: (
            (128, 64, 4, 3),
            (128, 128, 8, 2),
            (64, 64, 4, 3),
            (128, 64, 8, 3, TMA),
            (128, 128, 8, 3, TMA),
        ),
        128: (
            (128, 64, 8, 3),
            (128, 64, 8, 3, AHEAD),
            (64, 64, 4, 2),
            (128, 64, 8, 3, AHEAD, TMA),
            (128, 128, 8, 2, TMA),
        ),
        256: ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)),
        512: ((64, 32, 8, 1), (32, 32, 8, 1)),
    },
    "wgmma + pairs": {
        64: ((128, 64, 8, 3), (64, 64, 4, 3)),
        128: ((128, 64, 8, 3), (64, 64, 4, 2)),
    },
    "wgmma + padded": {
        64: ((128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 8, 3, TMA)),
        128: ((128, 64, 8, 3), (128, 64, 8, 3, AHEAD, TMA)),
    },
    "wgmma + dropout": {
        64: ((128, 64, 8, 3), (64, 64, 4, 3)),
        128: ((128, 64, 8, 3), (64, 64, 4, 2)),
    },
    "tcgen05": {
        64: ((128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3, TMA)),
        128: ((128, 64, 8, 3), (64, 64, 8, 2), (128, 128, 8, 2, TMA)),
        256: ((128, 32, 8, 2), (64, 64, 8, 2)),
        512: ((32, 32, 8, 1),),
    },
    "tcgen05 + pairs": {
        64: ((128, 64, 8, 3), (64, 64, 4, 3)),
        128: ((128, 64, 8, 2), (64, 64, 8, 2)),
    },
    "mma": {
        64: ((128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3)),
        128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
        256: ((128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
        512: ((32, 32, 8, 1), (16, 32, 8, 1)),
    },
    "mma + padded": {
        64: ((128, 64, 8, 3), (64, 64, 4, 3)),
        128: ((128, 32, 8, 3), (64, 64, 8, 2)),
    },
    "mma, 99 KB": {
        64: ((128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
    },
    "mma + pairs": {
        64: ((128, 64, 8, 2), (64, 64, 4, 3)),
        128: ((128, 64, 8, 2), (64, 64, 8, 2)),
    },
    "mma + dropout": {
        64: ((128, 64, 8, 3), (128, 32, 8, 3)),
        128: ((128, 32, 8, 3), (128, 32, 8, 2)),
    },
    "fp32": {
        64: ((64, 32, 8, 2), (32, 32, 8, 2)),
        128: ((64, 16, 8, 1), (32, 32, 8, 2)),
        256: ((32, 32, 8, 1), (16, 16, 8, 1)),
        512: ((16, 32, 8, 1), (16, 16, 8, 1), (8, 16, 8, 1)),
    },
}

DKDV: Tiles = {
    "wgmma": {
        64: ((64, 128, 8, 3), (32, 128, 8, 3, APART), (64, 64, 4, 2), (64, 128, 8, 3, TMA)),
        128: ((32, 128, 8, 3), (32, 128, 8, 2), (32, 64, 8, 2), (32, 128, 8, 3, TMA)),
        256: ((32, 64, 8, 2), (32, 32, 8, 1)),
        512: ((16, 16, 8, 1),),
    },
    "wgmma + pairs": {
        64: ((64, 128, 8, 2), (32, 128, 8, 2)),
        128: ((32, 128, 8, 1), (32, 64, 8, 2)),
    },
    "wgmma + dropout": {
        64: ((32, 128, 8, 3), (32, 128, 8, 2)),
        128: ((32, 64, 8, 3), (16, 128, 8, 2)),
    },
    "tcgen05": {
        64: ((64, 128, 8, 3), (32, 64, 4, 2)),
        128: ((64, 128, 8, 1), (64, 64, 8, 1), (32, 64, 8, 2)),
        256: ((32, 64, 8, 1), (32, 32, 8, 1)),
        512: ((16, 16, 8, 1),),
    },
    "tcgen05 + pairs": {
        64: ((64, 128, 8, 2), (32, 64, 4, 2)),
        128: ((64, 128, 8, 1), (64, 64, 8, 1)),
    },
    "tcgen05 + dropout": {
        64: ((32, 64, 4, 2),),
        128: ((64, 64, 8, 1),),
    },
    "mma": {
        64: ((32, 128, 8, 3, APART), (32, 64, 8, 3, APART)),
        128: ((16, 128, 8, 3, APART), (64, 64, 8, 2), (32, 64, 8, 3, APART)),
        256: ((32, 64, 8, 2), (32, 32, 8, 1)),
        512: ((16, 16, 8, 1),),
    },
    "mma + pairs": {
        64: ((16, 128, 8, 2), (16, 64, 8, 2)),
        128: ((32, 64, 8, 2), (16, 64, 8, 2)),
    },
    "mma, 99 KB + pairs": {
        128: ((16, 64, 8, 3), (16, 64, 8, 2)),
    },
    "mma + dropout": {
        64: ((16, 128, 8, 3), (16, 128, 8, 2)),
        128: ((32, 64, 8, 2), (16, 64, 8, 2)),
    },
    "fp32": {
        64: ((32, 32, 8, 2), (16, 32, 8, 1)),
        128: ((16, 32, 8, 1),),
        256: ((16, 16, 8, 1),),
        512: ((16, 16, 8, 1), (16, 8, 8, 1)),
    },
}

DQ: Tiles = {
    "wgmma": {
        64: ((128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3, TMA)),
        128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (128, 128, 8, 2, TMA)),
        256: ((64, 64, 8, 2), (64, 32, 8, 2)),
        512: ((32, 32, 8, 1), (32, 16, 8, 1)),
    },
    "wgmma + pairs": {
        64: ((128, 64, 8, 2), (64, 64, 4, 2)),
    },
    "wgmma + padded": {
        128: ((128, 64, 8, 2), (128, 64, 8, 3, TMA)),
    },
    "wgmma + dropout": {
        64: ((128, 64, 8, 3), (64, 64, 4, 2)),
        128: ((128, 64, 8, 2), (128, 32, 8, 3)),
    },
    "tcgen05": {
        64: ((128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3, TMA)),
        128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 3, TMA)),
        256: ((64, 32, 8, 2), (64, 32, 8, 1)),
        512: ((32, 32, 8, 1), (32, 16, 8, 1)),
    },
    "tcgen05 + padded": {
        128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2)),
    },
    "mma": {
        64: ((128, 64, 8, 3), (64, 64, 4, 3)),
        128: ((128, 32, 8, 3), (128, 32, 8, 2), (64, 32, 4, 2)),
        256: ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
        512: ((32, 32, 8, 1), (16, 16, 8, 1)),
    },
    "mma + pairs": {
        64: ((64, 32, 4, 2),),
        128: ((64, 32, 8, 2), (64, 32, 4, 2)),
    },
    "mma + dropout": {
        64: ((128, 32, 8, 3), (64, 64, 8, 3)),
        128: ((128, 32, 8, 3), (64, 32, 8, 3)),
    },
    "fp32": {
        64: ((32, 32, 8, 2), (32, 32, 8, 1)),
        128: ((32, 16, 8, 1),),
        256: ((16, 16, 8, 1),),
        512: ((16, 16, 8, 1), (8, 16, 8, 1)),
    },
}

BIAS_GRAD: Tiles = {
    "wgmma": {
        64: ((64, 64, 8, 2),),
        128: ((64, 64, 8, 2),),
        256: ((64, 32, 8, 1),),
        512: ((16, 16, 8, 1),),
    },
    "mma": {
        64: ((32, 64, 8, 2),),
        128: ((32, 32, 8, 1),),
        256: ((32, 32, 8, 1),),
        512: ((16, 16, 8, 1),),
    },
    "fp32": DQ["fp32"],
}
BIAS_GRAD["tcgen05"] = BIAS_GRAD["wgmma"]


class Elements(NamedTuple):
    """How many elements of q, k, v, … a tile keeps."""

    held: int  # all the while
    walked: int  # in each copy of what it walks over
    rows: int  # of p, and of the results


Operands = Callable[[int, int, tuple[int, int]], Elements]  # of queries, keys and widths


def shared_bytes(
    tile: Tile, operands: Operands, arch: int, dtype: torch.dtype, widths: tuple[int, int],
    extra: int,
) -> int:  # fmt: skip
    """The shared memory of a tile, in bytes; arguments as in `candidates`.

    Exact for mma.sync in half precision at head dims to 128, without mask and bias: a copy begins
    stages − 1 tiles before its products, and p crosses warps where its rows are fewer than the
    columns of the result. Else an estimate that counts every stage; wgmma and tcgen05 read shared
    memory themselves, while the next copies are under way.
    """
    m, n, _, stages, *_ = tile
    held, walked, rows = operands(m, n, widths)
    if arch // 10 in (8, 12) and dtype.itemsize == 2 and not extra:
        crossing = m * n if rows < max(widths) else 0
        return 2 * (held + max(stages - 1, 1) * walked + crossing)
    return dtype.itemsize * (held + stages * walked) + stages * m * n * extra


def candidates(
    tiles: Tiles,
    device: Device,
    dtype: torch.dtype,
    widths: tuple[int, int],
    extra: int,
    operands: Operands,
    dropped: bool,
    padded: bool = False,
    described: bool = False,
) -> tuple[triton.Config, ...]:
    """The tiles for a device and padded head dims that fit in its shared memory, in their order.

    extra: bytes for each query and key, besides the operands. dropped: with dropout. padded: the
    head dims are less than their widths. described: what is walked over is `describable`. If no
    tile fits, the last, smallest one.
    """
    kinds = {9: ("wgmma",), 10: ("tcgen05",)}.get(device.arch // 10, ("mma",))
    if kinds == ("mma",) and device.shared < 100 << 10:
        kinds = ("mma, 99 KB", "mma")
    kinds = ("fp32",) if dtype == torch.float32 else kinds
    special = ("dropout", "pairs") if dropped else ("pairs",) if extra else ("padded",) * padded
    kinds = (*(f"{kind} + {each}" for each in special for kind in kinds), *kinds)
    width = max(64, *widths)
    found = next(tiles[kind][width] for kind in kinds if width in tiles.get(kind, ()))
    found = tuple(each for each in found if described or TMA not in each)
    if INTERPRETED.value:
        return (_config((32, 16, 4, 1, *found[0][4:])),)
    about = (operands, device.arch, dtype, widths, extra)
    fitting = [each for each in found if shared_bytes(each, *about) <= device.shared]
    return tuple(_config(each) for each in fitting or found[-1:])


def _config(each: Tile) -> triton.Config:
    m, n, warps, stages, *constants = each
    options = {"BLOCK_M": m, "BLOCK_N": n} | dict.fromkeys(constants, True)
    return triton.Config(options, num_warps=warps, num_stages=stages)


def forward_operands(m: int, n: int, widths: tuple[int, int]) -> Elements:
    return Elements(m * widths[0], n * sum(widths), m)


def dkdv_operands(m: int, n: int, widths: tuple[int, int]) -> Elements:
    """Among them two fp32 statistics of each row."""
    return Elements(n * sum(widths), m * (sum(widths) + 4), n)


def dq_operands(m: int, n: int, widths: tuple[int, int]) -> Elements:
    return Elements(m * sum(widths), n * sum(widths), m)


@functools.cache
def forward_tiles(
    device: Device, dtype: torch.dtype, widths: tuple[int, int], extra: int, dropped: bool,
    padded: bool, described: bool,
) -> tuple[triton.Config, ...]:  # fmt: skip
    """Candidates for forward_kernel; widths: padded D and Dv, the rest as in `candidates`."""
    about = (device, dtype, widths, extra, forward_operands, dropped, padded, described)
    return candidates(FORWARD, *about)


@functools.cache
def dkdv_tiles(
    device: Device, dtype: torch.dtype, widths: tuple[int, int], extra: int, dropped: bool,
    described: bool,
) -> tuple[triton.Config, ...]:  # fmt: skip
    """Candidates for dkdv_kernel."""
    about = (device, dtype, widths, extra, dkdv_operands, dropped, False, described)
    return candidates(DKDV, *about)


@functools.cache
def dq_tiles(
    device: Device, dtype: torch.dtype, widths: tuple[int, int], extra: int, dropped: bool,
    padded: bool, described: bool,
) -> tuple[triton.Config, ...]:  # fmt: skip
    """Candidates for dq_kernel."""
    about = (device, dtype, widths, extra, dq_operands, dropped, padded, described)
    return candidates(DQ, *about)


@functools.cache
def bias_grad_tile(
    device: Device, dtype: torch.dtype, widths: tuple[int, int], extra: int, dropped: bool
) -> triton.Config:
    """The one tile of bias_grad_kernel, whose sum takes as many registers as the scores."""
    return candidates(BIAS_GRAD, device, dtype, widths, extra, dq_operands, dropped)[0]
