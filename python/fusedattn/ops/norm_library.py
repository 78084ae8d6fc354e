"""The norms as library ops: schemas, fake kernels, and how a call reaches a backend.

`call_forward` and `call_backward` are what autograd uses. In plain eager mode they run the kernel
at once; where something watches or traces (compile, export, jit.trace, dispatch modes, the
profiler) they go through `torch.ops.fusedattn`. There a call may have come with other tensors
than it was traced with, so that it is checked again. Every dtype pair is native, so there is no
autocast rule.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import check_like
from ._library import cpu_at_once, define, plain
from ._registry import Op
from .norm_backends import BACKENDS
from .norm_config import (
    NormCall,
    NormConfig,
    check_parameter,
    configure,
    shape_of,
    stream_dtype,
)

layer_norm_op = Op("layer_norm", BACKENDS)
rms_norm_op = Op("rms_norm", BACKENDS)


class Gradients(NamedTuple):
    """The dtypes of the gradients that are wanted; that of x always is."""

    x: torch.dtype
    residual: torch.dtype | None
    weight: torch.dtype | None
    bias: torch.dtype | None


# --- outputs -------------------------------------------------------------------------------------

_contiguous = torch.contiguous_format


def _matrix_shape(x: Tensor, dims: int) -> tuple[int, int]:
    """(rows, width) of a tensor whose last `dims` dimensions are normalised."""
    shape = x.shape
    if dims == 1 and len(shape) == 2:
        return shape[0], shape[1]
    return math.prod(shape[:-dims]), math.prod(shape[-dims:])


def _empty_outputs(
    x: Tensor, rows: int, z_dtype: torch.dtype | None, centre: bool, statistics: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """out, z, mean and rstd; out and z are contiguous, in the shape of x."""
    out = torch.empty_like(x, memory_format=_contiguous)
    z = None
    if z_dtype is not None:
        z = torch.empty_like(x, dtype=z_dtype, memory_format=_contiguous)
    if not statistics:
        return out, z, None, None
    wide = x.dtype in (torch.float32, torch.float64)
    rstd = x.new_empty(rows) if wide else x.new_empty(rows, dtype=torch.float32)
    return out, z, rstd.new_empty(rows) if centre else None, rstd


def _empty_gradients(
    z: Tensor, width: int, dtypes: Gradients
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dresidual, dweight and dbias; all but dx only where they have a dtype."""
    dx = torch.empty_like(z, dtype=dtypes.x, memory_format=_contiguous)
    dresidual = dweight = dbias = None
    if dtypes.residual is not None:
        dresidual = torch.empty_like(z, dtype=dtypes.residual, memory_format=_contiguous)
    if dtypes.weight is not None:
        dweight = z.new_empty(width, dtype=dtypes.weight)
    if dtypes.bias is not None:
        dbias = z.new_empty(width, dtype=dtypes.bias)
    return dx, dresidual, dweight, dbias


def _present(like: Tensor, outputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Outputs as a library op returns them: an absent one is empty."""
    return tuple(like.new_empty(0) if x is None else x for x in outputs)


# --- what runs -----------------------------------------------------------------------------------


def _matrices(
    rows: int, width: int, dims: int, any_rank: bool, *tensors: Tensor | None
) -> list[Any]:
    """As the kernels take them; copied only where their strides allow no view (rows, width)."""
    found = []
    for x in tensors:
        if x is not None and not (any_rank and dims == 1 and x.is_contiguous()):
            if dims != 1 or x.dim() != 2:
                x = x.reshape(rows, width)
            if not x.is_contiguous() and x.stride(1) != 1:
                x = x.contiguous()
        found.append(x)
    return found


def _vector(x: Tensor | None) -> Tensor | None:
    return x if x is None or (x.dim() == 1 and x.is_contiguous()) else x.reshape(-1).contiguous()


def _run_forward(
    x, residual, weight, bias, seed, dims, z_dtype, config, backend, statistics=True
):  # fmt: skip
    rows, width = _matrix_shape(x, dims)
    outputs = out, z, mean, rstd = _empty_outputs(x, rows, z_dtype, config.centre, statistics)
    if rows == 0 or width == 0:
        for statistic in (mean, rstd):
            if statistic is not None:
                statistic.zero_()
        return outputs
    op = layer_norm_op if config.centre else rms_norm_op
    kernels = op.kernels(backend)
    x, residual, out, z = _matrices(rows, width, dims, kernels.any_rank, x, residual, out, z)
    kernels.forward(x, residual, _vector(weight), _vector(bias), seed, out, z, mean, rstd, config)
    return outputs


def _run_backward(dout, dz, z, weight, mean, rstd, seed, dims, dtypes, config, backend):
    rows, width = _matrix_shape(z, dims)
    grads = dx, dresidual, dweight, dbias = _empty_gradients(z, width, dtypes)
    if rows == 0 or width == 0:
        for x in (dweight, dbias):
            if x is not None:
                x.zero_()
        return grads
    op = layer_norm_op if config.centre else rms_norm_op
    kernels = op.kernels(backend)
    dout, dz, z, dx, dresidual = _matrices(
        rows, width, dims, kernels.any_rank, dout, dz, z, dx, dresidual
    )
    kernels.backward(
        dout, dz, z, _vector(weight), mean, rstd, seed, dx, dresidual, dweight, dbias, config
    )
    return grads


# --- library ops ---------------------------------------------------------------------------------

_OPTIONS = "str backend, bool centre, float eps, float weight_offset, float dropout_p"


def _check(name, x, weight, seed, dims, config: NormConfig) -> tuple[int, ...]:
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


def _forward(x, residual, weight, bias, seed, dims, z_dtype, backend, *options):
    config = configure(*options)
    name = config.name
    shape = _check(name, x, weight, seed, dims, config)
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
    op = layer_norm_op if config.centre else rms_norm_op
    chosen = op.choose(backend, NormCall(x, residual, weight, bias, z_dtype, config))
    found = _run_forward(x, residual, weight, bias, seed, dims, z_dtype, config, chosen)
    return _present(x, found)


def _forward_fake(x, residual, weight, bias, seed, dims, z_dtype, backend, centre, *options):
    return _present(x, _empty_outputs(x, _matrix_shape(x, dims)[0], z_dtype, centre))


def _backward(
    dout, dz, z, weight, mean, rstd, seed, dims, x_dtype, residual_dtype, weight_dtype, bias_dtype,
    backend, *options,
):  # fmt: skip
    dtypes = Gradients(x_dtype, residual_dtype, weight_dtype, bias_dtype)
    config = configure(*options)
    name = f"{config.name}'s backward"
    _check(name, z, weight, seed, dims, config)
    mean = mean if config.centre else None
    for dtype in dtypes:
        if dtype is not None:
            stream_dtype(name, z, dtype)
    if weight_dtype is not None and weight is None:
        raise ValueError(f"{name}: got weight_dtype={weight_dtype} without a weight")
    wide = torch.float64 if x_dtype == torch.float64 else torch.float32
    rows = (_matrix_shape(z, dims)[0],)
    if config.centre and mean is None:
        raise ValueError(f"{name}: got no mean, expected that of each row")
    for what, x, shape, dtype in (
        ("dout", dout, z.shape, x_dtype), ("dz", dz, z.shape, z.dtype),
        ("mean", mean, rows, wide), ("rstd", rstd, rows, wide),
    ):  # fmt: skip
        if x is not None:
            check_like(name, what, x, shape, dtype, z.device)
    op = layer_norm_op if config.centre else rms_norm_op
    chosen = op.choose(backend, NormCall(z, None, weight, None, z.dtype, config))
    found = _run_backward(dout, dz, z, weight, mean, rstd, seed, dims, dtypes, config, chosen)
    return _present(z, found)


def _backward_fake(
    dout, dz, z, weight, mean, rstd, seed, dims, x_dtype, residual_dtype, weight_dtype, bias_dtype,
    *options,
):  # fmt: skip
    dtypes = Gradients(x_dtype, residual_dtype, weight_dtype, bias_dtype)
    return _present(z, _empty_gradients(z, _matrix_shape(z, dims)[1], dtypes))


norm_fwd = define(
    "norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, int dims, "
    f"ScalarType? z_dtype, {_OPTIONS}) -> (Tensor out, Tensor z, Tensor mean, Tensor rstd)",
    _forward, _forward_fake,
)  # fmt: skip
norm_bwd = define(
    "norm_bwd(Tensor? dout, Tensor? dz, Tensor z, Tensor? weight, Tensor? mean, Tensor rstd, "
    "Tensor? seed, int dims, ScalarType x_dtype, ScalarType? residual_dtype, "
    f"ScalarType? weight_dtype, ScalarType? bias_dtype, {_OPTIONS}) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _backward, _backward_fake,
)  # fmt: skip


def call_forward(
    x, residual, weight, bias, seed, dims, z_dtype, config, backend, statistics=True
):  # fmt: skip
    """out, z, mean and rstd; z is None where it is x itself, mean for RMS norm.

    Without `statistics`, which only a gradient needs, mean and rstd may be None.
    """
    if plain(x, residual, weight, bias, seed):
        return _run_forward(
            x, residual, weight, bias, seed, dims, z_dtype, config, backend, statistics
        )
    out, z, mean, rstd = norm_fwd(x, residual, weight, bias, seed, dims, z_dtype, backend, *config)
    return out, z if z_dtype is not None else None, mean if config.centre else None, rstd


def call_backward(dout, dz, z, weight, mean, rstd, seed, dims, dtypes, config, backend):
    """dx, dresidual, dweight and dbias; what has no dtype in `dtypes` is None."""
    native = cpu_at_once(backend)
    if native is not None and seed is None and dims == 1:
        found = native.usual_norm_backward(dout, dz, z, weight, mean, rstd, dtypes, config)
        if found is not None:
            return found
    if plain(dout, dz, z, weight, mean, rstd, seed):
        return _run_backward(dout, dz, z, weight, mean, rstd, seed, dims, dtypes, config, backend)
    found = norm_bwd(dout, dz, z, weight, mean, rstd, seed, dims, *dtypes, backend, *config)
    return tuple(x if dtype else None for x, dtype in zip(found, dtypes, strict=True))
