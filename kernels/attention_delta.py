"""Of attention's backward, what each row contributes: Δ = rowsum(dout ∘ out) − dlse, and lse."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .attention_ds_scale import load_ds_scale
from .common import LOG2E, View, load_tile, matrix, rows_from, view
from .plans import Launches


@triton.jit(do_not_specialize=["dropout", "heads", "group", "seq_q"])
def delta_kernel(
    out,  # View (B, Hq, Sq, Dv)
    dout,  # View (B, Hq, Sq, Dv)
    lse,  # fp32 (B, Hq, Sq), contiguous
    dlse,  # View (B, Hq, 1, Sq) of fp32, or None
    shift,  # fp32 (B, Hq, Sq), contiguous: lse in the units of `weights`
    delta,  # fp32 (B, Hq, Sq), contiguous: rowsum(dout ∘ out) − dlse
    scaled,  # the same times e, or None
    norms,  # of `load_ds_scale`, or None
    dropout,  # Dropped, or None
    heads,
    group,
    seq_q,
    NATURAL: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    tiles = tl.cdiv(seq_q, BLOCK_M)
    flat = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_M
    batch, head = flat // heads, flat % heads
    i = first + tl.arange(0, BLOCK_M)
    inside = i < seq_q
    o = load_tile(rows_from(out, batch, head, 0, ALIGNED), first, seq_q, BLOCK_M, DV, BLOCK_DV)
    do = load_tile(rows_from(dout, batch, head, 0, ALIGNED), first, seq_q, BLOCK_M, DV, BLOCK_DV)
    row = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = flat.to(tl.int64) * seq_q + i
    if dlse is not None:
        of_head = matrix(dlse, batch, head)
        row -= tl.load(of_head.data + i.to(tl.int64) * of_head.col, mask=inside, other=0.0)
    # A query that saw nothing has p = exp(−inf − inf) = 0, and no gradient whatever dlse is.
    seen = tl.load(lse + at, mask=inside, other=0.0)
    nothing = seen == float("-inf")
    seen = tl.where(nothing, float("inf"), seen)
    tl.store(shift + at, seen if NATURAL else seen * LOG2E, mask=inside)
    row = tl.where(nothing, 0.0, row)
    tl.store(delta + at, row, mask=inside)
    if scaled is not None:
        tl.store(scaled + at, row * load_ds_scale(norms, flat // group, dropout), mask=inside)


_ARGUMENTS = ("dropout", "heads", "group", "seq_q", "NATURAL", "DV", "BLOCK_DV", "ALIGNED")


def row_terms(
    launches: Launches,
    dout: View,
    dlse: View | None,
    out: Tensor,
    lse: Tensor,
    norms: Tensor | None,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """The shift of each row's scores, Δ = rowsum(dout ∘ out) − dlse, e · Δ: (B, Hq, Sq), fp32."""
    heads, seq_q = out.shape[1:3]
    shift, delta, *more = launches.empties(2 if norms is None else 3, lse.shape)
    scaled = more[0] if more else None
    rows = 32
    launches.launch(
        delta_kernel, (out.shape[0] * heads * triton.cdiv(seq_q, rows),),
        view(out), dout, lse, dlse, shift, delta, scaled, norms, BLOCK_M=rows, num_warps=4,
        **{name: arguments[name] for name in _ARGUMENTS},
    )  # fmt: skip
    return shift, delta, delta if scaled is None else scaled
