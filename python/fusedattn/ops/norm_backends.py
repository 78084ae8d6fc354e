"""The norms' backends in order of preference: what each takes, and its kernels.

Kernels are objects with

    forward(x, residual, weight, bias, seed, out, z, mean, rstd, config)
    backward(dout, dz, z, weight, mean, rstd, seed, dx, dresidual, dweight, dbias, config)

on matrices (rows, width) with unit column stride and any row stride; with `any_rank` contiguous
tensors (…, width) as well. They write every element of their outputs; nothing is empty. x is
float64 if any of x, residual and z is; the statistics are float32, float64 for a float64 x.

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

from .. import _native
from ..reference import functional as reference
from ._backends import cpu_refuses, cuda_refuses, emulated_refuses, stream_of, triton_refuses
from ._registry import Backend, Refusal
from .norm_config import NormCall, NormConfig

# --- cpu: csrc/cpu/rowwise/norm.cpp --------------------------------------------------------------


def _cpu_refuses(call: NormCall, requested: bool) -> Refusal | None:
    return cpu_refuses(call.x, "x")


def _cpu_kernels() -> Any:
    native = _native.cpu
    return SimpleNamespace(
        forward=native.norm_forward, backward=native.norm_backward, any_rank=True
    )


# --- cuda: csrc/cuda/norm.cu ---------------------------------------------------------------------


def _float64_refused(call: NormCall) -> Refusal | None:
    for name, x in (("residual", call.residual), ("weight", call.weight), ("bias", call.bias)):
        if x is not None and x.dtype == torch.float64:
            return Refusal(f"{name} is torch.float64", "use float32, bfloat16 or float16")
    return None


def _cuda_refuses(call: NormCall, requested: bool) -> Refusal | None:
    return cuda_refuses(call.x, "x") or _float64_refused(call)


def _emulated_refuses(call: NormCall, requested: bool) -> Refusal | None:
    return emulated_refuses(call.x, requested) or _float64_refused(call)


def _cuda_kernels(native: Any) -> Any:
    def forward(x, residual, weight, bias, seed, out, z, mean, rstd, config):
        native.norm_forward(
            x, residual, weight, bias, seed, out, z, mean, rstd, config, stream_of(x)
        )

    def backward(dout, dz, z, weight, mean, rstd, seed, dx, dresidual, dweight, dbias, config):
        native.norm_backward(
            dout, dz, z, weight, mean, rstd, seed, dx, dresidual, dweight, dbias, config,
            stream_of(z),
        )  # fmt: skip

    return SimpleNamespace(forward=forward, backward=backward, any_rank=True)


# --- triton: kernels/norm_fwd.py, norm_bwd.py ----------------------------------------------------


def _triton_refuses(call: NormCall, requested: bool) -> Refusal | None:
    return triton_refuses(call.x, requested, "x") or _float64_refused(call)


def _triton_kernels() -> Any:
    from ..kernels.norm_bwd import norm_backward
    from ..kernels.norm_fwd import norm_forward

    return SimpleNamespace(forward=norm_forward, backward=norm_backward, any_rank=False)


# --- reference: reference/functional.py ----------------------------------------------------------


def _reference_refuses(call: NormCall, requested: bool) -> Refusal | None:
    return None


def _reference_kernels() -> Any:
    def in_dtype(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
        return [None if x is None else x.to(dtype) for x in tensors]

    def forward(x, residual, weight, bias, seed, out, z, mean, rstd, config: NormConfig):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, residual, weight, bias = in_dtype(wide, x, residual, weight, bias)
        source = reference.dropout(x, config.dropout_p, seed)
        if residual is not None:
            source = source + residual
        if z is not None:
            source = z.copy_(source).to(wide)
        result, average, scale = reference.norm(source, weight, bias, **_options(config))
        out.copy_(result)
        for statistic, value in ((mean, average), (rstd, scale)):
            if statistic is not None:
                statistic.copy_(value.squeeze(-1))

    def backward(
        dout, dz, z, weight, mean, rstd, seed, dx, dresidual, dweight, dbias, config: NormConfig
    ):
        inputs = in_dtype(rstd.dtype, dout, dz, z, weight)
        total, for_weight, for_bias = reference.norm_backward(*inputs, **_options(config))
        dx.copy_(reference.dropout(total, config.dropout_p, seed))
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


BACKENDS = (
    Backend("cpu", _cpu_refuses, _cpu_kernels),
    Backend("cuda", _cuda_refuses, lambda: _cuda_kernels(_native.cuda)),
    Backend("triton", _triton_refuses, _triton_kernels),
    Backend("cuda_emulated", _emulated_refuses, lambda: _cuda_kernels(_native.cuda_emulated())),
    Backend("reference", _reference_refuses, _reference_kernels),
)
