"""Masks and biases by rule, as the tensors of a call: see fusedattn.masks and fusedattn.biases."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..biases import DistanceBias
from ..masks import Mask, from_block_mask
from ._checks import INDICES, check_device, check_tensor


class Rules(NamedTuple):
    """Fields of an `AttentionCall`, in its order."""

    distance_bias: Tensor | None = None
    prefix_lengths: Tensor | None = None
    documents_q: Tensor | None = None
    documents_k: Tensor | None = None
    mask_blocks: Tensor | None = None


NONE = Rules()


def _is_block_mask(x: object) -> bool:
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    return flex is not None and isinstance(x, flex.BlockMask)


def unfold(mask: Any, bias: Any, q: Tensor, k: Tensor) -> tuple[Any, Any, Rules, int]:
    """(mask, bias, rules, block size): tensors or None, and what stood for them by rule.

    q, k: checked, with four dimensions.
    """
    rules, size = NONE, 0
    if isinstance(bias, DistanceBias):
        rules = rules._replace(distance_bias=_along("attention", bias, q, k))
        bias = None
    if mask is not None and _is_block_mask(mask):
        lengths, expected = tuple(mask.seq_lengths), (q.shape[2], k.shape[2])
        if lengths != expected:
            raise ValueError(
                f"attention: got mask, a BlockMask for lengths {lengths} of q and k, expected "
                f"{expected}"
            )
        mask = from_block_mask(mask)
    if isinstance(mask, Mask):
        rules = rules._replace(
            prefix_lengths=mask.prefix_lengths, documents_q=mask.documents_q,
            documents_k=mask.documents_k, mask_blocks=mask.blocks,
        )  # fmt: skip
        size, mask = mask.block_size, mask.dense
    return mask, bias, rules, size


def _along(op: str, bias: DistanceBias, q: Tensor, k: Tensor) -> Tensor:
    """Of q and k (B, H, S, D), in the dtype of the log-sum-exp."""
    table = bias.table
    check_device(op, "bias", table, "q", q)
    if table.shape[1] != q.shape[1]:
        raise ValueError(
            f"{op}: got bias with a table of shape {tuple(table.shape)}, expected (buckets, Hq) "
            f"with Hq = {q.shape[1]}"
        )
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return bias.along(q.shape[2], k.shape[2], wide)


def packed_bias(op: str, bias: Any, q: Tensor, k: Tensor) -> Tensor | None:
    """A bias of packed sequences, which is by rule."""
    if bias is None:
        return None
    if not isinstance(bias, DistanceBias):
        raise TypeError(
            f"{op}: got bias of type {type(bias).__name__}, expected one of fusedattn.biases or "
            "None: packed sequences have no (B, Hq, Sq, Sk)"
        )
    return _along(op, bias, q, k)


def packed_prefix(op: str, mask: Any, q: Tensor, sequences: int) -> Tensor | None:
    """A mask of packed sequences, which is a `masks.prefix`."""
    if mask is None:
        return None
    alone = isinstance(mask, Mask) and all(
        x is None for x in (mask.documents_q, mask.blocks, mask.dense)
    )
    if not alone:
        raise TypeError(
            f"{op}: got mask of type {type(mask).__name__}, expected None or masks.prefix alone: "
            "packed sequences have no (B, Hq, Sq, Sk)"
        )
    return _lengths(op, mask.prefix_lengths, sequences, q)


def _lengths(op: str, x: Tensor | None, sequences: int, q: Tensor) -> Tensor | None:
    if x is None:
        return None
    shape = check_tensor(op, "prefix_lengths", x, INDICES)
    check_device(op, "prefix_lengths", x, "q", q)
    if shape != (sequences,):
        raise ValueError(
            f"{op}: got masks.prefix of lengths of shape {tuple(shape)}, expected ({sequences},)"
        )
    return x


def validate_rules(rules: Rules, size: int, q: Tensor, k: Tensor, sequences: int) -> None:
    """Check the tensors of a call against q and k, of which there are so many sequences."""
    op = "attention"
    batch, heads, seq_q, _ = q.shape
    seq_k = k.shape[2]
    if (x := rules.distance_bias) is not None:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        shape = check_tensor(op, "distance_bias", x, (wide,))
        check_device(op, "distance_bias", x, "q", q)
        expected = (batch, heads, 1, seq_q + seq_k - 1)
        fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads)
        if not fits or tuple(shape[2:]) != expected[2:]:
            raise ValueError(
                f"{op}: got distance_bias of shape {tuple(shape)}, expected {expected}, the first "
                "two of that size or 1"
            )
    _lengths(op, rules.prefix_lengths, sequences, q)
    pair = rules.documents_q, rules.documents_k
    if (pair[0] is None) != (pair[1] is None):
        raise ValueError(f"{op}: got documents of one of queries and keys, expected both")
    for name, x, rows in (("documents_q", pair[0], seq_q), ("documents_k", pair[1], seq_k)):
        if x is not None:
            shape = check_tensor(op, name, x, INDICES)
            check_device(op, name, x, "q", q)
            if tuple(shape) not in ((1, rows), (batch, rows)):
                raise ValueError(
                    f"{op}: got masks.documents with {name} of shape {tuple(shape)}, expected "
                    f"({rows},) or {(batch, rows)}"
                )
    if pair[0] is not None and pair[0].dtype != pair[1].dtype:  # type: ignore[union-attr]
        raise TypeError(
            f"{op}: got documents of dtypes {pair[0].dtype} and {pair[1].dtype}, "  # type: ignore[union-attr]
            "expected one"
        )
    if (x := rules.mask_blocks) is not None:
        shape = check_tensor(op, "mask_blocks", x, (torch.bool,))
        check_device(op, "mask_blocks", x, "q", q)
        if size < 1:
            raise ValueError(f"{op}: got block_size={size}, expected at least 1")
        expected = (batch, heads, -(-seq_q // size), -(-seq_k // size))
        fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads)
        if not fits or tuple(shape[2:]) != expected[2:]:
            raise ValueError(
                f"{op}: got masks.blocks of shape {tuple(shape)} and size {size}, expected "
                f"{expected}, the first two of that size or 1"
            )
