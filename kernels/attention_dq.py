"""Attention backward: dq and, of a bias with a row for each query, dbias: see attention_bwd.py.

A bias of one column, or of one element, gets its sum over the keys of each query. Likewise the
gradient of ALiBi's slopes, −Σ ds · distance, one number for each query, which `slopes_kernel` adds
up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from .attention_bias_grad import add_or_store
from .attention_ds_scale import less_delta, load_ds_scale, unscaled
from .attention_mask import listed
from .attention_scores import (
    UNSPECIALISED,
    Packed,
    chain,
    distance,
    hide,
    kept_weights,
    key_range,
    load_seed,
    packed_rows,
    scores,
    sequence_at,
    tiles_of,
    weights,
    work_item,
)
from .common import described, dot, load_tile, matrix, rows_from, store_tile
from .plans import Launches


@triton.jit(do_not_specialize=UNSPECIALISED)
def dq_kernel(
    q,  # View (B, Hq, Sq, D)
    k,  # View (B, Hkv, Sk, D)
    v,  # View (B, Hkv, Sk, Dv)
    rules,  # of attention_scores.py
    kv_lengths,  # int32 or int64 (B,), or None
    packed,  # of packed sequences where they begin, or None
    dout,  # View (B, Hq, Sq, Dv)
    shift,  # fp32 (B, Hq, Sq), contiguous
    delta,  # fp32 (B, Hq, Sq), contiguous: e · Δ
    norms,  # of `load_ds_scale`, or None
    dq,  # View (B, Hq, Sq, D), or None
    dbias,  # View (B, Hq, Sq, Sk) of fp32 zeros, a stride 0 where it is broadcast, or None
    dslopes,  # fp32 (B, Hq, Sq), contiguous: of those of ALiBi, what a query adds; or None
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
    TMA: tl.constexpr = False,
    SUM_ROWS: tl.constexpr = False,  # of dbias: `BiasSum`
    SUM_COLS: tl.constexpr = False,
    ADDED: tl.constexpr = False,
):
    tiles = tiles_of(seq_q, sequences, BLOCK_M)
    index, flat = work_item(tl.program_id(0), tiles, heads_total, section, upper)
    batch, head = flat // heads, flat % heads
    sequence = sequence_at(
        index, batch, seq_q, seq_k, kv_lengths, packed, sequences, False, BLOCK_M
    )
    k_head = rows_from(k, batch, head // group, sequence.first_k, ALIGNED)
    v_head = rows_from(v, batch, head // group, sequence.first_k, ALIGNED)
    if TMA:
        k_head = described(k_head, sequence.seq_k, BLOCK_N, D, BLOCK_D)
        v_head = described(v_head, sequence.seq_k, BLOCK_N, DV, BLOCK_DV)
    first = sequence.index * BLOCK_M
    i = first + tl.arange(0, BLOCK_M)
    inside = i < sequence.seq_q
    rows = flat.to(tl.int64) * seq_q + sequence.first_q
    begin, whole, full, end = key_range(
        first, sequence, lower, upper, rules.prefix, BLOCK_M, BLOCK_N
    )
    if dropout is not None:
        dropout = load_seed(dropout)
    ds_scale = load_ds_scale(norms, flat // group, dropout) if norms is not None else None

    q_head = rows_from(q, batch, head, sequence.first_q, ALIGNED)
    dout_head = rows_from(dout, batch, head, sequence.first_q, ALIGNED)
    q_tile = load_tile(q_head, first, sequence.seq_q, BLOCK_M, D, BLOCK_D)
    do_tile = load_tile(dout_head, first, sequence.seq_q, BLOCK_M, DV, BLOCK_DV)
    shift_row = tl.load(shift + rows + i, mask=inside, other=0.0)
    delta_row = tl.load(delta + rows + i, mask=inside, other=0.0)
    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    slopes_row = tl.zeros([BLOCK_M], tl.float32)
    bias_row = tl.zeros([BLOCK_M], tl.float32)
    # Two loops, on sm_90 never skipped, as in the forward.
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
    WGMMA: tl.constexpr = cuda_capability_geq(9) and not cuda_capability_geq(10)
    for part in tl.static_range(PARTS):
        if not WGMMA or bounds[part] < bounds[part + 1]:
            for index in tl.range(bounds[part], bounds[part + 1], STEP):
                start = tl.load(tile_list + index) * BLOCK_N if LISTED else index
                j = start + tl.arange(0, BLOCK_N)
                k_tile = load_tile(k_head, start, sequence.seq_k, BLOCK_N, D, BLOCK_D)
                v_tile = load_tile(v_head, start, sequence.seq_k, BLOCK_N, DV, BLOCK_DV)
                raw = dot(q_tile, tl.trans(k_tile), None, PRECISION)
                s = scores(
                    raw,
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
                p = weights(s, shift_row[:, None], scale, NATURAL)
                dp = dot(do_tile, tl.trans(v_tile), None, PRECISION)
                if dropout is not None:
                    keep = kept_weights(dropout, sequence, head, first, start, BLOCK_M, BLOCK_N)
                    dp = tl.where(keep, dp * dropout.keep_scale, 0.0)
                ds = p * less_delta(dp, delta_row[:, None], ds_scale)
                if SUM_COLS:
                    bias_row += tl.sum(ds, 1)
                elif dbias is not None:
                    of_head = matrix(dbias, batch, head)
                    at = i.to(tl.int64)[:, None] * of_head.row
                    at += j.to(tl.int64)[None, :] * of_head.col
                    exists = inside[:, None] & (j < sequence.seq_k)[None, :]
                    add_or_store(of_head.data + at, unscaled(ds, ds_scale), exists, ADDED)
                if dslopes is not None:
                    slopes_row -= tl.sum(ds * distance(sequence, i[:, None], j[None, :]), 1)
                if dq is not None:
                    ds = chain(ds, raw, rules, scale)
                    dq_tile = dot(ds.to(k_tile.dtype), k_tile, dq_tile, PRECISION)
    if SUM_COLS:
        of_head = matrix(dbias, batch, head)
        bias_row = unscaled(bias_row, ds_scale)
        if SUM_ROWS:
            total = tl.sum(tl.where(inside, bias_row, 0.0), 0)
            add_or_store(of_head.data, total, None, ADDED)
        else:
            at = of_head.data + i.to(tl.int64) * of_head.row
            add_or_store(at, bias_row, inside, ADDED)
    if dslopes is not None:
        tl.store(dslopes + rows + i, unscaled(slopes_row, ds_scale), mask=inside)
    if dq is not None:
        dq_tile = unscaled(dq_tile * scale, ds_scale)
        dq_head = rows_from(dq, batch, head, sequence.first_q, ALIGNED)
        store_tile(dq_head, dq_tile, first, sequence.seq_q, BLOCK_M, D, BLOCK_D)


# --- the gradient of ALiBi's slopes --------------------------------------------------------------


@triton.jit(do_not_specialize=["heads", "seq_q", "sequences"])
def slopes_kernel(
    rows,  # fp32 (B, Hq, Sq), contiguous: `dslopes` of `dq_kernel`
    parts,  # fp32 (B, Hq), contiguous; of packed sequences (N, Hq)
    offsets,  # of packed sequences those of queries, or None
    heads,
    seq_q,
    sequences,
    BLOCK: tl.constexpr,
):
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    count = seq_q
    at = rows + tl.program_id(0).to(tl.int64) * seq_q
    if offsets is not None:
        first, count = packed_rows(offsets, batch, sequences, seq_q, False)
        at = rows + head.to(tl.int64) * seq_q + first
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(at + i, mask=i < count, other=0.0)
    tl.store(parts + tl.program_id(0), tl.sum(total, 0))


def _sum_parts(parts: Tensor, dslopes: Tensor) -> None:
    torch.sum(parts, 0, out=dslopes)


def sum_slopes(
    launches: Launches, rows: Tensor, packed: Packed | None, sequences: int, dslopes: Tensor
) -> None:
    """Write dslopes (B or 1, Hq, 1, 1) from what each query adds."""
    heads, seq_q = rows.shape[1:]
    one = dslopes.shape[0] == 1
    lead = (sequences, 1) if one else (1, sequences)
    parts = launches.empty((*lead, heads, 1, 1))
    launches.launch(
        slopes_kernel, (sequences * heads,), rows, parts, None if packed is None else packed.q,
        heads, seq_q, sequences, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    launches.apply(_sum_parts, parts, dslopes)
