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
from ._checks import check_seed, seed_tensor
from ._library import cpu_at_once, watched
from ._op import Op, Outputs
from .norm_config import (
    NormBackwardCall,
    NormCall,
    check_parameter,
    configure,
    matrix_shape,
    remembered,
    shape_of,
    stream_dtype,
)
from .norm_kernels import BACKENDS, norm_bwd, norm_fwd

# Looked up once: what follows runs on every call.
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled

# --- formulas ------------------------------------------------------------------------------------


def _wide(*tensors: Tensor | None, dtype: torch.dtype) -> list[Any]:
    return [None if x is None else x.to(dtype) for x in tensors]


def _formula(call: NormCall) -> Outputs:
    """The reference, differentiable to any order, with the rounding of the kernels."""
    x, residual, weight, bias, seed, dims, z_dtype, _, config = call
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    start = x.dim() - dims
    source, weight, bias = _wide(x, weight, bias, dtype=wide)
    if config.dropout_p != 0.0:  # by rows; else shapes stay symbols in what is exported
        rows = matrix_shape(x, dims)
        source = reference.dropout(source.reshape(rows), config.dropout_p, seed).reshape(x.shape)
    z = source if residual is None else source + residual.to(wide)
    z = z if z_dtype is None else z.to(z_dtype)
    weight, bias = (None if y is None else y.flatten() for y in (weight, bias))
    out = reference.norm(
        z.to(wide).flatten(start), weight, bias,
        centre=config.centre, eps=config.eps, weight_offset=config.weight_offset,
    )[0]  # fmt: skip
    return out.reshape_as(x).to(x.dtype), z, None, None


def _backward_formula(call: NormBackwardCall) -> Outputs:
    """dx, dresidual, dweight and dbias by the reference, in float32 or float64."""
    config, shape = call.config, call.z.shape
    given = call.dout if call.dout is not None else call.dz
    wide = torch.promote_types(call.z.dtype, torch.float32)
    if given is not None:
        wide = torch.promote_types(wide, given.dtype)
    rows = matrix_shape(call.z, call.dims)
    dout, dz, z = (None if y is None else y.to(wide).reshape(rows) for y in call[:3])
    weight = None if call.weight is None else call.weight.to(wide).reshape(-1)
    total, for_weight, for_bias = reference.norm_backward(
        dout, dz, z, weight,  # type: ignore[arg-type]
        centre=config.centre, eps=config.eps, weight_offset=config.weight_offset,
    )  # fmt: skip
    dx = reference.dropout(total, config.dropout_p, call.seed)
    return dx.reshape(shape), total.reshape(shape), for_weight.sum(0), for_bias.sum(0)


# --- autograd ------------------------------------------------------------------------------------


def _keep(call: NormCall, outputs: Outputs, wanted: Any) -> tuple[Outputs, tuple[Any, ...]]:
    _, z, mean, rstd = outputs
    x, residual, weight, bias, seed = call[:5]
    _, for_residual, for_weight, for_bias, _ = wanted
    # Without dropout x and a residual of its dtype have one gradient.
    own: Any = for_residual and not (call.config.dropout_p == 0.0 and residual.dtype is x.dtype)  # type: ignore[union-attr]
    dtypes = (
        x.dtype,
        residual.dtype if own else None,  # type: ignore[union-attr]
        weight.dtype if for_weight else None,  # type: ignore[union-attr]
        bias.dtype if for_bias else None,  # type: ignore[union-attr]
    )
    return (x if z is None else z, weight, mean, rstd, seed), (call.dims, *dtypes, call.config)


def _pull_back(douts: Any, saved: Any, rest: Any, wanted: Any, run: Any) -> Outputs:
    call = NormBackwardCall(*douts, *(None,) * (2 - len(douts)), *saved, *rest)
    dx, dresidual, dweight, dbias = run(call)
    if call.dims > 1:
        shape = call.z.shape[call.z.dim() - call.dims :]
        dweight, dbias = (None if y is None else y.view(shape) for y in (dweight, dbias))
    if dresidual is None and wanted[1]:
        dresidual = dx
    return dx, dresidual, dweight, dbias, None


def _op(name: str) -> Op:
    return Op(
        name, BACKENDS, norm_fwd, _formula, differentiable=range(4), cotangents=2,
        backward=Op(name, BACKENDS, norm_bwd, _backward_formula), keep=_keep, pull_back=_pull_back,
    )  # fmt: skip


layer_norm_op, rms_norm_op = _op("layer_norm"), _op("rms_norm")

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
    op = layer_norm_op if options[0] else rms_norm_op
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
                call = NormCall(x, residual, weight, bias, None, 1, None, True, config)
                served = op.record(call, "cpu", lambda *_: found)
                return served[0] if residual is None else served
            return found[0] if residual is None else found[:2]
    name = op.name
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
    if bias is weight and bias is not None:
        bias = bias.view_as(bias)  # one tensor passed as both would get the gradient of one
    statistics = watched() or (_grad_enabled() and _requires_grad(x, residual, weight, bias))
    call = NormCall(x, residual, weight, bias, seed, dims, z_dtype, statistics, config)
    out, *stream = op(call, backend)
    if out.dtype is not dtype:
        out = out.to(dtype)
    return out if residual is None else (out, stream[0])


def _requires_grad(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.requires_grad for x in tensors)
