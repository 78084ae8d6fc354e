"""What layer norm and RMS norm share: their options and the checks on their arguments."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import (
    FLOATS,
    check_device,
    check_integer,
    check_like,
    check_number,
    check_probability,
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
    """One call, of which the last `dims` dimensions are normalised.

    z_dtype: of the residual stream; None where z is x itself, without residual and dropout.
    statistics: a gradient may want mean and rstd.
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    seed: Tensor | None
    dims: int
    z_dtype: torch.dtype | None
    statistics: bool
    config: NormConfig


class NormBackwardCall(NamedTuple):
    """The gradients of out and z, either None for zero, with what the forward left.

    mean and rstd have the shape of the rows, which are the leading dimensions of z, or one
    dimension. The dtypes are those of the gradients that are wanted; that of x always is.
    """

    dout: Tensor | None
    dz: Tensor | None
    z: Tensor
    weight: Tensor | None
    mean: Tensor | None
    rstd: Tensor
    seed: Tensor | None
    dims: int
    x_dtype: torch.dtype
    residual_dtype: torch.dtype | None
    weight_dtype: torch.dtype | None
    bias_dtype: torch.dtype | None
    config: NormConfig

    @property
    def dtypes(self) -> tuple[torch.dtype | None, ...]:
        """Of the gradients of x, residual, weight and bias."""
        return self[8:12]


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


def _check_rows(
    name: str, x: Tensor, weight: Any, seed: Any, dims: int, config: NormConfig
) -> tuple[int, ...]:
    """What both directions have in common; returns the normalised shape."""
    if not 1 <= dims <= x.dim():
        raise ValueError(
            f"{name}: got dims={dims} of x of {x.dim()} dimensions, expected 1 or more"
        )
    shape = shape_of(name, x, x.shape[x.dim() - dims :])
    if weight is not None:
        check_parameter(name, "weight", weight, x, shape)
    if config.dropout_p != 0.0:
        if seed is None:
            raise ValueError(f"{name}: got dropout_p={config.dropout_p} without a seed")
        check_like(name, "seed", seed, (1,), torch.int64, x.device)
    return shape


def check_call(call: NormCall) -> NormCall:
    """A call from a traced or exported program, checked as the public function checks its own."""
    config = configure(*call.config)
    x, residual, weight, bias, seed, dims, z_dtype = call[:7]
    name = config.name
    shape = _check_rows(name, x, weight, seed, dims, config)
    if bias is not None:
        check_parameter(name, "bias", bias, x, shape)
    if residual is not None:
        check_parameter(name, "residual", residual, x, x.shape)
    if (residual is not None or config.dropout_p != 0.0) != (z_dtype is not None):
        raise ValueError(f"{name}: got z_dtype={z_dtype}, expected one with a residual or dropout")
    if z_dtype is not None:
        streams = (stream_dtype(name, x, z_dtype), None if residual is None else residual.dtype)
        if torch.float64 in streams and x.dtype != torch.float64:
            raise ValueError(f"{name}: got x of {x.dtype} in a stream of float64, expected float64")
    return call._replace(config=config)


def check_backward_call(call: NormBackwardCall) -> NormBackwardCall:
    """The same for a call of the backward."""
    config = configure(*call.config)
    z, name = call.z, f"{config.name}'s backward"
    _check_rows(name, z, call.weight, call.seed, call.dims, config)
    for dtype in call.dtypes:
        if dtype is not None:
            stream_dtype(name, z, dtype)
    if call.weight_dtype is not None and call.weight is None:
        raise ValueError(f"{name}: got weight_dtype={call.weight_dtype} without a weight")
    if config.centre and call.mean is None:
        raise ValueError(f"{name}: got no mean, expected that of each row")
    call = call._replace(mean=call.mean if config.centre else None, config=config)
    wide = torch.float64 if call.x_dtype == torch.float64 else torch.float32
    flat = call.rstd.dim() == 1
    rows = (matrix_shape(z, call.dims)[0],) if flat else z.shape[: z.dim() - call.dims]
    for what, x, shape, dtype in (
        ("dout", call.dout, z.shape, call.x_dtype), ("dz", call.dz, z.shape, z.dtype),
        ("mean", call.mean, rows, wide), ("rstd", call.rstd, rows, wide),
    ):  # fmt: skip
        if x is not None:
            check_like(name, what, x, shape, dtype, z.device)
    return call


def matrix_shape(x: Tensor, dims: int) -> tuple[int, int]:
    """(rows, width) of a tensor whose last `dims` dimensions are normalised."""
    shape = x.shape
    if dims == 1 and len(shape) == 2:
        return shape[0], shape[1]
    return math.prod(shape[:-dims]), math.prod(shape[-dims:])
