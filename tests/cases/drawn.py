"""Calls of attention at random: shapes across the edges of tiles, and all options together."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from cases import BF16, F16, F32, F64
from cases.rules import BIASES, RuleCase

MASKS = ("documents", "prefix", "blocks")
DTYPES = (F16, BF16, F32, F64)
EDGES = (127, 129, 193, 260)


@st.composite
def drawn_cases(
    draw: Any,
    *,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    edges: tuple[int, ...] = EDGES,
    most: int = 80,
    each: int = 3,
    dims: st.SearchStrategy[int] = st.integers(1, 90),  # noqa: B008
    ruled: bool = True,
) -> RuleCase:
    """edges: lengths beside those up to `most`; each: sequences, key heads and queries of each, at
    most; ruled: also masks, and masks and biases by rule."""
    batch, kv_heads, group = (draw(st.integers(1, each)) for _ in range(3))
    lengths_of = st.integers(1, most) | st.sampled_from(edges)
    seq_q, seq_k = draw(lengths_of), draw(lengths_of)
    side = st.none() | st.integers(0, 90)
    heads = kv_heads * group
    full = (batch, heads, seq_q, seq_k)
    broadcast = st.none() | st.tuples(*(st.sampled_from((1, size)) for size in full))
    lengths = st.tuples(*[st.integers(0, seq_k)] * batch)
    bias = draw(broadcast)
    rules: tuple[str, ...] = ()
    if ruled and draw(st.booleans()):
        rules = tuple(draw(st.lists(st.sampled_from(MASKS), unique=True)))
        if bias is None and draw(st.booleans()):
            rules += (draw(st.sampled_from(tuple(BIASES))),)
    return RuleCase(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        seq_q=seq_q,
        seq_k=seq_k,
        dim=draw(dims),
        dim_v=draw(dims),
        dtype=draw(st.sampled_from(dtypes)),
        causal=draw(st.sampled_from((False, "top_left", "bottom_right"))),
        scale=draw(st.none() | st.floats(-1.0, 1.0, width=32)),
        mask=draw(broadcast) if ruled else None,
        bias=bias,
        kv_lengths=draw(st.none() | lengths),
        window=draw(st.none() | st.tuples(side, side)),
        softcap=draw(st.none() | st.floats(0.5, 5.0, width=32)),
        alibi_slopes=draw(st.sampled_from((None, (heads,), (batch, heads)))),
        sinks=draw(st.booleans()),
        dropout_p=draw(st.sampled_from((0.0, 0.5))),
        grads=draw(st.sampled_from((("lse",), ("out", "lse")))),
        rules=rules,
        size=draw(st.integers(1, 70)),
    )
