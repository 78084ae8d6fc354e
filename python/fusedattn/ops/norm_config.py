"""What layer norm and RMS norm share: their options and the checks on their arguments."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import (
    FLOATS,
    check_device,
    check_integer,
    check_number,
    check_probability,
    check_seed,
    check_tensor,
)


class NormConfig(NamedTuple):
    """The options of one call, in the order of the library ops' schemas.

    centre: layer norm, which subtracts the mean; False for RMS norm.
    """

    centre: bool
    eps: float
    weight_offset: float = 0.0
    dropout_p: float = 0.0

    @property
    def name(self) -> str:
        """The public function."""
        return "layer_norm" if self.centre else "rms_norm"


class NormCall(NamedTuple):
    """What a backend looks at to take or refuse a call."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    z_dtype: torch.dtype | None
    config: NormConfig


def configure(centre: bool, eps: float, weight_offset: float, dropout_p: float) -> NormConfig:
    """Check the options.

    Raises:
        TypeError: an option that is not a number.
        ValueError: eps below 0, dropout_p outside [0, 1].
    """
    op = NormConfig(centre, 0.0).name
    config = NormConfig(
        centre,
        check_number(op, "eps", eps),
        check_number(op, "weight_offset", weight_offset),
        check_probability(op, "dropout_p", dropout_p),
    )
    if not config.eps >= 0.0:
        raise ValueError(f"{op}: got eps={eps}, expected eps >= 0")
    return config


remembered = functools.lru_cache(maxsize=256)(configure)


def shape_of(name: str, x: Tensor, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """`normalized_shape` as a tuple, after a check of x against it.

    Raises:
        TypeError: x is not a floating-point tensor, or the shape not one of integers.
        ValueError: x does not end in `normalized_shape`.
    """
    given = check_tensor(name, "x", x)
    if type(normalized_shape) is int:
        shape: tuple[int, ...] = (normalized_shape,)
    else:
        shape = _integers(name, normalized_shape)
    dims = len(shape)
    if dims == 0 or len(given) < dims or given[-dims:] != shape:
        raise ValueError(
            f"{name}: got x of shape {tuple(given)}, expected one that ends in "
            f"normalized_shape={_integers(name, shape)}, of at least one dimension"
        )
    return shape


def _integers(name: str, shape: Any) -> tuple[int, ...]:
    expected = "an int or a sequence of ints"
    if isinstance(shape, Tensor):
        expected += " (the weight comes after it)"
    elif isinstance(shape, Iterable):
        return tuple(check_integer(name, "normalized_shape", n, expected) for n in shape)
    return (check_integer(name, "normalized_shape", shape, expected),)


def check_parameter(name: str, what: str, y: Tensor, x: Tensor, shape: Sequence[int]) -> None:
    """Check weight, bias or residual: floating point, of `shape`, where x is.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: another shape or another device.
    """
    given = check_tensor(name, what, y)
    if given != shape:
        of = "x" if what == "residual" else "normalized_shape"
        raise ValueError(
            f"{name}: got {what} of shape {tuple(given)}, expected that of {of}, {tuple(shape)}"
        )
    check_device(name, what, y, "x", x)


def seed_tensor(name: str, seed: int | Tensor | None, x: Tensor) -> Tensor:
    """The seed of a dropout as one int64 where x is; None draws it from torch's generator.

    Raises:
        TypeError, ValueError: neither an integer of 64 bits nor a tensor with one.
    """
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    seed = check_seed(name, seed, x)
    if isinstance(seed, Tensor):
        return seed.detach().reshape(1).to(x.device, torch.int64)
    return torch.full((1,), seed, dtype=torch.int64, device=x.device)


def stream_dtype(name: str, residual: Tensor, residual_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the residual that is returned."""
    if residual_dtype is None:
        return residual.dtype
    if not isinstance(residual_dtype, torch.dtype) or residual_dtype not in FLOATS:
        dtype = isinstance(residual_dtype, torch.dtype)
        got = f"={residual_dtype}" if dtype else f" of type {type(residual_dtype).__name__}"
        raise TypeError(
            f"{name}: got residual_dtype{got}, expected float32, bfloat16, float16 or float64"
        )
    return residual_dtype
