"""Attention: dropout(softmax(scale · qkᵀ + bias)) v, and its gradients.

With p = softmax(s) over the visible keys, lse = log Σ exp(s) (natural log, per query) and z = 1, or
with dropout 1 / (1 − dropout_p) where a weight is kept and 0 where it is not:

    r = scale · q kᵀ   s = r + bias, with a softcap c · tanh(r / c) + bias   out = (p ∘ z) v
    ds = p ∘ (z ∘ dout·vᵀ − rowsum(dout ∘ out) + dlse)     dr = ds, or ds ∘ (1 − tanh²(r / c))
    dq = scale · dr k   dk = scale · drᵀ q   dv = (p ∘ z)ᵀ dout   dbias = ds, summed as broadcast

since rowsum(dout ∘ out) = Σ p ∘ z ∘ dout·vᵀ. z is a function of the seed and the place of a weight
(reference.attention_dropout). Only q, k, v, out and lse are kept for the backward; p and z are
recomputed tile by tile, so nothing of size Sq·Sk is ever stored (Milakov and Gimelshein 2018; Dao
et al. 2022).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..biases import DistanceBias
from ..masks import Mask
from ._checks import check_flag, check_seed, seed_tensor
from ._library import hand_over, has_override, is_overridden
from ._op import Op
from ._spellings import refuse_unknown
from ._transforms import Folding, ForwardMode
from .attention_backends import BACKENDS, backward_formula, formula
from .attention_checks import (
    autocast,
    is_learned,
    replace_causal_bias,
    scaled,
    validate,
    validate_extras,
    validate_heads,
)
from .attention_config import (
    AttentionBackwardCall,
    AttentionCall,
    configure,
    remembered,
)
from .attention_jvp import along, attention_jvp, jvp_formula
from .attention_kernels import attention_bwd, attention_fwd
from .attention_rules import NONE, unfold, validate_rules
from .attention_shapes import over_leading

if TYPE_CHECKING:
    from ._typing import AttentionOptions, Unpack

# Looked up once: what follows runs on every call.
_autocast_anywhere = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_deterministic = torch.are_deterministic_algorithms_enabled

_NOTHING = (None,) * 7  # of the call's tensors, those after the last that has a gradient
_NOT_PACKED = (None,) * 3  # the last of the call's tensors

# --- autograd ------------------------------------------------------------------------------------


def _keep(call: AttentionCall, outputs: Any, wanted: Any) -> tuple[tuple[Any, ...], tuple]:
    grads = (*wanted[:3], wanted[4], wanted[6], wanted[7], wanted[9])
    return (*outputs, *call[:-1]), (*grads, call.config)


def _pull_back(douts: Any, saved: Any, rest: Any, wanted: Any, run: Any) -> tuple[Any, ...]:
    dq, dk, dv, dbias, slopes, sinks, distance = run(AttentionBackwardCall(*douts, *saved, *rest))
    return dq, dk, dv, None, dbias, None, slopes, sinks, None, distance, *_NOTHING


_BATCHED = {
    "q", "k", "v", "kv_lengths", "prefix_lengths", "dout", "dlse", "out", "lse", "t_q", "t_k",
    "t_v",
}  # fmt: skip
_SHARED = {
    "mask", "bias", "alibi_slopes", "distance_bias", "documents_q", "documents_k", "mask_blocks",
    "t_bias",
}  # fmt: skip


def _folds(call: Any) -> bool:
    """Dropout knows the number of a batch entry, and sinks have one gradient for all."""
    grad = type(call) is AttentionBackwardCall and call.sinks_grad
    return call.cu_seqlens_q is None and call.config.dropout_p == 0.0 and not grad


def _summed(call: Any) -> tuple[str | None, ...]:
    if type(call) is not AttentionBackwardCall:
        return (None,) * (2 if type(call) is AttentionCall else 4)
    names = (*[None] * 3, "bias", "alibi_slopes", None, "distance_bias")
    return tuple(name if asked else None for name, asked in zip(names, call[21:28], strict=True))


_FOLDING = Folding(frozenset(_BATCHED), frozenset(_SHARED), _folds, _summed)


op = Op(
    "attention", BACKENDS, attention_fwd, formula, differentiable=(0, 1, 2, 4, 6, 7, 9),
    cotangents=2,
    backward=Op("attention_bwd", BACKENDS, attention_bwd, backward_formula, folding=_FOLDING),
    keep=_keep, pull_back=_pull_back, folding=_FOLDING,
    forward_mode=ForwardMode(
        Op(
            "attention_jvp", BACKENDS, attention_jvp, jvp_formula,
            differentiable=(0, 1, 2, 4, 6, 7, 9, 17, 18, 19, 20), folding=_FOLDING,
        ),
        along,
    ),
)  # fmt: skip

# --- public functions ----------------------------------------------------------------------------


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    bias: Any,
    causal: bool | str,
    window: tuple[int | None, int | None] | None,
    scale: float | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    kv_lengths: Tensor | None,
    dropout_p: float,
    deterministic: bool | None = None,
    seed: int | Tensor | None = None,
) -> AttentionCall | None:
    """The call, checked; None where q, k and v have other leading dimensions than one batch."""
    if _autocast_anywhere():
        q, k, v, bias, alibi_slopes, sinks = autocast(q, k, v, bias, alibi_slopes, sinks)
    head_dim = validate(q, k, v, leading=True)
    if head_dim == 0:
        return None
    if deterministic is None:
        deterministic = _deterministic()
    rules, block_size = NONE, 0
    if mask is not None or bias is not None or kv_lengths is not None:
        mask, bias, causal = replace_causal_bias(q, k, mask, bias, causal)
        mask, bias, rules, block_size = unfold(mask, bias, q, k)
        mask, bias, kv_lengths = validate_extras(q, k, mask, bias, kv_lengths)
        if rules is not NONE:
            validate_rules(rules, block_size, q, k, q.shape[0])
    if alibi_slopes is not None:
        alibi_slopes = validate_heads("alibi_slopes", alibi_slopes, q, q.shape[0])
    if sinks is not None:
        sinks = validate_heads("sinks", sinks, q)
    # 1 == True == np.float32(1), a tensor may change, and dynamo warns about a cache.
    usual = (
        (type(causal) is bool or type(causal) is str)
        and (scale is None or type(scale) is float)
        and window is None
        and (softcap is None or type(softcap) is float)
        and type(dropout_p) is float
        and type(deterministic) is bool
        and type(head_dim) is int
        and not _is_compiling()
    )
    config = (remembered if usual else configure)(
        head_dim, causal, scale, window, softcap, dropout_p, deterministic
    )
    if block_size:
        config = config._replace(block_size=block_size)
    if config.dropout_p != 0.0:
        seed = seed_tensor("attention", seed, q)
    elif seed is not None:
        check_seed("attention", seed, q)
        seed = None
    return AttentionCall(
        q, k, v, mask, bias, kv_lengths, alibi_slopes, sinks, seed, *rules, *_NOT_PACKED, config
    )


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Unpack[AttentionOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | Mask | None = None,
    bias: Tensor | DistanceBias | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """dropout(softmax(scale · qkᵀ + bias)) v over the keys that each query may attend to.

    Fused, in O(Sq + Sk) memory, and differentiable; `torch.func.vmap` becomes part of the batch.
    So is forward mode along tangents of q, k, v and bias; second derivatives and tangents of other
    tensors run the reference's formula, which stores all scores.
    Tensors may have any strides and are read in place: a (B, S, H, D) tensor is passed as its
    `.transpose(1, 2)`.

    Instead of B there may be no dimension or several, in each tensor, and sizes of 1 broadcast, as
    in `F.scaled_dot_product_attention`: q (Hq, Sq, D); q (B, N, Hq, Sq, D) with a bias
    (B, 1, Hq, Sq, Sk). Nothing is expanded in memory for it.

    Args:
        q: queries (B, Hq, Sq, D), float16, bfloat16, float32 or float64.
        k: keys (B, Hkv, Sk, D); Hq is a multiple of Hkv (grouped queries).
        v: values (B, Hkv, Sk, Dv). All three may be nested, jagged (B, H, j, D): then so are the
            results, and there is no mask, bias or kv_lengths (see `attention_varlen`).
        mask: bool, True = may attend, broadcastable to (B, Hq, Sq, Sk); or by rule, one of
            `fusedattn.masks`, or a BlockMask of FlexAttention. As mask or bias also a
            `torch.nn.attention.bias.CausalBias`, which stands for `causal`.
        bias: added to the scaled scores, broadcastable likewise, in the dtype of q or float32; or
            by rule, one of `fusedattn.biases`, such as T5's. It, alibi_slopes, sinks and a tensor
            as scale have a gradient of their own shape.
        causal: True or "bottom_right": the last query sees every key. "top_left": the first query
            sees the first key only, as in `F.scaled_dot_product_attention`. For Sq 2 and Sk 4:

                "top_left"  x . . .        "bottom_right"  x x x .
                            x x . .                        x x x x
        window: (left, right), how many keys are seen to either side of the diagonal, either None
            for all; without `causal` the diagonal is that of "bottom_right". (w, 0): each query
            sees itself and w keys before it, as in Mistral with a `sliding_window` of w + 1.
        scale: any float; D**-0.5 by default. Or a tensor (Hq,), or of no dimension, in the dtype of
            q or float32: a learned one, as in Swin V2. q is multiplied by it, in float32, and
            rounded to its own dtype, whose range q · scale has to fit.
        softcap: c, 1e-30 to 1e30: scores are c · tanh(scale · qkᵀ / c) + bias, as in Gemma 2.
        alibi_slopes: (Hq,) or (B, Hq), float32: −slope · |i + Sk − Sq − j| is added to the score of
            query i and key j (Press et al. 2022), whatever `causal` is.
        sinks: (Hq,), in the dtype of q or float32: one more logit in the softmax of each head, that
            gives no value, as in gpt-oss. It is part of the log-sum-exp.
        dropout_p: each weight of the softmax is dropped with this probability, else divided by
            1 − dropout_p; at 1 all are dropped. The log-sum-exp is that without dropout.
        seed: of what is dropped, an int of 64 bits or a tensor with one, which is not read on the
            host. `None` draws one from torch's generator, where dropout_p is not 0. A seed drops
            the same weights on every backend, forward and backward: a function of it and of the
            numbers of batch, head, query and key (Philox; Salmon et al. 2011).
        kv_lengths: (B,) int32 or int64, any value; keys at and past it do not exist. It moves no
            diagonal.
        return_lse: also return the log-sum-exp of the scores.
        deterministic: gradients are bitwise repeatable. `None` follows
            `torch.use_deterministic_algorithms`. The forward always is, and so is the CPU for one
            number of threads; its output and log-sum-exp are the same for every number.
        backend: "auto", or the name of the one that must serve the call.

    Returns:
        out (B, Hq, Sq, Dv) in the dtype of q; with `return_lse` also lse (B, Hq, Sq), natural
        logarithm, float32 (float64 for float64 inputs), differentiable. A query that may attend
        to nothing gets out 0, lse −inf and zero gradients. Kernels take rowsum(dout ∘ out) from the
        rounded out (Dao et al. 2022): dq and dk of queries that see few keys, and the gradient of
        alibi_slopes, err by that rounding times the mean of v, which eager attention cancels. They
        take probabilities from lse, which has no digits left for log Sk where a bias puts all keys
        of a query below −2²⁰ or so: hide such a query by a mask, whose gradients are zero.

    Raises:
        TypeError, ValueError: the arguments do not fit together; nothing has been launched.
        UnsupportedError: no backend (or not the one named) takes the call; lists every reason.
    """
    if unknown:
        refuse_unknown("attention", unknown)
    if has_override(q, k, v, mask, bias, kv_lengths, alibi_slopes, sinks, scale):
        given = locals()
        del given["unknown"]
        if is_overridden(given):
            return hand_over(attention, given)
        if isinstance(q, Tensor) and q.is_nested:
            from .attention_varlen import attention_nested

            return attention_nested(**given)
    if return_lse is not False:
        return_lse = check_flag("attention", "return_lse", return_lse)
    number: Any = scale
    if type(scale) is not float and is_learned(scale):
        q, number = scaled(q, scale)  # type: ignore[arg-type]
    call = _prepare(
        q, k, v, mask, bias, causal, window, number, softcap, alibi_slopes, sinks, kv_lengths,
        dropout_p, deterministic, seed,
    )  # fmt: skip
    if call is None:
        out, lse = over_leading(
            functools.partial(attention, return_lse=True),
            {
                "q": q, "k": k, "v": v, "mask": mask, "bias": bias, "causal": causal,
                "window": window, "scale": number, "softcap": softcap,
                "alibi_slopes": alibi_slopes, "sinks": sinks, "kv_lengths": kv_lengths,
                "dropout_p": dropout_p, "seed": seed, "deterministic": deterministic,
                "backend": backend,
            },
        )  # fmt: skip
    else:
        out, lse = op(call, backend)
    return (out, lse) if return_lse else out
