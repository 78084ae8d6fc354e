"""Masks by rule: what is hidden costs nothing, and no mask of size Sq · Sk is made.

>>> import torch, fusedattn
>>> q, k, v = torch.randn(3, 2, 8, 128, 64)
>>> ids = torch.arange(128).div(50, rounding_mode="floor").expand(2, 128)  # of 50, 50 and 28
>>> mask = fusedattn.masks.documents(ids)
>>> fusedattn.attention(q, k, v, mask=mask, causal=True).shape
torch.Size([2, 8, 128, 64])

Rules are combined by `&`, with each other and with a bool tensor. `causal`, `window` and
`kv_lengths` of the call hide more.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .ops._checks import INDICES, check_integer, check_tensor

__all__ = ["Mask", "blocks", "documents", "from_block_mask", "prefix"]

_INT32 = 2**32


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """What the functions of this module make, for the argument `mask` of `attention`. A pytree.

    documents_q (B or 1, Sq) and documents_k (B or 1, Sk) must agree; prefix_lengths (B,): a query
    sees that many keys and those before it; blocks (B or 1, Hq or 1, ⌈Sq/size⌉, ⌈Sk/size⌉) and
    dense (B or 1, Hq or 1, Sq, Sk): bool, True = may attend. None hides nothing.
    """

    documents_q: Tensor | None = None
    documents_k: Tensor | None = None
    prefix_lengths: Tensor | None = None
    blocks: Tensor | None = None
    dense: Tensor | None = None
    block_size: int = 0

    def __and__(self, other: Mask | Tensor) -> Mask:
        if isinstance(other, Tensor):
            other = Mask(dense=other)
        if not isinstance(other, Mask):
            return NotImplemented
        size = math.gcd(self.block_size, other.block_size)
        return Mask(
            _both(_one_id, self.documents_q, other.documents_q),
            _both(_one_id, self.documents_k, other.documents_k),
            _both(torch.minimum, self.prefix_lengths, other.prefix_lengths),
            _both(torch.logical_and, self._in_blocks_of(size), other._in_blocks_of(size)),
            _both(torch.logical_and, self.dense, other.dense),
            size,
        )

    __rand__ = __and__

    def _in_blocks_of(self, size: int) -> Tensor | None:
        if self.blocks is None or self.block_size == size:
            return self.blocks
        times = self.block_size // size
        return self.blocks.repeat_interleave(times, -1).repeat_interleave(times, -2)


def _both(combine: Any, x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None else x if y is None else combine(x, y)


def _one_id(x: Tensor, y: Tensor) -> Tensor:
    """Equal where both are."""
    if x.dtype != torch.int32 or y.dtype != torch.int32:
        raise TypeError(
            f"masks.documents: got ids of dtypes {x.dtype} and {y.dtype} on both sides of &, "
            "expected int32"
        )
    return x.to(torch.int64) * _INT32 + (y.to(torch.int64) & (_INT32 - 1))


_TENSORS = 5


def _flatten(x: Mask) -> tuple[list[Any], int]:
    fields = [getattr(x, each.name) for each in dataclasses.fields(x)]
    return fields[:_TENSORS], fields[_TENSORS]


def _flatten_with_keys(x: Mask) -> tuple[list[Any], int]:
    names = [_pytree.GetAttrKey(each.name) for each in dataclasses.fields(x)]
    children, context = _flatten(x)
    return list(zip(names, children, strict=False)), context


def _unflatten(children: list[Any], context: int) -> Mask:
    return Mask(*children, context)


_pytree.register_pytree_node(
    Mask, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="fusedattn.masks.Mask",
)  # fmt: skip


def documents(ids: Tensor, ids_k: Tensor | None = None) -> Mask:
    """Queries see the keys of their own document: those of the same id.

    Args:
        ids: (S,) or (B, S), int32 or int64, of queries and keys. Equal ids need not be neighbours,
            but what is skipped is found by the smallest and largest of some neighbours.
        ids_k: (Sk,) or (B, Sk) of the keys, where they are others than the queries.

    Raises:
        TypeError, ValueError: not such tensors.
    """
    given = {"ids": ids, "ids_k": ids if ids_k is None else ids_k}
    for name, x in given.items():
        shape = check_tensor("masks.documents", name, x, INDICES)
        if len(shape) not in (1, 2):
            raise ValueError(
                f"masks.documents: got {name} of shape {tuple(shape)}, expected (S,) or (B, S)"
            )
    of_queries, of_keys = (x if x.dim() == 2 else x[None] for x in given.values())
    return Mask(documents_q=of_queries, documents_k=of_keys)


def prefix(lengths: Tensor) -> Mask:
    """A causal mask, but for the first keys of each batch entry, which all queries see (a prefix
    language model: Raffel et al. 2020).

    Args:
        lengths: (B,), int32 or int64, of any value: how many keys those are. Behind them the last
            query sees every key, as with `causal=True`.

    Raises:
        TypeError, ValueError: not such a tensor.
    """
    shape = check_tensor("masks.prefix", "lengths", lengths, INDICES)
    if len(shape) != 1:
        raise ValueError(f"masks.prefix: got lengths of shape {tuple(shape)}, expected (B,)")
    return Mask(prefix_lengths=lengths)


def blocks(tensor: Tensor, size: int) -> Mask:
    """Which blocks of `size` queries and `size` keys see one another.

    Args:
        tensor: bool, broadcastable to (B, Hq, ⌈Sq/size⌉, ⌈Sk/size⌉), True = may attend. The last
            two dimensions are never broadcast.
        size: of a block, at least 1. What is hidden costs nothing from 64 on.

    Raises:
        TypeError, ValueError: not such a tensor, or no such size.
    """
    shape = check_tensor("masks.blocks", "tensor", tensor, (torch.bool,))
    if not 2 <= len(shape) <= 4:
        raise ValueError(
            f"masks.blocks: got tensor of shape {tuple(shape)}, expected 2 to 4 dimensions, (B, "
            "Hq, blocks of queries, blocks of keys)"
        )
    size = check_integer("masks.blocks", "size", size, "an int")
    if size < 1:
        raise ValueError(f"masks.blocks: got size={size}, expected at least 1")
    return Mask(blocks=tensor[(None,) * (4 - len(shape))], block_size=size)


def from_block_mask(block_mask: Any) -> Mask:
    """A `torch.nn.attention.flex_attention.BlockMask`, whose blocks that hide all cost nothing.

    `attention` converts one that it is given; where it is the same at each call, convert it once.
    Where it has blocks of which its `mask_mod` hides a part, that is made into a bool tensor (B, H,
    Sq, Sk) of the block mask's own B and H.
    """
    rows, columns = block_mask.BLOCK_SIZE
    size = math.gcd(rows, columns)
    seen = block_mask.to_dense().bool()
    seen = seen.repeat_interleave(rows // size, -2).repeat_interleave(columns // size, -1)
    seq_q, seq_k = block_mask.seq_lengths
    seen = seen[..., : -(-seq_q // size), : -(-seq_k // size)]
    dense = None
    if int(block_mask.kv_num_blocks.max()) > 0:  # of those that are seen in part
        from torch.nn.attention.flex_attention import create_mask

        batch, heads = block_mask.kv_num_blocks.shape[:2]
        dense = create_mask(
            block_mask.mask_mod, batch, heads, seq_q, seq_k, block_mask.kv_num_blocks.device
        )
    return Mask(blocks=seen, dense=dense, block_size=size)
