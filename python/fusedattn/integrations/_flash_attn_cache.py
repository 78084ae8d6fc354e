"""`flash_attn_with_kvcache` of the flash-attn package, and what its other functions share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.attention_decode import attention_decode, known
from ..ops.rotary import apply_rotary

_OP = "flash_attn_with_kvcache"


def options_of(
    softmax_scale: float | None, causal: bool, window_size: tuple[int, int], softcap: float
) -> dict[str, Any]:
    """As `attention` has them; −1 is an unbounded side."""
    left, right = (None if side == -1 else side for side in window_size)
    return {
        "scale": softmax_scale, "causal": bool(causal), "softcap": softcap or None,
        "window": None if left is None and right is None else (left, right),
    }  # fmt: skip


def positive(lse: Tensor) -> Tensor:
    """+inf for a query that sees no key, as that package has it."""
    return lse.masked_fill(lse == float("-inf"), float("inf"))


def _check_pages(block_table: Tensor, used: Tensor, pages: int) -> None:
    """used (N,): how many of a sequence's pages are read or written."""
    if not known(block_table):
        return
    if int(used.max()) > block_table.shape[1]:
        raise ValueError(
            f"{_OP}: got block_table of {block_table.shape[1]} pages a sequence, expected "
            f"{int(used.max())}"
        )
    place = torch.arange(block_table.shape[1], device=block_table.device)
    wrong = ((block_table < 0) | (block_table >= pages)) & (place < used[:, None])
    if wrong.any():
        raise ValueError(
            f"{_OP}: got block_table with page {int(block_table[wrong][0])}, expected 0 to "
            f"{pages - 1}"
        )


def rows_of_pages(cu_seqlens: Tensor, block_table: Tensor, size: int, pages: int) -> Tensor:
    """Which rows of all pages, one after the other, are those of packed sequences; (total,)."""
    offsets = cu_seqlens.long()
    _check_pages(block_table, (offsets.diff() + size - 1) // size, pages)
    row = torch.arange(int(offsets[-1]), device=offsets.device)
    number = torch.bucketize(row, offsets[1:], right=True)
    place = row - offsets[number]
    return block_table[number, place // size].long() * size + place % size


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of new queries on a cache, which new keys and values are appended to in place.

    No gradient is recorded. Masks and distances are those of each sequence's own length, and the
    cache is read where it lies.

    Args:
        q: (B, Sq, Hq, D).
        k_cache, v_cache: (Bc, Sc, Hkv, D) with Bc ≥ B, or with a block_table (pages, size, Hkv, D).
        k, v: (B, Snew, Hkv, D): written behind the first cache_seqlens keys.
        rotary_cos, rotary_sin: (T, R/2), for the new keys and, where causal or in a window, for
            the queries at those positions; without either all queries stand at cache_seqlens.
        cache_seqlens: an int or (B,) int32, how many keys there are already; all by default.
        cache_batch_idx: (B,) int32, which entry of the cache is whose.
        cache_leftpad: (B,) int32, where the keys of each begin.
        block_table: (B, pages of each) int32.
        num_splits: no part of a result, and not looked at.
        return_softmax_lse: also return the log-sum-exp (B, Hq, Sq), +inf where no key is seen.

    Returns:
        out (B, Sq, Hq, Dv).

    Raises:
        TypeError, ValueError: the arguments do not fit together, the cache is too small, or a page
            is out of range; nothing was written. On a GPU values are checked within `strict()`.
    """
    with torch.no_grad():
        batch = q.shape[0]
        size = k_cache.shape[1]
        room = size if block_table is None else size * block_table.shape[1]
        before = _lengths(cache_seqlens, batch, room, k, q.device)
        new = 0 if k is None else k.shape[1]
        _check(k_cache, k, v, batch, before, new, room, cache_batch_idx, block_table)
        options = options_of(softmax_scale, causal, window_size, softcap)
        if rotary_cos is not None:
            q, k = _rotated(
                q, k, rotary_cos, rotary_sin, before, rotary_interleaved,
                causal or options["window"] is not None,
            )  # fmt: skip
        if k is not None:
            place = before[:, None] + torch.arange(new, device=q.device)
            _append(((k_cache, k), (v_cache, v)), place, cache_batch_idx, block_table)
        table = block_table
        if cache_batch_idx is not None:  # a page is then all that an entry has
            table = cache_batch_idx[:, None]
        keys, values = (x[:batch] if table is None else x for x in (k_cache, v_cache))
        length = before + new
        begun = None
        if cache_leftpad is not None:
            begun = torch.arange(room, device=q.device) >= cache_leftpad[:, None, None, None]
        slopes = None if alibi_slopes is None else alibi_slopes.float()
        out, lse = attention_decode(
            q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), length, mask=begun,
            block_table=table, alibi_slopes=slopes, return_lse=True, **options,
        )  # fmt: skip
    out = out.transpose(1, 2)
    return (out, positive(lse)) if return_softmax_lse else out


def _lengths(given: Any, batch: int, room: int, k: Tensor | None, device: Any) -> Tensor:
    if given is None:
        if k is not None:
            raise ValueError(f"{_OP}: got k without cache_seqlens, expected where it is to go")
        given = room
    if isinstance(given, int):
        return torch.full((batch,), given, device=device)
    if tuple(given.shape) != (batch,):
        raise ValueError(
            f"{_OP}: got cache_seqlens of shape {tuple(given.shape)}, expected ({batch},)"
        )
    return given.long()


def _check(
    k_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    batch: int,
    before: Tensor,
    new: int,
    room: int,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> None:
    if (k is None) != (v is None):
        raise ValueError(f"{_OP}: got one of k and v, expected both or neither")
    if block_table is not None and cache_batch_idx is not None:
        raise ValueError(f"{_OP}: got cache_batch_idx with block_table, expected one of the two")
    if block_table is None and cache_batch_idx is None and k_cache.shape[0] < batch:
        raise ValueError(
            f"{_OP}: got k_cache of {k_cache.shape[0]} entries, expected at least {batch}"
        )
    if k is not None and k.shape[2:] != k_cache.shape[2:]:
        raise ValueError(
            f"{_OP}: got k of shape {tuple(k.shape)}, expected ({batch}, Snew, "
            f"{', '.join(map(str, k_cache.shape[2:]))})"
        )
    if known(before):
        least, most = int(before.min()), int(before.max()) + new
        if least < 0 or most > room:
            raise ValueError(
                f"{_OP}: got cache_seqlens from {least} and keys up to {most}, expected 0 to "
                f"{room}, the room of the cache"
            )
    if cache_batch_idx is not None and known(cache_batch_idx):
        least, most = int(cache_batch_idx.min()), int(cache_batch_idx.max())
        if least < 0 or most >= k_cache.shape[0]:
            raise ValueError(
                f"{_OP}: got cache_batch_idx from {least} to {most}, expected 0 to "
                f"{k_cache.shape[0] - 1}"
            )
    if block_table is not None:
        size = k_cache.shape[1]
        _check_pages(block_table, (before + new + size - 1) // size, k_cache.shape[0])


def _rotated(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Any, before: Tensor, interleaved: bool,
    ordered: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    def rotate(x: Tensor, steps: int) -> Tensor:
        positions = before[:, None] + steps * torch.arange(x.shape[1], device=x.device)
        turned = apply_rotary(
            x.transpose(1, 2), cos, sin, interleaved=interleaved, positions=positions
        )
        return turned.transpose(1, 2)

    return rotate(q, 1 if ordered else 0), None if k is None else rotate(k, 1)


def _append(
    pairs: Any, place: Tensor, cache_batch_idx: Tensor | None, block_table: Tensor | None
) -> None:
    number = torch.arange(place.shape[0], device=place.device)[:, None]
    for cache, new in pairs:
        if block_table is not None:
            size = cache.shape[1]
            cache[block_table[number, place // size].long(), place % size] = new.to(cache.dtype)
        else:
            entry = number if cache_batch_idx is None else cache_batch_idx.long()[:, None]
            cache[entry, place] = new.to(cache.dtype)
