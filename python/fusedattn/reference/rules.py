"""Masks and biases by rule, written out: every pair of query and key.

step (Sq, Sk): how far a key is to the right of the diagonal that ends at the last query and key.
"""

from __future__ import annotations

import torch
from torch import Tensor


def steps(q: Tensor, k: Tensor) -> Tensor:
    """`step` of q (…, Sq, D) and k (…, Sk, D)."""
    seq_q, seq_k = q.shape[-2], k.shape[-2]
    key = torch.arange(seq_k, device=q.device)
    return key - torch.arange(seq_k - seq_q, seq_k, device=q.device)[:, None]


def _places(step: Tensor, count: int, zero: int) -> Tensor:
    return (step + zero).clamp(0, count - 1)


def distance_bias(values: Tensor, step: Tensor, zero: int) -> Tensor:
    """(B, H, 1, N), of which number zero + d is for a step of d → (B, H, Sq, Sk)."""
    return values[:, :, 0, _places(step, values.shape[-1], zero)]


def distance_bias_gradient(ds: Tensor, values: Tensor, step: Tensor, zero: int) -> Tensor:
    """That of `distance_bias`, from the gradient of the scores (B, Hq, Sq, Sk)."""
    places = _places(step, values.shape[-1], zero).flatten()
    sums = ds.new_zeros(*ds.shape[:2], values.shape[-1])
    sums = sums.index_add(-1, places, ds.flatten(-2))
    return sums[:, :, None].sum_to_size(values.shape)


def prefix(lengths: Tensor, step: Tensor) -> Tensor:
    """(B, 1, Sq, Sk): the first lengths[b] keys, and those that a causal mask shows."""
    key = torch.arange(step.shape[1], device=step.device)
    return ((key < lengths[:, None])[:, None, :] | (step <= 0))[:, None]


def documents(of_queries: Tensor, of_keys: Tensor) -> Tensor:
    """(B, 1, Sq, Sk): both of one document."""
    return (of_queries[:, :, None] == of_keys[:, None, :])[:, None]


def blocks(seen: Tensor, size: int, seq_q: int, seq_k: int) -> Tensor:
    """(B, H, Sq, Sk) of blocks of so many queries and keys."""
    whole = seen.repeat_interleave(size, -2).repeat_interleave(size, -1)
    return whole[..., :seq_q, :seq_k]
