"""Attention's forward mode: out, lse and their derivatives along tangents of q, k, v and bias.

With the letters of attention.py, r = scale · q kᵀ, and ṡ for the derivative of s:

    ṙ = scale · (q̇ kᵀ + q k̇ᵀ)   ṡ = ṙ, or ṙ ∘ (1 − tanh²(r / c)) with a softcap, + ḃias
    lsė = Σ p ∘ ṡ, the derivative of the log-sum-exp; a sink is in p, and has ṡ = 0
    ouṫ = (p ∘ z ∘ ṡ) v + (p ∘ z) v̇ − out ∘ lsė

since ṗ = p ∘ (ṡ − lsė). All sums are of one pass over the keys, beside those of the forward: so out
and lse come with their derivatives, in O(Sq + Sk) memory. Tangents of slopes, sinks and tables
are the formula's, and so are derivatives of what is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import functional as reference
from ..reference import varlen
from ._checks import check_like, check_tensor
from ._library import LibraryOp
from ._op import Outputs
from .attention_backends import added_bias, options, packed_options, wide
from .attention_checks import broadcastable, check_call
from .attention_config import AttentionCall, AttentionJvpCall
from .attention_kernels import empty_outputs, forward_flops, nothing

# --- call ----------------------------------------------------------------------------------------


def along(call: AttentionCall, tangents: Sequence[Tensor | None]) -> AttentionJvpCall | None:
    """None where something else than q, k, v and bias has a tangent."""
    t_q, t_k, t_v, mask, t_bias, *others = tangents
    if mask is not None or any(x is not None for x in others):
        return None
    return AttentionJvpCall(*call[:-1], t_q, t_k, t_v, t_bias, call.config)


def check_jvp_call(call: AttentionJvpCall) -> AttentionJvpCall:
    """The same as `check_call` for a call of forward mode."""
    checked = check_call(call.primal)
    if call.config.cached:
        raise ValueError("attention_jvp: got a cache, which has no tangents, expected none")
    q, k, v, bias, t_bias = call.q, call.k, call.v, checked.bias, call.t_bias
    for name, x, of in (("t_q", call.t_q, q), ("t_k", call.t_k, k), ("t_v", call.t_v, v)):
        if x is not None:
            check_like("attention_jvp", name, x, of.shape, of.dtype, of.device)
    if t_bias is not None:
        if bias is None:
            raise ValueError("attention_jvp: got t_bias without bias, expected it")
        check_tensor("attention_jvp", "t_bias", t_bias, (bias.dtype,))
        t_bias = broadcastable("t_bias", t_bias, q, k)
    return AttentionJvpCall(*checked[:-1], call.t_q, call.t_k, call.t_v, t_bias, call.config)


# --- outputs -------------------------------------------------------------------------------------


def _empty_duals(call: AttentionJvpCall) -> tuple[Tensor, ...]:
    return *empty_outputs(call), *empty_outputs(call)


def _run_jvp(call: AttentionJvpCall, kernels: Any) -> tuple[Tensor, ...]:
    outputs = _empty_duals(call)
    out, lse, t_out, t_lse = outputs
    if out.numel() == 0 or nothing(call):
        return out.zero_(), lse.fill_(float("-inf")), t_out.zero_(), t_lse.zero_()
    kernels.jvp(call, *outputs)
    return outputs


def _flops(q: Any, k: Any, v: Any, *rest: Any, **_: Any) -> int:
    """Six products, of which absent tangents save some: three over D, three over Dv."""
    others = len(AttentionCall._fields) - 4  # of a forward's tensors, those after q, k and v
    return 3 * forward_flops(q, k, v, *rest[:others], *rest[others + 4 :])


attention_jvp = LibraryOp(
    "attention_jvp", AttentionJvpCall, ("out", "lse", "t_out", "t_lse"),
    allocate=_empty_duals, run=_run_jvp, check=check_jvp_call, flops=_flops,
)  # fmt: skip

# --- formula -------------------------------------------------------------------------------------


def jvp_formula(call: AttentionJvpCall) -> Outputs:
    """The reference; half precision computes in float32."""
    q, k, v, *tangents = (wide(x) for x in (*call[:3], *call[17:21]))
    with torch.autocast(q.device.type, enabled=False):
        if call.cu_seqlens_q is not None:
            found = varlen.attention_jvp(q, k, v, *tangents[:3], **packed_options(call))
        else:
            found = reference.attention_jvp(
                q, k, v, *tangents, **options(call), bias=added_bias(call)
            )
    out, lse, t_out, t_lse = found
    return out.to(call.q.dtype), lse, t_out.to(call.q.dtype), t_lse
