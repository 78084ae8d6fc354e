"""Softmax as a module: `torch.nn.Softmax` over the fused op, with its options."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Proxy

from ..ops.softmax import softmax
from ._inputs import is_nested, recorded, rows


class Softmax(torch.nn.Softmax):
    """Drop-in for `torch.nn.Softmax`: softmax(scale · x + bias) along `dim`, where not masked.

    A row with nothing to see is 0, where torch's is NaN.

    Args:
        dim: the dimension that sums to 1. None follows torch: 0 for inputs of 0, 1 or 3
            dimensions, else 1; here without its deprecation warning.
        scale: any float.
        causal: over the last two dimensions, as `fusedattn.softmax` draws it; `dim` is then the
            last.
    """

    # Of a torch.nn.Softmax that becomes one of these: what was made without these options.
    scale: float = 1.0
    causal: bool | str = False

    def __init__(
        self, dim: int | None = None, *, scale: float = 1.0, causal: bool | str = False
    ) -> None:
        super().__init__(dim)
        self.scale = scale
        self.causal = causal

    def forward(
        self, input: Tensor, *, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """The softmax of `input`; `mask` and `bias` as for `fusedattn.softmax`.

        A nested input, strided or jagged, gives a nested output and takes neither mask, bias nor
        `causal`. Along the dimension in which its sequences differ torch's own softmax computes it.
        """
        if isinstance(input, Proxy):
            call = recorded(self, input, mask=mask, bias=bias)
            if call is not None:
                return call
        dim = self.dim
        if dim is None and isinstance(input, Tensor):
            dim = 0 if input.dim() in (0, 1, 3) else 1
        if is_nested(input):
            if mask is not None or bias is not None or self.causal:
                raise ValueError(
                    "Softmax: got a nested input with a mask, a bias or causal, expected none"
                )
            from_the_end = input.dim() - dim if dim >= 0 else -dim
            found = rows(input, from_the_end) if 0 < from_the_end < input.dim() else None
            if found is None:
                return super().forward(input if self.scale == 1.0 else input * self.scale)
            return found[1](softmax(found[0], -from_the_end, scale=self.scale))
        return softmax(input, dim, mask=mask, bias=bias, scale=self.scale, causal=self.causal)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}, causal={self.causal!r}"
