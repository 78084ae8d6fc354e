"""The oracle: every op as its formula in plain PyTorch, in the dtype of its inputs.

In fp64 these functions are what the kernels are compared with; in the tested dtype they are the
"eager" whose error sets the tolerance (tests/compare.py). They are differentiable to any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import Places as Places
from .dropout import attention_dropout as attention_dropout
from .dropout import dropout as dropout
from .dropout import philox as philox
from .positions import add_sinusoidal as add_sinusoidal
from .positions import apply_rotary as apply_rotary
from .positions import sinusoidal_positions as sinusoidal_positions

# --- attention -----------------------------------------------------------------------------------


def visible_keys(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    kv_lengths: Tensor | None = None,
) -> Tensor | None:
    """What each query may attend to: bool, broadcastable to (B, Hq, Sq, Sk), or None for all.

    window: how many keys left and right of the diagonal, which without `causal` is "bottom_right".

    The causal diagonal, for Sq = 2 and Sk = 4 (x = visible):

        "top_left"  x . . .        "bottom_right"  x x x .
                    x x . .                        x x x x
    """
    seq_q, seq_k = q.shape[-2], k.shape[-2]
    seen = mask
    key = torch.arange(seq_k, device=q.device)
    left, right = (None, None) if window is None else window
    if causal or left is not None or right is not None:
        query = torch.arange(seq_q, device=q.device)[:, None]
        diagonal = 0 if causal == "top_left" else seq_k - seq_q
        step = key - query - diagonal
        if causal:
            seen = step <= 0 if seen is None else seen & (step <= 0)
        if left is not None:
            seen = step >= -left if seen is None else seen & (step >= -left)
        if right is not None:
            seen = step <= right if seen is None else seen & (step <= right)
    if kv_lengths is not None:
        exists = (key < kv_lengths[:, None])[:, None, None, :]
        seen = exists if seen is None else seen & exists
    return seen


def scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    bias: Tensor | None,
    seen: Tensor | None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """scale · qkᵀ + bias − slope · distance, −inf where a query may not look; (B, Hq, Sq, Sk).

    With a softcap c the first term is c · tanh(scale · qkᵀ / c).
    """
    s = torch.matmul(q, k.transpose(-1, -2)) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    if alibi_slopes is not None:
        s = s - per_head(alibi_slopes, s) * distances(q, k).to(s.dtype)
    return s if seen is None else s.masked_fill(~seen, float("-inf"))


def distances(q: Tensor, k: Tensor) -> Tensor:
    """|i + Sk − Sq − j| of queries i and keys j: from the diagonal that ALiBi counts from."""
    seq_q, seq_k = q.shape[-2], k.shape[-2]
    row = torch.arange(seq_k - seq_q, seq_k, device=q.device)[:, None]
    return (row - torch.arange(seq_k, device=q.device)).abs()


def per_head(x: Tensor, s: Tensor) -> Tensor:
    """(Hq,) or (B, Hq), or that with two dimensions of 1 behind, in the dtype of the scores."""
    return (x if x.dim() == 4 else x[..., None, None]).to(s.dtype)


def chain(ds: Tensor, q: Tensor, k: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """The gradient of scale · qkᵀ, from that of the scores."""
    if softcap is None:
        return ds
    t = torch.tanh(torch.matmul(q, k.transpose(-1, -2)) * scale / softcap)
    return ds * (1.0 - t * t)


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each of Hkv heads for its group of query heads: (B, Hkv, S, D) → (B, Hq, S, D)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def sum_heads(x: Tensor, heads: int) -> Tensor:
    """The derivative of `expand_heads`: each group's sum, (B, Hq, S, D) → (B, Hkv, S, D)."""
    if x.shape[1] == heads:
        return x
    group = x.shape[1] // heads
    return x.reshape(x.shape[0], heads, group, *x.shape[2:]).sum(2)


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
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    places: Places | None = None,
) -> tuple[Tensor, Tensor]:
    """dropout(softmax(scores)) v and the log-sum-exp, in the dtype of q; see `scores`.

    q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) → out (B, Hq, Sq, Dv),
    lse (B, Hq, Sq). Sinks are one more logit of each head, in the sum and of no value. A query that
    may attend to nothing gets out 0 and lse −inf.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (expand_heads(drop_absent(x, kv_lengths), q.shape[1]) for x in (k, v))
    seen = visible_keys(q, k, mask=mask, causal=causal, window=window, kv_lengths=kv_lengths)
    s = scores(q, k, scale, bias, seen, softcap, alibi_slopes)
    if s.shape[-1] == 0:
        out = torch.matmul(s.to(v.dtype), v)
        return out, s.sum(-1) - float("inf")
    highest = s.detach().amax(-1, keepdim=True)
    nothing = highest == float("-inf")
    sink = None
    if sinks is not None:
        # Rows that see nothing don't see it either: it may be NaN.
        sink = per_head(sinks, s).expand_as(highest).masked_fill(nothing, float("-inf"))
        highest = torch.maximum(highest, sink.detach())
    highest = highest.masked_fill(highest == float("-inf"), 0.0)
    e = torch.exp(s - highest)
    total = e.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - highest)
    total = total.masked_fill(nothing, 1.0)
    p = attention_dropout(e / total, dropout_p, seed, places)
    out = torch.matmul(p.to(v.dtype), v)
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
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    places: Places | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of `attention` as a formula: (dq, dk, dv, ds, dsinks).

    ds (B, Hq, Sq, Sk) and, with sinks, dsinks (B, Hq, Sq, 1) are not yet summed.

    dv = pᵀ·do,  ds = p ∘ (do·vᵀ − rowsum(do ∘ out) + dlse),  dq = scale·dr·k,  dk = scale·drᵀ·q
    (Dao et al. 2022, appendix B.2, with the term of the log-sum-exp); dr is that of `chain`. With
    dropout p in dv and do·vᵀ in ds are what it leaves of them.
    The gradient of the bias is ds, summed over the dimensions along which the bias was broadcast.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads_kv = k.shape[1]
    k, v = (expand_heads(drop_absent(x, kv_lengths), q.shape[1]) for x in (k, v))
    seen = visible_keys(q, k, mask=mask, causal=causal, window=window, kv_lengths=kv_lengths)
    s = scores(q, k, scale, bias, seen, softcap, alibi_slopes)
    nothing = (s == float("-inf")).all(-1, keepdim=True)
    sink = None if sinks is None else per_head(sinks, s).expand(*s.shape[:-1], 1)
    logits = s if sink is None else torch.cat([s, sink], -1)
    p = torch.softmax(logits.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)
    p, p_sink = (p, None) if sink is None else (p[..., :-1], p[..., -1:])
    dout = torch.zeros_like(torch.matmul(p, v)) if dout is None else dout
    dp = attention_dropout(torch.matmul(dout, v.transpose(-1, -2)), dropout_p, seed, places)
    row = (p * dp).sum(-1, keepdim=True)
    if dlse is not None:
        row = row - dlse.to(row.dtype)[..., None]
    # Where p is 0 so is ds, whatever the gradient of a log-sum-exp of −inf may be.
    ds = torch.where(p == 0, 0.0, p * (dp - row))
    dr = chain(ds, q, k, scale, softcap)
    dq = scale * torch.matmul(dr, k)
    dk = scale * torch.matmul(dr.transpose(-1, -2), q)
    dv = torch.matmul(attention_dropout(p, dropout_p, seed, places).transpose(-1, -2), dout)
    dk, dv = (drop_absent(sum_heads(x, heads_kv), kv_lengths) for x in (dk, dv))
    dsinks = None if p_sink is None else torch.where(p_sink == 0, 0.0, -p_sink * row)
    return dq, dk, dv, ds, dsinks


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    t_bias: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    kv_lengths: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    places: Places | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`attention` and its derivative along tangents, None for zero: (out, lse, t_out, t_lse).

    t_s = t_r + t_bias with t_r = scale · (t_q kᵀ + q t_kᵀ) through `chain`, t_lse = Σ p ∘ t_s and
    t_out = (p ∘ t_s) v + p t_v − out ∘ t_lse, where with dropout p is what it leaves but in t_lse.
    """
    dropped = (dropout_p, seed, places)
    given: dict[str, Any] = {"softcap": softcap, "kv_lengths": kv_lengths, **options}
    out, lse = attention(
        q, k, v, scale=scale, sinks=sinks, dropout_p=dropout_p, seed=seed, places=places, **given
    )
    k, v = (expand_heads(drop_absent(x, kv_lengths), q.shape[1]) for x in (k, v))
    shown: Any = {n: given.get(n) for n in ("mask", "causal", "window", "kv_lengths")}
    seen = visible_keys(q, k, **shown)
    s = scores(q, k, scale, given.get("bias"), seen, softcap, given.get("alibi_slopes"))
    p = torch.exp(s - lse[..., None].masked_fill(lse[..., None] == float("-inf"), 0.0))
    t_s = torch.zeros_like(s)
    if t_q is not None:
        t_s = t_s + torch.matmul(t_q, k.transpose(-1, -2)) * scale
    if t_k is not None:
        t_k = expand_heads(drop_absent(t_k, kv_lengths), q.shape[1])
        t_s = t_s + torch.matmul(q, t_k.transpose(-1, -2)) * scale
    t_s = chain(t_s, q, k, scale, softcap)
    if t_bias is not None:
        t_s = t_s + t_bias
    moved = torch.where(s == float("-inf"), 0.0, p * t_s)
    t_lse = moved.sum(-1)
    t_out = torch.matmul(attention_dropout(moved, *dropped), v) - out * t_lse[..., None]
    if t_v is not None:
        t_v = expand_heads(drop_absent(t_v, kv_lengths), q.shape[1])
        t_out = t_out + torch.matmul(attention_dropout(p, *dropped), t_v)
    return out, lse, t_out, t_lse


# --- layer norm and RMS norm ----------------------------------------------------------------------


def norm(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    centre: bool,
    eps: float,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(z − mean) · rstd · (weight_offset + weight) + bias over the last dimension; mean, rstd.

    `centre` is for layer norm; RMS norm subtracts no mean.
    """
    mean, centred = torch.zeros_like(z[..., :1]), z
    if centre:
        # The mean of what is left makes up for the rounding of the first: a row of equal elements,
        # whose mean is off by an ulp, would be that ulp over √eps.
        first = z.mean(-1, keepdim=True)
        left = (z - first).mean(-1, keepdim=True)
        mean, centred = first + left, (z - first) - left
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    out = centred * rstd
    if weight is not None:
        out = out * (weight + weight_offset)
    if bias is not None:
        out = out + bias
    return out, mean, rstd


def norm_backward(
    dout: Tensor | None,
    dz: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    *,
    centre: bool,
    eps: float,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `norm` as a formula: of z, and of weight and bias before the sum over rows.

    With n = (z − mean) · rstd and g = dout · (weight_offset + weight), per row of width N:
    gradient of z = rstd · (g − Σg / N − n · Σ(g · n) / N) + dz; without Σg for RMS norm.
    """
    normalised, _, rstd = norm(z, None, None, centre=centre, eps=eps)
    dout = torch.zeros_like(z) if dout is None else dout
    g = dout if weight is None else dout * (weight + weight_offset)
    total = g - normalised * (g * normalised).mean(-1, keepdim=True)
    if centre:
        total = total - g.mean(-1, keepdim=True)
    total = total * rstd
    return total if dz is None else total + dz, dout * normalised, dout


def _norm_of_shape(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    seed: int | Tensor | None,
    *,
    centre: bool,
    eps: float,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """`norm` over the trailing dimensions `normalized_shape` of dropout(x) + residual."""
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    width = math.prod(shape)
    rows = math.prod(x.shape[: x.dim() - len(shape)])
    weight, bias = (None if y is None else y.reshape(width) for y in (weight, bias))
    if isinstance(seed, int):
        seed = torch.tensor([seed], device=x.device)
    z = dropout(x.reshape(rows, width), dropout_p, seed)
    z = z if residual is None else (z + residual.reshape(rows, width)).to(residual.dtype)
    out = norm(z, weight, bias, centre=centre, eps=eps, weight_offset=weight_offset)[0]
    out = out.reshape(x.shape).to(x.dtype)
    return out if residual is None else (out, z.reshape(x.shape))


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`F.layer_norm` of z = dropout(x) + residual; with a residual (out, z)."""
    return _norm_of_shape(
        x, normalized_shape, weight, bias, residual, dropout_p, seed, centre=True, eps=eps
    )


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`F.rms_norm` of z = dropout(x) + residual, with weight_offset + weight as the weight."""
    if eps is None:
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    return _norm_of_shape(
        x, normalized_shape, weight, None, residual, dropout_p, seed,
        centre=False, eps=eps, weight_offset=weight_offset,
    )  # fmt: skip


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


# --- SwiGLU ---------------------------------------------------------------------------------------


def _activated(x: Tensor, activation: str) -> Tensor:
    if activation.startswith("gelu"):
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return torch.relu(x) if activation == "relu" else F.silu(x)


def swiglu(gate: Tensor, up: Tensor | None = None, *, activation: str = "silu") -> Tensor:
    """act(gate) ∘ up, where act is "silu", "gelu", "gelu_tanh" or "relu" (Shazeer 2020).

    Without up the last dimension of gate holds both.
    """
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return _activated(gate, activation) * up


def _slope(x: Tensor, activation: str) -> Tensor:
    """act'(x), but for relu."""
    if activation == "gelu":
        return 0.5 * torch.erfc(x * -(0.5**0.5)) + x * torch.exp(-0.5 * x * x) / math.sqrt(math.tau)
    if activation == "silu":
        s = torch.sigmoid(x)
        return s + x * (s * (1 - s))
    twice = 2 * math.sqrt(2 / math.pi)
    s = torch.sigmoid(twice * (x + 0.044715 * x**3))
    # Clamped where the sigmoid has long been level: there its slope is 0, and must not meet inf.
    inner = twice * (1 + 3 * 0.044715 * x.clamp(-100.0, 100.0) ** 2)
    return s + x * (s * (1 - s) * inner)


def swiglu_backward(
    dout: Tensor, gate: Tensor, up: Tensor | None = None, *, activation: str = "silu"
) -> tuple[Tensor, Tensor | None]:
    """The gradients of `swiglu` as a formula: (dgate, dup), the first of both where up is None."""
    g, u = gate.chunk(2, dim=-1) if up is None else (gate, up)
    pulled = dout * u
    if activation == "relu":
        dgate = pulled.masked_fill(g <= 0, 0.0)
    else:
        dgate = pulled * _slope(g, activation)
    dup = dout * _activated(g, activation)
    return (torch.cat((dgate, dup), dim=-1), None) if up is None else (dgate, dup)
