"""Attention on tensors with no, one or several leading dimensions, each of its size or broadcast.

The kernels know one batch dimension. Leading dimensions that every tensor has, or is broadcast
along, become one; what is left of them is gone through call by call. So nothing is expanded in
memory, and a bias that is shared by some of them is read, and its gradient summed, as it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import is_causal_bias

# What has leading dimensions, and how many others follow them.
_DIMENSIONS = {
    "q": 3, "k": 3, "v": 3, "mask": 3, "bias": 3, "kv_lengths": 0, "alibi_slopes": 1,
}  # fmt: skip


def leading_shape(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """What the leading dimensions of q, k and v are broadcast to.

    Raises:
        ValueError: they do not fit together.
    """
    try:
        return tuple(torch.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v))))
    except RuntimeError:
        leading = [tuple(x.shape[:-3]) for x in (q, k, v)]
        raise ValueError(
            f"attention: got leading dimensions {leading[0]}, {leading[1]}, {leading[2]} of q, k, "
            "v, expected sizes that are equal or 1"
        ) from None


def _split(leading: tuple[int, ...], shapes: list[tuple[int, ...]]) -> int:
    """The first of the leading dimensions from which on they can be one: each tensor has all of
    them, or is broadcast along all."""
    first = len(leading)
    kinds: list[set[bool]] = [set() for _ in shapes]
    for at in range(len(leading) - 1, -1, -1):
        if leading[at] != 1:
            for kind, shape in zip(kinds, shapes, strict=True):
                kind.add(shape[at] == 1)
        if any(len(kind) > 1 for kind in kinds):
            break
        first = at
    return first


def _padded(name: str, x: Any, leading: tuple[int, ...]) -> Tensor:
    """With as many leading dimensions as there are, of size 1 where it has none."""
    own = x.shape[: max(x.dim() - _DIMENSIONS[name], 0)]
    fits = len(own) <= len(leading) and all(
        n in (1, size) for n, size in zip(reversed(own), reversed(leading), strict=False)
    )
    whole = name in ("kv_lengths", "alibi_slopes")
    if not fits or (whole and tuple(own) != leading and x.dim() != _DIMENSIONS[name]):
        raise ValueError(
            f"attention: got {name} of shape {tuple(x.shape)}, expected leading dimensions "
            f"{leading}{'' if whole else ', each of that size or 1'}"
        )
    rest = x.shape[len(own) :]
    return x.reshape((1,) * (len(leading) - len(own)) + tuple(own) + tuple(rest))


def over_leading(call: Callable[..., Any], given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """out (…, Hq, Sq, Dv) and lse (…, Hq, Sq) of `call`, which takes one batch dimension.

    given: its arguments, of which those in _DIMENSIONS have leading dimensions, in any number.
    """
    leading = leading_shape(given["q"], given["k"], given["v"])
    tensors = {
        name: _padded(name, given[name], leading)
        for name in _DIMENSIONS
        if isinstance(given[name], Tensor) and not is_causal_bias(given[name])
    }
    if "alibi_slopes" in tensors and given["alibi_slopes"].dim() == 1:
        del tensors["alibi_slopes"]  # for all
    first = _split(leading, [tuple(x.shape[: len(leading)]) for x in tensors.values()])
    outer, inner = leading[:first], leading[first:]
    outs, lses = [], []
    for number, at in enumerate(itertools.product(*map(range, outer))):
        part = {}
        for name, x in tensors.items():
            own = x[tuple(0 if n == 1 else i for i, n in zip(at, x.shape, strict=False))]
            batch = math.prod(own.shape[: len(inner)])
            own = own.reshape((batch, *own.shape[len(inner) :]))
            if name in ("q", "k", "v"):
                own = own.expand(math.prod(inner), *own.shape[1:])
            part[name] = own
        seed = given.get("seed")
        if number and seed is not None:  # another mask for each
            part["seed"] = seed + number
        out, lse = call(**given | part)
        outs.append(out)
        lses.append(lse)
    if not outs:
        q, v = tensors["q"], tensors["v"]
        shape = (*leading, *q.shape[-3:-1])
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return q.new_zeros(*shape, v.shape[-1]), q.new_zeros(shape, dtype=wide)
    if len(outs) == 1:
        out, lse = outs[0], lses[0]
    else:
        out, lse = torch.stack(outs), torch.stack(lses)
    return out.reshape(*leading, *out.shape[-3:]), lse.reshape(*leading, *lse.shape[-2:])
