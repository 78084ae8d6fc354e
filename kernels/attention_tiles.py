"""Which tiles the attention kernels may use: for each kernel, kind of arithmetic and head dim.

"wgmma" is sm_90, "tcgen05" sm_100, "mma" every other GPU with half-precision tensor cores, "fp32"
the scalar units, since fp32 products are IEEE. A mask or a bias takes registers of its own, so
"+ pairs" has smaller tiles for head dims where that matters. The first tile of a list is the best
guess, taken where nothing may be timed.

Left out are tiles in which registers spill at head dims 64 and 128 (tests/test_triton_compile.py;
of one dkdv tile float16 on sm_100 spills two, outside the loop) and those that do not fit in the
GPU's shared memory: 227 KB on sm_90 and sm_100, 163 KB on sm_80, 99 KB on sm_86, sm_89 and sm_120.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton

from .common import INTERPRETED, Device

Tile = tuple[int, int, int, int]  # queries, keys, warps, pipeline stages
Tiles = dict[str, dict[int, tuple[Tile, ...]]]  # by kind of arithmetic, then by padded head dim

FORWARD: Tiles = {
    "wgmma": {
        64: ((128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3)),
        128: ((128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)),
        256: ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)),
        512: ((64, 32, 8, 1), (32, 32, 8, 1)),
    },
    "wgmma + pairs": {
        64: ((128, 64, 8, 3), (64, 64, 4, 3)),
        128: ((128, 64, 8, 3), (64, 64, 4, 2)),
    },
    "tcgen05": {
        64: ((128, 64, 8, 3), (64, 64, 4, 3)),
        128: ((128, 64, 8, 3), (64, 64, 8, 2)),
        256: ((128, 32, 8, 2), (64, 64, 8, 2)),
        512: ((32, 32, 8, 1),),
    },
    "tcgen05 + pairs": {
        64: ((128, 64, 8, 3), (64, 64, 4, 3)),
        128: ((128, 64, 8, 2), (64, 64, 8, 2)),
    },
    "mma": {
        64: ((128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3)),
        128: ((128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 2)),
        256: ((128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
        512: ((32, 32, 8, 1), (16, 32, 8, 1)),
    },
    "mma + pairs": {
        64: ((128, 64, 8, 2), (64, 64, 4, 3)),
        128: ((128, 64, 8, 2), (64, 64, 8, 2)),
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
        64: ((64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2)),
        128: ((32, 128, 8, 2), (32, 64, 8, 2)),
        256: ((32, 64, 8, 2), (32, 32, 8, 1)),
        512: ((16, 16, 8, 1),),
    },
    "wgmma + pairs": {
        64: ((64, 128, 8, 2), (32, 128, 8, 2)),
        128: ((32, 128, 8, 1), (32, 64, 8, 2)),
    },
    "tcgen05": {
        64: ((64, 128, 8, 2), (32, 64, 4, 2)),
        128: ((64, 128, 8, 1), (64, 64, 8, 1), (32, 64, 8, 2)),
        256: ((32, 64, 8, 1), (32, 32, 8, 1)),
        512: ((16, 16, 8, 1),),
    },
    "tcgen05 + pairs": {
        64: ((64, 128, 8, 2), (32, 64, 4, 2)),
        128: ((64, 128, 8, 1), (64, 64, 8, 1)),
    },
    "mma": {
        64: ((32, 128, 8, 2), (32, 64, 8, 2)),
        128: ((64, 64, 8, 2), (16, 64, 4, 2)),
        256: ((32, 64, 8, 2), (32, 32, 8, 1)),
        512: ((16, 16, 8, 1),),
    },
    "mma + pairs": {
        64: ((16, 128, 8, 2), (16, 64, 8, 2)),
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
        64: ((128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2)),
        128: ((128, 64, 8, 2), (64, 64, 4, 2)),
        256: ((64, 64, 8, 2), (64, 32, 8, 2)),
        512: ((32, 32, 8, 1), (32, 16, 8, 1)),
    },
    "wgmma + pairs": {
        64: ((128, 64, 8, 2), (64, 64, 4, 2)),
    },
    "tcgen05": {
        64: ((128, 64, 8, 2), (64, 64, 4, 2)),
        128: ((128, 64, 8, 2), (64, 64, 4, 2)),
        256: ((64, 32, 8, 2), (64, 32, 8, 1)),
        512: ((32, 32, 8, 1), (32, 16, 8, 1)),
    },
    "mma": {
        64: ((128, 64, 8, 2), (64, 64, 4, 2)),
        128: ((64, 64, 4, 2), (64, 32, 4, 2)),
        256: ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
        512: ((32, 32, 8, 1), (16, 16, 8, 1)),
    },
    "mma + pairs": {
        64: ((64, 32, 4, 2),),
        128: ((64, 32, 8, 2), (64, 32, 4, 2)),
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


def candidates(
    tiles: Tiles,
    device: Device,
    dtype: torch.dtype,
    widths: tuple[int, int],
    extra: int,
    shared: Callable[[int, int, int], int],
) -> tuple[triton.Config, ...]:
    """The tiles for a device and padded head dims that fit in its shared memory, in their order.

    extra: bytes of mask and bias for each query and key. shared(m, n, stages): an upper bound of
    the elements of q, k, v, … that a tile keeps. If no tile fits, the last, smallest one.
    """
    if INTERPRETED.value:
        return (_config((32, 16, 4, 1)),)
    kind = {9: "wgmma", 10: "tcgen05"}.get(device.arch // 10, "mma")
    kind = "fp32" if dtype == torch.float32 else kind
    width = max(64, *widths)
    found = tiles[kind][width]
    if extra:
        found = tiles.get(f"{kind} + pairs", {}).get(width, found)
    fitting = [
        (m, n, warps, stages)
        for m, n, warps, stages in found
        if dtype.itemsize * shared(m, n, stages) + stages * m * n * extra <= device.shared
    ]
    return tuple(_config(each) for each in fitting or found[-1:])


def _config(each: Tile) -> triton.Config:
    m, n, warps, stages = each
    return triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)


@functools.cache
def forward_tiles(
    device: Device, dtype: torch.dtype, widths: tuple[int, int], extra: int
) -> tuple[triton.Config, ...]:
    """Candidates for forward_kernel; widths: padded D and Dv, extra: as in `candidates`."""

    def shared(m: int, n: int, stages: int) -> int:
        return m * widths[0] + stages * n * sum(widths)

    return candidates(FORWARD, device, dtype, widths, extra, shared)


@functools.cache
def dkdv_tiles(
    device: Device, dtype: torch.dtype, widths: tuple[int, int], extra: int
) -> tuple[triton.Config, ...]:
    """Candidates for dkdv_kernel, which also keeps two statistics of each row and a tile of p."""

    def shared(m: int, n: int, stages: int) -> int:
        return (n + stages * m) * sum(widths) + m * n + stages * m * 4

    return candidates(DKDV, device, dtype, widths, extra, shared)


def _dq_shared(widths: tuple[int, int]) -> Callable[[int, int, int], int]:
    return lambda m, n, stages: (m + stages * n) * sum(widths)


@functools.cache
def dq_tiles(
    device: Device, dtype: torch.dtype, widths: tuple[int, int], extra: int
) -> tuple[triton.Config, ...]:
    """Candidates for dq_kernel."""
    return candidates(DQ, device, dtype, widths, extra, _dq_shared(widths))


@functools.cache
def bias_grad_tile(
    device: Device, dtype: torch.dtype, widths: tuple[int, int], extra: int
) -> triton.Config:
    """The one tile of bias_grad_kernel, whose sum takes as many registers as the scores."""
    return candidates(BIAS_GRAD, device, dtype, widths, extra, _dq_shared(widths))[0]
