"""Layer norm and RMS norm as modules: torch.nn's LayerNorm and RMSNorm over the fused ops.

With z = dropout(x) + residual (both optional) the output is the norm of z; a call with a residual
also returns z, the residual stream for the next block. Nested tensors, strided or jagged, give
nested ones; every sequence must have the normalised dimensions.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from ..ops._checks import check_number, check_probability
from ..ops.layer_norm import layer_norm
from ..ops.rms_norm import rms_norm
from ._inputs import (
    check_dtype,
    is_nested,
    recorded,
    rows,
    same_sequences,
)


def _check_options(name: str, normalized_shape: Any, dtype: Any, dropout_p: Any) -> None:
    one = isinstance(normalized_shape, numbers.Integral)
    shape = (normalized_shape,) if one else normalized_shape
    if not isinstance(shape, Sequence) or not all(isinstance(n, numbers.Integral) for n in shape):
        raise TypeError(f"{name}: got normalized_shape={normalized_shape!r}, expected integers")
    if any(n < 0 for n in shape):
        raise ValueError(f"{name}: got normalized_shape={normalized_shape}, expected sizes")
    check_dtype(name, dtype)
    check_probability(name, "dropout_p", dropout_p)


def _nested_norm(module: Any, x: Tensor, residual: Tensor | None) -> Any:
    """The norm of nested x by its rows; None where torch's own must say what is wrong with x."""
    shape = tuple(module.normalized_shape)
    found = rows(x, len(shape))
    fits = found is not None and found[0].shape[-len(shape) :] == shape
    if residual is None:
        return found[1](module.forward(found[0])) if found and fits else None
    beside = rows(residual, len(shape)) if same_sequences(x, residual) else None
    if not (found and fits and beside):
        raise ValueError(
            f"{type(module).__name__}: got a nested tensor with a residual, expected a nested "
            f"residual of the same sequences, each (…, {', '.join(map(str, shape))})"
        )
    out, z = module.forward(found[0], beside[0])
    return found[1](out), found[1](z)


class LayerNorm(torch.nn.LayerNorm):
    """Drop-in for `torch.nn.LayerNorm`: same constructor, parameters and state_dict.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in torch.
        dropout_p: probability of dropping an element of x while training.
        residual_dtype: of the residual that is returned; that of the one given by default.
    """

    dropout_p: float = 0.0
    residual_dtype: torch.dtype | None = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        dropout_p: float = 0.0,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        _check_options("LayerNorm", normalized_shape, dtype, dropout_p)
        shape: Any = normalized_shape
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)
        self.dropout_p, self.residual_dtype = dropout_p, residual_dtype

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of z; with a residual (norm, z)."""
        if isinstance(input, Proxy) and (call := recorded(self, input, residual)) is not None:
            return call
        if is_nested(input):
            found = _nested_norm(self, input, residual)
            return super().forward(input) if found is None else found
        return layer_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            residual=residual,
            dropout_p=self.dropout_p if self.training else 0.0,
            residual_dtype=None if residual is None else self.residual_dtype,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", dropout_p={self.dropout_p}" if self.dropout_p else "")


class RMSNorm(torch.nn.RMSNorm):
    """Drop-in for `torch.nn.RMSNorm`: same constructor, parameters and state_dict.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in torch; eps None is that of
            `torch.nn.functional.rms_norm`.
        weight_offset: added to the weight. With 1 (Gemma) weights start at 0, so that the module
            starts as the same function.
        dropout_p: probability of dropping an element of x while training.
        residual_dtype: of the residual that is returned; that of the one given by default.
    """

    weight_offset: float = 0.0
    dropout_p: float = 0.0
    residual_dtype: torch.dtype | None = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        weight_offset: float = 0.0,
        dropout_p: float = 0.0,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        _check_options("RMSNorm", normalized_shape, dtype, dropout_p)
        check_number("RMSNorm", "weight_offset", weight_offset)
        self.weight_offset = weight_offset  # first: torch's constructor calls reset_parameters
        shape: Any = normalized_shape
        super().__init__(shape, eps, elementwise_affine, device, dtype)
        self.dropout_p, self.residual_dtype = dropout_p, residual_dtype

    def reset_parameters(self) -> None:
        """Weights for which weight_offset + weight is 1."""
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of z; with a residual (norm, z)."""
        if isinstance(x, Proxy) and (call := recorded(self, x, residual)) is not None:
            return call
        if is_nested(x):
            found = _nested_norm(self, x, residual)
            return super().forward(x) if found is None else found
        return rms_norm(
            x,
            self.normalized_shape,
            self.weight,
            self.eps,
            residual=residual,
            weight_offset=self.weight_offset,
            dropout_p=self.dropout_p if self.training else 0.0,
            residual_dtype=None if residual is None else self.residual_dtype,
        )

    def extra_repr(self) -> str:
        text = super().extra_repr()
        text += f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return text + (f", dropout_p={self.dropout_p}" if self.dropout_p else "")
