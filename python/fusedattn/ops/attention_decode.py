"""Attention of new queries on a cache of keys and values, as in generation.

A call on a cache is one of `attention`'s op. Its kernels read the cache where it lies, in pages or
not, with the keys split between threads or blocks ("Flash-Decoding", Dao et al. 2023; pages: Kwon
et al. 2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ._checks import INDICES, check_device, check_flag, check_tensor
from ._library import hand_over, has_override, is_overridden, plain
from ._registry import is_strict
from ._spellings import refuse_unknown
from .attention import op
from .attention_checks import (
    in_tables,
    is_learned,
    scaled,
    unless_single,
    validate,
    validate_extras,
    validate_heads,
)
from .attention_config import AttentionCall, configure
from .rotary import apply_rotary

if TYPE_CHECKING:
    from ._typing import DecodeOptions, Unpack

_NAME = "attention_decode"


@overload
def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *,
    return_lse: Literal[False] = False, **options: Unpack[DecodeOptions],
) -> Tensor: ...  # fmt: skip
@overload
def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *,
    return_lse: Literal[True], **options: Unpack[DecodeOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *,
    return_lse: bool, **options: Unpack[DecodeOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    block_table: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    mask: Tensor | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of the last queries of each sequence on a cache, to which new keys are appended.

    The cache is read where it lies. Diagonals, windows and distances are those of each sequence's
    own length. Decoding, speculative decoding and chunked prefill are the same call, with one query
    or many. No gradient is recorded.

    >>> import torch, fusedattn
    >>> k_cache, v_cache = torch.zeros(2, 4, 8, 1024, 64)  # (B, Hkv, room, D)
    >>> lengths = torch.tensor([7, 0, 300, 12], dtype=torch.int32)
    >>> q, k, v = torch.randn(4, 32, 1, 64), *torch.randn(2, 4, 8, 1, 64)
    >>> fusedattn.attention_decode(q, k_cache, v_cache, lengths, k=k, v=v).shape
    torch.Size([4, 32, 1, 64])
    >>> lengths += 1

    Args:
        q: (B, Hq, Sq, D), the last Sq queries of each sequence, float16, bfloat16, float32 or
            float64.
        k_cache, v_cache: (B, Hkv, room, D) and (B, Hkv, room, Dv) of any strides, in the dtype of
            q: a (B, room, Hkv, D) one is passed as its `.transpose(1, 2)`. With `block_table`
            pages: (pages, Hkv, size, D), of any size.
        lengths: (B,), int32 or int64: how many keys each sequence has in the cache, before those of
            `k` are appended. It is not changed.
        k, v: (B, Hkv, Snew, D) and (B, Hkv, Snew, Dv): written behind them, in place, first of all.
        block_table: (B, n), int32 or int64: the pages of each sequence, in order. Those behind its
            last key may hold any number.
        cos, sin: (T, R/2) or (B, T, R/2): rotary tables (see `apply_rotary`), by which q and `k`
            are turned to the positions where they stand; the cache is as it was written.
        interleaved: the pairs of the rotation, as in `apply_rotary`.
        mask: bool, True = may attend, broadcastable to (B, Hq, Sq, room).
        causal: the last query sees every key, the one before it all but the last, and so on. False:
            each query sees every key.
        window, scale, softcap, alibi_slopes, sinks: as in `attention`.
        return_lse: also return the log-sum-exp of the scores.
        backend: "auto", or the name of the one that must serve the call.

    Returns:
        out (B, Hq, Sq, Dv); with `return_lse` also lse (B, Hq, Sq), float32 (float64 for float64
        inputs). A query that sees no key, as of a sequence shorter than Sq, gets 0 and −inf.

    Raises:
        TypeError, ValueError: the arguments do not fit together, there is no room for the new keys,
            or a page does not exist; nothing was written. On a GPU, where values are not looked at
            but within `strict()`, they never lead outside of the cache.
        UnsupportedError: no backend (or not the one named) takes the call; lists every reason.
    """
    given = locals()
    if given.pop("unknown"):
        refuse_unknown(_NAME, unknown)
    if has_override(*given.values()) and is_overridden(given):
        return hand_over(attention_decode, given)
    return_lse = check_flag(_NAME, "return_lse", return_lse)
    causal = check_flag(_NAME, "causal", causal)
    floats = (q, k_cache, v_cache, k, v, alibi_slopes, sinks)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in floats):
        raise ValueError(
            f"{_NAME}: got a tensor that requires a gradient, expected none, or torch.no_grad(): a "
            "cache has no gradient"
        )
    with torch.no_grad():
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(q.device.type):
            # The cache keeps its dtype, and all else takes it.
            q = q.to(k_cache.dtype)
            k, v = (None if x is None else x.to(k_cache.dtype) for x in (k, v))
            alibi_slopes, sinks = (unless_single(x, torch.float32) for x in (alibi_slopes, sinks))
        keys, values = (in_tables(q, x, block_table) for x in (k_cache, v_cache))
        head_dim = validate(q, keys, values)
        new = _check_new(q, k, v, keys, values)
        _check_lengths(q, lengths, new, keys.shape[2])
        if block_table is not None:
            _check_pages(block_table, lengths, new, k_cache)
        mask, _, _ = validate_extras(q, keys, mask, None, None)
        if alibi_slopes is not None:
            alibi_slopes = validate_heads("alibi_slopes", alibi_slopes, q, q.shape[0])
        if sinks is not None:
            sinks = validate_heads("sinks", sinks, q)
        own = scale
        if is_learned(scale):
            q, own = scaled(q, scale, _NAME)  # type: ignore[arg-type]
        config = configure(head_dim, causal, own, window, softcap)._replace(cached=True)  # type: ignore[arg-type]
        total = lengths + new if new else lengths
        if (cos is None) != (sin is None):
            raise ValueError(f"{_NAME}: got one of cos and sin, expected both or neither")
        if cos is not None:
            q = _turned(q, cos, sin, total - q.shape[2], interleaved)
            k = None if k is None else _turned(k, cos, sin, lengths, interleaved)
        call = AttentionCall(
            q, k_cache, v_cache, mask, None, total, alibi_slopes, sinks, block_table=block_table,
            config=config,
        )  # fmt: skip
        if k is not None:
            op.choose(backend, call)  # which may refuse it: nothing is written then
            for cache, x in ((k_cache, k), (v_cache, v)):
                _append(cache, x, lengths, block_table)  # type: ignore[arg-type]
        out, lse = op(call, backend)
    return (out, lse) if return_lse else out


def _check_new(q: Tensor, k: Any, v: Any, keys: Tensor, values: Tensor) -> int:
    """How many keys are new."""
    if (k is None) != (v is None):
        raise ValueError(f"{_NAME}: got one of k and v, expected both or neither")
    if k is None:
        return 0
    for name, x, of in (("k", k, keys), ("v", v, values)):
        shape = check_tensor(_NAME, name, x, (of.dtype,))
        check_device(_NAME, name, x, "q", q)
        new = k.shape[2] if k.dim() == 4 else "Snew"
        expected = (*of.shape[:2], new, of.shape[3])
        if tuple(shape) != expected:
            raise ValueError(f"{_NAME}: got {name} of shape {tuple(shape)}, expected {expected}")
    return k.shape[2]


def known(x: Tensor) -> bool:
    """Whether values may be looked at: nothing waits for a GPU but within `strict()`."""
    return plain(x) and (x.is_cpu or is_strict())


def _check_lengths(q: Tensor, lengths: Tensor, new: int, room: int) -> None:
    shape = check_tensor(_NAME, "lengths", lengths, INDICES)
    check_device(_NAME, "lengths", lengths, "q", q)
    if tuple(shape) != (q.shape[0],):
        raise ValueError(f"{_NAME}: got lengths of shape {tuple(shape)}, expected ({q.shape[0]},)")
    if not known(lengths) or lengths.numel() == 0:
        return
    least, most = (int(x) for x in torch.aminmax(lengths))
    if least < 0 or most + new > room:
        raise ValueError(
            f"{_NAME}: got lengths from {least} to {most} and {new} new keys, expected none below "
            f"0 and room for all: the cache has {room}"
        )


def _check_pages(block_table: Tensor, lengths: Tensor, new: int, cache: Tensor) -> None:
    """Those in which a sequence has keys are there, and are no other's where they are written."""
    if not (known(block_table) and known(lengths)):
        return
    pages, _, size, _ = cache.shape
    place = torch.arange(block_table.shape[1], device=block_table.device)
    end = (lengths + new + size - 1) // size if size else lengths
    used = place < end[:, None]
    wrong = ((block_table < 0) | (block_table >= pages)) & used
    if wrong.any():
        raise ValueError(
            f"{_NAME}: got block_table with page {int(block_table[wrong][0])}, expected 0 to "
            f"{pages - 1}"
        )
    if new:
        written = block_table[used & (place >= (lengths // size)[:, None])]
        if len(torch.unique(written)) < written.numel():
            raise ValueError(
                f"{_NAME}: got block_table in which two sequences write to one page, expected a "
                "page of its own for each"
            )


def _turned(x: Tensor, cos: Tensor, sin: Any, first: Tensor, interleaved: bool) -> Tensor:
    """x (B, H, S, D) by rotary, its rows at positions first (B,) and on."""
    positions = first[:, None] + torch.arange(x.shape[2], device=x.device)
    return apply_rotary(x, cos, sin, interleaved=interleaved, positions=positions.clamp(min=0))


def _append(cache: Tensor, x: Tensor, lengths: Tensor, block_table: Tensor | None) -> None:
    """Write x (B, Hkv, Snew, D) behind the first keys; a place outside of the cache is an error."""
    place = lengths.long()[:, None] + torch.arange(x.shape[2], device=x.device)
    entry = torch.arange(x.shape[0], device=x.device)[:, None]
    if block_table is not None:
        size = cache.shape[2]
        entry, place = block_table.long().gather(1, place // size), place % size
    cache.transpose(1, 2)[entry, place] = x.transpose(1, 2)
