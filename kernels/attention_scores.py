"""What the kernels of attention share: which keys a query sees, and what scores become of qkᵀ."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import LOG2E, load_pairs, matrix
from .dropout import kept

# Kernel arguments that change from call to call.
UNSPECIALISED = [
    "dropout", "heads_total", "heads", "group", "seq_q", "seq_k", "lower", "upper", "section",
]  # fmt: skip


class Sequence(NamedTuple):
    """One sequence of the batch; its queries i and keys j are counted from its own first."""

    first_q: Any  # rows of q, out, dout, dq, lse
    seq_q: Any
    first_k: Any  # of k, v, dk, dv
    seq_k: Any  # that exist
    lower: Any  # query i sees keys i + lower … i + upper; None: all to that side
    upper: Any
    offset: Any  # Sk − Sq: where ALiBi counts distances from


@triton.jit
def sequence_of(batch, seq_q, seq_k, lower, upper, kv_lengths):
    """That of a batch element; seq_q and seq_k: what the tensors have room for."""
    keys = seq_k
    if kv_lengths is not None:
        # Only what is at most seq_k has its dtype.
        keys = tl.minimum(tl.maximum(tl.load(kv_lengths + batch), 0), seq_k).to(seq_k.dtype)
    return Sequence(0, seq_q, 0, keys, lower, upper, seq_k - seq_q)


@triton.jit
def key_range(first, sequence, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(begin, whole, full, end) for queries first … first + BLOCK_M: see attention_fwd.py."""
    begin, whole = 0, 0
    full = sequence.seq_k
    end = sequence.seq_k
    if sequence.upper is not None:
        past = first + sequence.upper
        full = tl.maximum(tl.minimum(full, past + 1), 0)
        end = tl.maximum(tl.minimum(end, past + BLOCK_M), 0)
    if sequence.lower is not None:
        low = first + sequence.lower
        begin = tl.maximum(low, 0) // BLOCK_N * BLOCK_N
        whole = tl.cdiv(tl.maximum(low + BLOCK_M - 1, 0), BLOCK_N) * BLOCK_N
        whole = tl.minimum(whole, tl.maximum(end, begin))
    return begin, whole, tl.maximum(full // BLOCK_N * BLOCK_N, whole), end


@triton.jit
def query_range(start, sequence, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(begin, whole, full, end) for keys start … start + BLOCK_N: queries [begin, end) see any of
    them, [whole, full) all that exist."""
    begin, whole = 0, 0
    end = tl.where(start < sequence.seq_k, sequence.seq_q, 0)
    if sequence.lower is not None:
        full = tl.maximum(start - sequence.lower + 1, 0) // BLOCK_M * BLOCK_M
        end = tl.minimum(end, tl.maximum(start - sequence.lower + BLOCK_N, 0))
    else:
        full = end
    if sequence.upper is not None:
        low = start - sequence.upper
        begin = tl.maximum(low, 0) // BLOCK_M * BLOCK_M
        whole = tl.cdiv(tl.maximum(low + BLOCK_N - 1, 0), BLOCK_M) * BLOCK_M
        whole = tl.minimum(whole, end)
    return begin, whole, full, end


class Rules(NamedTuple):
    """What makes scores of the products qkᵀ, but for `scale`; None is compiled away."""

    mask: Any  # View (B, Hq, Sq, Sk) of bool
    bias: Any  # View (B, Hq, Sq, Sk)
    softcap: Any  # float
    alibi_slopes: Any  # View (B, Hq, 1, 1) of fp32
    bounds: Any  # of what the mask shows: attention_mask.py


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
def distance(sequence, i, j):
    """Of query i and key j, as ALiBi has it."""
    return tl.abs(i + sequence.offset - j).to(tl.float32)


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
    if rules.alibi_slopes is not None:
        slope = tl.load(matrix(rules.alibi_slopes, batch, head).data)
        s = s - slope * distance(sequence, i, j)
    if rules.mask is not None:
        seen = load_pairs(matrix(rules.mask, batch, head), i, j, sequence.seq_q, sequence.seq_k)
        s = tl.where(seen != 0, s, float("-inf"))
    return s


@triton.jit
def hide(s, i, j, sequence):
    """−inf where key j does not exist or is not between the bounds of query i."""
    limit = sequence.seq_k
    if sequence.upper is not None:
        limit = tl.minimum(limit, i + sequence.upper + 1)
    seen = j < limit
    if sequence.lower is not None:
        seen = seen & (j >= i + sequence.lower)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def weights(s, shift, scale, NATURAL: tl.constexpr):
    """exp(score − shift); the shift is natural if NATURAL, else in units of log 2."""
    if NATURAL:
        return tl.exp2((s - shift) * LOG2E)
    return tl.exp2(tl.fma(s, scale * LOG2E, -shift))


class Dropped(NamedTuple):
    """Dropout of the weights: the seed and a `Dropout`."""

    seed: Any  # int64 (1,); in a kernel its value
    limit: Any
    keep_scale: Any


@triton.jit
def load_seed(dropout):
    """The seed read once, for all tiles."""
    if dropout is not None:
        dropout = Dropped(tl.load(dropout.seed), dropout.limit, dropout.keep_scale)
    return dropout


@triton.jit
def kept_weights(
    dropout, batch, head, first, start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Which weights of queries first … and of keys start …, a multiple of 4, are not dropped."""
    i = (first + tl.arange(0, BLOCK_M))[:, None]
    return kept(dropout.seed, dropout.limit, start, i, head, batch, BLOCK_N)


@triton.jit
def work_item(program, tiles, heads_total, section, upper):
    """(tile, head): in sections of heads that fit in L2 together, the longest tiles first, which
    are the last ones where `upper` bounds the keys of the first."""
    first = program // (section * tiles) * section
    width = tl.minimum(section, heads_total - first)
    program -= first * tiles
    index = program // width
    if upper is not None:
        index = tiles - 1 - index
    return index, first + program % width
