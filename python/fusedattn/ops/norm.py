"""Layer norm and RMS norm: one op, with the residual added and dropout applied in the same pass.

Per row of N elements, with w = weight_offset + weight (0 + weight for layer norm):

    z = dropout(x) + residual                       rounded to the dtype of the residual stream
    mean = Σ z / N (0 for RMS norm)                 rstd = (Σ (z − mean)² / N + eps)^−½
    n = (z − mean) · rstd                           out = n · w + bias

    g = dout · w
    dz' = rstd · (g − Σ g / N − n · Σ (g · n) / N) + dz        (without Σ g for RMS norm)
    dresidual = dz'     dx = dropout(dz') with the same mask     dweight = Σ dout · n over the rows
    dbias = Σ dout over the rows

(Ba et al. 2016; Zhang and Sennrich 2019.) Only z, mean and rstd are kept for the backward; without
residual and dropout z is x itself. Dropout's mask is a function of the seed and the position
(reference.philox), so that it is never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import functional as reference
from ._library import (
    cpu_at_once,
    differentiate,
    direct,
    keep,
    kept,
    second_order,
    transformed,
    watched,
)
from .norm_config import (
    NormCall,
    NormConfig,
    check_parameter,
    configure,
    seed_tensor,
    shape_of,
    stream_dtype,
)
from .norm_library import (
    Gradients,
    call_backward,
    call_forward,
    layer_norm_op,
    norm_bwd,
    norm_fwd,
    rms_norm_op,
)

# Looked up once: what follows runs on every call.
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled


def _wide(*tensors: Tensor | None, dtype: torch.dtype) -> list[Any]:
    return [None if x is None else x.to(dtype) for x in tensors]


def _formula(x, residual, weight, bias, seed, dims, z_dtype, config: NormConfig):
    """The reference, differentiable to any order, with the rounding of the kernels: (out, z)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    start = x.dim() - dims
    source, weight, bias = _wide(x, weight, bias, dtype=wide)
    if config.dropout_p != 0.0:  # by rows; else shapes stay symbols in what is exported
        rows = (x.shape[:start].numel(), x.shape[start:].numel())
        source = reference.dropout(source.reshape(rows), config.dropout_p, seed).reshape(x.shape)
    z = source if residual is None else source + residual.to(wide)
    z = z if z_dtype is None else z.to(z_dtype)
    weight, bias = (None if y is None else y.flatten() for y in (weight, bias))
    out = reference.norm(
        z.to(wide).flatten(start), weight, bias,
        centre=config.centre, eps=config.eps, weight_offset=config.weight_offset,
    )[0]  # fmt: skip
    return out.reshape_as(x).to(x.dtype), z


# --- autograd ------------------------------------------------------------------------------------


class NormFunction(torch.autograd.Function):
    """Differentiable layer norm or RMS norm on arguments that have been checked.

    apply(x, residual, weight, bias, seed, dims, z_dtype, config, backend) -> out, or (out, z) where
    there is a `z_dtype`: always with a residual or a dropout. The last `dims` dimensions of x are
    normalised, weight and bias have their shape; config is a `NormConfig`.
    """

    @staticmethod
    def forward(ctx: Any, x, residual, weight, bias, seed, dims, z_dtype, config, backend):
        outputs = call_forward(x, residual, weight, bias, seed, dims, z_dtype, config, backend)
        return _keep(ctx, outputs, x, residual, weight, bias, seed, dims, config, backend)

    @staticmethod
    def backward(ctx: Any, dout, dz=None):
        if dout is None and dz is None:
            return (None,) * 9
        z, weight, mean, rstd, seed = kept(ctx)
        differentiable = _grad_enabled() and not _is_compiling()
        backward = _NormBackward.apply if differentiable else call_backward
        dx, dresidual, dweight, dbias = backward(
            dout, dz, z, weight, mean, rstd, seed, *ctx.options
        )
        dims = ctx.options[0]
        if dims > 1:
            shape = z.shape[z.dim() - dims :]
            dweight, dbias = (None if y is None else y.view(shape) for y in (dweight, dbias))
        return dx, dx if ctx.shared else dresidual, dweight, dbias, None, None, None, None, None


def _keep(ctx: Any, outputs, x, residual, weight, bias, seed, dims, config, backend):
    """Keep for the backward what it needs; returns what the function does."""
    out, z, mean, rstd = outputs
    keep(ctx, x if z is None else z, weight, mean, rstd, seed)
    ctx.set_materialize_grads(False)
    _, for_residual, for_weight, for_bias = ctx.needs_input_grad[:4]
    # Without dropout x and a residual of its dtype have one gradient.
    shared = for_residual and config.dropout_p == 0.0 and residual.dtype is x.dtype
    wanted = Gradients(
        x.dtype,
        residual.dtype if for_residual and not shared else None,
        weight.dtype if for_weight else None,
        bias.dtype if for_bias else None,
    )
    ctx.shared, ctx.options = shared, (dims, wanted, config, backend)
    return out if z is None else (out, z)


class _ServedFunction(NormFunction):
    """The same of a call that is served already: `outputs` has all four of it."""

    @staticmethod
    def forward(ctx: Any, x, residual, weight, bias, seed, dims, outputs, config, backend):
        return _keep(ctx, outputs, x, residual, weight, bias, seed, dims, config, backend)


class _LibraryFunction(NormFunction):
    """The gradient of the library op, whose kernel checks the arguments: all four outputs."""

    @staticmethod
    def forward(ctx: Any, x, residual, weight, bias, seed, dims, z_dtype, config, backend):
        outputs = norm_fwd(x, residual, weight, bias, seed, dims, z_dtype, backend, *config)
        out, z, mean, rstd = outputs
        found = out, z if z_dtype else None, mean if config.centre else None, rstd
        _keep(ctx, found, x, residual, weight, bias, seed, dims, config, backend)
        ctx.mark_non_differentiable(mean, rstd, *(() if z_dtype else (z,)))
        return outputs

    @staticmethod
    def backward(ctx: Any, dout, dz=None, *statistics):
        return NormFunction.backward(ctx, dout, dz)


_Function, _Served = direct(NormFunction), direct(_ServedFunction)


class _NormBackward(torch.autograd.Function):
    """The backward as a differentiable function; its own gradient is that of the formula."""

    @staticmethod
    def forward(ctx: Any, dout, dz, z, weight, mean, rstd, seed, dims, dtypes, config, backend):
        keep(ctx, dout, dz, z, weight, seed)
        ctx.dims, ctx.config = dims, config
        ctx.set_materialize_grads(False)
        return call_backward(dout, dz, z, weight, mean, rstd, seed, dims, dtypes, config, backend)

    @staticmethod
    def backward(ctx: Any, *cotangents):
        *inputs, seed = kept(ctx)

        def formula(*inputs):
            return _backward_formula(inputs, seed, ctx.dims, ctx.config)

        return *second_order(formula, inputs, cotangents), *(None,) * 7


def _differentiable_forward(x, residual, weight, bias, seed, dims, z_dtype, backend, *options):
    arguments = (x, residual, weight, bias, seed, dims, z_dtype, NormConfig(*options), backend)
    return _LibraryFunction.apply(*arguments)


def _differentiable_backward(
    dout, dz, z, weight, mean, rstd, seed, dims, x_dtype, residual_dtype, weight_dtype, bias_dtype,
    backend, *options,
):  # fmt: skip
    dtypes = Gradients(x_dtype, residual_dtype, weight_dtype, bias_dtype)
    found = _NormBackward.apply(
        dout, dz, z, weight, mean, rstd, seed, dims, dtypes, NormConfig(*options), backend
    )
    return tuple(z.new_empty(0) if x is None else x for x in found)


differentiate(norm_fwd, _differentiable_forward)
differentiate(norm_bwd, _differentiable_backward)


def _backward_formula(inputs, seed, dims: int, config: NormConfig) -> tuple[Tensor, ...]:
    """dx, dresidual, dweight and dbias by the reference's formula, in float32 or float64."""
    dout, dz, z, weight = inputs
    given = dout if dout is not None else dz
    wide = torch.promote_types(torch.promote_types(z.dtype, given.dtype), torch.float32)
    shape = z.shape
    tail = shape[len(shape) - dims :].numel()
    rows = (shape[: len(shape) - dims].numel(), tail)
    matrices: list[Any] = [None if y is None else y.to(wide).reshape(rows) for y in inputs[:3]]
    dout, dz, z = matrices
    weight = None if weight is None else weight.to(wide).reshape(-1)
    total, for_weight, for_bias = reference.norm_backward(
        dout, dz, z, weight,
        centre=config.centre, eps=config.eps, weight_offset=config.weight_offset,
    )  # fmt: skip
    dx = reference.dropout(total, config.dropout_p, seed)
    return dx.reshape(shape), total.reshape(shape), for_weight.sum(0), for_bias.sum(0)


# --- what the public functions share -------------------------------------------------------------


def normalise(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: int | Tensor | None,
    residual_dtype: torch.dtype | None,
    options: tuple[bool, float, float, float],
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """Check the arguments, choose a backend and run: out, with a residual (out, residual_out).

    The options are centre, eps, weight_offset and dropout_p.
    """
    native = cpu_at_once(backend)
    # Dynamo traces through a cached function, but warns about it.
    uncached = native is None and _is_compiling()
    config = (configure.__wrapped__ if uncached else configure)(*options)
    if native is not None and config.dropout_p == 0.0 and residual_dtype is None:
        found = native.usual_norm_forward(
            x, normalized_shape, weight, bias, residual, config, _grad_enabled()
        )
        if found is not None:
            if found[3] is not None:  # kept for a gradient
                return _differentiable(
                    _Served, x, residual, weight, bias, None, 1, found, config, "cpu"
                )
            return found[0] if residual is None else found[:2]
    name = "layer_norm" if config.centre else "rms_norm"
    shape = shape_of(name, x, normalized_shape)
    dims = len(shape)
    if weight is not None:
        check_parameter(name, "weight", weight, x, shape)
    if bias is not None:
        check_parameter(name, "bias", bias, x, shape)
    z_dtype = None
    if residual is not None:
        check_parameter(name, "residual", residual, x, x.shape)
        z_dtype = stream_dtype(name, residual, residual_dtype)
        residual = residual.view_as(residual) if residual is x else residual
    elif residual_dtype is not None:
        raise ValueError(f"{name}: got residual_dtype={residual_dtype} without a residual")
    if config.dropout_p == 0.0:
        seed = None
    else:
        seed = seed_tensor(name, seed, x)
        z_dtype = z_dtype or x.dtype
    dtype = x.dtype
    if residual is not None and torch.float64 in (residual.dtype, z_dtype):
        x = x.to(torch.float64)  # a stream in float64 is computed in float64
    op = layer_norm_op if config.centre else rms_norm_op
    chosen = op.choose(backend, NormCall(x, residual, weight, bias, z_dtype, config))
    if transformed():
        out, z = _formula(x, residual, weight, bias, seed, dims, z_dtype, config)
    elif _grad_enabled() and _requires_grad(x, residual, weight, bias) and not watched():
        found = _differentiable(
            _Function, x, residual, weight, bias, seed, dims, z_dtype, config, chosen
        )
        out, z = (found, None) if z_dtype is None else found
    else:
        out, z, _, _ = call_forward(
            x, residual, weight, bias, seed, dims, z_dtype, config, chosen, statistics=False
        )
    if out.dtype is not dtype:
        out = out.to(dtype)
    return out if residual is None else (out, z)


def _differentiable(function, x, residual, weight, bias, *options: Any):
    """One tensor passed as both weight and bias would get the gradient of one."""
    if bias is weight and bias is not None:
        bias = bias.view_as(bias)
    return function.apply(x, residual, weight, bias, *options)


def _requires_grad(x, residual, weight, bias) -> bool:
    return (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
