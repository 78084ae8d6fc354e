"""Which tiles the attention kernels may use on a device: of attention_tile_lists.py what fits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

from .attention_tile_lists import BIAS_GRAD, DKDV, DQ, FORWARD, JVP, TMA, Tile, Tiles
from .common import INTERPRETED, Device


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
    special: tuple[str, ...],
    described: bool = False,
) -> tuple[triton.Config, ...]:
    """The tiles for a device and padded head dims that fit in its shared memory, in their order.

    extra: bytes for each query and key, besides the operands. special: kinds of call, of which the
    first that has tiles counts. described: what is walked over is `describable`. If no tile fits,
    the last, smallest one.
    """
    kinds = {9: ("wgmma",), 10: ("tcgen05",)}.get(device.arch // 10, ("mma",))
    if kinds == ("mma",) and device.shared < 100 << 10:
        kinds = ("mma, 99 KB", "mma")
    kinds = ("fp32",) if dtype == torch.float32 else kinds
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


def jvp_operands(m: int, n: int, widths: tuple[int, int]) -> Elements:
    return Elements(2 * m * widths[0], 2 * n * sum(widths), m)


@functools.cache
def forward_tiles(
    device: Device, dtype: torch.dtype, widths: tuple[int, int], extra: int,
    special: tuple[str, ...], described: bool,
) -> tuple[triton.Config, ...]:  # fmt: skip
    """Candidates for forward_kernel; widths: padded D and Dv, the rest as in `candidates`."""
    return candidates(FORWARD, device, dtype, widths, extra, forward_operands, special, described)


@functools.cache
def dkdv_tiles(
    device: Device, dtype: torch.dtype, widths: tuple[int, int], extra: int,
    special: tuple[str, ...], described: bool,
) -> tuple[triton.Config, ...]:  # fmt: skip
    """Candidates for dkdv_kernel."""
    return candidates(DKDV, device, dtype, widths, extra, dkdv_operands, special, described)


@functools.cache
def dq_tiles(
    device: Device, dtype: torch.dtype, widths: tuple[int, int], extra: int,
    special: tuple[str, ...], described: bool,
) -> tuple[triton.Config, ...]:  # fmt: skip
    """Candidates for dq_kernel."""
    return candidates(DQ, device, dtype, widths, extra, dq_operands, special, described)


@functools.cache
def jvp_tiles(
    device: Device, dtype: torch.dtype, widths: tuple[int, int], extra: int,
    special: tuple[str, ...],
) -> tuple[triton.Config, ...]:  # fmt: skip
    """Candidates for jvp_kernel; arguments as in `attention_tiles.candidates`."""
    return candidates(JVP, device, dtype, widths, extra, jvp_operands, special)


@functools.cache
def bias_grad_tile(
    device: Device, dtype: torch.dtype, widths: tuple[int, int], extra: int,
    special: tuple[str, ...],
) -> triton.Config:  # fmt: skip
    """The one tile of bias_grad_kernel, whose sum takes as many registers as the scores."""
    return candidates(BIAS_GRAD, device, dtype, widths, extra, dq_operands, special)[0]
