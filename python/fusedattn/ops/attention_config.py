"""Attention's calls and options, which are checked once before anything is launched."""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

from ._checks import (
    check_causal,
    check_flag,
    check_integer,
    check_number,
    check_probability,
)


class AttentionConfig(NamedTuple):
    """The options of one call, in the order of the library ops' schemas.

    causal: 0 none, 1 top-left, 2 bottom-right. deterministic: no gradient is a sum in an order that
    changes from call to call. softcap: 0 for none. window: keys seen to the left and to the right
    of the diagonal, −1 for unbounded.

    The schema is in exported programs, so that what is to come has its place already: no backend
    takes one of those from table_kind on yet. max_seqlen_q, max_seqlen_k: of packed sequences, 0
    where nobody knows. table_kind: what `bias_table` is indexed by, 0 none, 1 T5's
    buckets, 2 those of a decoder, 3 clipped distances; table_distance: from there on all are one.
    block_size: queries and keys of an entry of `mask_blocks`.
    """

    causal: int = 0
    scale: float = 1.0
    deterministic: bool = False
    softcap: float = 0.0
    window_left: int = -1
    window_right: int = -1
    dropout_p: float = 0.0
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    table_kind: int = 0
    table_distance: int = 0
    block_size: int = 0

    @property
    def window(self) -> tuple[int | None, int | None] | None:
        """The public spelling of `window_left` and `window_right`."""
        left, right = (None if x < 0 else x for x in (self.window_left, self.window_right))
        return None if left is None and right is None else (left, right)

    @property
    def causal_name(self) -> bool | str:
        """The public spelling of `causal`."""
        return (False, "top_left", "bottom_right")[self.causal]


class AttentionCall(NamedTuple):
    """One call: mask and bias of four dimensions, each 1 or that of the scores (B, Hq, Sq, Sk).

    alibi_slopes (B or 1, Hq, 1, 1) and sinks (1, Hq, 1, 1) are in the dtype of lse. seed: one
    int64, None without dropout. Packed sequences lie one after the other in q (1, Hq, total_q, D),
    k and v, where cu_seqlens_q and cu_seqlens_k (N + 1,) say that they begin; slopes are then
    (N or 1, Hq, 1, 1). No backend takes the others yet: scales of the heads, a (buckets, Hq) table
    of biases, lengths of prefixes (B,), documents (B, S) of queries and keys, which blocks are
    seen, the pages of a cache.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    kv_lengths: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    scales: Tensor | None = None
    seed: Tensor | None = None
    bias_table: Tensor | None = None
    prefix_lengths: Tensor | None = None
    documents_q: Tensor | None = None
    documents_k: Tensor | None = None
    mask_blocks: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    block_table: Tensor | None = None
    config: AttentionConfig = AttentionConfig()


class AttentionBackwardCall(NamedTuple):
    """The gradients of out and lse, either None for zero, with what the forward had and gave.

    <tensor>_grad: its gradient is wanted; those of q, k and v always are.
    """

    dout: Tensor | None
    dlse: Tensor | None
    out: Tensor
    lse: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    kv_lengths: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    scales: Tensor | None = None
    seed: Tensor | None = None
    bias_table: Tensor | None = None
    prefix_lengths: Tensor | None = None
    documents_q: Tensor | None = None
    documents_k: Tensor | None = None
    mask_blocks: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    block_table: Tensor | None = None
    bias_grad: bool = False
    alibi_slopes_grad: bool = False
    sinks_grad: bool = False
    scales_grad: bool = False
    bias_table_grad: bool = False
    config: AttentionConfig = AttentionConfig()

    @property
    def forward(self) -> AttentionCall:
        """The call whose gradient this is."""
        return AttentionCall(*self[4:22], self.config)


def configure(
    head_dim: int,
    causal: bool | str = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
) -> AttentionConfig:
    """Check the options and fill in the defaults."""
    op = "attention"
    try:
        left, right = (None, None) if window is None else window
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(
            f"{op}: got window of type {type(window).__name__}, expected (left, right)"
        ) from None
    left, right = _side(left), _side(right)
    if left < -1 or right < -1:
        raise ValueError(f"{op}: got window={window}, expected sides >= 0 or None")
    expected = "a float or None"
    cap = 0.0 if softcap is None else check_number(op, "softcap", softcap, expected)
    if softcap is not None and not 1e-30 <= cap <= 1e30:  # and so in float32
        raise ValueError(f"{op}: got softcap={softcap}, expected a float of 1e-30 to 1e30 or None")
    return AttentionConfig(
        check_causal(op, causal),
        head_dim**-0.5 if scale is None else check_number(op, "scale", scale, expected),
        check_flag(op, "deterministic", deterministic),
        cap,
        left,
        right,
        check_probability(op, "dropout_p", dropout_p),
    )


def _side(side: int | None) -> int:
    """−1 for None, and what is below 0 below that."""
    if side is None:
        return -1
    side = check_integer("attention", "window", side, "(left, right), each an int or None")
    return side if side >= 0 else -2


remembered = functools.lru_cache(maxsize=256)(configure)
