"""Attention backward: dq, dk, dv and dbias.

With p = exp(s − lse), recomputed tile by tile, and Δ = rowsum(dout ∘ out) − dlse, one number per
query, and z which weights dropout keeps, times 1 / (1 − dropout_p):

    ds = p ∘ (z ∘ dout vᵀ − Δ)   dv = (p ∘ z)ᵀ dout   dq = scale · ds k   dk = scale · dsᵀ q
    dbias = ds, summed over what shares an element of bias

(Dao et al. 2022, appendix B.2; the gradient of lse only shifts Δ.) In float16 ds is kept times a
power of two, e: attention_ds_scale.py. Three kernels, with no sums by atomics but those of a shared
bias, so that all other gradients are bitwise repeatable, and with `deterministic` that too:

    delta_kernel   Δ and e · Δ: attention_delta.py
    dkdv_kernel    one tile of keys of one key head; over the queries of all heads of its group
    dq_kernel      one tile of queries of one head; over the keys, as in the forward

dkdv works on transposed scores (keys × queries): pᵀ and dsᵀ come out of one product in the layout
of the next one's first operand, and stay in registers.
A bias of one row for all queries gets its gradient in dkdv, any other in dq; which of these sums
are of several programs, and how they are done in an order: attention_bias_grad.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_bias_grad import add_or_store, bias_sum, broadcast_bias_gradient
from .attention_delta import row_terms
from .attention_distance_grad import distance_bias_gradient
from .attention_dq import dq_kernel, sum_slopes
from .attention_ds_scale import largest_norms, less_delta, load_ds_scale, unscaled
from .attention_launch import (
    common_arguments,
    heads_in_l2,
    launch_settings,
    packed_of,
    pair_bytes,
    rules_of,
    sequences_of,
    shown_of,
    special_tiles,
    tiles,
    tuning,
)
from .attention_mask import listed
from .attention_scores import (
    UNSPECIALISED,
    chain,
    hide,
    kept_weights,
    load_seed,
    query_range,
    scores,
    sequence_at,
    tiles_of,
    weights,
    work_item,
)
from .attention_tiles import dkdv_tiles, dq_tiles
from .common import (
    View,
    broadcast_view,
    describable,
    described,
    device_of,
    dot,
    load_tile,
    matrix,
    optional_view,
    row_view,
    rows_from,
    store_tile,
    view,
)
from .plans import Launches, planned
from .tuning import Tuner

if TYPE_CHECKING:
    from fusedattn.ops.attention_config import AttentionBackwardCall

# --- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=UNSPECIALISED)
def dkdv_kernel(
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
    dk,  # View (B, Hkv, Sk, D), or None
    dv,  # View (B, Hkv, Sk, Dv), or None
    dbias,  # View (B, Hq, 1, Sk) of fp32 zeros, a stride 0 where it is broadcast, or None
    scale,
    dropout,  # Dropped, or None
    heads_total,  # B·Hkv
    heads,  # Hq
    group,  # Hq / Hkv
    seq_q,
    seq_k,
    lower,  # query i sees keys i + lower … i + upper; None: all to that side
    upper,
    section,  # key heads that are worked on together
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
    MASKED_APART: tl.constexpr = False,
    TMA: tl.constexpr = False,
    ADDED: tl.constexpr = False,  # of dbias: `BiasSum`
):
    tiles = tiles_of(seq_k, sequences, BLOCK_N)
    index, flat = work_item(tl.program_id(0), tiles, heads_total, section, None)
    batch, kv_head = flat // (heads // group), flat % (heads // group)
    sequence = sequence_at(index, batch, seq_q, seq_k, kv_lengths, packed, sequences, True, BLOCK_N)
    start = sequence.index * BLOCK_N
    j = start + tl.arange(0, BLOCK_N)
    keys = sequence.seq_k
    room = seq_k if packed is None else keys  # rows of dk and dv, whose keys exist or not
    # The tail of the keys is not masked here: a key is a row, what it gets stays in that row, and
    # the row is dropped.
    begin, whole, full, end = query_range(
        start, sequence, lower, upper, rules.prefix, BLOCK_M, BLOCK_N
    )
    if dropout is not None:
        dropout = load_seed(dropout)
    ds_scale = load_ds_scale(norms, flat, dropout) if norms is not None else None
    PAIRS: tl.constexpr = MASKED or rules.bias is not None
    DS: tl.constexpr = dk is not None or dbias is not None
    # Two loops as in the forward, for tiles of which the registers suffice.
    LISTED: tl.constexpr = shown_tiles is not None
    SPLIT: tl.constexpr = MASKED_APART and (LISTED or (upper is not None and lower is None))
    STEP: tl.constexpr = 1 if LISTED else BLOCK_M
    bounds = (begin, whole, end) if SPLIT else (begin, end)

    k_head = rows_from(k, batch, kv_head, sequence.first_k, ALIGNED)
    v_head = rows_from(v, batch, kv_head, sequence.first_k, ALIGNED)
    k_tile = load_tile(k_head, start, keys, BLOCK_N, D, BLOCK_D)
    v_tile = load_tile(v_head, start, keys, BLOCK_N, DV, BLOCK_DV)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in tl.range(0, group):
        head = kv_head * group + member
        q_head = rows_from(q, batch, head, sequence.first_q, ALIGNED)
        dout_head = rows_from(dout, batch, head, sequence.first_q, ALIGNED)
        if TMA:
            q_head = described(q_head, sequence.seq_q, BLOCK_M, D, BLOCK_D)
            dout_head = described(dout_head, sequence.seq_q, BLOCK_M, DV, BLOCK_DV)
        rows = (batch * heads + head).to(tl.int64) * seq_q + sequence.first_q
        bias_row = tl.zeros([BLOCK_N], tl.float32)
        span = bounds
        if LISTED:
            tile_list, partial, count = listed(shown_tiles, batch, head, sequence.index)
            span = (0, partial, count) if SPLIT else (0, count)
        for part in tl.static_range(1 + SPLIT):
            for step in tl.range(span[part], span[part + 1], STEP):
                at = tl.load(tile_list + step) * BLOCK_M if LISTED else step
                i = at + tl.arange(0, BLOCK_M)
                inside = i < sequence.seq_q
                q_tile = load_tile(q_head, at, sequence.seq_q, BLOCK_M, D, BLOCK_D)
                do_tile = load_tile(dout_head, at, sequence.seq_q, BLOCK_M, DV, BLOCK_DV)
                shift_row = tl.load(shift + rows + i, mask=inside, other=0.0)
                delta_row = tl.load(delta + rows + i, mask=inside, other=0.0)
                raw = dot(k_tile, tl.trans(q_tile), None, PRECISION)
                # The exponentials run while the tensor cores work at this.
                if DS and not PAIRS:
                    dp = dot(v_tile, tl.trans(do_tile), None, PRECISION)
                s = scores(
                    raw,
                    rules,
                    batch,
                    head,
                    sequence,
                    i[None, :],
                    j[:, None],
                    scale,
                    NATURAL,
                    MASKED and not (LISTED and SPLIT and part == 1),
                )
                masked = part == 0 if SPLIT else at < whole
                if lower is not None and not (LISTED and SPLIT):
                    masked = masked | (at >= full)
                if upper is not None or lower is not None:  # noqa: SIM102
                    if masked:
                        s = hide(s, i[None, :], j[:, None], sequence, lower, upper)
                if rules.alibi_slopes is not None:  # past the last query one below 0 overflows
                    s = tl.minimum(s, shift_row[None, :], tl.PropagateNan.ALL)
                p = weights(s, shift_row[None, :], scale, NATURAL)
                kept_p = p
                if dropout is not None:
                    keep = kept_weights(dropout, sequence, head, at, start, BLOCK_M, BLOCK_N)
                    keep = tl.trans(keep)
                    kept_p = tl.where(keep, p, 0.0)
                if dv is not None:
                    dv_tile = dot(kept_p.to(do_tile.dtype), do_tile, dv_tile, PRECISION)
                if DS:
                    if PAIRS:  # later: no registers are left for it
                        dp = dot(v_tile, tl.trans(do_tile), None, PRECISION)
                    if dropout is not None:
                        dp = tl.where(keep, dp * dropout.keep_scale, 0.0)
                    ds = p * less_delta(dp, delta_row[None, :], ds_scale)
                if dbias is not None:
                    bias_row += tl.sum(ds, 1)
                if dk is not None:
                    ds = chain(ds, raw, rules, scale)
                    dk_tile = dot(ds.to(q_tile.dtype), q_tile, dk_tile, PRECISION)

        if dbias is not None:
            of_head = matrix(dbias, batch, head)
            at = of_head.data + j.to(tl.int64) * of_head.col
            add_or_store(at, unscaled(bias_row, ds_scale), j < keys, ADDED)

    exists = (j < keys)[:, None]
    if dk is not None:
        dk_tile = tl.where(exists, unscaled(dk_tile * scale, ds_scale), 0.0)
        dk_head = rows_from(dk, batch, kv_head, sequence.first_k, ALIGNED)
        store_tile(dk_head, dk_tile, start, room, BLOCK_N, D, BLOCK_D)
    if dv is not None:
        if dropout is not None:
            dv_tile *= dropout.keep_scale
        dv_tile = tl.where(exists, dv_tile, 0.0)
        dv_head = rows_from(dv, batch, kv_head, sequence.first_k, ALIGNED)
        store_tile(dv_head, dv_tile, start, room, BLOCK_N, DV, BLOCK_DV)


# --- launcher ------------------------------------------------------------------------------------


_dkdv_tuner, _dq_tuner = Tuner(), Tuner()


def _zero(launches: Launches, dtype: torch.dtype) -> View:
    return View(launches.zeros((), dtype), 0, 0, 0, 0)


@planned(launch_settings)
def attention_backward(
    launches: Launches,
    call: AttentionBackwardCall,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dbias: Tensor | None,
    dalibi_slopes: Tensor | None = None,
    ddistance_bias: Tensor | None = None,
) -> None:
    """Write those that are not None: dq, dk, dv and dbias of any strides, the others contiguous.

    dout (B, Hq, Sq, Dv) may be expanded, dout or dlse (B, Hq, Sq) None (zero).
    """
    out, q, k, v = call.out, call.q, call.k, call.v
    device = device_of(q)
    arguments = common_arguments(call, call.dout, out, dq, dk, dv)
    widths = (arguments["BLOCK_D"], arguments["BLOCK_DV"])
    about = (device, q.dtype, widths, pair_bytes(call), special_tiles(call))
    walked = call.dout is not None and describable(q, call.dout)
    heads_q, heads_k = (x.shape[0] * x.shape[1] for x in (q, k))
    lse, lengths = launches.vector(call.lse), launches.vector(call.kv_lengths)
    dlse = row_view(call.dlse)
    dout = _zero(launches, out.dtype) if call.dout is None else view(call.dout)
    packed = packed_of(launches, call)
    norms = largest_norms(launches, v, dout, lse, dlse, lengths, packed, arguments)
    shift, delta, scaled = row_terms(launches, dout, dlse, out, lse, norms, arguments)
    rules = rules_of(launches, call)
    inputs = (view(q), view(k), view(v))
    views = (*inputs, rules, lengths, packed, dout, shift)

    def dkdv_grid(tile: dict[str, int]) -> tuple[int]:
        return (heads_k * tiles(call, k, tile["BLOCK_N"]),)

    def dq_grid(tile: dict[str, int]) -> tuple[int]:
        return (heads_q * tiles(call, q, tile["BLOCK_M"]),)

    # In fp32, and zero where no tile comes by.
    sums = bias_sum(dbias, q, k)
    total = dbias
    if dbias is not None and dbias.dtype != torch.float32:
        total = launches.empty(dbias.shape)
    in_order = sums.added and call.config.deterministic
    of_dkdv = total if sums.of_keys and not in_order else None
    of_dq = None if sums.of_keys or in_order else total
    if dk is not None or dv is not None or of_dkdv is not None:
        found = dkdv_tiles(*about, walked)
        launches.tuned(
            _dkdv_tuner, tuning(call, arguments, found, products=4), dkdv_kernel, dkdv_grid,
            *views, scaled, norms, optional_view(dk), optional_view(dv), broadcast_view(of_dkdv),
            heads_total=heads_k, zeroed=of_dkdv,
            made={"shown_tiles": shown_of(call, rules, lengths, of_keys=True)},
            section=min(heads_k, heads_in_l2(device, q, out, 1)), **arguments,
            **({} if of_dkdv is None else {"ADDED": sums.added}),
        )  # fmt: skip
    slopes = None if dalibi_slopes is None else launches.empty(lse.shape)
    if dq is not None or of_dq is not None or slopes is not None:
        found = dq_tiles(*about, describable(k, v))
        summed = {"SUM_ROWS": sums.rows, "SUM_COLS": sums.cols, "ADDED": sums.added}
        launches.tuned(
            _dq_tuner, tuning(call, arguments, found, products=3), dq_kernel, dq_grid, *views,
            scaled, norms, optional_view(dq), broadcast_view(of_dq), slopes, heads_total=heads_q,
            zeroed=of_dq, made={"shown_tiles": shown_of(call, rules, lengths)},
            section=min(heads_q, heads_in_l2(device, k, v, arguments["group"])), **arguments,
            **({} if of_dq is None else summed),
        )  # fmt: skip
    if dalibi_slopes is not None:
        sum_slopes(launches, slopes, packed, sequences_of(call), dalibi_slopes)
    if in_order and total is not None:
        given = (*inputs, rules, lengths, dout, shift, delta)
        unpacked = {x: y for x, y in arguments.items() if x != "sequences"}
        broadcast_bias_gradient(launches, total, given, unpacked, about, q)
    if dbias is not None and total is not None and total is not dbias:
        launches.apply(Tensor.copy_, dbias, total)
    if ddistance_bias is not None:
        views = (*inputs, rules, lengths, packed, dout, shift, delta)
        distance_bias_gradient(
            launches, ddistance_bias, views, packed, arguments, about, q.shape[0]
        )
