"""The oracle of attention on a cache: each sequence by itself, on the keys that it has.

q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), of which the first kv_lengths (B,) keys
exist; or k, v (pages, Hkv, size, D) and block_table (B, n), whose pages hold them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import functional


def of_sequence(x: Tensor, b: int, length: int, block_table: Tensor | None) -> Tensor:
    """(1, Hkv, length, D): the first rows of sequence b."""
    if block_table is None:
        return x[b : b + 1, :, :length]
    pages = -(-length // x.shape[2])
    numbers = block_table[b, :pages].long().clamp(0, x.shape[0] - 1)
    return x[numbers].transpose(0, 1).flatten(1, 2)[None, :, :length]


def _entry(x: Tensor | None, b: int) -> Tensor | None:
    return x if x is None or x.shape[0] == 1 else x[b : b + 1]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lengths: Tensor,
    block_table: Tensor | None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`functional.attention` of each sequence, whose diagonal ends at its last key."""
    room = k.shape[2] if block_table is None else block_table.shape[1] * k.shape[2]
    found = []
    for b, given in enumerate(kv_lengths.tolist()):
        length = min(max(given, 0), room)
        own, slopes = (_entry(x, b) for x in (mask, alibi_slopes))
        if own is not None and own.shape[3] != 1:
            own = own[..., :length]
        keys, values = (of_sequence(x, b, length, block_table) for x in (k, v))
        found.append(
            functional.attention(
                q[b : b + 1], keys, values, mask=own, alibi_slopes=slopes, **options
            )
        )
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs), torch.cat(lses)
