"""What layer norm and RMS norm share: their options and the checks on their arguments."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


@functools.lru_cache(maxsize=256)
def configure(centre: bool, eps: float, weight_offset: float, dropout_p: float) -> NormConfig:
    """Check the options.

    Raises:
        TypeError: an option that is not a number.
        ValueError: eps below 0, dropout_p outside [0, 1].
    """
    config = NormConfig(centre, eps, weight_offset, dropout_p)
    for option in ("eps", "weight_offset", "dropout_p"):
        value = getattr(config, option)
        if not isinstance(value, (int, float)):
            raise TypeError(
                f"{config.name}: got {option} of type {type(value).__name__}, expected a float"
            )
    if not eps >= 0.0:
        raise ValueError(f"{config.name}: got eps={eps}, expected eps >= 0")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{config.name}: got dropout_p={dropout_p}, expected 0 <= dropout_p <= 1")
    return NormConfig(centre, float(eps), float(weight_offset), float(dropout_p))


def shape_of(name: str, x: Tensor, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """`normalized_shape` as a tuple, after a check of x against it.

    Raises:
        TypeError: x is not a floating-point tensor, or the shape not one of integers.
        ValueError: x does not end in `normalized_shape`.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got x of type {type(x).__name__}, expected a Tensor")
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{name}: got x of dtype {x.dtype}, expected float16, bfloat16, float32 or float64"
        )
    if isinstance(normalized_shape, (int, torch.SymInt)):
        shape: tuple[int, ...] = (normalized_shape,)
    else:
        try:
            shape = tuple(normalized_shape)
            integers = all(isinstance(n, (int, torch.SymInt)) for n in shape)
        except TypeError:
            integers = False
        if not integers:
            raise TypeError(f"{name}: got normalized_shape={normalized_shape!r}, expected integers")
    dims = len(shape)
    if dims == 0 or x.dim() < dims or x.shape[-dims:] != shape:
        raise ValueError(
            f"{name}: got x of shape {tuple(x.shape)}, expected one that ends in "
            f"normalized_shape={tuple(shape)}, of at least one dimension"
        )
    return shape


def check_parameter(name: str, what: str, y: Tensor, x: Tensor, shape: Sequence[int]) -> None:
    """Check weight, bias or residual: floating point, of `shape`, where x is.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: another shape or another device.
    """
    if not isinstance(y, Tensor):
        raise TypeError(f"{name}: got {what} of type {type(y).__name__}, expected a Tensor")
    if y.dtype not in DTYPES:
        raise TypeError(
            f"{name}: got {what} of dtype {y.dtype}, expected float16, bfloat16, float32 or float64"
        )
    if y.shape != shape:
        of = "x" if what == "residual" else "normalized_shape"
        raise ValueError(
            f"{name}: got {what} of shape {tuple(y.shape)}, expected that of {of}, {tuple(shape)}"
        )
    if y.device != x.device:
        raise ValueError(f"{name}: got {what} on {y.device}, expected the device of x, {x.device}")


def seed_tensor(name: str, seed: int | Tensor | None, x: Tensor) -> Tensor:
    """The seed of a dropout as one int64 where x is; None draws it from torch's generator.

    Raises:
        TypeError, ValueError: neither an integer of 64 bits nor a tensor with one.
    """
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    if isinstance(seed, Tensor):
        if seed.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: got seed of dtype {seed.dtype}, expected int64")
        if seed.numel() != 1:
            raise ValueError(f"{name}: got seed of shape {tuple(seed.shape)}, expected 1 element")
        return seed.detach().reshape(1).to(x.device, torch.int64)
    if not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"{name}: got seed of type {type(seed).__name__}, expected an int")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{name}: got seed={seed}, expected an integer of 64 bits, signed")
    return torch.full((1,), seed, dtype=torch.int64, device=x.device)


def stream_dtype(name: str, residual: Tensor, residual_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the residual that is returned."""
    if residual_dtype is None:
        return residual.dtype
    if residual_dtype not in DTYPES:
        raise TypeError(
            f"{name}: got residual_dtype={residual_dtype}, expected float16, bfloat16, float32 or "
            "float64"
        )
    return residual_dtype
