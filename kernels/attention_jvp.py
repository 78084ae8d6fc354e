r"""Attention's forward mode: out, lse and their derivatives along tangents of q, k, v and bias.

    q, t_q (B, Hq, Sq, D)   k, t_k (B, Hkv, Sk, D)   v, t_v (B, Hkv, Sk, Dv)
    t_bias (B, Hq, Sq, Sk), each dimension full or 1
    →   out, t_out (B, Hq, Sq, Dv)   lse, t_lse (B, Hq, Sq), fp32

The programs, their loops and their units are those of attention_fwd.py. Beside the maximum, l and
the output each keeps, of the derivatives t_s of the scores, d = Σ e t_s and t_o = Σ e (t_s v + t_v)
with e = exp(s − m), which shrink with the others when m grows. At the end

    t_s = scale · (t_q kᵀ + q t_kᵀ), times the slope of a softcap, + t_bias
    t_lse = d / l        t_out = (t_o − o · t_lse) / l

Dropout changes e in o and t_o alone. A tangent that is None is compiled away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .attention_launch import (
    common_arguments,
    heads_in_l2,
    launch_settings,
    packed_of,
    pair_bytes,
    rules_of,
    shown_of,
    special_tiles,
    tiles,
    tuning,
)
from .attention_mask import listed
from .attention_scores import (
    UNSPECIALISED,
    chain,
    columns_of,
    hide,
    kept_weights,
    key_range,
    load_seed,
    scores,
    sequence_at,
    tiles_of,
    weights,
    work_item,
)
from .attention_tiles import jvp_tiles
from .common import (
    LN2,
    LOG2E,
    broadcast_view,
    device_of,
    dot,
    load_pairs,
    load_tile,
    matrix,
    optional_view,
    rows_from,
    store_tile,
    view,
)
from .plans import Launches, planned
from .tuning import Tuner

if TYPE_CHECKING:
    from fusedattn.ops.attention_config import AttentionJvpCall

# --- kernel --------------------------------------------------------------------------------------


@triton.jit
def moved_scores(
    raw, q_tile, k_tile, t_q_tile, t_k_head, start, t_bias, rules, batch, head, sequence, i, j,
    scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """t_s of queries i and keys j, start …, whose products are `raw`."""
    t_s = None
    if t_q_tile is not None:
        t_s = dot(t_q_tile, tl.trans(k_tile), None, PRECISION)
    if t_k_head is not None:
        t_k_tile = load_tile(t_k_head, start, sequence.seq_k, BLOCK_N, D, BLOCK_D)
        t_s = dot(q_tile, tl.trans(t_k_tile), t_s, PRECISION)
    t_s = tl.zeros_like(raw) if t_s is None else chain(t_s * scale, raw, rules, scale)
    if t_bias is not None:
        columns = columns_of(rules, sequence)
        of_bias = load_pairs(matrix(t_bias, batch, head), i, j, sequence.seq_q, columns)
        t_s = t_s + of_bias.to(tl.float32)
    return t_s


@triton.jit(do_not_specialize=UNSPECIALISED)
def jvp_kernel(
    q,  # View (B, Hq, Sq, D)
    k,  # View (B, Hkv, Sk, D)
    v,  # View (B, Hkv, Sk, Dv)
    t_q,  # Views like these, or None
    t_k,
    t_v,
    t_bias,  # View (B, Hq, Sq, Sk), or None
    rules,
    kv_lengths,  # int32 or int64 (B,), or None
    packed,  # of packed sequences where they begin, or None
    sinks,  # View (1, Hq, 1, 1) of fp32, or None
    out,  # View (B, Hq, Sq, Dv)
    lse,  # fp32 (B, Hq, Sq), contiguous
    t_out,  # as out
    t_lse,  # as lse
    scale,
    dropout,  # Dropped, or None
    heads_total,  # B·Hq
    heads,  # Hq
    group,  # Hq / Hkv
    seq_q,
    seq_k,
    lower,  # query i sees keys i + lower … i + upper; None: all to that side
    upper,
    section,  # heads that are worked on together
    sequences,  # that are packed, or None
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ALIGNED: tl.constexpr,
    NATURAL: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    shown_tiles=None,  # of `listed`
):
    tiles = tiles_of(seq_q, sequences, BLOCK_M)
    index, flat = work_item(tl.program_id(0), tiles, heads_total, section, upper)
    batch, head = flat // heads, flat % heads
    sequence = sequence_at(
        index, batch, seq_q, seq_k, kv_lengths, packed, sequences, False, BLOCK_M
    )
    rows, keys = sequence.seq_q, sequence.seq_k
    k_head = rows_from(k, batch, head // group, sequence.first_k, ALIGNED)
    v_head = rows_from(v, batch, head // group, sequence.first_k, ALIGNED)
    first = sequence.index * BLOCK_M
    i = first + tl.arange(0, BLOCK_M)
    begin, whole, full, end = key_range(
        first, sequence, lower, upper, rules.prefix, BLOCK_M, BLOCK_N
    )
    if dropout is not None:
        dropout = load_seed(dropout)
    LISTED: tl.constexpr = shown_tiles is not None
    if LISTED:
        tile_list, _, end = listed(shown_tiles, batch, head, sequence.index)
        begin = 0

    q_head = rows_from(q, batch, head, sequence.first_q, ALIGNED)
    q_tile = load_tile(q_head, first, rows, BLOCK_M, D, BLOCK_D)
    t_q_tile = None
    t_k_head = None
    if t_q is not None:
        t_q_head = rows_from(t_q, batch, head, sequence.first_q, ALIGNED)
        t_q_tile = load_tile(t_q_head, first, rows, BLOCK_M, D, BLOCK_D)
    if t_k is not None:
        t_k_head = rows_from(t_k, batch, head // group, sequence.first_k, ALIGNED)
    if t_v is not None:
        t_v_head = rows_from(t_v, batch, head // group, sequence.first_k, ALIGNED)
    MOVED: tl.constexpr = t_q is not None or t_k is not None or t_bias is not None
    # What fp16 holds of e · t_s is not much: each tile's rows are multiplied relative to their
    # largest.
    NARROW: tl.constexpr = v.data.dtype.element_ty == tl.float16
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    d = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    t_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for at in tl.range(begin, end, 1 if LISTED else BLOCK_N):
        start = tl.load(tile_list + at) * BLOCK_N if LISTED else at
        j = start + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k_head, start, keys, BLOCK_N, D, BLOCK_D)
        v_tile = load_tile(v_head, start, keys, BLOCK_N, DV, BLOCK_DV)
        raw = dot(q_tile, tl.trans(k_tile), None, PRECISION)
        if MOVED:
            t_s = moved_scores(
                raw, q_tile, k_tile, t_q_tile, t_k_head, start, t_bias, rules, batch, head,
                sequence, i[:, None], j[None, :], scale, D, BLOCK_D, BLOCK_N, PRECISION,
            )  # fmt: skip
        s = scores(
            raw, rules, batch, head, sequence, i[:, None], j[None, :], scale, NATURAL, MASKED
        )
        if (start < whole) | (start >= full):
            s = hide(s, i[:, None], j[None, :], sequence, lower, upper)
        highest = tl.max(s, 1) if NATURAL else tl.max(s, 1) * (scale * LOG2E)
        m_new = tl.maximum(m, highest)
        # A row that has seen no key yet keeps exp(−inf − 0) = 0 instead of exp(−inf + inf).
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = weights(s, shift[:, None], scale, NATURAL)
        alpha = tl.exp2((m - shift) * LOG2E if NATURAL else m - shift)
        l = l * alpha + tl.sum(p, 1)  # noqa: E741
        acc = acc * alpha[:, None]
        t_acc = t_acc * alpha[:, None]
        if MOVED:
            t_s = p * t_s
            d = d * alpha + tl.sum(t_s, 1)
        if dropout is not None:
            keep = kept_weights(dropout, sequence, head, first, start, BLOCK_M, BLOCK_N)
            p = tl.where(keep, p, 0.0)
            if MOVED:
                t_s = tl.where(keep, t_s, 0.0)
        p = p.to(v_tile.dtype)
        acc = dot(p, v_tile, acc, PRECISION)
        if t_v is not None:
            t_v_tile = load_tile(t_v_head, start, keys, BLOCK_N, DV, BLOCK_DV)
            t_acc = dot(p, t_v_tile, t_acc, PRECISION)
        if MOVED:
            if NARROW:
                size = tl.max(tl.abs(t_s), 1)
                unit = tl.where(size == 0.0, 0.0, 1.0 / size)
                part = dot((t_s * unit[:, None]).to(v_tile.dtype), v_tile, None, PRECISION)
                t_acc += part * size[:, None]
            else:
                t_acc = dot(t_s.to(v_tile.dtype), v_tile, t_acc, PRECISION)
        m = m_new

    if sinks is not None:
        sink = tl.load(matrix(sinks, batch, head).data)
        sink = sink if NATURAL else sink * LOG2E
        # A row that saw nothing stays one.
        m_new = tl.where(m == float("-inf"), m, tl.maximum(m, sink))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2((m - shift) * LOG2E if NATURAL else m - shift)
        more = tl.exp2((sink - shift) * LOG2E if NATURAL else sink - shift)
        l = tl.where(m == float("-inf"), l, l * alpha + more)  # noqa: E741
        d = d * alpha
        acc = acc * alpha[:, None]
        t_acc = t_acc * alpha[:, None]
        m = m_new
    inverse = tl.where(l == 0.0, 0.0, 1.0 / l)
    d = d * inverse
    at = flat.to(tl.int64) * seq_q + sequence.first_q + i
    total = m + tl.log2(l) * LN2 if NATURAL else (m + tl.log2(l)) * LN2
    tl.store(lse + at, total, mask=i < rows)
    tl.store(t_lse + at, d, mask=i < rows)
    if dropout is not None:
        inverse *= dropout.keep_scale
    t_acc = (t_acc - acc * d[:, None]) * inverse[:, None]
    out_head = rows_from(out, batch, head, sequence.first_q, ALIGNED)
    store_tile(out_head, acc * inverse[:, None], first, rows, BLOCK_M, DV, BLOCK_DV)
    t_out_head = rows_from(t_out, batch, head, sequence.first_q, ALIGNED)
    store_tile(t_out_head, t_acc, first, rows, BLOCK_M, DV, BLOCK_DV)


# --- launcher ------------------------------------------------------------------------------------

_tuner = Tuner()


@planned(launch_settings)
def attention_jvp(
    launches: Launches, call: AttentionJvpCall, out: Tensor, lse: Tensor, t_out: Tensor,
    t_lse: Tensor,
) -> None:  # fmt: skip
    """Write `out` and `t_out` (B, Hq, Sq, Dv), any strides, `lse` and `t_lse` (B, Hq, Sq), fp32 and
    contiguous.

    What `attention_forward` takes, and tangents of any strides, t_bias like a bias.
    """
    q, k, v = call[:3]
    tangents = call.t_q, call.t_k, call.t_v, call.t_bias
    device = device_of(q)
    arguments = common_arguments(call, out, t_out, *tangents[:3])
    heads_total = q.shape[0] * q.shape[1]
    arguments["heads_total"] = heads_total
    arguments["section"] = min(heads_total, heads_in_l2(device, k, v, arguments["group"]))
    moved = (*map(optional_view, tangents[:3]), broadcast_view(call.t_bias))
    rules, lengths = rules_of(launches, call), launches.vector(call.kv_lengths)
    views = (
        view(q), view(k), view(v), *moved, rules, lengths,
        packed_of(launches, call), broadcast_view(call.sinks), view(out), lse, view(t_out), t_lse,
    )  # fmt: skip

    def grid(tile: dict[str, int]) -> tuple[int]:
        return (heads_total * tiles(call, q, tile["BLOCK_M"]),)

    widths = (arguments["BLOCK_D"], arguments["BLOCK_DV"])
    extra = pair_bytes(call) + (0 if call.t_bias is None else call.t_bias.element_size())
    found = jvp_tiles(device, q.dtype, widths, extra, special_tiles(call))
    about = tuning(call, arguments, found, products=6)
    key = about["key"]
    about["key"] = key._replace(kind=(*key.kind, *(x is None for x in tangents)))
    shown = {"shown_tiles": shown_of(call, rules, lengths)}
    launches.tuned(_tuner, about, jvp_kernel, grid, *views, made=shown, **arguments)
