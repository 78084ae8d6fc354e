"""Attention: softmax(scale · qkᵀ + bias) v, and its gradients.

With p = softmax(s) over the visible keys and lse = log Σ exp(s) (natural log, per query):

    s = scale · q kᵀ + bias            out = p v
    ds = p ∘ (dout·vᵀ − rowsum(dout ∘ out) + dlse)
    dq = scale · ds k     dk = scale · dsᵀ q     dv = pᵀ dout     dbias = ds, summed as broadcast

Only q, k, v, out and lse are kept for the backward; p is recomputed tile by tile, so nothing of
size Sq·Sk is ever stored (Milakov and Gimelshein 2018; Dao et al. 2022).
"""

from __future__ import annotations

import sys
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..reference import functional as reference
from .attention_backends import BACKENDS
from .attention_config import (
    AttentionCall,
    AttentionConfig,
    configure,
    validate,
    validate_extras,
)
from ._registry import Op

_op = Op("attention", BACKENDS)

# --- schema and fake -----------------------------------------------------------------------------

_library = torch.library.Library("fusedattn", "DEF")
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? kv_lengths, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? seed"
)
_OPTIONS = (
    "str backend, int causal, float scale, int window_left, int window_right, float softcap, "
    "float dropout_p"
)
_library.define(f"attention_fwd({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse)")
_library.define(
    f"attention_bwd(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, {_INPUTS}, bool bias_grad, "
    f"{_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"
)


def _empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out laid out in memory as (B, Sq, Hq, Dv), so that merging the heads is a view; and lse."""
    batch, heads, seq, _ = q.shape
    dim, dtype, device = v.shape[3], q.dtype, q.device
    strides = (seq * heads * dim, dim, heads * dim, 1)
    out = torch.empty_strided((batch, heads, seq, dim), strides, dtype=dtype, device=device)
    lse_dtype = dtype if dtype is torch.float64 else torch.float32
    return out, torch.empty((batch, heads, seq), dtype=lse_dtype, device=device)


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, v)


def _backward_fake(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
    kv_lengths: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    seed: Tensor | None, bias_grad: bool, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_gradients(q, k, v, bias if bias_grad else None)


def _run_forward(q, k, v, mask, bias, kv_lengths, config, backend) -> tuple[Tensor, Tensor]:
    out, lse = _empty_outputs(q, v)
    if out.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    _op.kernels(backend).forward(q, k, v, mask, bias, kv_lengths, out, lse, config)
    return out, lse


def _run_backward(
    dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths, bias_grad, config, backend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _empty_gradients(q, k, v, bias if bias_grad else None)
    if lse.numel() == 0 or k.numel() == 0:
        return tuple(x.zero_() for x in grads)
    _op.kernels(backend).backward(
        dout, dlse, q, k, v, out, lse, *grads[:3], grads[3] if bias_grad else None,
        mask, bias, kv_lengths, config,
    )  # fmt: skip
    return grads


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
    kv_lengths: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    seed: Tensor | None, backend: str, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _run_forward(q, k, v, mask, bias, kv_lengths, AttentionConfig(*options), backend)


def _backward(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
    kv_lengths: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    seed: Tensor | None, bias_grad: bool, backend: str, *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    config = AttentionConfig(*options)
    return _run_backward(
        dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths, bias_grad, config, backend
    )


class _Undifferentiable(torch.autograd.Function):
    """A raw op on tensors that require a gradient: it runs, but nothing flows back through it."""

    @staticmethod
    def forward(ctx: Any, op: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "torch.ops.fusedattn.attention_fwd and attention_bwd have no gradient: "
            "call fusedattn.attention instead"
        )


def _below_autograd(op: Any) -> Any:
    def kernel(*args: Any) -> Any:
        tensors = (x for x in args if isinstance(x, Tensor))
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return _Undifferentiable.apply(op, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return kernel


for _name, _kernel, _fake in (
    ("attention_fwd", _forward, _forward_fake),
    ("attention_bwd", _backward, _backward_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    _library.impl(_name, _below_autograd(getattr(torch.ops.fusedattn, _name)), "Autograd")
    torch.library.register_fake(f"fusedattn::{_name}", _fake, lib=_library)


def _flops(q: torch.Size, k: torch.Size, v: torch.Size) -> int:
    """Two products of two operations each, as torch counts SDPA: causal is not halved."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _forward_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return _flops(q, k, v)


def _backward_flops(
    dout: Any, dlse: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any
) -> int:
    return _flops(q, k, v) * 5 // 2


def _register_flops() -> None:
    """Tell torch's FLOP counter, if it is there: importing it here would import triton."""
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is not None and torch.ops.fusedattn.attention_fwd not in counter.flop_registry:
        counter.register_flop_formula(torch.ops.fusedattn.attention_fwd)(_forward_flops)
        counter.register_flop_formula(torch.ops.fusedattn.attention_bwd)(_backward_flops)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Nothing is watching or tracing: the dispatcher's 5 µs a call would find our kernel anyway."""
    return (
        not torch.compiler.is_compiling()
        and type(q) is type(k) is type(v) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.autograd._profiler_enabled()
    )


def _call_forward(q, k, v, mask, bias, kv_lengths, config, backend):
    if _plain(q, k, v):
        return _run_forward(q, k, v, mask, bias, kv_lengths, config, backend)
    _register_flops()
    return torch.ops.fusedattn.attention_fwd(
        q, k, v, mask, bias, kv_lengths, None, None, None, backend, *config
    )


def _call_backward(
    dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths, bias_grad, config, backend
):
    if _plain(q, k, v):
        return _run_backward(
            dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths, bias_grad, config, backend
        )
    return torch.ops.fusedattn.attention_bwd(
        dout, dlse, out, lse, q, k, v, mask, bias, kv_lengths, None, None, None, bias_grad,
        backend, *config,
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
        out, lse = _call_forward(q, k, v, mask, bias, kv_lengths, config, backend)
        ctx.save_for_backward(q, k, v, out, lse, mask, bias, kv_lengths)
        ctx.set_materialize_grads(False)
        ctx.config, ctx.backend = config, backend
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * 8
        saved = ctx.saved_tensors
        bias_grad = ctx.needs_input_grad[4]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _AttentionBackward.apply(
                dout, dlse, *saved, bias_grad, ctx.config, ctx.backend
            )
        else:
            grads = _call_backward(dout, dlse, *saved, bias_grad, ctx.config, ctx.backend)
        dq, dk, dv, dbias = grads
        return dq, dk, dv, None, dbias if bias_grad else None, None, None, None


class _AttentionBackward(torch.autograd.Function):
    """The backward as a differentiable function; its own gradient is that of the formula."""

    @staticmethod
    def forward(ctx: Any, dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths, *rest):
        ctx.save_for_backward(dout, dlse, q, k, v, mask, bias, kv_lengths)
        ctx.bias_grad, ctx.config, _ = rest
        ctx.set_materialize_grads(False)
        return _call_backward(dout, dlse, q, k, v, out, lse, mask, bias, kv_lengths, *rest)

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
            out, lse = reference.attention(
                q, k, v, mask=mask, bias=bias, causal=ctx.config.causal_name,
                scale=ctx.config.scale, kv_lengths=kv_lengths,
            )  # fmt: skip
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
                [g for g, _ in pairs], chosen, [c for _, c in pairs], allow_unused=True,
                create_graph=torch.is_grad_enabled(),
            )  # fmt: skip
        )
        ddout, ddlse, dq, dk, dv, dbias = (next(second) if want else None for want in wanted)
        return ddout, ddlse, dq, dk, dv, None, None, None, dbias, None, None, None, None


# --- public functions ----------------------------------------------------------------------------


def _prepare(
    q, k, v, mask, bias, causal, window, scale, softcap, alibi_slopes, sinks, kv_lengths, dropout_p
) -> AttentionCall:
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.dtype != torch.float64 else x for x in (q, k, v))
        if bias is not None and bias.dtype not in (dtype, torch.float32):
            bias = bias.to(dtype)
    validate(q, k, v)
    config = configure(q.shape[3], causal, scale, window, softcap, dropout_p)
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

    Fused and differentiable to any order, in O(Sq + Sk) memory. Tensors may have any strides and
    are read in place: a (B, S, H, D) tensor is passed as its `.transpose(1, 2)`.

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
        kv_lengths: (B,) int32; keys at and past it do not exist. It moves no diagonal.
        return_lse: also return the log-sum-exp of the scores.
        deterministic: accepted for symmetry; every backend here is bitwise repeatable when
            `torch.use_deterministic_algorithms` is on, and the CPU always.
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
        dropout_p,
    )  # fmt: skip
    chosen = _op.choose(backend, call)
    q, k, v, mask, bias, kv_lengths = call[:6]
    config = call.config
    if torch._C._are_functorch_transforms_active():
        # vmap, torch.func.grad and jvp differentiate and batch the formula itself.
        result = _formula(call)
    elif torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        # One tensor passed twice would break the graph under torch.compile.
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is q or v is call.k else v
        result = AttentionFunction.apply(q, k, v, mask, bias, kv_lengths, config, chosen)
    else:
        result = _call_forward(q, k, v, mask, bias, kv_lengths, config, chosen)
    return result if return_lse else result[0]


def _formula(call: AttentionCall) -> tuple[Tensor, Tensor]:
    out, lse = reference.attention(
        call.q, call.k, call.v, mask=call.mask, bias=call.bias, causal=call.config.causal_name,
        scale=call.config.scale, kv_lengths=call.kv_lengths,
    )  # fmt: skip
    return out.to(call.q.dtype), lse if lse.dtype == torch.float64 else lse.float()


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    backend: str = "auto",
) -> str:
    """The backend that `attention` would run for these arguments, and why not each other one."""
    return _op.explain(
        backend,
        _prepare(q, k, v, mask, bias, causal, None, scale, None, None, None, kv_lengths, 0.0),
    )
