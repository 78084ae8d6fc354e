"""Softmax's options and the checks on its arguments, made once before anything is launched."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

CAUSAL = {False: 0, True: 2, "top_left": 1, "bottom_right": 2}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)

_is_compiling = torch.compiler.is_compiling


class SoftmaxConfig(NamedTuple):
    """The options of one call. causal: 0 none, 1 top-left, 2 bottom-right."""

    causal: int
    scale: float

    @property
    def causal_name(self) -> bool | str:
        """The public spelling of `causal`."""
        return (False, "top_left", "bottom_right")[self.causal]


class SoftmaxCall(NamedTuple):
    """What a backend looks at to take or refuse a call."""

    x: Tensor
    mask: Tensor | None
    bias: Tensor | None
    dim: int
    config: SoftmaxConfig


@functools.lru_cache(maxsize=256, typed=True)
def configure(rank: int, dim: int, causal: bool | str, scale: float) -> SoftmaxConfig:
    """Check the options of a call on a tensor of `rank` dimensions."""
    if not isinstance(dim, int):
        raise TypeError(f"softmax: got dim of type {type(dim).__name__}, expected an int")
    if not -max(rank, 1) <= dim < max(rank, 1):
        raise ValueError(
            f"softmax: got dim={dim}, expected {-max(rank, 1)} <= dim < {max(rank, 1)} for a "
            f"tensor of {rank} dimensions"
        )
    if causal not in CAUSAL:
        raise ValueError(
            f"softmax: got causal={causal!r}, expected False, True, 'top_left' or 'bottom_right'"
        )
    if causal and (rank < 2 or dim not in (-1, rank - 1)):
        raise ValueError(
            f"softmax: got causal={causal!r} with dim={dim} of {rank} dimensions, expected dim=-1 "
            "of at least 2 dimensions (…, query, key)"
        )
    if not isinstance(scale, (int, float)):
        raise TypeError(f"softmax: got scale of type {type(scale).__name__}, expected a float")
    return SoftmaxConfig(CAUSAL[causal], float(scale))


def _check_broadcast(name: str, extra: Tensor, x: Tensor) -> None:
    if extra.device != x.device:
        raise ValueError(
            f"softmax: got {name} on {extra.device}, expected the device of x, {x.device}"
        )
    fits = extra.dim() <= x.dim() and all(
        have == 1 or have == want
        for have, want in zip(reversed(extra.shape), reversed(x.shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"softmax: got {name} of shape {tuple(extra.shape)}, expected one that broadcasts to "
            f"the shape of x, {tuple(x.shape)}"
        )


def _check_extras(x: Tensor, mask: Tensor | None, bias: Tensor | None) -> None:
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(
                f"softmax: got mask of type {got}, expected a bool tensor (True = keep); a float "
                "mask is passed as bias"
            )
        _check_broadcast("mask", mask, x)
    if bias is not None:
        allowed = DTYPES[3:] if x.dtype == torch.float64 else DTYPES[:3]
        if not isinstance(bias, Tensor) or bias.dtype not in allowed:
            got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
            raise TypeError(
                f"softmax: got bias of type {got}, expected a tensor of "
                f"{', '.join(str(dtype) for dtype in allowed)} for x of {x.dtype}"
            )
        _check_broadcast("bias", bias, x)


def prepare(x, dim, mask, bias, scale, causal) -> SoftmaxCall:
    if not isinstance(x, Tensor):
        raise TypeError(f"softmax: got x of type {type(x).__name__}, expected a Tensor")
    if x.dtype not in DTYPES:
        raise TypeError(
            f"softmax: got x of dtype {x.dtype}, expected float16, bfloat16, float32 or float64"
        )
    # Dynamo traces through a cached function, but warns about it.
    checked = configure.__wrapped__ if _is_compiling() else configure
    config = checked(x.dim(), dim, causal, scale)
    if mask is not None or bias is not None:
        _check_extras(x, mask, bias)
    return SoftmaxCall(x, mask, bias, dim, config)
