"""The norms as library ops: schemas, fake kernels, and how a call reaches a backend.

`call_forward` and `call_backward` are what autograd uses. In plain eager mode they run the kernel
at once; where something watches or traces (compile, export, jit.trace, dispatch modes, the
profiler) they go through `torch.ops.fusedattn`. Every dtype pair is native, so there is no autocast
rule.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._library import cpu_at_once, define, plain
from ._registry import Op
from .norm_backends import BACKENDS
from .norm_config import NormConfig

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


def _forward(x, residual, weight, bias, seed, dims, z_dtype, backend, *options):
    config = NormConfig(*options)
    found = _run_forward(x, residual, weight, bias, seed, dims, z_dtype, config, backend)
    return _present(x, found)


def _forward_fake(x, residual, weight, bias, seed, dims, z_dtype, backend, centre, *options):
    return _present(x, _empty_outputs(x, _matrix_shape(x, dims)[0], z_dtype, centre))


def _backward(
    dout, dz, z, weight, mean, rstd, seed, dims, x_dtype, residual_dtype, weight_dtype, bias_dtype,
    backend, *options,
):  # fmt: skip
    dtypes = Gradients(x_dtype, residual_dtype, weight_dtype, bias_dtype)
    config = NormConfig(*options)
    found = _run_backward(
        dout, dz, z, weight, None if not config.centre else mean, rstd, seed, dims, dtypes, config,
        backend,
    )  # fmt: skip
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
    _forward, _forward_fake, instead="fusedattn.layer_norm or fusedattn.rms_norm",
)  # fmt: skip
norm_bwd = define(
    "norm_bwd(Tensor? dout, Tensor? dz, Tensor z, Tensor? weight, Tensor? mean, Tensor rstd, "
    "Tensor? seed, int dims, ScalarType x_dtype, ScalarType? residual_dtype, "
    f"ScalarType? weight_dtype, ScalarType? bias_dtype, {_OPTIONS}) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _backward, _backward_fake, instead="fusedattn.layer_norm or fusedattn.rms_norm",
)  # fmt: skip


def call_forward(
    x, residual, weight, bias, seed, dims, z_dtype, config, backend, statistics=True
):  # fmt: skip
    """out, z, mean and rstd; z is None where it is x itself, mean for RMS norm.

    Without `statistics`, which only a gradient needs, mean and rstd may be None.
    """
    if plain(x, residual, weight, bias):
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
    if plain(dout, dz, z, weight):
        return _run_backward(dout, dz, z, weight, mean, rstd, seed, dims, dtypes, config, backend)
    found = norm_bwd(dout, dz, z, weight, mean, rstd, seed, dims, *dtypes, backend, *config)
    return tuple(x if dtype else None for x, dtype in zip(found, dtypes, strict=True))
