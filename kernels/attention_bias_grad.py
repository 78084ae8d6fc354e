"""The gradient of an attention bias that was broadcast: ds summed over what shared it.

    ds = p ∘ (z ∘ dout vᵀ − Δ), p = exp(s − lse)       (attention_bwd.py)
    dbias[b, h, i, j] = Σ ds over every index along which bias has size 1

It is summed where ds is at hand: over keys in dq_kernel, over queries in dkdv_kernel, whose rows
are keys, and what several heads or batch entries share, there too, by fp32 atomics. Only where such
a sum has to be deterministic has it a kernel of its own: one program owns one tile of dbias and
walks over all tiles of ds that add to it, recomputing each from q, k, v and dout: two more matrix
products, but the same bits each time. Where dbias has too few tiles to fill the GPU the walk is
split, and the parts summed afterwards.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_scores import (
    hide,
    kept_weights,
    load_seed,
    scores,
    sequence_of,
    weights,
)
from .attention_tiles import bias_grad_tile
from .common import dot, load_tile, rows_from
from .plans import Launches


class BiasSum(NamedTuple):
    """How the gradient of a bias of some shape is summed."""

    rows: bool  # over queries
    cols: bool  # over keys
    added: bool  # several programs of the kernel that computes it add to one element

    @property
    def of_keys(self) -> bool:
        """Whether that kernel is `dkdv_kernel`."""
        return self.rows and not self.cols


def bias_sum(bias: Tensor | None, q: Tensor, k: Tensor) -> BiasSum:
    if bias is None:
        return BiasSum(False, False, False)
    batch, heads, rows, cols = bias.shape
    over_rows, over_cols = rows < q.shape[2], cols < k.shape[2]
    shared = batch < q.shape[0] or heads < q.shape[1]
    return BiasSum(over_rows, over_cols, shared or (over_rows and over_cols))


@triton.jit
def add_or_store(pointers, x, mask, ADDED: tl.constexpr):
    """x to what is there if ADDED, else in its place."""
    if ADDED:
        tl.atomic_add(pointers, x, mask=mask, sem="relaxed")
    else:
        tl.store(pointers, x, mask=mask)


_LENGTHS = ["seq_q", "seq_k", "lower", "upper", "tiles_m", "tiles_n", "splits", "summed"]


@triton.jit
def score_gradient(
    q, k, v, rules, dout, shift, delta, scale, dropout, batch, head, heads, group, seq_q, lower,
    upper, sequence, m, n, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, ALIGNED: tl.constexpr, NATURAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """ds of tile (m, n) of the scores of a head, before a softcap bends it; 0 where unseen."""
    i, j = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, keys = i < sequence.seq_q, sequence.seq_k
    rows = (batch * heads + head).to(tl.int64) * seq_q + sequence.first_q
    q_head = rows_from(q, batch, head, sequence.first_q, ALIGNED)
    k_head = rows_from(k, batch, head // group, sequence.first_k, ALIGNED)
    v_head = rows_from(v, batch, head // group, sequence.first_k, ALIGNED)
    dout_head = rows_from(dout, batch, head, sequence.first_q, ALIGNED)
    q_tile = load_tile(q_head, m * BLOCK_M, sequence.seq_q, BLOCK_M, D, BLOCK_D)
    k_tile = load_tile(k_head, n * BLOCK_N, keys, BLOCK_N, D, BLOCK_D)
    v_tile = load_tile(v_head, n * BLOCK_N, keys, BLOCK_N, DV, BLOCK_DV)
    do_tile = load_tile(dout_head, m * BLOCK_M, sequence.seq_q, BLOCK_M, DV, BLOCK_DV)
    shift_row = tl.load(shift + rows + i, mask=inside, other=0.0)
    delta_row = tl.load(delta + rows + i, mask=inside, other=0.0)
    s = dot(q_tile, tl.trans(k_tile), None, PRECISION)
    s = scores(s, rules, batch, head, sequence, i[:, None], j[None, :], scale, NATURAL, MASKED)
    s = hide(s, i[:, None], j[None, :], sequence, lower, upper)
    p = weights(s, shift_row[:, None], scale, NATURAL)
    dp = dot(do_tile, tl.trans(v_tile), None, PRECISION)
    if dropout is not None:
        keep = kept_weights(dropout, sequence, head, m * BLOCK_M, n * BLOCK_N, BLOCK_M, BLOCK_N)
        dp = tl.where(keep, dp * dropout.keep_scale, 0.0)
    return tl.where(inside[:, None], p * (dp - delta_row[:, None]), 0.0)


@triton.jit(do_not_specialize=["dropout", "heads", "group", "summed_heads", *_LENGTHS])
def bias_grad_kernel(
    q,  # View (B, Hq, Sq, D)
    k,  # View (B, Hkv, Sk, D)
    v,  # View (B, Hkv, Sk, Dv)
    rules,  # of attention_scores.py
    kv_lengths,  # int32 or int64 (B,), or None
    dout,  # View (B, Hq, Sq, Dv)
    shift,  # fp32 (B, Hq, Sq), contiguous
    delta,  # fp32 (B, Hq, Sq), contiguous
    parts,  # fp32 (splits, *bias.shape), contiguous
    scale,
    dropout,  # Dropped, or None
    heads,  # Hq
    group,  # Hq / Hkv
    seq_q,
    seq_k,
    lower,  # query i sees keys i + lower … i + upper; None: all to that side
    upper,
    splits,
    summed,  # tiles of ds that add to one tile of dbias
    summed_heads,  # Hq if the bias is shared by the heads, else 1
    tiles_m,  # tiles of queries, tiles of keys
    tiles_n,
    bias_shape,  # (B or 1, Hq or 1, Sq or 1, Sk or 1)
    SUM_ROWS: tl.constexpr,
    SUM_COLS: tl.constexpr,
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
):
    # Which tile of dbias: (part, batch, head, m, n), each of the last four 0 where it is summed.
    program = tl.program_id(0)
    own_n = 1 if SUM_COLS else tiles_n
    own_m = 1 if SUM_ROWS else tiles_m
    n0, program = program % own_n, program // own_n
    m0, program = program % own_m, program // own_m
    head0, program = program % bias_shape[1], program // bias_shape[1]
    batch0, part = program % bias_shape[0], program // bias_shape[0]

    share = tl.cast(summed, tl.int64)
    low = (share * part // splits).to(tl.int32)
    high = (share * (part + 1) // splits).to(tl.int32)
    if upper is not None and not SUM_ROWS and not SUM_COLS:
        high = tl.where(n0 * BLOCK_N < (m0 + 1) * BLOCK_M + upper, high, low)  # else unseen
    if dropout is not None:
        dropout = load_seed(dropout)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(low, high):
        # Which tile of ds: `step` counts the summed dimensions, keys fastest, batch slowest.
        m, n, rest = m0, n0, step
        if SUM_COLS:
            n, rest = rest % tiles_n, rest // tiles_n
        if SUM_ROWS:
            m, rest = rest % tiles_m, rest // tiles_m
        head = head0 + rest % summed_heads
        batch = batch0 + rest // summed_heads
        sequence = sequence_of(m, batch, seq_q, seq_k, kv_lengths)
        acc += score_gradient(
            q, k, v, rules, dout, shift, delta, scale, dropout, batch, head, heads, group, seq_q,
            lower, upper, sequence, m, n, D, DV, BLOCK_D, BLOCK_DV, ALIGNED, NATURAL, MASKED,
            PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    shape_m, shape_n = bias_shape[2], bias_shape[3]
    i, j = m0 * BLOCK_M + tl.arange(0, BLOCK_M), n0 * BLOCK_N + tl.arange(0, BLOCK_N)
    total = parts + (tl.program_id(0) // (own_m * own_n)).to(tl.int64) * shape_m * shape_n
    if SUM_ROWS:
        acc = tl.sum(acc, 0, keep_dims=True)
        i = tl.zeros([1], tl.int32)
    if SUM_COLS:
        acc = tl.sum(acc, 1, keep_dims=True)
        j = tl.zeros([1], tl.int32)
    inside = (i < shape_m)[:, None] & (j < shape_n)[None, :]
    tl.store(total + i.to(tl.int64)[:, None] * shape_n + j[None, :], acc, mask=inside)


def _sum_parts(parts: Tensor, dbias: Tensor) -> None:
    torch.sum(parts, 0, out=dbias)


def broadcast_bias_gradient(
    launches: Launches,
    dbias: Tensor,
    views: tuple,
    arguments: dict[str, Any],
    about: tuple,
    q: Tensor,
) -> None:
    """Write the gradient of a bias that has size 1 where the scores do not, in an order.

    dbias: fp32, of the bias's four dimensions. views, arguments: what `bias_grad_kernel` shares
    with the other kernels of the backward; about: what its tile is chosen by, the device first.
    """
    batch, heads, seq_q, _ = q.shape
    seq_k = arguments["seq_k"]
    of_batch, of_heads, of_rows, of_cols = dbias.shape
    options = bias_grad_tile(*about)
    tiles_m = triton.cdiv(seq_q, options.kwargs["BLOCK_M"])
    tiles_n = triton.cdiv(seq_k, options.kwargs["BLOCK_N"])
    sum_rows, sum_cols = of_rows < seq_q, of_cols < seq_k
    owned = of_batch * of_heads * (1 if sum_rows else tiles_m) * (1 if sum_cols else tiles_n)
    summed_heads = heads if of_heads < heads else 1
    summed = (batch if of_batch < batch else 1) * summed_heads
    summed *= (tiles_m if sum_rows else 1) * (tiles_n if sum_cols else 1)
    # Two programs for each processor; the parts stay small, since they multiply few tiles.
    splits = min(summed, triton.cdiv(2 * about[0].processors, owned))
    parts = launches.empty((splits, *dbias.shape))
    launches.launch(
        bias_grad_kernel, (splits * owned,), *views, parts, **arguments, splits=splits,
        summed=summed, summed_heads=summed_heads, tiles_m=tiles_m, tiles_n=tiles_n,
        bias_shape=tuple(dbias.shape), SUM_ROWS=sum_rows, SUM_COLS=sum_cols,
        **options.all_kwargs(),
    )  # fmt: skip
    launches.apply(_sum_parts, parts, dbias)
