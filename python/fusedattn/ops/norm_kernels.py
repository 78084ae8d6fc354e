"""The norms' kernels: what they write to, and the backends in order of preference.

Kernels are objects with

    forward(call, out, z, mean, rstd)                       call a `NormCall`
    backward(call, dx, dresidual, dweight, dbias)           call a `NormBackwardCall`

on matrices (rows, width) with unit column stride and any row stride; with `any_rank` contiguous
tensors (…, width) as well; all others are contiguous vectors. They write every element of
their outputs; nothing is empty. x is float64 if any of x, residual and z is; the statistics are
float32, float64 for a float64 x.

forward   z = dropout(x) + residual, rounded to its dtype before anything is computed from it, and
          out = (z − mean) · rstd · (weight_offset + weight) + bias. z is None where it is x itself,
          mean for RMS norm, both statistics where no gradient will need them.
backward  the gradient of z plus dz, written to dresidual, and through the dropout to dx; dweight
          and dbias, each (width,) in its own dtype, summed over rows in float32. Outputs but dx
          are None where unwanted, dout and dz where they are zero.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..reference import functional as reference
from ._backends import standard_backends
from ._library import LibraryOp
from ._op import Outputs
from ._registry import Refusal
from .norm_config import (
    NormBackwardCall,
    NormCall,
    NormConfig,
    check_backward_call,
    check_call,
    matrix_shape,
)

_contiguous = torch.contiguous_format


def _rows_of(call: Any) -> Tensor:
    """The rows that a call normalises, or whose norm it differentiates."""
    return call.x if isinstance(call, NormCall) else call.z


# --- cuda: csrc/cuda/norm.cu ---------------------------------------------------------------------


def _float64_refused(call: Any) -> Refusal | None:
    for name in ("residual", "weight", "bias"):
        x = getattr(call, name, None)
        if x is not None and x.dtype == torch.float64:
            return Refusal(f"{name} is torch.float64", "use float32, bfloat16 or float16")
    return None


# --- triton: kernels/norm_fwd.py, norm_bwd.py ----------------------------------------------------


def _triton_kernels() -> Any:
    from ..kernels.norm_bwd import norm_backward
    from ..kernels.norm_fwd import norm_forward

    return SimpleNamespace(forward=norm_forward, backward=norm_backward, any_rank=False)


# --- reference: reference/functional.py ----------------------------------------------------------


def _reference_kernels() -> Any:
    def in_dtype(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
        return [None if x is None else x.to(dtype) for x in tensors]

    def forward(call: NormCall, out: Any, z: Any, mean: Any, rstd: Any) -> None:
        wide = torch.float64 if call.x.dtype == torch.float64 else torch.float32
        x, residual, weight, bias = in_dtype(wide, *call[:4])
        source = reference.dropout(x, call.config.dropout_p, call.seed)
        if residual is not None:
            source = source + residual
        if z is not None:
            source = z.copy_(source).to(wide)
        result, average, scale = reference.norm(source, weight, bias, **_options(call.config))
        out.copy_(result)
        for statistic, value in ((mean, average), (rstd, scale)):
            if statistic is not None:
                statistic.copy_(value.squeeze(-1))

    def backward(call: NormBackwardCall, dx: Any, dresidual: Any, dweight: Any, dbias: Any) -> None:
        inputs = in_dtype(call.rstd.dtype, *call[:4])
        total, for_weight, for_bias = reference.norm_backward(*inputs, **_options(call.config))
        dx.copy_(reference.dropout(total, call.config.dropout_p, call.seed))
        if dresidual is not None:
            dresidual.copy_(total)
        for grad, value in ((dweight, for_weight), (dbias, for_bias)):
            if grad is not None:
                grad.copy_(value.sum(0))

    return SimpleNamespace(forward=forward, backward=backward, any_rank=False)


def _options(config: NormConfig) -> dict[str, Any]:
    return {
        "centre": config.centre,
        "eps": config.eps,
        "weight_offset": config.weight_offset,
    }


BACKENDS = standard_backends(
    "norm", _rows_of, _triton_kernels, _reference_kernels, "x", gpu_refuses=_float64_refused
)

# --- outputs -------------------------------------------------------------------------------------


def _empty_outputs(call: NormCall) -> Outputs:
    """out and z, contiguous, in the shape of x; mean and rstd in that of its rows."""
    x = call.x
    out = torch.empty_like(x, memory_format=_contiguous)
    z = None
    if call.z_dtype is not None:
        z = torch.empty_like(x, dtype=call.z_dtype, memory_format=_contiguous)
    if not call.statistics:
        return out, z, None, None
    rows = x.shape[: -call.dims]
    wide = x.dtype in (torch.float32, torch.float64)
    rstd = x.new_empty(rows) if wide else x.new_empty(rows, dtype=torch.float32)
    return out, z, rstd.new_empty(rows) if call.config.centre else None, rstd


def _empty_gradients(call: NormBackwardCall) -> Outputs:
    """dx, dresidual, dweight and dbias; all but dx only where they have a dtype."""
    z, (_, width) = call.z, matrix_shape(call.z, call.dims)
    dx = torch.empty_like(z, dtype=call.x_dtype, memory_format=_contiguous)
    dresidual = dweight = dbias = None
    if call.residual_dtype is not None:
        dresidual = torch.empty_like(z, dtype=call.residual_dtype, memory_format=_contiguous)
    if call.weight_dtype is not None:
        dweight = z.new_empty(width, dtype=call.weight_dtype)
    if call.bias_dtype is not None:
        dbias = z.new_empty(width, dtype=call.bias_dtype)
    return dx, dresidual, dweight, dbias


def _matrix(x: Any, shape: tuple[int, int], dims: int, any_rank: bool) -> Any:
    """As the kernels take it; copied only where its strides allow no view (rows, width)."""
    if x is not None and not (any_rank and dims == 1 and x.is_contiguous()):
        if dims != 1 or x.dim() != 2:
            x = x.reshape(shape)
        if not x.is_contiguous() and x.stride(1) != 1:
            x = x.contiguous()
    return x


def _vector(x: Tensor | None) -> Tensor | None:
    return x if x is None or (x.dim() == 1 and x.is_contiguous()) else x.reshape(-1).contiguous()


def _zero(*tensors: Tensor | None) -> None:
    for x in tensors:
        if x is not None:
            x.zero_()


def _run_forward(call: NormCall, kernels: Any) -> Outputs:
    outputs = out, z, mean, rstd = _empty_outputs(call)
    shape = matrix_shape(call.x, call.dims)
    if 0 in shape:
        _zero(mean, rstd)
        return outputs
    form = (shape, call.dims, kernels.any_rank)
    x, residual, out, z = (_matrix(y, *form) for y in (call.x, call.residual, out, z))
    given = NormCall(x, residual, _vector(call.weight), _vector(call.bias), *call[4:])
    kernels.forward(given, out, z, _vector(mean), _vector(rstd))
    return outputs


def _run_backward(call: NormBackwardCall, kernels: Any) -> Outputs:
    grads = dx, dresidual, dweight, dbias = _empty_gradients(call)
    shape = matrix_shape(call.z, call.dims)
    if 0 in shape:
        _zero(dweight, dbias)
        return grads
    form = (shape, call.dims, kernels.any_rank)
    dout, dz, z, dx, dresidual = (_matrix(y, *form) for y in (*call[:3], dx, dresidual))
    weight, mean, rstd = (_vector(y) for y in call[3:6])
    given = NormBackwardCall(dout, dz, z, weight, mean, rstd, *call[6:])  # type: ignore[arg-type]
    kernels.backward(given, dx, dresidual, dweight, dbias)
    return grads


def _usual_backward(call: NormBackwardCall, native: Any) -> Outputs | None:
    if call.seed is not None or call.dims != 1:
        return None
    statistics = call[4:6]
    if call.rstd.dim() != 1:  # not those of a usual forward
        statistics = _vector(call.mean), _vector(call.rstd)  # type: ignore[assignment]
    return native.usual_norm_backward(*call[:4], *statistics, call.dtypes, call.config)


# --- library ops ---------------------------------------------------------------------------------

norm_fwd = LibraryOp(
    "norm_fwd", NormCall, ("out", "z", "mean", "rstd"),
    allocate=_empty_outputs, run=_run_forward, check=check_call,
    wanted=lambda call: (
        True, call.z_dtype is not None, call.statistics and call.config.centre, call.statistics
    ),
)  # fmt: skip
norm_bwd = LibraryOp(
    "norm_bwd", NormBackwardCall, ("dx", "dresidual", "dweight", "dbias"),
    allocate=_empty_gradients, run=_run_backward, check=check_backward_call,
    wanted=lambda call: [dtype is not None for dtype in call.dtypes],
    usual=_usual_backward,
)  # fmt: skip
