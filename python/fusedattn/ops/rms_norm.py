"""RMS norm, as a public function; the maths and the op are in norm.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from ._library import hand_over, has_override, is_overridden
from .norm import normalise

if TYPE_CHECKING:
    from ._typing import RMSNormOptions, Unpack

_EPS32, _EPS64 = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))


@overload
def rms_norm(
    x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None,
    eps: float | None = None, *, residual: None = None, **options: Unpack[RMSNormOptions],
) -> Tensor: ...  # fmt: skip
@overload
def rms_norm(
    x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None,
    eps: float | None = None, *, residual: Tensor, **options: Unpack[RMSNormOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def rms_norm(
    x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None,
    eps: float | None = None, *, residual: Tensor | None, **options: Unpack[RMSNormOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """z / √(mean(z²) + eps) · (weight_offset + weight) with z = dropout(x) + residual, in one pass.

    Differentiable to any order. The mean of the squares is taken over the last dimensions, in
    float32 (float64 for float64 inputs). Every pair of dtypes is taken as it is, so autocast
    changes nothing: a bfloat16 x may meet float32 weights and a float32 residual.

    Args:
        x: (…, *normalized_shape), float16, bfloat16, float32 or float64, any strides. A copy is
            made only where rows are not contiguous.
        normalized_shape: the sizes of the last dimensions of x; an int for one dimension.
        weight: of `normalized_shape`, any dtype; may be missing.
        eps: added to the mean of the squares; by default the one that `F.rms_norm` takes,
            torch.finfo(torch.float32).eps, for float64 that of float64.
        residual: of the shape of x, any dtype; added to x before the statistics.
        weight_offset: added to the weight, in float32; 1 for weights that are stored as their
            distance from 1 (Gemma). Without a weight it has no effect.
        dropout_p: probability with which an element of x is dropped; the rest is divided by
            1 − dropout_p. The mask depends on the seed alone and is the same on every backend.
        seed: an int, or a tensor with one integer; None draws from torch's generator.
        residual_dtype: of the residual that is returned; that of `residual` by default.
        backend: "auto", or the name of the one that must serve the call.

    Returns:
        out in the shape and dtype of x; with a residual (out, residual_out), where residual_out is
        z: what was normalised, rounded to its own dtype.

    Raises:
        TypeError, ValueError: the arguments do not fit together; nothing has been launched.
        UnsupportedError: no backend (or not the one named) takes the call; lists every reason.
    """
    if has_override(x, weight, residual) and is_overridden(locals()):
        return hand_over(rms_norm, locals())
    if eps is None:
        eps = _EPS64 if isinstance(x, Tensor) and x.dtype is torch.float64 else _EPS32
    options = (False, eps, weight_offset, dropout_p)
    return normalise(
        x, normalized_shape, weight, None, residual, seed, residual_dtype, options, backend
    )
