"""What the kernels of attention share: which keys a query sees, and what scores become of qkᵀ."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import LOG2E, load_pairs, matrix


class Sequence(NamedTuple):
    """One sequence of the batch; its queries i and keys j are counted from its own first."""

    first_q: Any  # rows of q, out, dout, dq, lse
    seq_q: Any
    first_k: Any  # of k, v, dk, dv
    seq_k: Any  # that exist
    diagonal: Any  # query i sees keys up to i + diagonal where causal


@triton.jit
def sequence_of(batch, seq_q, seq_k, diagonal, kv_lengths):
    """That of a batch element; seq_q and seq_k: what the tensors have room for."""
    keys = seq_k
    if kv_lengths is not None:
        # Only what is at most seq_k has its dtype.
        keys = tl.minimum(tl.maximum(tl.load(kv_lengths + batch), 0), seq_k).to(seq_k.dtype)
    return Sequence(0, seq_q, 0, keys, diagonal)


@triton.jit
def key_range(first, sequence, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(begin, full, end) for queries first … first + BLOCK_M: the drawing in attention_fwd.py."""
    full = sequence.seq_k
    end = sequence.seq_k
    if CAUSAL:
        past = first + sequence.diagonal
        full = tl.maximum(tl.minimum(full, past + 1), 0)
        end = tl.maximum(tl.minimum(end, past + BLOCK_M), 0)
    return 0, full // BLOCK_N * BLOCK_N, end


@triton.jit
def query_range(
    start, sequence, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(begin, full, end) for keys start … start + BLOCK_N: queries [begin, full) see a part of
    them, [full, end) all that exist."""
    begin, full = 0, 0
    end = tl.where(start < sequence.seq_k, sequence.seq_q, 0)
    if CAUSAL:
        low = start - sequence.diagonal
        begin = tl.maximum(low, 0) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.maximum(low + BLOCK_N - 1, 0), BLOCK_M) * BLOCK_M
        full = tl.minimum(full, end)
    return begin, full, end


class Rules(NamedTuple):
    """What makes scores of the products qkᵀ, but for `scale`; None is compiled away."""

    mask: Any  # View (B, Hq, Sq, Sk) of bool
    bias: Any  # View (B, Hq, Sq, Sk)
    softcap: Any  # float


@triton.jit
def tanh(x):
    """A polynomial where |x| is small (Cephes' tanhf), else by exp(2 |x|)."""
    u = x * x
    near = -5.70498872745e-3 * u + 2.06390887954e-2
    near = near * u - 5.37397155531e-2
    near = near * u + 1.33314422036e-1
    near = near * u - 3.33332819422e-1
    near = near * (u * x) + x
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    return tl.where(size > 0.625, tl.where(x < 0.0, -far, far), near)  # NaN is near


@triton.jit
def chain(ds, raw, rules, scale):
    """The gradient of scale · raw, from that of the score that `scores` makes of raw = qkᵀ."""
    if rules.softcap is not None:
        t = tanh(raw * (scale / rules.softcap))
        ds = ds * (1.0 - t * t)
    return ds


@triton.jit
def scores(s, rules, batch, head, sequence, i, j, scale, NATURAL: tl.constexpr):
    """What enters the softmax, from s = qkᵀ of queries i and keys j: every change to it is here.

    −inf where the mask forbids. If NATURAL the result is the score, else score / scale.
    """
    if NATURAL:
        s = s * scale
    if rules.softcap is not None:
        s = rules.softcap * tanh(s / rules.softcap)
    if rules.bias is not None:
        bias = load_pairs(matrix(rules.bias, batch, head), i, j, sequence.seq_q, sequence.seq_k)
        s = s + bias.to(tl.float32)
    if rules.mask is not None:
        seen = load_pairs(matrix(rules.mask, batch, head), i, j, sequence.seq_q, sequence.seq_k)
        s = tl.where(seen != 0, s, float("-inf"))
    return s


@triton.jit
def hide(s, i, j, sequence, CAUSAL: tl.constexpr):
    """−inf where key j does not exist or lies after the diagonal of query i."""
    limit = sequence.seq_k
    if CAUSAL:
        limit = tl.minimum(limit, i + sequence.diagonal + 1)
    return tl.where(j < limit, s, float("-inf"))


@triton.jit
def weights(s, shift, scale, NATURAL: tl.constexpr):
    """exp(score − shift); the shift is natural if NATURAL, else in units of log 2."""
    if NATURAL:
        return tl.exp2((s - shift) * LOG2E)
    return tl.exp2(tl.fma(s, scale * LOG2E, -shift))


@triton.jit
def work_item(program, tiles, heads_total, section, LAST_FIRST: tl.constexpr):
    """(tile, head): in sections of heads that fit in L2 together, the longest tiles first."""
    first = program // (section * tiles) * section
    width = tl.minimum(section, heads_total - first)
    program -= first * tiles
    index = program // width
    if LAST_FIRST:
        index = tiles - 1 - index
    return index, first + program % width
