r"""What keeps ds in the range of float16, as which the products ds k and dsᵀ q take it.

The kernels of attention_bwd.py work with e · ds and divide dq and dk by e, a power of two for each
head of keys. Since p (1 − p) ≤ ¼ and Δ + dlse is the mean of dp, |ds| = p |dp − Δ| is at most

    ½ max ‖dout_i‖ max ‖v_j‖ / (1 − dropout_p) + max |dlse_i|

(Cauchy and Schwarz), and e is the largest up to 1 with which that stays below 2¹⁵. To scale is
exact but for what falls below the normal numbers, 2⁻²⁹ of the bound. bfloat16 and float32 reach
further, and have None in place of all this.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_scores import Packed, load_length
from .common import View, load_tile, matrix, rows_from, view
from .plans import Launches

# --- in the backward -----------------------------------------------------------------------------


@triton.jit
def load_ds_scale(norms, kv_head, dropout):
    """e of a head of B · Hkv."""
    at = norms + 3 * kv_head
    bound = 0.5 * tl.sqrt(tl.load(at) * tl.load(at + 1))
    if dropout is not None:
        bound *= dropout.keep_scale
    bound += tl.load(at + 2)
    exponent = bound.to(tl.int32, bitcast=True) >> 23  # bound < 2^(exponent − 126)
    exponent = tl.where(exponent > 141, 268 - exponent, 127)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def less_delta(dp, delta, ds_scale):
    """e · (dp − Δ), from e · Δ."""
    return dp - delta if ds_scale is None else tl.fma(dp, ds_scale, -delta)


@triton.jit
def unscaled(x, ds_scale):
    """x / e: exact, as a multiplication."""
    if ds_scale is not None:
        x *= (0x7F000000 - ds_scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return x


# --- the maxima ----------------------------------------------------------------------------------


@triton.jit
def _raise(maximum, x):
    """The largest element of x to what is stored; those that are not finite do not count."""
    tl.atomic_max(maximum, tl.max(tl.where(x < float("inf"), x, 0.0), 0), sem="relaxed")


@triton.jit(do_not_specialize=["heads", "group", "seq_q", "seq_k", "of_values", "sequences"])
def norms_kernel(
    v,  # View (B, Hkv, Sk, Dv)
    dout,  # View (B, Hq, Sq, Dv)
    lse,  # fp32 (B, Hq, Sq), contiguous
    dlse,  # View (B, Hq, 1, Sq) of fp32, or None
    kv_lengths,  # int32 or int64 (B,), or None
    packed,  # of packed sequences where they begin, or None
    norms,  # fp32 (B · Hkv, 3) of zeros: max ‖v_j‖², max ‖dout_i‖², max |dlse_i|
    heads,  # Hq
    group,  # Hq / Hkv
    seq_q,
    seq_k,
    of_values,  # programs, the first ones
    sequences,  # that are packed, or None
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    if program < of_values:
        tiles = tl.cdiv(seq_k, ROWS)
        flat, first = program // tiles, program % tiles * ROWS
        batch, head = flat // (heads // group), flat % (heads // group)
        keys = seq_k
        if kv_lengths is not None:
            keys = load_length(kv_lengths, batch, seq_k)
        if packed is not None:  # all sequences of a head have one e
            keys = load_length(packed.k, sequences, seq_k)
        v_head = rows_from(v, batch, head, 0, ALIGNED)
        x = load_tile(v_head, first, keys, ROWS, DV, BLOCK_DV).to(tl.float32)
        _raise(norms + 3 * flat, tl.sum(x * x, 1))
    else:
        tiles = tl.cdiv(seq_q, ROWS)
        flat, first = (program - of_values) // tiles, (program - of_values) % tiles * ROWS
        batch, head = flat // heads, flat % heads
        i = first + tl.arange(0, ROWS)
        at = lse + flat.to(tl.int64) * seq_q + i
        sees = tl.load(at, mask=i < seq_q, other=float("-inf")) != float("-inf")
        dout_head = rows_from(dout, batch, head, 0, ALIGNED)
        x = load_tile(dout_head, first, seq_q, ROWS, DV, BLOCK_DV).to(tl.float32)
        _raise(norms + 3 * (flat // group) + 1, tl.where(sees, tl.sum(x * x, 1), 0.0))
        if dlse is not None:
            of_head = matrix(dlse, batch, head)
            y = tl.load(of_head.data + i.to(tl.int64) * of_head.col, mask=sees, other=0.0)
            _raise(norms + 3 * (flat // group) + 2, tl.abs(y))


_ARGUMENTS = ("heads", "group", "seq_q", "seq_k", "sequences", "DV", "BLOCK_DV", "ALIGNED")


def largest_norms(
    launches: Launches,
    v: Tensor,
    dout: View,
    lse: Tensor,
    dlse: View | None,
    kv_lengths: Tensor | None,
    packed: Packed | None,
    arguments: dict[str, Any],
) -> Tensor | None:
    """What `load_ds_scale` reads; None for a dtype that needs no scale.

    lse and kv_lengths are contiguous; arguments: those that the kernels of the backward share.
    """
    if v.dtype != torch.float16:
        return None
    batch, kv_heads, seq_k, _ = v.shape
    heads, seq_q = lse.shape[1:]
    rows = 32
    of_values = batch * kv_heads * triton.cdiv(seq_k, rows)
    norms = launches.zeros((batch * kv_heads, 3))
    launches.launch(
        norms_kernel, (of_values + batch * heads * triton.cdiv(seq_q, rows),),
        view(v), dout, lse, dlse, kv_lengths, packed, norms, of_values=of_values, ROWS=rows,
        num_warps=4, **{name: arguments[name] for name in _ARGUMENTS},
    )  # fmt: skip
    return norms
