"""The oracle's dropout: random words by Philox, as functions of a seed and a place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def philox(seed: Tensor, width: int, *counter: Tensor) -> Tensor:
    """Philox-4x32-10 (Salmon et al. 2011): random words in [0, 2³²), int64 (…, width).

    Key: the low and the high half of `seed` (one int64). Counter: (column // 4, *counter), three
    integers of 32 bits, each (…, 1); of its four words a column takes number column % 4.
    """
    low = 0xFFFFFFFF
    c = list(torch.broadcast_tensors(torch.arange((width + 3) // 4, device=seed.device), *counter))
    key = [seed.reshape(()) & low, (seed.reshape(()) >> 32) & low]
    for _ in range(10):
        # int64 products wrap around, which leaves their 64 bits as they should be.
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [((b >> 32) & low) ^ c[1] ^ key[0], b & low, ((a >> 32) & low) ^ c[3] ^ key[1], a & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return torch.stack(c, dim=-1).flatten(-2)[..., :width]


def _drop(x: Tensor, p: float, words: Tensor) -> Tensor:
    """x / (1 − p) where the random word is at least p·2³², else 0."""
    factor = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    return torch.where(words >= int(p * 2.0**32), x * factor, 0.0)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Dropout of x (rows, width), with the halves of the row as the counter."""
    if p == 0.0 or seed is None:
        return x
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    return _drop(x, p, philox(seed, x.shape[1], row & 0xFFFFFFFF, row >> 32, row * 0))


class Places(NamedTuple):
    """Where weights are, for their dropout: batch entry (B, 1, 1, 1) or (Sq, 1), query (Sq, 1) and
    key (Sk,), each counted from the first of its sequence."""

    batch: Tensor
    query: Tensor
    key: Tensor


def attention_dropout(
    x: Tensor, p: float, seed: int | Tensor | None, places: Places | None = None
) -> Tensor:
    """Dropout of attention's weights (B, Hq, Sq, Sk), with (query, head, batch) as the counter.

    places: where they are, if not where they stand.
    """
    if p == 0.0 or seed is None:
        return x
    if not isinstance(seed, Tensor):
        seed = torch.tensor([seed], device=x.device)
    batch, head, query = (torch.arange(n, device=x.device) for n in x.shape[:3])
    head = head[:, None, None]
    if places is None:
        words = philox(seed, x.shape[3], query[:, None], head, batch[:, None, None, None])
    else:
        words = philox(seed, x.shape[3], places.query, head, places.batch)[..., places.key]
    return _drop(x, p, words)
