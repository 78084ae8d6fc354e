r"""Attention forward: out = softmax(scale · qkᵀ + bias) v and lse = log Σ exp(scores).

    q (B, Hq, Sq, D)   k (B, Hkv, Sk, D)   v (B, Hkv, Sk, Dv)   →   out (B, Hq, Sq, Dv)
    mask, bias: (B, Hq, Sq, Sk), each dimension full or 1        →   lse (B, Hq, Sq), fp32

One program computes BLOCK_M queries of one head. It walks over the keys in tiles of BLOCK_N and
keeps, per query, the maximum m, the sum l of exp(s − m), and the output of the keys seen so far;
when m grows, l and the output are scaled by exp(m_old − m_new) (Milakov and Gimelshein 2018; Dao
et al. 2022). Only tiles on the diagonal or at the end of the keys are masked:

    keys →   0 …… full …… end           the tiles [0, full) are seen whole by every query of the
    queries  . . . x \ - - -            program, [full, end) in part, the rest not at all
             . . . x x \ - -

Scores in two units. Without a bias and with scale > 0, m is kept in units of log 2 and scale·log₂e
is folded into the exponent: exp2(qk·scale·log₂e − m) is one fused multiply-add and one exp2. Else
scores are natural, exp2((s − m)·log₂e): a bias of finfo.min must not overflow when it is scaled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_scores import Rules, hide, key_range, scores, sequence_of, weights, work_item
from .attention_tiles import forward_tiles
from .common import (
    LN2,
    LOG2E,
    Device,
    aligned,
    block_width,
    broadcast_view,
    bucket,
    device_of,
    dot,
    dot_precision,
    load_tile,
    rows_from,
    store_tile,
    vector,
    view,
)
from .tuning import Key, Tuner

if TYPE_CHECKING:
    from fusedattn.ops.attention_config import AttentionBackwardCall, AttentionCall

# --- kernel --------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["heads_total", "heads", "group", "seq_q", "seq_k", "diagonal", "section"]
)
def forward_kernel(
    q,  # View (B, Hq, Sq, D)
    k,  # View (B, Hkv, Sk, D)
    v,  # View (B, Hkv, Sk, Dv)
    rules,  # of attention_scores.py
    kv_lengths,  # int32 or int64 (B,), or None
    out,  # View (B, Hq, Sq, Dv)
    lse,  # fp32 (B, Hq, Sq), contiguous
    scale,
    heads_total,  # B·Hq
    heads,  # Hq
    group,  # Hq / Hkv
    seq_q,
    seq_k,
    diagonal,  # query i sees keys up to i + diagonal
    section,  # heads that are worked on together
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    index, flat = work_item(tl.program_id(0), tl.cdiv(seq_q, BLOCK_M), heads_total, section, CAUSAL)
    batch, head = flat // heads, flat % heads
    sequence = sequence_of(batch, seq_q, seq_k, diagonal, kv_lengths)
    rows, keys = sequence.seq_q, sequence.seq_k
    k_head = rows_from(k, batch, head // group, sequence.first_k, ALIGNED)
    v_head = rows_from(v, batch, head // group, sequence.first_k, ALIGNED)
    first = index * BLOCK_M
    i = first + tl.arange(0, BLOCK_M)
    begin, full, end = key_range(first, sequence, CAUSAL, BLOCK_M, BLOCK_N)

    q_head = rows_from(q, batch, head, sequence.first_q, ALIGNED)
    q_tile = load_tile(q_head, first, rows, BLOCK_M, D, BLOCK_D)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # Full tiles and masked ones have loops of their own: a branch between the products hides from
    # Triton that they are a chain. A mask or a bias leaves no registers for a second loop.
    SPLIT: tl.constexpr = rules.mask is None and rules.bias is None
    bounds = (begin, full, end) if SPLIT else (begin, end)
    for part in tl.static_range(1 + SPLIT):
        for start in tl.range(bounds[part], bounds[part + 1], BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            k_tile = load_tile(k_head, start, keys, BLOCK_N, D, BLOCK_D)
            v_tile = load_tile(v_head, start, keys, BLOCK_N, DV, BLOCK_DV)
            s = dot(q_tile, tl.trans(k_tile), None, PRECISION)
            s = scores(s, rules, batch, head, sequence, i[:, None], j[None, :], scale, NATURAL)
            masked = part == 1 if SPLIT else start >= full
            if masked:
                s = hide(s, i[:, None], j[None, :], sequence, CAUSAL)
            highest = tl.max(s, 1) if NATURAL else tl.max(s, 1) * (scale * LOG2E)
            m_new = tl.maximum(m, highest)
            # A row that has seen no key yet keeps exp(−inf − 0) = 0 instead of exp(−inf + inf).
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = weights(s, shift[:, None], scale, NATURAL)
            alpha = tl.exp2((m - shift) * LOG2E if NATURAL else m - shift)
            l = l * alpha + tl.sum(p, 1)  # noqa: E741
            acc = acc * alpha[:, None]
            acc = dot(p.to(v_tile.dtype), v_tile, acc, PRECISION)
            m = m_new

    inverse = tl.where(l == 0.0, 0.0, 1.0 / l)
    out_head = rows_from(out, batch, head, sequence.first_q, ALIGNED)
    store_tile(out_head, acc * inverse[:, None], first, rows, BLOCK_M, DV, BLOCK_DV)
    total = m + tl.log2(l) * LN2 if NATURAL else (m + tl.log2(l)) * LN2
    at = flat.to(tl.int64) * seq_q + sequence.first_q + i
    tl.store(lse + at, total, mask=i < rows)


# --- launcher ------------------------------------------------------------------------------------


def rules_of(call: AttentionCall | AttentionBackwardCall) -> Rules:
    """The rules of a call, as the kernels take them."""
    softcap = call.config.softcap or None
    return Rules(broadcast_view(call.mask), broadcast_view(call.bias), softcap)


def common_arguments(
    call: AttentionCall | AttentionBackwardCall, *further: Tensor
) -> dict[str, Any]:
    """The kernel arguments, other than tensors and tiles, that forward and backward share.

    further: tensors besides q, k and v of which the kernels load or store tiles.
    """
    q, k, v, config = call.q, call.k, call.v, call.config
    head_dim, head_dim_v = q.shape[3], v.shape[3]
    seq_q, seq_k = q.shape[2], k.shape[2]
    return {
        "scale": config.scale,
        "heads": q.shape[1],
        "group": q.shape[1] // k.shape[1],
        "seq_q": seq_q,
        "seq_k": seq_k,
        "diagonal": seq_k - seq_q if config.causal == 2 else 0,
        "D": head_dim,
        "DV": head_dim_v,
        "BLOCK_D": block_width(head_dim),
        "BLOCK_DV": block_width(head_dim_v),
        "CAUSAL": config.causal != 0,
        "ALIGNED": aligned(q, k, v, *further),
        "NATURAL": call.bias is not None or config.softcap > 0 or not config.scale > 1e-30,
        "PRECISION": dot_precision(q),
    }


def tuning(
    call: AttentionCall | AttentionBackwardCall, arguments: dict[str, Any], products: int
) -> dict[str, Any]:
    """What `Tuner.pick` asks of a call with so many products of matrices."""
    q, k = call.q, call.k
    kind = (
        q.device, q.dtype, arguments["D"], arguments["DV"], arguments["CAUSAL"],
        arguments["PRECISION"], call.mask is None, call.bias is None, call.config.softcap > 0,
        arguments["group"],
    )  # fmt: skip
    heads, seq_q, seq_k = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
    width = (arguments["D"] + arguments["DV"]) // 2
    return {
        "key": Key(kind, (bucket(seq_q, 8192), bucket(seq_k, 8192), bucket(heads, 256))),
        "work": 2 * products * heads * seq_q * seq_k * width,
        "deterministic": call.config.deterministic,
    }


def pair_bytes(call: AttentionCall | AttentionBackwardCall) -> int:
    """Bytes that are read for each pair of query and key."""
    return sum(x.element_size() for x in (call.mask, call.bias) if x is not None)


def heads_in_l2(device: Device, x: Tensor, y: Tensor, share: int) -> int:
    """How many heads to work on at once so that what they share, one head of x and y, stays in L2.

    share: how many programs' heads read the same head of x and y.
    """
    size = x.shape[2] * (x.shape[3] + y.shape[3]) * x.element_size()
    return max(1, device.l2 // (2 * size)) * share


_tuner = Tuner()


def attention_forward(call: AttentionCall, out: Tensor, lse: Tensor) -> None:
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
    lengths = vector(call.kv_lengths)
    views = (view(q), view(k), view(v), rules_of(call), lengths, view(out), lse)

    def launch(options: triton.Config) -> None:
        grid = (heads_total * triton.cdiv(q.shape[2], options.kwargs["BLOCK_M"]),)
        forward_kernel[grid](*views, **arguments, **options.all_kwargs())

    with torch.cuda.device_of(q):
        widths = (arguments["BLOCK_D"], arguments["BLOCK_DV"])
        padded = widths != (arguments["D"], arguments["DV"])
        found = forward_tiles(device, q.dtype, widths, pair_bytes(call), padded)
        about = tuning(call, arguments, products=2)
        launch(_tuner.pick(candidates=found, launch=launch, **about))
