"""Attention of sequences that lie one after the other, without padding between them.

A packed call is one of `attention`'s op: q (total_q, Hq, D) is handed on as a view
(1, Hq, total_q, D), and the offsets say to the kernels which rows are a sequence (Dao et al. 2022,
whose `flash_attn_varlen_func` has the same arguments).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..biases import DistanceBias
from ..masks import Mask
from ._checks import check_flag, check_integer, check_seed, check_tensor, seed_tensor
from ._library import hand_over, has_override, is_overridden
from ._spellings import refuse_unknown
from .attention import op
from .attention_checks import (
    autocast,
    is_learned,
    scaled,
    validate,
    validate_heads,
    validate_offsets,
)
from .attention_config import AttentionCall, configure
from .attention_rules import packed_bias, packed_prefix

if TYPE_CHECKING:
    from ._typing import Unpack, VarlenOptions

_NAME = "attention_varlen"


def _view(name: str, x: Tensor) -> Tensor:
    """(total, H, D) as (1, H, total, D)."""
    shape = check_tensor(_NAME, name, x)
    if len(shape) != 3:
        raise ValueError(
            f"{_NAME}: got {name} of shape {tuple(shape)}, expected 3 dimensions (total, heads, "
            "head dim)" + "; a batch (B, H, S, D) goes to attention" * (len(shape) == 4)
        )
    return x.transpose(0, 1)[None]


def _longest(name: str, value: Any) -> int:
    if value is None:
        return 0
    value = check_integer(_NAME, name, value, "an int or None")
    if value < 0:
        raise ValueError(f"{_NAME}: got {name}={value}, expected at least 0")
    return value


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: tuple[Tensor, Tensor],
    longest: tuple[Any, Any],
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: int | Tensor | None,
    mask: Mask | None,
    bias: DistanceBias | None,
    **options: Any,
) -> AttentionCall:
    if is_learned(scale := options["scale"]):
        q, options["scale"] = scaled(q, scale, _NAME, heads=-2)
    q, k, v = _view("q", q), _view("k", k), _view("v", v)
    if torch._C._is_any_autocast_enabled():
        q, k, v, _, alibi_slopes, sinks = autocast(q, k, v, None, alibi_slopes, sinks)
    head_dim = validate(q, k, v)
    sequences = validate_offsets(q, k, *offsets)
    if alibi_slopes is not None:
        alibi_slopes = validate_heads("alibi_slopes", alibi_slopes, q, sequences)
    if sinks is not None:
        sinks = validate_heads("sinks", sinks, q)
    config = configure(head_dim, **options)._replace(
        max_seqlen_q=_longest("max_seqlen_q", longest[0]),
        max_seqlen_k=_longest("max_seqlen_k", longest[1]),
    )
    if config.dropout_p != 0.0:
        seed = seed_tensor(_NAME, seed, q)
    elif seed is not None:
        check_seed(_NAME, seed, q)
        seed = None
    return AttentionCall(
        q, k, v, alibi_slopes=alibi_slopes, sinks=sinks, seed=seed,
        distance_bias=packed_bias(_NAME, bias, q, k),
        prefix_lengths=packed_prefix(_NAME, mask, q, sequences), cu_seqlens_q=offsets[0],
        cu_seqlens_k=offsets[1], config=config,
    )  # fmt: skip


@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    return_lse: Literal[False] = False, **options: Unpack[VarlenOptions],
) -> Tensor: ...  # fmt: skip
@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    return_lse: Literal[True], **options: Unpack[VarlenOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    return_lse: bool, **options: Unpack[VarlenOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    mask: Mask | None = None,
    bias: DistanceBias | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of sequences that are packed one after the other, each by itself.

    Sequence b has queries cu_seqlens_q[b] … cu_seqlens_q[b + 1] − 1 and keys cu_seqlens_k[b] …
    cu_seqlens_k[b + 1] − 1. Nothing is padded, copied or waited for, and the second offsets may be
    the same tensor as the first. It is differentiable as `attention` is, in
    forward mode too; second derivatives and what `vmap` maps over run the formula, which stores
    total_q · total_k scores.

    >>> import torch, fusedattn
    >>> q, k, v = torch.randn(3, 10, 4, 32)  # (total, heads, head dim) each
    >>> offsets = torch.tensor([0, 3, 3, 10], dtype=torch.int32)  # of 3, 0 and 7 rows
    >>> out = fusedattn.attention_varlen(
    ...     q, k, v, cu_seqlens_q=offsets, cu_seqlens_k=offsets, causal=True)
    >>> out.shape
    torch.Size([10, 4, 32])

    Args:
        q: queries (total_q, Hq, D), float16, bfloat16, float32 or float64, of any strides.
        k: keys (total_k, Hkv, D); Hq is a multiple of Hkv (grouped queries).
        v: values (total_k, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: (N + 1,) int32 or int64, on the device of q: 0, then where each
            of N sequences ends, at most total. A sequence may have no queries, no keys or neither.
            On a CPU the values are checked, elsewhere within `fusedattn.strict()`, which waits for
            the device; without that wrong ones give wrong results, but nothing outside the
            tensors is read or written. While a graph is traced they are not looked at.
        max_seqlen_q, max_seqlen_k: the largest length, if you know it: FLOPs are counted and tiles
            tuned by it. The kernels need no bound, so that without one nothing waits for a device.
        mask: None, or `fusedattn.masks.prefix(lengths)` with lengths (N,).
        bias: None, or one of `fusedattn.biases`.
        causal, window, scale, softcap: as in `attention`. The diagonal is that of each sequence's
            own lengths.
        alibi_slopes: (Hq,) or (N, Hq), float32; distances are those in the sequence.
        sinks: (Hq,), in the dtype of q or float32.
        dropout_p, seed: as in `attention`; a seed drops what it drops of a batch of the sequences.
        return_lse: also return the log-sum-exp of the scores.
        deterministic: gradients are bitwise repeatable, as in `attention`.
        backend: "auto", or the name of the one that must serve the call.

    Returns:
        out (total_q, Hq, Dv) in the dtype of q, contiguous; with `return_lse` also lse
        (Hq, total_q), float32 (float64 for float64 inputs), differentiable. On a CPU both are bit
        for bit those of `attention` on each sequence alone. A query that may attend to nothing and
        a row past the last offset get out 0, lse −inf and zero gradients, whatever is stored there.

    Raises:
        TypeError, ValueError: the arguments do not fit together; nothing has been launched.
        UnsupportedError: no backend (or not the one named) takes the call; lists every reason.
    """
    given = locals()
    if given.pop("unknown"):
        refuse_unknown(_NAME, unknown)
    if has_override(*given.values()) and is_overridden(given):
        return hand_over(attention_varlen, given)
    return_lse = check_flag(_NAME, "return_lse", return_lse)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    call = _prepare(
        q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), alibi_slopes, sinks,
        seed, mask, bias, causal=causal, scale=scale, window=window, softcap=softcap,
        dropout_p=dropout_p, deterministic=deterministic,
    )  # fmt: skip
    out, lse = op(call, backend)
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out


def attention_nested(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Any,
    bias: Any,
    kv_lengths: Tensor | None,
    return_lse: bool,
    **options: Any,
) -> Any:
    """`attention` of jagged q, k and v (B, H, j, D), whose offsets are those of packed rows."""
    for name, x in (("mask", mask), ("bias", bias), ("kv_lengths", kv_lengths)):
        if isinstance(x, Tensor):
            raise ValueError(f"attention: got {name} with nested q, expected None")
    (q_rows, cu_q), (k_rows, cu_k), (v_rows, cu_v) = (
        _jagged(name, x) for name, x in (("q", q), ("k", k), ("v", v))
    )
    if cu_v is not cu_k and not torch.equal(cu_v, cu_k):
        raise ValueError("attention: got other offsets of v than of k, expected those of k")
    out = attention_varlen(
        q_rows, k_rows, v_rows, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, mask=mask, bias=bias,
        return_lse=return_lse, **options,
    )  # fmt: skip

    def nested(x: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(x, cu_q).transpose(1, 2)

    if not return_lse:
        return nested(out)  # type: ignore[arg-type]
    return nested(out[0]), nested(out[1].transpose(0, 1))


def _jagged(name: str, x: Any) -> tuple[Tensor, Tensor]:
    """The rows (total, H, D) of a jagged tensor (B, H, j, D), and its offsets."""
    nested = isinstance(x, Tensor) and x.is_nested and x.layout is torch.jagged and x.dim() == 4
    if not nested or x._ragged_idx != 2 or x.lengths() is not None:
        raise ValueError(
            f"attention: got {name} that is not jagged (B, H, j, D) without holes, expected nested "
            "q, k and v to be so; a (B, j, H, D) one is passed as its .transpose(1, 2)"
        )
    return x.transpose(1, 2).values(), x.offsets()
