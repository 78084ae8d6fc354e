r"""Attention forward: out = dropout(softmax(scale · qkᵀ + bias)) v and lse = log Σ exp(scores).

    q (B, Hq, Sq, D)   k (B, Hkv, Sk, D)   v (B, Hkv, Sk, Dv)   →   out (B, Hq, Sq, Dv)
    mask, bias: (B, Hq, Sq, Sk), each dimension full or 1        →   lse (B, Hq, Sq), fp32

One program computes BLOCK_M queries of one head. It walks over the keys in tiles of BLOCK_N and
keeps, per query, the maximum m, the sum l of exp(s − m), and the output of the keys seen so far;
when m grows, l and the output are scaled by exp(m_old − m_new) (Milakov and Gimelshein 2018; Dao
et al. 2022). Only tiles on the diagonal or at the end of the keys are masked:

    keys →   begin … whole …… full … end      the tiles [whole, full) are seen by every query of the
    queries  - - \ x x x x x \ - - -          program, [begin, whole) and [full, end) in part, the
             - - - \ x x x x x \ - -          rest not at all; without a window begin = whole = 0

Scores in two units. Without a bias and with scale > 0, m is kept in units of log 2 and scale·log₂e
is folded into the exponent: exp2(qk·scale·log₂e − m) is one fused multiply-add and one exp2. Else
scores are natural, exp2((s − m)·log₂e): a bias of finfo.min must not overflow when it is scaled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

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
from .attention_tiles import forward_tiles
from .common import (
    LN2,
    LOG2E,
    broadcast_view,
    describable,
    described,
    device_of,
    dot,
    load_tile,
    matrix,
    rows_from,
    store_tile,
    view,
)
from .plans import Launches, planned
from .tuning import Tuner

if TYPE_CHECKING:
    from fusedattn.ops.attention_config import AttentionCall

# --- kernel --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(
    q,  # View (B, Hq, Sq, D)
    k,  # View (B, Hkv, Sk, D)
    v,  # View (B, Hkv, Sk, Dv)
    rules,
    kv_lengths,  # int32 or int64 (B,), or None
    packed,  # of packed sequences where they begin, or None
    sinks,  # View (1, Hq, 1, 1) of fp32, or None
    out,  # View (B, Hq, Sq, Dv)
    lse,  # fp32 (B, Hq, Sq), contiguous
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
    AHEAD: tl.constexpr = False,
    TMA: tl.constexpr = False,
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
    if TMA:
        k_head = described(k_head, keys, BLOCK_N, D, BLOCK_D)
        v_head = described(v_head, keys, BLOCK_N, DV, BLOCK_DV)
    first = sequence.index * BLOCK_M
    i = first + tl.arange(0, BLOCK_M)
    begin, whole, full, end = key_range(
        first, sequence, lower, upper, rules.prefix, BLOCK_M, BLOCK_N
    )
    if dropout is not None:
        dropout = load_seed(dropout)

    q_head = rows_from(q, batch, head, sequence.first_q, ALIGNED)
    q_tile = load_tile(q_head, first, rows, BLOCK_M, D, BLOCK_D)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # Full tiles and masked ones have loops of their own: a branch between the products hides from
    # Triton that they are a chain. A bias leaves no registers for a second loop.
    LISTED: tl.constexpr = shown_tiles is not None
    SPLIT: tl.constexpr = rules.bias is None and (LISTED or not MASKED)
    UNMASKED: tl.constexpr = 1 if LISTED or lower is not None else 0  # the loop over full tiles
    PARTS: tl.constexpr = (2 if LISTED or lower is None else 3) if SPLIT else 1
    STEP: tl.constexpr = 1 if LISTED else BLOCK_N
    bounds = (begin, end)
    if LISTED:
        tile_list, partial, count = listed(shown_tiles, batch, head, sequence.index)
        bounds = (0, partial, count) if SPLIT else (0, count)
    elif SPLIT:
        bounds = (begin, full, end) if lower is None else (begin, whole, full, end)
    # After a loop that may be skipped, sums under way join those from before it: for that ptxas has
    # each wgmma wait (its remark C7515).
    WGMMA: tl.constexpr = cuda_capability_geq(9) and not cuda_capability_geq(10)
    # AHEAD: qkᵀ of the next tile beside the exponentials of this one (Shah et al. 2024), for tiles
    # of which the registers suffice. The last one is of keys that do not exist or are not seen.
    tl.static_assert(not (AHEAD and LISTED), "the next tile is not the one beside it")
    if AHEAD:
        at = tl.maximum(begin, 1 - keys)  # without keys past them
        k_tile = load_tile(k_head, at, keys, BLOCK_N, D, BLOCK_D)
        ahead = dot(q_tile, tl.trans(k_tile), None, PRECISION)
    for part in tl.static_range(PARTS):
        if not WGMMA or bounds[part] < bounds[part + 1]:
            for at in tl.range(bounds[part], bounds[part + 1], STEP):
                start = tl.load(tile_list + at) * BLOCK_N if LISTED else at
                j = start + tl.arange(0, BLOCK_N)
                k_start = start + BLOCK_N if AHEAD else start
                k_tile = load_tile(k_head, k_start, keys, BLOCK_N, D, BLOCK_D)
                v_tile = load_tile(v_head, start, keys, BLOCK_N, DV, BLOCK_DV)
                s = ahead if AHEAD else dot(q_tile, tl.trans(k_tile), None, PRECISION)
                s = scores(
                    s,
                    rules,
                    batch,
                    head,
                    sequence,
                    i[:, None],
                    j[None, :],
                    scale,
                    NATURAL,
                    MASKED and not (SPLIT and part == UNMASKED),
                )
                masked = part != UNMASKED if SPLIT else (start < whole) | (start >= full)
                if masked:
                    s = hide(s, i[:, None], j[None, :], sequence, lower, upper)
                highest = tl.max(s, 1) if NATURAL else tl.max(s, 1) * (scale * LOG2E)
                m_new = tl.maximum(m, highest)
                # A row that has seen no key yet keeps exp(−inf − 0) = 0 instead of exp(−inf + inf).
                shift = tl.where(m_new == float("-inf"), 0.0, m_new)
                if AHEAD:
                    ahead = dot(q_tile, tl.trans(k_tile), None, PRECISION)
                p = weights(s, shift[:, None], scale, NATURAL)
                alpha = tl.exp2((m - shift) * LOG2E if NATURAL else m - shift)
                l = l * alpha + tl.sum(p, 1)  # noqa: E741
                acc = acc * alpha[:, None]
                if dropout is not None:
                    keep = kept_weights(dropout, sequence, head, first, start, BLOCK_M, BLOCK_N)
                    p = tl.where(keep, p, 0.0)
                acc = dot(p.to(v_tile.dtype), v_tile, acc, PRECISION)
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
        acc = acc * alpha[:, None]
        m = m_new
    inverse = tl.where(l == 0.0, 0.0, 1.0 / l)
    if dropout is not None:
        inverse *= dropout.keep_scale
    out_head = rows_from(out, batch, head, sequence.first_q, ALIGNED)
    store_tile(out_head, acc * inverse[:, None], first, rows, BLOCK_M, DV, BLOCK_DV)
    total = m + tl.log2(l) * LN2 if NATURAL else (m + tl.log2(l)) * LN2
    at = flat.to(tl.int64) * seq_q + sequence.first_q + i
    tl.store(lse + at, total, mask=i < rows)


# --- launcher ------------------------------------------------------------------------------------


_tuner = Tuner()


@planned(launch_settings)
def attention_forward(launches: Launches, call: AttentionCall, out: Tensor, lse: Tensor) -> None:
    """Write `out` (B, Hq, Sq, Dv), any strides, and `lse` (B, Hq, Sq), fp32 and contiguous.

    fp16, bf16 and fp32; head dims to 512; any strides; mask and bias with four dimensions, each
    full or 1. Keys at and after kv_lengths are not read.
    """
    q, k, v = call[:3]
    device = device_of(q)
    arguments = common_arguments(call, out)
    heads_total = q.shape[0] * q.shape[1]
    arguments["heads_total"] = heads_total
    arguments["section"] = min(heads_total, heads_in_l2(device, k, v, arguments["group"]))
    lengths = launches.vector(call.kv_lengths)
    sinks = broadcast_view(call.sinks)
    packed = packed_of(launches, call)
    rules = rules_of(launches, call)
    views = (view(q), view(k), view(v), rules, lengths, packed, sinks, view(out), lse)

    def grid(tile: dict[str, int]) -> tuple[int]:
        return (heads_total * tiles(call, q, tile["BLOCK_M"]),)

    widths = (arguments["BLOCK_D"], arguments["BLOCK_DV"])
    kind = (device, q.dtype, widths, pair_bytes(call), special_tiles(call))
    found = forward_tiles(*kind, describable(k, v))
    about = tuning(call, arguments, found, products=2)
    shown = {"shown_tiles": shown_of(call, rules, lengths)}
    launches.tuned(_tuner, about, forward_kernel, grid, *views, made=shown, **arguments)
