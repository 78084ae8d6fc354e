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

    max_seqlen_q, max_seqlen_k: of packed sequences, 0 where nobody knows. block_size: queries and
    keys of an entry of `mask_blocks`. cached: k and v are a cache, of which kv_lengths tells what
    exists; the diagonal of each sequence is that of its own length.
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
    block_size: int = 0
    cached: bool = False

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
    (N or 1, Hq, 1, 1).

    distance_bias (B or 1, Hq or 1, 1, Sq + Sk − 1), in the dtype of lse: what is added to the score
    of a key that is d to the right of the "bottom_right" diagonal stands at d + Sk − 1; in packed
    calls Sq and Sk are the totals, and the diagonal is that of the sequence.

    Masks by rule (attention_rules.py): prefix_lengths (B,), of keys that all queries see, the
    others being causal; documents_q (B or 1, Sq) and documents_k (B or 1, Sk), which must agree;
    mask_blocks (B or 1, Hq or 1, ⌈Sq/size⌉, ⌈Sk/size⌉), bool.

    block_table (B, n): the pages of a cache that hold a sequence's keys, one after the other; k and
    v are then (pages, Hkv, rows of a page, D), and Sk is n times those rows. A call on a cache
    (`config.cached`) has kv_lengths and no gradient.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    kv_lengths: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    seed: Tensor | None = None
    distance_bias: Tensor | None = None
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

    <tensor>_grad: its gradient is wanted.
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
    seed: Tensor | None = None
    distance_bias: Tensor | None = None
    prefix_lengths: Tensor | None = None
    documents_q: Tensor | None = None
    documents_k: Tensor | None = None
    mask_blocks: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    block_table: Tensor | None = None
    q_grad: bool = True
    k_grad: bool = True
    v_grad: bool = True
    bias_grad: bool = False
    alibi_slopes_grad: bool = False
    sinks_grad: bool = False
    distance_bias_grad: bool = False
    config: AttentionConfig = AttentionConfig()

    @property
    def forward(self) -> AttentionCall:
        """The call whose gradient this is."""
        return AttentionCall(*self[4:21], self.config)


class AttentionJvpCall(NamedTuple):
    """The fields of an `AttentionCall`, and tangents of four of them, each None for zero.

    t_q, t_k and t_v are of the shape and dtype of theirs; t_bias is of the dtype of the bias, with
    four dimensions, each 1 or that of the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    kv_lengths: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    seed: Tensor | None = None
    distance_bias: Tensor | None = None
    prefix_lengths: Tensor | None = None
    documents_q: Tensor | None = None
    documents_k: Tensor | None = None
    mask_blocks: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    block_table: Tensor | None = None
    t_q: Tensor | None = None
    t_k: Tensor | None = None
    t_v: Tensor | None = None
    t_bias: Tensor | None = None
    config: AttentionConfig = AttentionConfig()

    @property
    def primal(self) -> AttentionCall:
        """The call that this is a derivative of."""
        return AttentionCall(*self[:17], self.config)


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
