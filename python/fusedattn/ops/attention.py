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
from ._library import direct, transformed
from .attention_config import AttentionCall, configure, validate, validate_extras
from .attention_library import call_backward, call_forward, op

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


# --- autograd ------------------------------------------------------------------------------------


class AttentionFunction(torch.autograd.Function):
    """Differentiable attention on arguments that `fusedattn.attention` has already checked.

    apply(q, k, v, mask, bias, kv_lengths, config, backend) -> (out, lse): the shapes of
    `fusedattn.attention`, mask and bias with four dimensions, config an `AttentionConfig`,
    backend a backend's name.
    """

    @staticmethod
    def forward(ctx: Any, q, k, v, mask, bias, kv_lengths, config, backend):
        out, lse = call_forward(q, k, v, mask, bias, kv_lengths, config, backend)
        ctx.save_for_backward(q, k, v, out, lse, mask, bias, kv_lengths)
        ctx.set_materialize_grads(False)
        ctx.config, ctx.backend = config, backend
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * 8
        q, k, v, out, lse, mask, bias, kv_lengths = ctx.saved_tensors
        bias_grad = ctx.needs_input_grad[4]
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        backward = _AttentionBackward.apply if differentiable else call_backward
        grads = backward(
            dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths,
            bias_grad, ctx.config, ctx.backend,
        )  # fmt: skip
        dq, dk, dv, dbias = grads
        return dq, dk, dv, None, dbias if bias_grad else None, None, None, None


_Function = direct(AttentionFunction)


class _AttentionBackward(torch.autograd.Function):
    """The backward as a differentiable function; its own gradient is that of the formula."""

    @staticmethod
    def forward(ctx: Any, dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths, *rest):
        ctx.save_for_backward(dout, dlse, q, k, v, mask, bias, kv_lengths)
        ctx.bias_grad, ctx.config, _ = rest
        ctx.set_materialize_grads(False)
        return call_backward(dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths, *rest)

    @staticmethod
    def backward(ctx: Any, *cotangents):
        dout, dlse, q, k, v, mask, bias, kv_lengths = ctx.saved_tensors
        outer = (dout, dlse, q, k, v, bias)
        wanted = [x is not None and x.requires_grad for x in outer]
        with torch.enable_grad():
            # Fresh leaves for what carries no graph, so that the formula can be differentiated.
            q, k, v = (x if x.requires_grad else x.detach().requires_grad_() for x in (q, k, v))
            if bias is not None and not bias.requires_grad:
                bias = bias.detach().requires_grad_()
            out, lse = _formula(q, k, v, mask, bias, kv_lengths, ctx.config)
            seeds = [(o, g.to(o.dtype)) for o, g in ((out, dout), (lse, dlse)) if g is not None]
            inner = (q, k, v) if not ctx.bias_grad else (q, k, v, bias)
            grads = torch.autograd.grad(
                [o for o, _ in seeds], inner, [g for _, g in seeds], create_graph=True
            )
        pairs = [(g, c) for g, c in zip(grads, cotangents, strict=False) if c is not None]
        chosen = [x for x, want in zip(outer, wanted, strict=True) if want]
        if not pairs or not chosen:
            return (None,) * 13
        second = iter(
            torch.autograd.grad(
                [g for g, _ in pairs],
                chosen,
                [c for _, c in pairs],
                allow_unused=True,
                create_graph=torch.is_grad_enabled(),
            )
        )
        ddout, ddlse, dq, dk, dv, dbias = (next(second) if want else None for want in wanted)
        return ddout, ddlse, dq, dk, dv, None, None, None, dbias, None, None, None, None


# --- public functions ----------------------------------------------------------------------------


def _prepare(
    q, k, v, mask, bias, causal, window, scale, softcap, alibi_slopes, sinks, kv_lengths, dropout_p,
    deterministic=None,
) -> AttentionCall:  # fmt: skip
    if _autocast_anywhere() and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.dtype != torch.float64 else x for x in (q, k, v))
        if bias is not None and bias.dtype not in (dtype, torch.float32):
            bias = bias.to(dtype)
    validate(q, k, v)
    # Dynamo traces through a cached function, but warns about it.
    checked = configure.__wrapped__ if _is_compiling() else configure
    if deterministic is None:
        deterministic = _deterministic()
    config = checked(q.size(3), causal, scale, window, softcap, dropout_p, deterministic)
    if mask is not None or bias is not None or kv_lengths is not None:
        mask, bias, kv_lengths = validate_extras(q, k, mask, bias, kv_lengths)
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
        mask: bool, True = may attend, broadcastable to (B, Hq, Sq, Sk).
        bias: added to the scaled scores, broadcastable likewise, in the dtype of q or float32.
            Its gradient has its own shape.
        causal: True or "bottom_right": the last query sees every key. "top_left": the first query
            sees the first key only, as in `F.scaled_dot_product_attention`. For Sq 2 and Sk 4:

                "top_left"  x . . .        "bottom_right"  x x x .
                            x x . .                        x x x x
        window: (left, right), the keys seen to either side of the diagonal. Not supported yet.
        scale: any float; D**-0.5 by default.
        softcap, alibi_slopes, sinks, dropout_p, seed: not supported yet.
        kv_lengths: (B,) int32 or int64, any value; keys at and past it do not exist. It moves no
            diagonal.
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
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
    ) and torch.is_grad_enabled():
        # One tensor passed twice would break the graph under torch.compile.
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is q or v is call.k else v
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
