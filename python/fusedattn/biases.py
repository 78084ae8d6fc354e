"""Biases by rule: they depend on the distance of query and key alone, and take O(Sq + Sk) memory.

>>> import torch, fusedattn
>>> q, k, v = torch.randn(3, 2, 8, 128, 64)
>>> table = torch.nn.Embedding(32, 8)  # (buckets, heads), as T5 has it
>>> bias = fusedattn.biases.t5(table.weight, bidirectional=True)
>>> fusedattn.attention(q, k, v, bias=bias, scale=1.0).sum().backward()
>>> table.weight.grad.shape
torch.Size([32, 8])
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .ops._checks import FLOATS, check_flag, check_integer, check_tensor

__all__ = ["DistanceBias", "relative", "t5"]


@dataclasses.dataclass(frozen=True, eq=False)
class DistanceBias:
    """What `t5` and `relative` make, for the argument `bias` of `attention`. A pytree.

    table: (buckets, Hq), float. kind: "t5", "t5_decoder" or "relative". max_distance: from there on
    all keys are in one bucket.
    """

    table: Tensor
    kind: str
    max_distance: int

    def buckets(self, distance: Tensor) -> Tensor:
        """The row of the table for keys so far to the right of a query; int64."""
        if self.kind == "relative":
            return distance.clamp(-self.max_distance, self.max_distance) + self.max_distance
        count, first = self.table.shape[0], torch.zeros_like(distance)
        if self.kind == "t5":
            count //= 2
            first = (distance > 0) * count
            distance = distance.abs()
        else:
            distance = -distance.clamp(max=0)
        exact = count // 2
        far = torch.log(distance.clamp(min=1).float() / exact)
        far = far / math.log(self.max_distance / exact) * (count - exact)
        far = (exact + far.long()).clamp(max=count - 1)
        return first + torch.where(distance < exact, distance, far)

    def along(self, seq_q: int, seq_k: int, dtype: torch.dtype) -> Tensor:
        """The bias at distances −(Sk − 1) … Sq − 1, (1, Hq, 1, Sq + Sk − 1), differentiable.

        A distance counts keys to the right of the diagonal that ends at the last query and key.
        """
        distance = torch.arange(1 - seq_k, seq_q, device=self.table.device)
        rows = self.table.to(dtype)[self.buckets(distance)]
        return rows.t().contiguous()[None, :, None, :]


def _flatten(x: DistanceBias) -> tuple[list[Tensor], tuple[str, int]]:
    return [x.table], (x.kind, x.max_distance)


def _flatten_with_keys(x: DistanceBias) -> tuple[list[Any], tuple[str, int]]:
    return [(_pytree.GetAttrKey("table"), x.table)], (x.kind, x.max_distance)


def _unflatten(children: list[Tensor], context: tuple[str, int]) -> DistanceBias:
    return DistanceBias(*children, *context)


_pytree.register_pytree_node(
    DistanceBias, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="fusedattn.biases.DistanceBias",
)  # fmt: skip


def _check_table(op: str, table: Tensor) -> int:
    """How many buckets there are."""
    shape = check_tensor(op, "table", table, FLOATS)
    if len(shape) != 2 or shape[0] == 0:
        raise ValueError(f"{op}: got table of shape {tuple(shape)}, expected (buckets, heads)")
    return shape[0]


def t5(table: Tensor, *, bidirectional: bool, max_distance: int = 128) -> DistanceBias:
    """T5's relative position bias (Raffel et al. 2020): small distances have a bucket each, larger
    ones share buckets that grow with the logarithm, and from `max_distance` on all are one.

    Args:
        table: (buckets, Hq), float: `relative_attention_bias.weight` of a T5. It gets a gradient.
        bidirectional: half of the buckets are for keys to the right, as in an encoder; else those
            are all in the first, as in a decoder.
        max_distance: from there on all keys are in one bucket.

    Returns:
        A bias for `attention` and `attention_varlen`. Distances are those of ALiBi: the last query
        stands at the last key, so that a decoder's new queries are where they should be.

    Raises:
        TypeError, ValueError: no table, too few buckets, or a `max_distance` within the exact ones.
    """
    op = "biases.t5"
    bidirectional = check_flag(op, "bidirectional", bidirectional)
    buckets = _check_table(op, table)
    least = 4 if bidirectional else 2
    if buckets < least or (bidirectional and buckets % 2):
        even = "an even number of at least 4" if bidirectional else "at least 2"
        raise ValueError(
            f"{op}: got table of shape {tuple(table.shape)}, expected {even} buckets (rows)"
        )
    max_distance = check_integer(op, "max_distance", max_distance, "an int")
    exact = buckets // (4 if bidirectional else 2)
    if max_distance <= exact:
        raise ValueError(f"{op}: got max_distance={max_distance}, expected more than {exact}")
    return DistanceBias(table, "t5" if bidirectional else "t5_decoder", max_distance)


def relative(table: Tensor) -> DistanceBias:
    """A learned bias for each distance from −m to m, beyond which it stays the same (Shaw et al.
    2018, as a bias of the scores).

    Args:
        table: (2m + 1, Hq), float; row m + d is for keys d to the right of the query.

    Returns:
        A bias for `attention` and `attention_varlen`; distances are those of `t5`.

    Raises:
        TypeError, ValueError: no table of an odd number of rows.
    """
    op = "biases.relative"
    buckets = _check_table(op, table)
    if buckets % 2 == 0:
        raise ValueError(
            f"{op}: got table of shape {tuple(table.shape)}, expected (2m + 1, heads), an odd "
            "number of rows"
        )
    return DistanceBias(table, "relative", buckets // 2)
