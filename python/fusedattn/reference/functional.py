"""The oracle: every op as its formula in plain PyTorch, in the dtype of its inputs.

In fp64 these functions are what the kernels are compared with; in the tested dtype they are the
"eager" whose error sets the tolerance (tests/compare.py). They are differentiable to any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

# --- attention -----------------------------------------------------------------------------------


def visible_keys(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool | str = False,
    kv_lengths: Tensor | None = None,
) -> Tensor | None:
    """What each query may attend to: bool, broadcastable to (B, Hq, Sq, Sk), or None for all.

    The causal diagonal, for Sq = 2 and Sk = 4 (x = visible):

        "top_left"  x . . .        "bottom_right"  x x x .
                    x x . .                        x x x x
    """
    seq_q, seq_k = q.shape[-2], k.shape[-2]
    seen = mask
    key = torch.arange(seq_k, device=q.device)
    if causal:
        query = torch.arange(seq_q, device=q.device)[:, None]
        diagonal = 0 if causal == "top_left" else seq_k - seq_q
        below = key <= query + diagonal
        seen = below if seen is None else seen & below
    if kv_lengths is not None:
        exists = (key < kv_lengths[:, None])[:, None, None, :]
        seen = exists if seen is None else seen & exists
    return seen


def scores(q: Tensor, k: Tensor, scale: float, bias: Tensor | None, seen: Tensor | None) -> Tensor:
    """scale · qkᵀ + bias, −inf where a query may not look; (B, Hq, Sq, Sk)."""
    s = torch.matmul(q, k.transpose(-1, -2)) * scale
    if bias is not None:
        s = s + bias
    return s if seen is None else s.masked_fill(~seen, float("-inf"))


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each of Hkv heads for its group of query heads: (B, Hkv, S, D) → (B, Hq, S, D)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def drop_absent(x: Tensor, kv_lengths: Tensor | None) -> Tensor:
    """Zero the keys (or values) that do not exist, so that nothing stored there can leak."""
    if kv_lengths is None:
        return x
    exists = torch.arange(x.shape[2], device=x.device) < kv_lengths[:, None]
    return torch.where(exists[:, None, :, None], x, torch.zeros((), dtype=x.dtype, device=x.device))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · qkᵀ + bias) v and its log-sum-exp, in the dtype of q.

    q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) → out (B, Hq, Sq, Dv),
    lse (B, Hq, Sq). A query that may attend to nothing gets out 0 and lse −inf.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (expand_heads(drop_absent(x, kv_lengths), q.shape[1]) for x in (k, v))
    seen = visible_keys(q, k, mask=mask, causal=causal, kv_lengths=kv_lengths)
    s = scores(q, k, scale, bias, seen)
    if s.shape[-1] == 0:
        out = torch.matmul(s.to(v.dtype), v)
        return out, s.sum(-1) - float("inf")
    highest = s.detach().amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == float("-inf"), 0.0)
    e = torch.exp(s - highest)
    total = e.sum(-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    out = torch.matmul((e / total).to(v.dtype), v)
    lse = (highest + torch.log(total)).masked_fill(nothing, float("-inf"))
    return out, lse.squeeze(-1)


def attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `attention` as a formula: (dq, dk, dv, ds), ds of shape (B, Hq, Sq, Sk).

    dv = pᵀ·do,  ds = p ∘ (do·vᵀ − rowsum(do ∘ out) + dlse),  dq = scale·ds·k,  dk = scale·dsᵀ·q
    (Dao et al. 2022, appendix B.2, with the term of the log-sum-exp). The gradient of the bias is
    ds, summed over the dimensions along which the bias was broadcast.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads_kv = k.shape[1]
    k, v = (expand_heads(drop_absent(x, kv_lengths), q.shape[1]) for x in (k, v))
    seen = visible_keys(q, k, mask=mask, causal=causal, kv_lengths=kv_lengths)
    s = scores(q, k, scale, bias, seen)
    nothing = (s == float("-inf")).all(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)
    dout = torch.zeros_like(torch.matmul(p, v)) if dout is None else dout
    dp = torch.matmul(dout, v.transpose(-1, -2))
    row = (p * dp).sum(-1, keepdim=True)
    if dlse is not None:
        row = row - dlse.to(row.dtype)[..., None]
    # Where p is 0 so is ds, whatever the gradient of a log-sum-exp of −inf may be.
    ds = torch.where(p == 0, 0.0, p * (dp - row))
    dq = scale * torch.matmul(ds, k)
    dk = scale * torch.matmul(ds.transpose(-1, -2), q)
    dv = torch.matmul(p.transpose(-1, -2), dout)
    dk, dv = (drop_absent(x.unflatten(1, (heads_kv, -1)).sum(2), kv_lengths) for x in (dk, dv))
    return dq, dk, dv, ds


# --- layer norm and RMS norm ----------------------------------------------------------------------


# --- softmax --------------------------------------------------------------------------------------


def softmax(
    x: Tensor,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    causal: bool | str = False,
) -> Tensor:
    """softmax(scale · x + bias) along `dim`, −inf where masked; 0 where a row has nothing to see.

    `causal` looks at the last two dimensions, (…, query, key), as `visible_keys` draws it.
    """
    s = x * scale
    if bias is not None:
        s = s + bias
    seen = mask
    if causal:
        query = torch.arange(x.shape[-2], device=x.device)[:, None]
        key = torch.arange(x.shape[-1], device=x.device)
        diagonal = 0 if causal == "top_left" else x.shape[-1] - x.shape[-2]
        below = key <= query + diagonal
        seen = below if seen is None else seen & below
    if seen is not None:
        s = s.masked_fill(~seen, float("-inf"))
    # An all -inf row would be NaN, and 0·NaN in its gradient: softmax it as zeros, then drop it.
    nothing = (s == float("-inf")).all(dim, keepdim=True)
    p = torch.softmax(s.masked_fill(nothing, 0.0), dim).masked_fill(nothing, 0.0)
    return p.to(x.dtype)


def softmax_backward(
    dout: Tensor, out: Tensor, dim: int = -1, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The gradients of `softmax` as a formula, from its output: (dx, ds), both of its shape.

    ds = out ∘ (dout − Σ dout ∘ out),  dx = scale · ds. The gradient of the bias is ds, summed over
    the dimensions along which the bias was broadcast.
    """
    ds = out * (dout - (dout * out).sum(dim, keepdim=True))
    return ds * scale, ds


# --- rotary embedding -----------------------------------------------------------------------------


# --- sinusoidal positions -------------------------------------------------------------------------
