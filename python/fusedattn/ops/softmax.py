"""Softmax along a dimension, masked and biased, and its gradients.

With s = scale · x + bias, −inf where masked, and sums along the dimension:

    out = exp(s − max s) / Σ exp(s − max s), and 0 where no s is above −inf
    ds = out ∘ (dout − Σ dout ∘ out)      dx = scale · ds      dbias = ds, summed as broadcast

Statistics are float32 (float64 for float64). Only out is kept for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import functional as reference
from ._checks import HALVES
from ._library import cpu_at_once, define, direct, plain, transformed
from ._registry import Op
from .softmax_backends import BACKENDS, views
from .softmax_config import SoftmaxConfig, prepare, remembered

op = Op("softmax", BACKENDS)

# Looked up once: what follows runs on every call.
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled


def _formula(x, mask, bias, dim, config) -> Tensor:
    """The reference, differentiable to any order; half precision computes in float32."""
    wide = x.float() if x.dtype in HALVES else x
    with torch.autocast(x.device.type, enabled=False):
        out = reference.softmax(
            wide, dim, mask=mask, bias=bias, scale=config.scale, causal=config.causal_name
        )
    return out.to(x.dtype)


# --- schema and fake -----------------------------------------------------------------------------


def _run_forward(x, mask, bias, dim, config, backend) -> Tensor:
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    kernels = op.kernels(backend)
    if kernels.any_rank and x.dim() <= 4 and dim in (-1, x.dim() - 1):
        kernels.forward(x, mask, bias, out, config)
        return out
    for o, a, m, b in views((out, x, mask, bias), dim, config.causal):
        kernels.forward(a, m, b, o, config)
    return out


def _run_backward(dout, out, bias_shape, bias_dtype, x_grad, dim, config, backend):
    dx = torch.empty_like(out) if x_grad else None
    dbias = ds = None
    if bias_shape is not None:
        dbias = out.new_empty(bias_shape, dtype=bias_dtype)
        stat = torch.float32 if out.dtype in HALVES else out.dtype
        last = dim in (-1, out.dim() - 1)
        if last and dbias.shape == out.shape and bias_dtype == stat:
            ds = dbias
        else:
            shape = out.shape if last else out.movedim(dim, -1).shape
            ds = out.new_empty(shape, dtype=stat)
            ds = ds if last else ds.movedim(-1, dim)
    if out.numel() != 0:
        kernels = op.kernels(backend)
        if kernels.any_rank and out.dim() <= 4 and dim in (-1, out.dim() - 1):
            kernels.backward(dout, out, dx, ds, config)
        else:
            for o, g, a, s in views((out, dout, dx, ds), dim, config.causal):
                kernels.backward(g, o, a, s, config)
    if dbias is not None and ds is not None and ds is not dbias:
        dbias.copy_(ds.sum_to_size(bias_shape))
    return dx, dbias


def _forward(x: Tensor, mask: Tensor | None, bias: Tensor | None, backend: str, dim: int,
             *options: Any) -> Tensor:  # fmt: skip
    return _run_forward(x, mask, bias, dim, SoftmaxConfig(*options), backend)


def _backward(dout: Tensor, out: Tensor, bias_shape: Any, bias_dtype: Any, x_grad: bool,
              backend: str, dim: int, *options: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `call_backward`; a library op returns an empty tensor for an unwanted gradient."""
    dx, dbias = _run_backward(
        dout, out, bias_shape, bias_dtype, x_grad, dim, SoftmaxConfig(*options), backend
    )
    return (out.new_empty(0) if dx is None else dx), (out.new_empty(0) if dbias is None else dbias)


def _forward_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _backward_fake(dout: Tensor, out: Tensor, bias_shape: Any, bias_dtype: Any, x_grad: bool,
                   *_: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx = torch.empty_like(out) if x_grad else out.new_empty(0)
    if bias_shape is None:
        return dx, out.new_empty(0)
    return dx, out.new_empty(bias_shape, dtype=bias_dtype)


_OPTIONS = "str backend, int dim, int causal, float scale"
softmax_fwd = define(
    f"softmax_fwd(Tensor x, Tensor? mask, Tensor? bias, {_OPTIONS}) -> Tensor",
    _forward, _forward_fake, instead="fusedattn.softmax",
)  # fmt: skip
softmax_bwd = define(
    "softmax_bwd(Tensor dout, Tensor out, SymInt[]? bias_shape, ScalarType? bias_dtype, "
    f"bool x_grad, {_OPTIONS}) -> (Tensor dx, Tensor dbias)",
    _backward, _backward_fake, instead="fusedattn.softmax",
)  # fmt: skip


def call_forward(x, mask, bias, dim, config, backend) -> Tensor:
    if plain(x, bias):
        return _run_forward(x, mask, bias, dim, config, backend)
    return softmax_fwd(x, mask, bias, backend, dim, *config)


def call_backward(dout, out, bias_shape, bias_dtype, x_grad, dim, config, backend):
    """dx where `x_grad`, and the bias's gradient where there is a `bias_shape`; else None."""
    native = cpu_at_once(backend)
    if native is not None and x_grad and bias_shape is None:
        dx = native.usual_softmax_backward(dout, out, dim, config)
        if dx is not None:
            return dx, None
    if plain(dout, out):
        return _run_backward(dout, out, bias_shape, bias_dtype, x_grad, dim, config, backend)
    dx, dbias = softmax_bwd(dout, out, bias_shape, bias_dtype, x_grad, backend, dim, *config)
    return dx if x_grad else None, None if bias_shape is None else dbias


# --- autograd ------------------------------------------------------------------------------------


class SoftmaxFunction(torch.autograd.Function):
    """Differentiable softmax on arguments that `fusedattn.softmax` has already checked.

    apply(x, mask, bias, dim, config, backend) -> out: config a `SoftmaxConfig`, backend a backend's
    name.
    """

    @staticmethod
    def forward(ctx: Any, x, mask, bias, dim, config, backend):
        out = call_forward(x, mask, bias, dim, config, backend)
        return _keep(ctx, out, bias, dim, config, backend)

    @staticmethod
    def backward(ctx: Any, dout):
        (out,) = ctx.saved_tensors
        differentiable = _grad_enabled() and not _is_compiling()
        backward = _SoftmaxBackward.apply if differentiable else call_backward
        dx, dbias = backward(dout, out, *ctx.options)
        return dx, None, dbias, None, None, None


def _keep(ctx: Any, out, bias, dim, config, backend) -> Tensor:
    """Keep for the backward what it needs; returns out."""
    ctx.save_for_backward(out)
    x_grad, _, bias_grad = ctx.needs_input_grad[:3]
    of_bias = (bias.shape, bias.dtype) if bias_grad else (None, None)
    ctx.options = (*of_bias, x_grad, dim, config, backend)
    return out


class _ServedFunction(SoftmaxFunction):
    """The same of a call that is served already: `outputs` is (out,), else it were an input."""

    @staticmethod
    def forward(ctx: Any, x, outputs, bias, dim, config, backend):
        return _keep(ctx, outputs[0], bias, dim, config, backend)


_Function, _Served = direct(SoftmaxFunction), direct(_ServedFunction)


class _SoftmaxBackward(torch.autograd.Function):
    """The backward as a differentiable function; its own gradient is that of the formula.

    `out` carries the graph of the forward, so that what reaches it goes on to x and the bias.
    """

    @staticmethod
    def forward(ctx: Any, dout, out, bias_shape, bias_dtype, x_grad, dim, config, backend):
        ctx.save_for_backward(dout, out)
        ctx.bias_shape, ctx.dim, ctx.scale = bias_shape, dim, config.scale
        ctx.set_materialize_grads(False)
        return call_backward(dout, out, bias_shape, bias_dtype, x_grad, dim, config, backend)

    @staticmethod
    def backward(ctx: Any, ddx, ddbias):
        wanted = ctx.needs_input_grad[:2]
        dout, out = ctx.saved_tensors
        with torch.enable_grad():
            # Not `out` itself: the chain of the forward is autograd's, this is one link.
            inputs = [x.view_as(x) if x.requires_grad else x for x in (dout, out)]
            g, y = (x.float() if x.dtype in HALVES else x for x in inputs)
            dx, ds = reference.softmax_backward(g, y, ctx.dim, scale=ctx.scale)
            found = [] if ddx is None else [(dx, ddx.to(dx.dtype))]
            if ddbias is not None:
                found.append((ds.sum_to_size(ctx.bias_shape), ddbias.to(ds.dtype)))
            chosen = [x for x, want in zip(inputs, wanted, strict=True) if want]
            if not found or not chosen:
                return (None,) * 8
            second = iter(
                torch.autograd.grad(
                    [g for g, _ in found],
                    chosen,
                    [c for _, c in found],
                    allow_unused=True,
                    create_graph=torch.is_grad_enabled(),
                )
            )
        ddout, dout_of_out = (next(second) if want else None for want in wanted)
        return ddout, dout_of_out, None, None, None, None, None, None


# --- public function -----------------------------------------------------------------------------


def softmax(
    x: Tensor,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    causal: bool | str = False,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale · x + bias) along `dim`, over the elements that `mask` and `causal` keep.

    One pass, differentiable to any order. Statistics are float32 (float64 for float64 inputs)
    whatever the dtype, so autocast changes nothing. Any shape, any width, any strides.

    Args:
        x: float16, bfloat16, float32 or float64.
        dim: the dimension that sums to 1.
        mask: bool, True = keep, broadcastable to the shape of x.
        bias: added to scale · x, broadcastable likewise, float16, bfloat16 or float32 (float64 for
            x in float64). Differentiable; its gradient has its own shape and dtype, and is summed
            in float32.
        scale: any float.
        causal: over the last two dimensions (query, key), with dim=-1. True or "bottom_right": the
            last query sees every key. "top_left": the first query sees the first key only. For
            two queries and four keys:

                "top_left"  x . . .        "bottom_right"  x x x .
                            x x . .                        x x x x
        backend: "auto", or the name of the one that must serve the call.

    Returns:
        A tensor like x. A row with nothing to see, masked in full or −inf throughout, is 0 with
        zero gradient, where `torch.softmax` gives NaN. Otherwise NaN and infinities do as in torch:
        a row with a NaN or a +inf that is not masked is NaN.

    Raises:
        TypeError, ValueError: the arguments do not fit together; nothing has been launched.
        UnsupportedError: no backend (or not the one named) takes the call; lists every reason.
    """
    native = cpu_at_once(backend)
    if native is not None and mask is None and bias is None and native.usual_softmax(x, dim):
        config = remembered(x.dim(), dim, causal, scale)
        out = native.usual_softmax_forward(x, dim, config)
        if x.requires_grad and _grad_enabled():
            return _Served.apply(x, (out,), None, dim, config, "cpu")
        return out
    call = prepare(x, dim, mask, bias, scale, causal)
    chosen = op.choose(backend, call)
    _, _, _, dim, config = call
    if transformed():
        return _formula(x, mask, bias, dim, config)
    if (x.requires_grad or (bias is not None and bias.requires_grad)) and torch.is_grad_enabled():
        return _Function.apply(x, mask, bias, dim, config, chosen)
    return call_forward(x, mask, bias, dim, config, chosen)
