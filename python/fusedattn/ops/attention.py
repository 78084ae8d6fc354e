"""Attention: softmax(scale · qkᵀ + bias) v, and its gradients.

With p = softmax(s) over the visible keys and lse = log Σ exp(s) (natural log, per query):

    s = scale · q kᵀ + bias            out = p v
    ds = p ∘ (dout·vᵀ − rowsum(dout ∘ out) + dlse)
    dq = scale · ds k     dk = scale · dsᵀ q     dv = pᵀ dout     dbias = ds, summed as broadcast

Only q, k, v, out and lse are kept for the backward; p is recomputed tile by tile, so nothing of
size Sq·Sk is ever stored (Milakov and Gimelshein 2018; Dao et al. 2022).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import functional as reference
from ._library import (
    differentiate,
    direct,
    hand_over,
    has_override,
    is_overridden,
    keep,
    kept,
    second_order,
    transformed,
    watched,
)
from .attention_config import (
    AttentionCall,
    AttentionConfig,
    autocast,
    configure,
    replace_causal_bias,
    validate,
    validate_extras,
)
from .attention_library import attention_bwd, attention_fwd, call_backward, call_forward, op

# Looked up once: what follows runs on every call.
_autocast_anywhere = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_deterministic = torch.are_deterministic_algorithms_enabled


def _formula(q, k, v, mask, bias, kv_lengths, config) -> tuple[Tensor, Tensor]:
    """The reference, differentiable to any order; half precision computes in float32."""
    if q.dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast(q.device.type, enabled=False):
        return reference.attention(
            q, k, v, mask=mask, bias=bias, causal=config.causal_name, scale=config.scale,
            kv_lengths=kv_lengths,
        )  # fmt: skip


def _backward_formula(
    dout, dlse, q, k, v, mask, bias, kv_lengths, bias_grad, config
) -> tuple[Tensor | None, ...]:
    """The gradients by the reference's formula: dq, dk, dv and, where wanted, dbias."""
    if q.dtype in (torch.float16, torch.bfloat16):
        dout, q, k, v = (None if x is None else x.float() for x in (dout, q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        *grads, ds = reference.attention_backward(
            dout, dlse, q, k, v, mask=mask, bias=bias, causal=config.causal_name,
            scale=config.scale, kv_lengths=kv_lengths,
        )  # fmt: skip
    return *grads, ds.sum_to_size(bias.shape) if bias_grad else None


# --- autograd ------------------------------------------------------------------------------------


class AttentionFunction(torch.autograd.Function):
    """Differentiable attention on arguments that `fusedattn.attention` has already checked.

    apply(q, k, v, mask, bias, kv_lengths, config, backend) -> (out, lse): the shapes of
    `fusedattn.attention`, mask and bias with four dimensions, config an `AttentionConfig`,
    backend a backend's name.
    """

    @staticmethod
    def forward(ctx: Any, q, k, v, mask, bias, kv_lengths, config, backend):
        outputs = call_forward(q, k, v, mask, bias, kv_lengths, config, backend)
        return _keep(ctx, outputs, q, k, v, mask, bias, kv_lengths, config, backend)

    @staticmethod
    def backward(ctx: Any, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        q, k, v, out, lse, mask, bias, kv_lengths = kept(ctx)
        bias_grad = ctx.needs_input_grad[4]
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        backward = _AttentionBackward.apply if differentiable else call_backward
        grads = backward(
            dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths,
            bias_grad, ctx.config, ctx.backend,
        )  # fmt: skip
        dq, dk, dv, dbias = grads
        rest = (None,) * (len(ctx.needs_input_grad) - 5)
        return dq, dk, dv, None, dbias if bias_grad else None, *rest


def _keep(ctx: Any, outputs, q, k, v, mask, bias, kv_lengths, config, backend):
    """Keep for the backward what it needs; returns the outputs."""
    keep(ctx, q, k, v, *outputs, mask, bias, kv_lengths)
    ctx.set_materialize_grads(False)
    ctx.config, ctx.backend = config, backend
    return outputs


class _LibraryFunction(AttentionFunction):
    """The gradient of the library op, whose kernel checks the arguments."""

    @staticmethod
    def forward(ctx: Any, q, k, v, mask, bias, kv_lengths, config, backend, *unused):
        outputs = attention_fwd(q, k, v, mask, bias, kv_lengths, *unused, backend, *config)
        return _keep(ctx, outputs, q, k, v, mask, bias, kv_lengths, config, backend)


_Function = direct(AttentionFunction)


class _AttentionBackward(torch.autograd.Function):
    """The backward as a differentiable function; its own gradient is that of the formula."""

    @staticmethod
    def forward(ctx: Any, dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths, *rest):
        keep(ctx, dout, dlse, q, k, v, mask, bias, kv_lengths)
        ctx.bias_grad, ctx.config, _ = rest
        ctx.set_materialize_grads(False)
        return call_backward(dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths, *rest)

    @staticmethod
    def backward(ctx: Any, *cotangents):
        dout, dlse, q, k, v, mask, bias, kv_lengths = kept(ctx)

        def formula(dout, dlse, q, k, v, bias):
            return _backward_formula(
                dout, dlse, q, k, v, mask, bias, kv_lengths, ctx.bias_grad, ctx.config
            )

        ddout, ddlse, dq, dk, dv, dbias = second_order(
            formula, (dout, dlse, q, k, v, bias), cotangents
        )
        return ddout, ddlse, dq, dk, dv, None, None, None, dbias, None, None, None, None


def _differentiable_forward(
    q, k, v, mask, bias, kv_lengths, slopes, sinks, seed, backend, *options
):
    return _LibraryFunction.apply(
        q, k, v, mask, bias, kv_lengths, AttentionConfig(*options), backend, slopes, sinks, seed
    )


def _differentiable_backward(
    dout, dlse, out, lse, q, k, v, mask, bias, kv_lengths, slopes, sinks, seed, bias_grad, backend,
    *options,
):  # fmt: skip
    grads = _AttentionBackward.apply(
        dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths, bias_grad,
        AttentionConfig(*options), backend,
    )  # fmt: skip
    return *grads[:3], q.new_empty(0) if grads[3] is None else grads[3]


differentiate(attention_fwd, _differentiable_forward)
differentiate(attention_bwd, _differentiable_backward)

# --- public functions ----------------------------------------------------------------------------


def _prepare(
    q, k, v, mask, bias, causal, window, scale, softcap, alibi_slopes, sinks, kv_lengths, dropout_p,
    deterministic=None,
) -> AttentionCall:  # fmt: skip
    if _autocast_anywhere():
        q, k, v, bias = autocast(q, k, v, bias)
    head_dim = validate(q, k, v)
    # Dynamo traces through a cached function, but warns about it.
    checked = configure.__wrapped__ if _is_compiling() else configure
    if deterministic is None:
        deterministic = _deterministic()
    if mask is not None or bias is not None or kv_lengths is not None:
        mask, bias, causal = replace_causal_bias(q, k, mask, bias, causal)
        mask, bias, kv_lengths = validate_extras(q, k, mask, bias, kv_lengths)
    config = checked(head_dim, causal, scale, window, softcap, dropout_p, deterministic)
    return AttentionCall(q, k, v, mask, bias, kv_lengths, alibi_slopes, sinks, config)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · qkᵀ + bias) v over the keys that each query may attend to.

    Fused, in O(Sq + Sk) memory, and differentiable. Second derivatives, forward mode and
    `torch.func` transforms run the reference's formula, which stores all scores. Tensors may have
    any strides and are read in place: a (B, S, H, D) tensor is passed as its `.transpose(1, 2)`.

    Args:
        q: queries (B, Hq, Sq, D), float16, bfloat16, float32 or float64.
        k: keys (B, Hkv, Sk, D); Hq is a multiple of Hkv (grouped queries).
        v: values (B, Hkv, Sk, Dv).
        mask: bool, True = may attend, broadcastable to (B, Hq, Sq, Sk). As mask or bias also a
            `torch.nn.attention.bias.CausalBias`, which stands for `causal`.
        bias: added to the scaled scores, broadcastable likewise, in the dtype of q or float32.
            Its gradient has its own shape.
        causal: True or "bottom_right": the last query sees every key. "top_left": the first query
            sees the first key only, as in `F.scaled_dot_product_attention`. For Sq 2 and Sk 4:

                "top_left"  x . . .        "bottom_right"  x x x .
                            x x . .                        x x x x
        window: (left, right), the keys seen to either side of the diagonal. Not supported yet.
        scale: any float; D**-0.5 by default.
        softcap, alibi_slopes, sinks, dropout_p, seed: not supported yet.
        kv_lengths: (B,) int32; keys at and past it do not exist. It moves no diagonal.
        return_lse: also return the log-sum-exp of the scores.
        deterministic: gradients are bitwise repeatable. `None` follows
            `torch.use_deterministic_algorithms`. The forward always is, and so is the CPU.
        backend: "auto", or the name of the one that must serve the call.

    Returns:
        out (B, Hq, Sq, Dv) in the dtype of q; with `return_lse` also lse (B, Hq, Sq), natural
        logarithm, float32 (float64 for float64 inputs), differentiable. A query that may attend
        to nothing gets out 0, lse −inf and zero gradients.

    Raises:
        TypeError, ValueError: the arguments do not fit together; nothing has been launched.
        UnsupportedError: no backend (or not the one named) takes the call; lists every reason.
    """
    if has_override(q, k, v, mask, bias, kv_lengths) and is_overridden(locals()):
        return hand_over(attention, locals())
    call = _prepare(
        q, k, v, mask, bias, causal, window, scale, softcap, alibi_slopes, sinks, kv_lengths,
        dropout_p, deterministic,
    )  # fmt: skip
    chosen = op.choose(backend, call)
    q, k, v, mask, bias, kv_lengths = call[:6]
    config = call.config
    if transformed():
        out, lse = _formula(q, k, v, mask, bias, kv_lengths, config)
        result = out.to(q.dtype), lse
    elif (
        (
            q.requires_grad
            or k.requires_grad
            or v.requires_grad
            or (bias is not None and bias.requires_grad)
        )
        and torch.is_grad_enabled()
        and not watched()
    ):
        result = _Function.apply(q, k, v, mask, bias, kv_lengths, config, chosen)
    else:
        result = call_forward(q, k, v, mask, bias, kv_lengths, config, chosen)
    return result if return_lse else result[0]


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> str:
    """The backend that `attention` would run for these arguments, and why not each other one."""
    call = _prepare(
        q, k, v, mask, bias, causal, window, scale, softcap, alibi_slopes, sinks, kv_lengths,
        dropout_p,
    )  # fmt: skip
    return op.explain(backend, call)
