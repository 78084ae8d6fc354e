"""Softmax as a module: `torch.nn.Softmax` over the fused op, with its options."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.softmax import softmax


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
        """The softmax of `input`; `mask` and `bias` as for `fusedattn.softmax`."""
        dim = self.dim
        if dim is None:
            dim = 0 if input.dim() in (0, 1, 3) else 1
        return softmax(input, dim, mask=mask, bias=bias, scale=self.scale, causal=self.causal)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}, causal={self.causal!r}"
