"""The gradient of a bias of distances: ds summed along its diagonals.

    ds = p ∘ (z ∘ dout vᵀ − Δ), p = exp(s − lse)       (attention_bwd.py)
    dbias[b, h, 0, zero + d] = Σ ds over all queries i and keys j = i + d of those that share it

One program owns a diagonal of square tiles of one head, recomputes each ds that lies on it, as that
of a broadcast bias does, and adds them up where they are; at last the sum of tiles is summed along
its own diagonals, 2 · BLOCK − 1 of them. A distance lies in two diagonals of tiles, which a second
kernel brings together. No atomics, and O(Sq + Sk) memory.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .attention_bias_grad import score_gradient
from .attention_scores import Packed, load_seed, packed_number, packed_rows, sequence_of
from .attention_tiles import bias_grad_tile
from .common import broadcast_view
from .plans import Launches

_COUNTS = ["heads", "group", "seq_q", "seq_k", "lower", "upper", "sequences", "slots", "batches"]


@triton.jit
def slots_before(first_q, first_k, number, BLOCK: tl.constexpr):
    """How many diagonals of tiles packed sequences before one have at most; of a batch entry 0."""
    return first_q // BLOCK + first_k // BLOCK + 2 * number


@triton.jit
def number_of_slot(packed, slot, seq_q, seq_k, sequences, BLOCK: tl.constexpr):
    """The packed sequence that has this diagonal of tiles, and which of its own that is."""
    number = slot * 0
    last = sequences - 1
    while number < last:
        middle = (number + last + 1) // 2
        first_q, _ = packed_rows(packed.q, middle, sequences, seq_q, False)
        first_k, _ = packed_rows(packed.k, middle, sequences, seq_k, False)
        begun = slots_before(first_q, first_k, middle, BLOCK) <= slot
        number = tl.where(begun, middle, number)
        last = tl.where(begun, last, middle - 1)
    first_q, _ = packed_rows(packed.q, number, sequences, seq_q, False)
    first_k, _ = packed_rows(packed.k, number, sequences, seq_k, False)
    return number, slot - slots_before(first_q, first_k, number, BLOCK)


@triton.jit(do_not_specialize=["dropout", *_COUNTS])
def distance_grad_kernel(
    q,  # View (B, Hq, Sq, D)
    k,  # View (B, Hkv, Sk, D)
    v,  # View (B, Hkv, Sk, Dv)
    rules,  # of attention_scores.py
    kv_lengths,  # int32 or int64 (B,), or None
    packed,  # of packed sequences where they begin, or None
    dout,  # View (B, Hq, Sq, Dv)
    shift,  # fp32 (B, Hq, Sq), contiguous
    delta,  # fp32 (B, Hq, Sq), contiguous
    sums,  # fp32 (B or 1, Hq or 1, slots, 2 · BLOCK), contiguous
    scale,
    dropout,  # Dropped, or None
    batches,  # how many batch entries share a sum
    heads,  # Hq
    group,  # Hq / Hkv
    seq_q,
    seq_k,
    lower,  # query i sees keys i + lower … i + upper; None: all to that side
    upper,
    sequences,  # that are packed, or None
    slots,  # diagonals of tiles
    SUM_HEADS: tl.constexpr,  # all share a sum
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ALIGNED: tl.constexpr,
    NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot, flat = tl.program_id(0) % slots, tl.program_id(0) // slots
    if SUM_HEADS:
        head0, batch0, shared = flat * 0, flat, heads
    else:
        head0, batch0, shared = flat % heads, flat // heads, 1
    dropout = load_seed(dropout)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for entry in tl.range(0, batches):
        batch = batch0 + entry
        own = slot
        if packed is not None:
            number, own = number_of_slot(packed, slot, seq_q, seq_k, sequences, BLOCK)
            sequence = packed_number(
                number, seq_q, seq_k, lower, upper, packed, sequences, False, False
            )  # fmt: skip
        else:
            sequence = sequence_of(0, batch, seq_q, seq_k, lower, upper, kv_lengths)
        tiles_m = tl.cdiv(sequence.seq_q, BLOCK)
        step = own - (tiles_m - 1)  # n − m of the tiles
        begin = tl.maximum(-step, 0)
        end = tl.minimum(tiles_m, tl.cdiv(sequence.seq_k, BLOCK) - step)
        if sequence.upper is not None:
            end = tl.where(step * BLOCK - (BLOCK - 1) > sequence.upper, begin, end)
        if sequence.lower is not None:
            end = tl.where(step * BLOCK + BLOCK - 1 < sequence.lower, begin, end)
        for member in tl.range(0, shared):
            head = head0 + member
            for tile in tl.range(0, end - begin):
                m = begin + tile
                acc += score_gradient(
                    q, k, v, rules, dout, shift, delta, scale, dropout, batch, head, heads, group,
                    seq_q, sequence, m, m + step, D, DV, BLOCK_D, BLOCK_DV, ALIGNED, NATURAL,
                    PRECISION, BLOCK, BLOCK,
                )  # fmt: skip
    # Number x of the sums is of columns c = r + x − (BLOCK − 1) of rows r.
    x = tl.arange(0, 2 * BLOCK)[None, :]
    column = tl.arange(0, BLOCK)[:, None] + x - (BLOCK - 1)
    inside = (column >= 0) & (column < BLOCK)
    along = tl.gather(acc, tl.where(inside, column, 0), 1)
    total = tl.sum(tl.where(inside, along, 0.0), 0)
    at = sums + tl.program_id(0).to(tl.int64) * (2 * BLOCK)
    tl.store(at + tl.arange(0, 2 * BLOCK), total)


@triton.jit(do_not_specialize=["seq_q", "seq_k", "sequences", "slots"])
def distance_sum_kernel(
    sums,  # fp32 (B or 1, Hq or 1, slots, 2 · BLOCK), contiguous
    out,  # View (B, Hq, 1, Sq + Sk − 1) of fp32
    packed,
    heads,  # Hq or 1
    seq_q,
    seq_k,
    sequences,
    slots,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    count = seq_q + seq_k - 1
    parts = tl.cdiv(count, WIDTH)
    flat = tl.program_id(0) // parts
    place = tl.program_id(0) % parts * WIDTH + tl.arange(0, WIDTH)
    of_head = sums + flat.to(tl.int64) * slots * (2 * BLOCK)
    total = tl.zeros([WIDTH], tl.float32)
    if packed is None:
        total += _two_parts(of_head, place, 0, seq_q, seq_k, BLOCK)
    else:
        for number in tl.range(0, sequences):
            first_q, rows_q = packed_rows(packed.q, number, sequences, seq_q, False)
            first_k, rows_k = packed_rows(packed.k, number, sequences, seq_k, False)
            before = slots_before(first_q, first_k, number, BLOCK)
            total += _two_parts(of_head, place - (seq_k - rows_k), before, rows_q, rows_k, BLOCK)
    at = out.data + (flat // heads).to(tl.int64) * out.batch + (flat % heads) * out.head
    tl.store(at + place * out.col, total, mask=place < count)


@triton.jit
def _two_parts(sums, place, before, seq_q, seq_k, BLOCK: tl.constexpr):
    """Sum number `place` of a sequence, from the two diagonals of tiles that have a part of it."""
    exists = (place >= 0) & (place < seq_q + seq_k - 1)
    x = place - seq_q + tl.cdiv(seq_q, BLOCK) * BLOCK
    slot, at = x // BLOCK, x % BLOCK
    last = tl.cdiv(seq_q, BLOCK) + tl.cdiv(seq_k, BLOCK) - 2
    row = sums + (before + slot).to(tl.int64) * (2 * BLOCK)
    first = tl.load(row + at, mask=exists & (slot <= last), other=0.0)
    second = tl.load(row - BLOCK + at, mask=exists & (slot > 0), other=0.0)
    return first + second


def distance_bias_gradient(
    launches: Launches,
    ddistance: Tensor,
    views: tuple,
    packed: Packed | None,
    arguments: dict[str, Any],
    about: tuple,
    batches: int,
) -> None:
    """Write the gradient (B or 1, Hq or 1, 1, Sq + Sk − 1), fp32.

    views, arguments: what `distance_grad_kernel` shares with the other kernels of the backward;
    about: what its tile is chosen by, the device first; batches: B.
    """
    own_batches, own_heads = ddistance.shape[:2]
    options = bias_grad_tile(*about)
    block = min(options.kwargs["BLOCK_M"], options.kwargs["BLOCK_N"])
    seq_q, seq_k, sequences = (arguments[x] for x in ("seq_q", "seq_k", "sequences"))
    if sequences is None:
        slots = triton.cdiv(seq_q, block) + triton.cdiv(seq_k, block) - 1
    else:
        slots = seq_q // block + seq_k // block + 2 * sequences
    sums = launches.empty((own_batches, own_heads, slots, 2 * block))
    programs = own_batches * own_heads
    settings = {"num_warps": options.num_warps, "num_stages": options.num_stages}
    launches.launch(
        distance_grad_kernel, (programs * slots,), *views, sums, **arguments,
        batches=batches // own_batches, slots=slots, SUM_HEADS=own_heads < arguments["heads"],
        BLOCK=block, **settings,
    )  # fmt: skip
    width = 128
    grid = (programs * triton.cdiv(seq_q + seq_k - 1, width),)
    launches.launch(
        distance_sum_kernel, grid, sums, broadcast_view(ddistance), packed, own_heads, seq_q, seq_k,
        sequences, slots, BLOCK=block, WIDTH=width, num_warps=4,
    )  # fmt: skip
