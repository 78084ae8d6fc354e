"""Layer norm, as a public function; the maths and the op are in norm.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from ._library import hand_over, has_override, is_overridden
from .norm import normalise

if TYPE_CHECKING:
    from ._typing import NormOptions, Unpack


@overload
def layer_norm(
    x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, *, residual: None = None,
    **options: Unpack[NormOptions],
) -> Tensor: ...  # fmt: skip
@overload
def layer_norm(
    x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor,
    **options: Unpack[NormOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def layer_norm(
    x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor | None,
    **options: Unpack[NormOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """(z − mean) / √(variance + eps) · weight + bias with z = dropout(x) + residual, in one pass.

    Differentiable to any order. Means and variances are taken over the last dimensions, in float32
    (float64 for float64 inputs), from z itself in two passes. Every pair of dtypes is taken as it
    is, so autocast changes nothing: a bfloat16 x may meet float32 weights and a float32 residual.

    Args:
        x: (…, *normalized_shape), float16, bfloat16, float32 or float64, any strides. A copy is
            made only where rows are not contiguous.
        normalized_shape: the sizes of the last dimensions of x; an int for one dimension.
        weight, bias: of `normalized_shape`, any dtype; either may be missing.
        eps: added to the variance.
        residual: of the shape of x, any dtype; added to x before the statistics.
        dropout_p: probability with which an element of x is dropped; the rest is divided by
            1 − dropout_p. The mask depends on the seed alone and is the same on every backend.
        seed: an int, or a tensor with one integer; None draws from torch's generator.
        residual_dtype: of the residual that is returned; that of `residual` by default.
        backend: "auto", or the name of the one that must serve the call.

    Returns:
        out in the shape and dtype of x; with a residual (out, residual_out), where residual_out is
        z: what was normalised, rounded to its own dtype. The cpu backend normalises float32 rows
        without overflow as long as x − mean is finite; the others square in float32, which takes
        rows up to some 1e19.

    Raises:
        TypeError, ValueError: the arguments do not fit together; nothing has been launched.
        UnsupportedError: no backend (or not the one named) takes the call; lists every reason.
    """
    if has_override(x, weight, bias, residual) and is_overridden(locals()):
        return hand_over(layer_norm, locals())
    options = (True, eps, 0.0, dropout_p)
    return normalise(
        x, normalized_shape, weight, bias, residual, seed, residual_dtype, options, backend
    )
