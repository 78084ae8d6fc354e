"""Attention's library ops: the outputs of a call, which its kernels fill."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import HALVES
from ._library import LibraryOp
from .attention_checks import check_backward_call, check_call
from .attention_config import (
    AttentionBackwardCall,
    AttentionCall,
    AttentionConfig,
    AttentionJvpCall,
)

# Of q, k, v, bias, alibi_slopes, sinks and distance_bias, those that are wanted.
Gradients = tuple[Tensor | None, ...]

# --- outputs -------------------------------------------------------------------------------------


def empty_outputs(call: AttentionCall | AttentionJvpCall) -> tuple[Tensor, Tensor]:
    """out laid out in memory as (B, Sq, Hq, Dv), so that merging the heads is a view; and lse."""
    q = call.q
    batch, heads, seq, _ = q.shape
    dim = call.v.shape[3]
    out = q.new_empty_strided((batch, heads, seq, dim), (seq * heads * dim, dim, heads * dim, 1))
    if q.dtype in HALVES:
        return out, q.new_empty((batch, heads, seq), dtype=torch.float32)
    return out, q.new_empty((batch, heads, seq))


def _empty_gradients(call: AttentionBackwardCall) -> Gradients:
    like: Any = torch.empty_like
    return (
        like(call.q) if call.q_grad else None,
        like(call.k) if call.k_grad else None,
        like(call.v) if call.v_grad else None,
        call.bias.new_empty(call.bias.shape) if call.bias_grad else None,  # type: ignore[union-attr]
        like(call.alibi_slopes) if call.alibi_slopes_grad else None,
        like(call.sinks) if call.sinks_grad else None,
        like(call.distance_bias) if call.distance_bias_grad else None,
    )


def _sinks_gradient(call: AttentionBackwardCall, dsinks: Tensor) -> None:
    """Σ −p (rowsum(dout ∘ out) − dlse) over the queries of a head, with p = exp(sink − lse)."""
    delta = torch.zeros_like(call.lse)
    if call.dout is not None:
        # Contiguous: the order of a sum follows strides.
        delta = (call.dout.to(delta.dtype) * call.out).contiguous().sum(-1)
    if call.dlse is not None:
        delta = delta - call.dlse
    p = torch.exp(call.sinks[..., 0] - call.lse)  # type: ignore[index]
    ds = torch.where(call.lse == float("-inf"), 0.0, -p * delta)
    torch.sum(ds, (0, 2), out=dsinks.view(-1))


def nothing(call: AttentionCall | AttentionBackwardCall | AttentionJvpCall) -> bool:
    """No key, or no sequence that has one."""
    return call.k.numel() == 0 or (
        call.cu_seqlens_q is not None and call.cu_seqlens_q.shape[0] == 1
    )


def _run_forward(call: AttentionCall, kernels: Any) -> tuple[Tensor, Tensor]:
    out, lse = empty_outputs(call)
    if out.numel() == 0 or nothing(call):
        return out.zero_(), lse.fill_(float("-inf"))
    kernels.forward(call, out, lse)
    return out, lse


def _run_backward(call: AttentionBackwardCall, kernels: Any) -> Gradients:
    grads = _empty_gradients(call)
    if call.lse.numel() == 0 or nothing(call):
        for x in grads:
            if x is not None:
                x.zero_()
        return grads
    *of_scores, dsinks, ddistance = grads
    if ddistance is not None or any(x is not None for x in of_scores):
        kernels.backward(call, *of_scores, ddistance)
    if dsinks is not None:
        _sinks_gradient(call, dsinks)
    return grads


# --- library ops ---------------------------------------------------------------------------------


# Among the arguments of the library ops, counted from q on; torch leaves out the last defaults.
_BLOCK_TABLE = AttentionCall._fields.index("block_table")
_MAX_SEQLEN_K = len(AttentionCall._fields) + AttentionConfig._fields.index("max_seqlen_k")


def _scores(q: Any, k: Any, given: tuple[Any, ...]) -> int:
    """How many there are; of packed sequences, whose offsets nobody reads here, at most."""
    longest = given[_MAX_SEQLEN_K] if len(given) > _MAX_SEQLEN_K else 0
    if len(given) > _BLOCK_TABLE and given[_BLOCK_TABLE] is not None:
        return q[0] * q[1] * q[2] * given[_BLOCK_TABLE][1] * k[2]
    return q[0] * q[1] * q[2] * (min(k[2], longest) if longest else k[2])


def forward_flops(q: Any, k: Any, v: Any, *rest: Any, **_: Any) -> int:
    """Two operations a multiply-add, as torch counts SDPA: causal is not halved."""
    return 2 * _scores(q, k, (q, k, v, *rest)) * (q[3] + v[3])


def _backward_flops(
    dout: Any, dlse: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, *rest: Any, **_: Any
) -> int:
    """Five products: the scores again and dq, dk over D; dp and dv over Dv."""
    return 2 * _scores(q, k, (q, k, v, *rest)) * (3 * q[3] + 2 * v[3])


attention_fwd = LibraryOp(
    "attention_fwd", AttentionCall, ("out", "lse"),
    allocate=empty_outputs, run=_run_forward, check=check_call, flops=forward_flops,
)  # fmt: skip
attention_fwd.autocast(3)  # q, k and v; a bias keeps its dtype
attention_bwd = LibraryOp(
    "attention_bwd", AttentionBackwardCall,
    ("dq", "dk", "dv", "dbias", "dalibi_slopes", "dsinks", "ddistance_bias"),
    allocate=_empty_gradients, run=_run_backward, check=check_backward_call,
    wanted=lambda call: call[21:28], flops=_backward_flops,
)  # fmt: skip
