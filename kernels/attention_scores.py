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
    "sequences",
]  # fmt: skip


class Packed(NamedTuple):
    """Where packed sequences begin, which lie one after the other in tensors with B = 1.

    Rows past the last offset are a sequence more, whose queries see no key. Sequence b has no tile
    before number offsets[b] // BLOCK + b of the head, so that a head of so many rows has at most
    rows // BLOCK + sequences + 1 of them, whatever the lengths are, and nobody has to know those.
    """

    q: Any  # int32 or int64 (sequences + 1,)
    k: Any
    to_the_end: Any  # 1: the diagonal of each ends at its last key; 0: it begins at its first


class Sequence(NamedTuple):
    """One sequence of the batch; its queries i and keys j are counted from its own first."""

    index: Any  # which tile of it a program has
    number: Any  # of the sequence
    first_q: Any  # rows of q, out, dout, dq, lse
    seq_q: Any
    first_k: Any  # of k, v, dk, dv
    seq_k: Any  # that exist
    diagonal: Any  # query i sees keys i + diagonal + lower … i + diagonal + upper of the kernel's
    offset: Any  # Sk − Sq: where ALiBi counts distances from
    zero: Any  # in a bias of distances, the number of the distance 0


@triton.jit
def load_length(lengths, at, most):
    """lengths[at], at least 0 and at most `most`, whose dtype nothing larger may have."""
    return tl.minimum(tl.maximum(tl.load(lengths + at), 0), most).to(most.dtype)


@triton.jit
def sequence_of(index, batch, seq_q, seq_k, kv_lengths):
    """That of a batch element; seq_q and seq_k: what the tensors have room for."""
    keys = seq_k
    if kv_lengths is not None:
        keys = load_length(kv_lengths, batch, seq_k)
    return Sequence(index, batch, 0, seq_q, 0, keys, 0, seq_k - seq_q, seq_q - 1)


@triton.jit
def tiles_of(rows, sequences, BLOCK: tl.constexpr):
    """How many tiles of rows a head has, or at most."""
    return tl.cdiv(rows, BLOCK) if sequences is None else rows // BLOCK + sequences + 1


@triton.jit
def packed_rows(offsets, number, sequences, rows, REST: tl.constexpr):
    """(first, count) of a packed sequence; those past the last one's end if REST, else none."""
    first = load_length(offsets, number, rows)
    last = load_length(offsets, tl.minimum(number + 1, sequences), rows)
    if REST:
        last = tl.where(number < sequences, last, rows)
    return first, tl.maximum(last - first, 0)


@triton.jit
def packed_number(
    number, seq_q, seq_k, packed, sequences, REST_Q: tl.constexpr, REST_K: tl.constexpr
):
    """The packed one of this number, whose tile is the first."""
    first_q, rows_q = packed_rows(packed.q, number, sequences, seq_q, REST_Q)
    first_k, rows_k = packed_rows(packed.k, number, sequences, seq_k, REST_K)
    offset = rows_k - rows_q
    diagonal, zero = offset * packed.to_the_end, seq_k - 1 - offset
    return Sequence(0, number, first_q, rows_q, first_k, rows_k, diagonal, offset, zero)


@triton.jit
def packed_sequence(
    index, seq_q, seq_k, packed, sequences, OF_KEYS: tl.constexpr, BLOCK: tl.constexpr
):
    """The packed one of tile `index` of a head's queries, or OF_KEYS of its keys.

    A tile that is not there, or of rows that no sequence has, has nothing on the other side.
    """
    own = packed.k if OF_KEYS else packed.q
    number = index * 0
    last = sequences + 0
    while number < last:
        middle = (number + last + 1) // 2
        begun = tl.load(own + middle) // BLOCK + middle <= index
        number = tl.where(begun, middle, number)
        last = tl.where(begun, last, middle - 1)
    x = packed_number(number, seq_q, seq_k, packed, sequences, not OF_KEYS, OF_KEYS)
    rows_q, rows_k = x.seq_q, x.seq_k
    if OF_KEYS:
        index = tl.maximum(index - (x.first_k // BLOCK + number), 0)
        rows_q = tl.where(index * BLOCK < rows_k, rows_q, 0)
    else:
        index = tl.maximum(index - (x.first_q // BLOCK + number), 0)
        rows_k = tl.where(index * BLOCK < rows_q, rows_k, 0)
    return Sequence(
        index, number, x.first_q, rows_q, x.first_k, rows_k, x.diagonal, x.offset, x.zero
    )


@triton.jit
def sequence_at(
    index, batch, seq_q, seq_k, kv_lengths, packed, sequences, OF_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """That of a batch element, or the packed one that has tile `index`."""
    return (
        sequence_of(index, batch, seq_q, seq_k, kv_lengths)
        if packed is None
        else packed_sequence(index, seq_q, seq_k, packed, sequences, OF_KEYS, BLOCK)
    )


@triton.jit
def prefix_of(prefix, sequence):
    """How many keys every query of a sequence sees; 0 where there are no pairs."""
    pairs = (sequence.seq_q > 0) & (sequence.seq_k > 0)
    length = tl.load(prefix + sequence.number, mask=pairs, other=0)
    return tl.minimum(length, sequence.seq_k).to(tl.int32)


@triton.jit
def key_range(first, sequence, lower, upper, prefix, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(begin, whole, full, end) for queries first … first + BLOCK_M: see attention_fwd.py.

    prefix: where a mask of a prefix is one of `rules`, what narrows begin and end; or None.
    """
    begin, whole = 0, 0
    full = sequence.seq_k
    end = sequence.seq_k
    if prefix is not None:
        past = tl.maximum(first + sequence.offset + BLOCK_M, prefix_of(prefix, sequence))
        end = tl.maximum(tl.minimum(end, past), 0)
    if upper is not None:
        past = first + sequence.diagonal + upper
        full = tl.maximum(tl.minimum(full, past + 1), 0)
        end = tl.maximum(tl.minimum(end, past + BLOCK_M), 0)
    if lower is not None:
        low = first + sequence.diagonal + lower
        begin = tl.maximum(low, 0) // BLOCK_N * BLOCK_N
        whole = tl.cdiv(tl.maximum(low + BLOCK_M - 1, 0), BLOCK_N) * BLOCK_N
        whole = tl.minimum(whole, tl.maximum(end, begin))
    return begin, whole, tl.maximum(full // BLOCK_N * BLOCK_N, whole), end


@triton.jit
def query_range(
    start, sequence, lower, upper, prefix, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(begin, whole, full, end) for keys start … start + BLOCK_N: queries [begin, end) see any of
    them, [whole, full) all that exist."""
    begin, whole = 0, 0
    end = tl.where(start < sequence.seq_k, sequence.seq_q, 0)
    if lower is not None:
        past = start - sequence.diagonal - lower + 1
        full = tl.maximum(past, 0) // BLOCK_M * BLOCK_M
        end = tl.minimum(end, tl.maximum(past - 1 + BLOCK_N, 0))
    else:
        full = end
    if upper is not None:
        low = start - sequence.diagonal - upper
        begin = tl.maximum(low, 0) // BLOCK_M * BLOCK_M
        whole = tl.cdiv(tl.maximum(low + BLOCK_N - 1, 0), BLOCK_M) * BLOCK_M
        whole = tl.minimum(whole, end)
    if prefix is not None:
        low = tl.where(start < prefix_of(prefix, sequence), 0, start - sequence.offset)
        begin = tl.maximum(begin, tl.maximum(low, 0) // BLOCK_M * BLOCK_M)
        whole = tl.maximum(whole, begin)
    return begin, whole, full, end


class Rules(NamedTuple):
    """What makes scores of the products qkᵀ, but for `scale`; None is compiled away.

    One level deep: Triton 3.6 knows no None in a tuple in a tuple.
    """

    mask: Any  # View (B, Hq, Sq, Sk) of bool
    prefix: Any  # int32 or int64 (B,), of packed sequences (N,): a mask by rule
    documents_q: Any  # View (B, 1, 1, Sq) of int32 or int64: likewise
    documents_k: Any  # View (B, 1, 1, Sk)
    blocks: Any  # View (B, Hq, blocks of queries, blocks of keys) of bool: likewise
    block_size: Any  # of a block
    bias: Any  # View (B, Hq, Sq, Sk)
    distance_bias: Any  # View (B, Hq, 1, Sq + Sk − 1) of fp32
    softcap: Any  # float
    alibi_slopes: Any  # View (B, Hq, 1, 1) of fp32
    pack: Any  # a number that Sk is a multiple of, so many pairs are loaded at once: `columns_of`


@triton.jit
def columns_of(rules, sequence):
    """Of the matrices of mask and bias, known to end where a pack of pairs does if `rules.pack`."""
    if rules.pack is not None:
        return sequence.seq_k // rules.pack * rules.pack
    return sequence.seq_k


@triton.jit
def shown(rules, batch, head, sequence, i, j):
    """Whether the masks let query i see key j; one of i and j is a column, the other a row."""
    rows, keys = sequence.seq_q, columns_of(rules, sequence)
    if rules.mask is not None:
        seen = load_pairs(matrix(rules.mask, batch, head), i, j, rows, keys) != 0
    else:
        seen = (i < rows) & (j < keys)
    if rules.prefix is not None:
        seen = seen & ((j < tl.load(rules.prefix + sequence.number)) | (j <= i + sequence.offset))
    if rules.documents_q is not None:
        of_queries = matrix(rules.documents_q, batch, head)
        of_keys = matrix(rules.documents_k, batch, head)
        own = tl.load(of_queries.data + i.to(tl.int64) * of_queries.col, mask=i < rows, other=0)
        other = tl.load(of_keys.data + j.to(tl.int64) * of_keys.col, mask=j < keys, other=0)
        seen = seen & (own == other)
    if rules.blocks is not None:
        of_head = matrix(rules.blocks, batch, head)
        last_i, last_j = (rows - 1) // rules.block_size, (keys - 1) // rules.block_size
        m, n = i // rules.block_size, j // rules.block_size
        seen = seen & (load_pairs(of_head, m, n, last_i + 1, last_j + 1) != 0)
    return seen


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
def scores(
    s, rules, batch, head, sequence, i, j, scale, NATURAL: tl.constexpr, MASKED: tl.constexpr
):
    """What enters the softmax, from s = qkᵀ of queries i and keys j: every change to it is here.

    −inf where a mask forbids. If NATURAL the result is the score, else score / scale.
    """
    if NATURAL:
        s = s * scale
    if rules.softcap is not None:
        s = rules.softcap * tanh(s / rules.softcap)
    if rules.bias is not None:
        columns = columns_of(rules, sequence)
        bias = load_pairs(matrix(rules.bias, batch, head), i, j, sequence.seq_q, columns)
        s = s + bias.to(tl.float32)
    if rules.alibi_slopes is not None:
        slope = tl.load(matrix(rules.alibi_slopes, sequence.number, head).data)
        s = s - slope * distance(sequence, i, j)
    if rules.distance_bias is not None:
        row = matrix(rules.distance_bias, batch, head)
        exists = (i < sequence.seq_q) & (j < sequence.seq_k)
        s = s + tl.load(row.data + (j - i + sequence.zero) * row.col, mask=exists, other=0.0)
    if MASKED:
        s = tl.where(shown(rules, batch, head, sequence, i, j), s, float("-inf"))
    return s


@triton.jit
def hide(s, i, j, sequence, lower, upper):
    """−inf where key j does not exist or is not between the bounds of query i."""
    limit = sequence.seq_k
    if upper is not None:
        limit = tl.minimum(limit, i + sequence.diagonal + upper + 1)
    seen = j < limit
    if lower is not None:
        seen = seen & (j >= i + sequence.diagonal + lower)
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
    """The seed read once, for all tiles; there is dropout: a function returns no None."""
    return Dropped(tl.load(dropout.seed), dropout.limit, dropout.keep_scale)


@triton.jit
def kept_weights(
    dropout, sequence, head, first, start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Which weights of queries first … and of keys start …, a multiple of 4, are not dropped."""
    i = (first + tl.arange(0, BLOCK_M))[:, None]
    return kept(dropout.seed, dropout.limit, start, i, head, sequence.number, BLOCK_N)


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
