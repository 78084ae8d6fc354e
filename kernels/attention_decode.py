r"""Attention of a few queries on a cache, which may lie in pages; the keys are split.

    q (B, Hq, Sq, D)   k (B, Hkv, room, D)   v (B, Hkv, room, Dv)   →   out (B, Hq, Sq, Dv)
    or pages (pages, Hkv, size, D) of which block_table (B, n) tells →   lse (B, Hq, Sq), fp32

A program has BLOCK_M of the group · Sq queries that share a key head, as rows of one tile, and a
part of the keys that they see: memory sets the pace, and each key is read once for all of them. It
writes the maximum m of its scores, the sum l of exp(s − m) and the output without its denominator.
A second kernel brings the parts of a row together ("Flash-Decoding", Dao et al. 2023):

    m = max mᵢ      l = Σ lᵢ exp(mᵢ − m)      out = Σ oᵢ exp(mᵢ − m) / l      lse = m + log l

How the keys are split follows from what the cache has room for, and each sequence's part from its
own length: nobody reads a length on the host. Units of the scores are those of attention_fwd.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_launch import bounds_of, is_masked, launch_settings
from .attention_scores import Rules, Sequence, hide, load_length, scores, weights
from .common import (
    LN2,
    LOG2E,
    Device,
    block_width,
    broadcast_view,
    device_of,
    dot,
    dot_precision,
    matrix,
    view,
    with_data,
)
from .plans import Launches, planned

if TYPE_CHECKING:
    from fusedattn.ops.attention_config import AttentionCall

# --- kernels -------------------------------------------------------------------------------------


class Pages(NamedTuple):
    """Where the keys of a sequence lie, where that is not one after the other."""

    table: Any  # int32 or int64 (B, n)
    batch: Any  # its strides
    step: Any
    rows: Any  # of a page
    last: Any  # page that there is


@triton.jit
def cache_rows(x, batch, head, j, exists, pages):
    """Pointers to rows j of a head of k or v; never outside of it."""
    entry = batch.to(tl.int64)
    if pages is not None:
        place = (j // pages.rows).to(tl.int64) * pages.step
        page = tl.load(pages.table + entry * pages.batch + place, mask=exists, other=0)
        entry = tl.minimum(tl.maximum(page, 0), pages.last).to(tl.int64)
        j = j % pages.rows
    return x.data + entry * x.batch + head.to(tl.int64) * x.head + j.to(tl.int64) * x.row


@triton.jit
def columns(rows, step, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """(pointers, which exist) of so many columns of each of `rows`."""
    col = tl.arange(0, PADDED)[None, :]
    return rows[:, None] + col.to(tl.int64) * step, col < WIDTH


@triton.jit
def load_columns(rows, step, exists, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """So many columns of each of `rows`, 0 where it does not exist."""
    pointers, inside = columns(rows, step, WIDTH, PADDED)
    return tl.load(pointers, mask=inside & exists[:, None], other=0.0)


@triton.jit(do_not_specialize=["heads_kv", "group", "seq_q", "room", "splits", "lower", "upper"])
def decode_kernel(
    q,  # View (B, Hq, Sq, D)
    k,  # View (B or pages, Hkv, room or rows of a page, D)
    v,  # likewise, of Dv
    rules,
    kv_lengths,  # int32 or int64 (B,)
    pages,  # Pages, or None
    maxima,  # fp32 (splits, B, Hq, Sq), contiguous
    sums,  # likewise
    outs,  # fp32 (splits, B, Hq, Sq, Dv), contiguous
    scale,
    batches,  # B
    heads_kv,
    group,
    seq_q,
    room,  # for keys of a sequence
    splits,
    lower,  # query i sees keys i + diagonal + lower … i + diagonal + upper; None: all to that side
    upper,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    NATURAL: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    split, rest = tl.program_id(0) % splits, tl.program_id(0) // splits
    tiles = tl.cdiv(group * seq_q, BLOCK_M)
    tile, rest = rest % tiles, rest // tiles
    head_kv, batch = rest % heads_kv, rest // heads_kv
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    present = row < group * seq_q
    row = tl.where(present, row, tile * BLOCK_M)
    head, i = head_kv * group + row // seq_q, row % seq_q

    keys = load_length(kv_lengths, batch, room)
    diagonal = keys - seq_q
    sequence = Sequence(tile, batch, 0, seq_q, 0, keys, diagonal, diagonal, 0)
    begin, end = 0, keys
    if lower is not None:
        begin = tl.maximum(tl.min(i, 0) + diagonal + lower, 0) // BLOCK_N * BLOCK_N
    if upper is not None:
        end = tl.minimum(end, tl.max(i, 0) + diagonal + upper + 1)
    each = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), splits), BLOCK_N) * BLOCK_N
    begin += split * each
    end = tl.minimum(end, begin + each)

    q_rows = q.data + batch.to(tl.int64) * q.batch + head.to(tl.int64) * q.head
    q_rows += i.to(tl.int64) * q.row
    q_tile = load_columns(q_rows, q.col, present, D, BLOCK_D)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        exists = j < end
        k_rows = cache_rows(k, batch, head_kv, j, exists, pages)
        k_tile = load_columns(k_rows, k.col, exists, D, BLOCK_D)
        v_rows = cache_rows(v, batch, head_kv, j, exists, pages)
        v_tile = load_columns(v_rows, v.col, exists, DV, BLOCK_DV)
        s = dot(q_tile, tl.trans(k_tile), None, PRECISION)
        s = scores(
            s, rules, batch, head[:, None], sequence, i[:, None], j[None, :], scale, NATURAL, MASKED
        )
        s = hide(s, i[:, None], j[None, :], sequence, lower, upper)
        highest = tl.max(s, 1) if NATURAL else tl.max(s, 1) * (scale * LOG2E)
        m_new = tl.maximum(m, highest)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = weights(s, shift[:, None], scale, NATURAL)
        alpha = tl.exp2((m - shift) * LOG2E if NATURAL else m - shift)
        l = l * alpha + tl.sum(p, 1)  # noqa: E741
        acc = dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], PRECISION)
        m = m_new

    at = ((split * batches + batch) * heads_kv * group + head).to(tl.int64) * seq_q + i
    tl.store(maxima + at, m if NATURAL else m * LN2, mask=present)
    tl.store(sums + at, l, mask=present)
    pointers, inside = columns(outs + at * DV, 1, DV, BLOCK_DV)
    tl.store(pointers, acc, mask=inside & present[:, None])


@triton.jit(do_not_specialize=["rows", "heads", "seq_q", "splits"])
def combine_kernel(
    maxima,  # fp32 (splits, B, Hq, Sq), contiguous
    sums,
    outs,  # fp32 (splits, B, Hq, Sq, Dv), contiguous
    sinks,  # View (1, Hq, 1, 1) of fp32, or None
    out,  # View (B, Hq, Sq, Dv)
    lse,  # fp32 (B, Hq, Sq), contiguous
    rows,  # B · Hq · Sq
    heads,
    seq_q,
    splits,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    exists = split < splits
    at = split.to(tl.int64) * rows + row
    of_split = tl.load(maxima + at, mask=exists, other=float("-inf"))
    m = tl.max(of_split, 0)
    head = row // seq_q % heads
    if sinks is not None:
        sink = tl.load(matrix(sinks, row * 0, head).data)
        m = tl.where(m == float("-inf"), m, tl.maximum(m, sink))  # a row that saw nothing stays one
    shift = tl.where(m == float("-inf"), 0.0, m)
    factor = tl.exp2((of_split - shift) * LOG2E)
    l = tl.sum(tl.load(sums + at, mask=exists, other=0.0) * factor, 0)  # noqa: E741
    if sinks is not None:
        l += tl.where(m == float("-inf"), 0.0, tl.exp2((sink - shift) * LOG2E))  # noqa: E741
    parts = load_columns(outs + at * DV, 1, exists, DV, BLOCK_DV)
    total = tl.sum(parts * factor[:, None], 0) * tl.where(l == 0.0, 0.0, 1.0 / l)
    col = tl.arange(0, BLOCK_DV)
    of_row = matrix(out, row // seq_q // heads, head)
    to = of_row.data + row % seq_q * of_row.row + col.to(tl.int64) * of_row.col
    tl.store(to, total.to(out.data.dtype.element_ty), mask=col < DV)
    tl.store(lse + row, m + tl.log2(l) * LN2)


# --- launcher ------------------------------------------------------------------------------------

MOST_ROWS = 64  # of a tile
MOST_SPLITS = 64
LEAST_KEYS = 256  # worth a program of their own


def _tile(rows: int, widths: tuple[int, int], dtype: torch.dtype) -> dict[str, int]:
    """Two tiles of 32 KB of K and V are under way during the products of a third, where one has not
    to be larger. IEEE products in fp32 take registers."""
    of_key = sum(widths) * dtype.itemsize
    keys = max(16, min(64, triton.next_power_of_2((32 << 10) // of_key + 1) // 2))
    block = max(16, min(MOST_ROWS, triton.next_power_of_2(rows)))
    wide = dtype == torch.float32 and max(widths) > 64
    return {
        "BLOCK_M": block, "BLOCK_N": keys, "num_warps": 8 if wide else 4,
        "num_stages": 3 if keys * of_key <= 32 << 10 else 2,
    }  # fmt: skip


def _splits(programs: int, room: int, device: Device) -> int:
    """So many that all processors have work, if each gets keys enough."""
    wanted = 2 * device.processors // programs
    return max(1, min(wanted, triton.cdiv(room, LEAST_KEYS), MOST_SPLITS))


@planned(launch_settings)
def attention_decode(launches: Launches, call: AttentionCall, out: Tensor, lse: Tensor) -> None:
    """Write `out` (B, Hq, Sq, Dv), any strides, and `lse` (B, Hq, Sq), fp32 and contiguous.

    call: one on a cache; fp16, bf16 and fp32, head dims to 512.
    """
    q, k, v, config = call.q, call.k, call.v, call.config
    (batch, heads, seq_q, dim), dim_v, heads_kv = q.shape, v.shape[3], k.shape[1]
    device, group, room, pages = device_of(q), heads // heads_kv, k.shape[2], None
    if (table := call.block_table) is not None:
        room *= table.shape[1]
        pages = Pages(with_data(table), *table.stride(), k.shape[2], k.shape[0] - 1)
    rules = Rules(
        mask=broadcast_view(call.mask), prefix=None, documents_q=None, documents_k=None,
        blocks=None, block_size=None, bias=None, distance_bias=None,
        softcap=config.softcap or None, alibi_slopes=broadcast_view(call.alibi_slopes), pack=None,
    )  # fmt: skip
    natural = call.alibi_slopes is not None or config.softcap > 0 or not config.scale > 1e-30
    widths = block_width(dim), block_width(dim_v)
    tile = _tile(group * seq_q, widths, q.dtype)
    programs = batch * heads_kv * triton.cdiv(group * seq_q, tile["BLOCK_M"])
    splits = _splits(programs, room, device)
    rows = (splits, batch, heads, seq_q)
    maxima, sums, outs = launches.empty(rows), launches.empty(rows), launches.empty((*rows, dim_v))
    lower, upper = bounds_of(config, seq_q, room, packed=True)
    launches.launch(
        decode_kernel, (programs * splits,), view(q), view(k), view(v), rules,
        launches.vector(call.kv_lengths), pages, maxima, sums, outs, config.scale, batch, heads_kv,
        group, seq_q, room, splits, lower, upper, D=dim, DV=dim_v, BLOCK_D=widths[0],
        BLOCK_DV=widths[1], NATURAL=natural, MASKED=is_masked(call), PRECISION=dot_precision(q),
        **tile,
    )  # fmt: skip
    launches.launch(
        combine_kernel, (batch * heads * seq_q,), maxima, sums, outs, broadcast_view(call.sinks),
        view(out), lse, batch * heads * seq_q, heads, seq_q, splits, DV=dim_v, BLOCK_DV=widths[1],
        SPLITS=triton.next_power_of_2(splits), num_warps=4,
    )  # fmt: skip
