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
from ._checks import check_seed
from ._library import cpu_at_once, direct, transformed
from .norm_config import (
    NormCall,
    NormConfig,
    check_parameter,
    configure,
    remembered,
    seed_tensor,
    shape_of,
    stream_dtype,
)
from .norm_library import (
    Gradients,
    call_backward,
    call_forward,
    layer_norm_op,
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
    lead, tail = x.shape[: x.dim() - dims], x.shape[x.dim() - dims :]
    flat = (lead.numel(), tail.numel())
    source, weight, bias = _wide(x, weight, bias, dtype=wide)
    z = reference.dropout(source.reshape(flat), config.dropout_p, seed).reshape(x.shape)
    z = z if residual is None else z + residual.to(wide)
    z = z if z_dtype is None else z.to(z_dtype)
    weight, bias = (None if y is None else y.reshape(-1) for y in (weight, bias))
    out = reference.norm(
        z.to(wide).reshape(flat), weight, bias,
        centre=config.centre, eps=config.eps, weight_offset=config.weight_offset,
    )[0]  # fmt: skip
    return out.reshape(x.shape).to(x.dtype), z


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
        z, weight, mean, rstd, seed = ctx.saved_tensors
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
    ctx.save_for_backward(x if z is None else z, weight, mean, rstd, seed)
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


_Function, _Served = direct(NormFunction), direct(_ServedFunction)


class _NormBackward(torch.autograd.Function):
    """The backward as a differentiable function; its own gradient is that of the formula."""

    @staticmethod
    def forward(ctx: Any, dout, dz, z, weight, mean, rstd, seed, dims, dtypes, config, backend):
        ctx.save_for_backward(dout, dz, z, weight, seed)
        ctx.dims, ctx.config = dims, config
        ctx.set_materialize_grads(False)
        return call_backward(dout, dz, z, weight, mean, rstd, seed, dims, dtypes, config, backend)

    @staticmethod
    def backward(ctx: Any, *cotangents):
        dout, dz, z, weight, seed = ctx.saved_tensors
        inputs = (dout, dz, z, weight)
        wanted = [x is not None and x.requires_grad for x in inputs]
        with torch.enable_grad():
            # Views, so that nothing is differentiated past the inputs.
            leaves: list[Any] = [None if x is None else x.view_as(x) for x in inputs]
            grads = _backward_formula(leaves, seed, ctx.dims, ctx.config)
        pairs = [
            (g, c.to(g.dtype))
            for g, c in zip(grads, cotangents, strict=True)
            if c is not None and g.requires_grad
        ]
        if not pairs:  # the gradient of a weight does not depend on the weight
            return (None,) * 11
        chosen = [x for x, want in zip(leaves, wanted, strict=True) if want]
        found: Any = torch.autograd.grad(
            [g for g, _ in pairs],
            chosen,
            [c for _, c in pairs],
            allow_unused=True,
            create_graph=torch.is_grad_enabled(),
        )
        second = iter(found)
        return *(next(second) if want else None for want in wanted), *(None,) * 7


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
    _, eps, weight_offset, dropout_p = options
    # 1 == True == np.float32(1), a tensor may change, and dynamo warns about a cache.
    usual = type(eps) is type(weight_offset) is type(dropout_p) is float
    usual = usual and (native is not None or not _is_compiling())
    config = (remembered if usual else configure)(*options)
    if native is not None and config.dropout_p == 0.0 and seed is residual_dtype is None:
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
        raise ValueError(f"{name}: got a residual_dtype without a residual")
    if config.dropout_p == 0.0:
        if seed is not None:
            check_seed(name, seed, x)
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
    elif _grad_enabled() and _requires_grad(x, residual, weight, bias):
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
