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
from ._library import cpu_at_once, hand_over, has_override, is_overridden
from ._op import Op
from .softmax_config import SoftmaxBackwardCall, SoftmaxCall, prepare, remembered
from .softmax_kernels import BACKENDS, softmax_bwd, softmax_fwd

# Looked up once: what follows runs on every call.
_grad_enabled = torch.is_grad_enabled

# --- formulas ------------------------------------------------------------------------------------


def _formula(call: SoftmaxCall) -> tuple[Tensor]:
    """The reference, differentiable to any order; half precision computes in float32."""
    x, mask, bias, dim, config = call
    wide = x.float() if x.dtype in HALVES else x
    with torch.autocast(x.device.type, enabled=False):
        out = reference.softmax(
            wide, dim, mask=mask, bias=bias, scale=config.scale, causal=config.causal_name
        )
    return (out.to(x.dtype),)


def _backward_formula(call: SoftmaxBackwardCall) -> tuple[Tensor | None, ...]:
    """dx and ds by the reference, from out: what reaches it goes on to x and the bias."""
    dout, out = (x.float() if x.dtype in HALVES else x for x in call[:2])
    dx, ds = reference.softmax_backward(dout, out, call.dim, scale=call.config.scale)
    return dx, ds if call.bias_grad else None


# --- autograd ------------------------------------------------------------------------------------


def _keep(call: SoftmaxCall, outputs: Any, wanted: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    x_grad, _, bias_grad = wanted
    of_bias = (call.bias.shape, call.bias.dtype) if bias_grad else (None, None)  # type: ignore[union-attr]
    return outputs, (*of_bias, call.dim, x_grad, bias_grad, call.config)


def _pull_back(douts: Any, saved: Any, rest: Any, wanted: Any, run: Any) -> tuple[Any, ...]:
    shape, dtype, *options = rest
    dx, ds = run(SoftmaxBackwardCall(*douts, *saved, *options))
    if ds is not None and ds.shape != shape:
        ds = ds.sum_to_size(shape)
    return dx, None, ds if ds is None or ds.dtype is dtype else ds.to(dtype)


op = Op(
    "softmax", BACKENDS, softmax_fwd, _formula, differentiable=(0, 2), cotangents=1,
    backward=Op("softmax_bwd", BACKENDS, softmax_bwd, _backward_formula),
    keep=_keep, pull_back=_pull_back,
)  # fmt: skip

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
    if has_override(x, mask, bias) and is_overridden(locals()):
        return hand_over(softmax, locals())
    native = cpu_at_once(backend)
    if native is not None and mask is None and bias is None and native.usual_softmax(x, dim):
        config = remembered(x.dim(), dim, causal, scale)
        out = native.usual_softmax_forward(x, dim, config)
        if x.requires_grad and _grad_enabled():
            call = SoftmaxCall(x, None, None, dim, config)
            return op.record(call, "cpu", lambda *_: (out,))[0]
        return out
    return op(prepare(x, dim, mask, bias, scale, causal), backend)[0]
