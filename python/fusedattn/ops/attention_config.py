"""Attention's options and the checks on its arguments, made once before anything is launched."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

CAUSAL = {False: 0, True: 2, "top_left": 1, "bottom_right": 2}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AttentionConfig(NamedTuple):
    """The options of one call, in the order of the library ops' schemas.

    causal: 0 none, 1 top-left, 2 bottom-right. window: keys seen to the left and to the right of
    the diagonal, −1 for unbounded. softcap: 0 for none. No backend takes window, softcap or dropout
    yet: they have their places here, in the schema and in the kernels' parameters. deterministic:
    no gradient is a sum in an order that changes from call to call.
    """

    causal: int
    scale: float
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    deterministic: bool = False

    @property
    def causal_name(self) -> bool | str:
        """The public spelling of `causal`."""
        return (False, "top_left", "bottom_right")[self.causal]

    @property
    def pending(self) -> str | None:
        """The first option in use that no kernel takes yet."""
        if self[2:6] == (-1, -1, 0.0, 0.0):
            return None
        windowed = self.window_left >= 0 or self.window_right >= 0
        return "window" if windowed else "softcap" if self.softcap else "dropout_p"


class AttentionCall(NamedTuple):
    """What a backend looks at to take or refuse a call."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    kv_lengths: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    config: AttentionConfig


@functools.lru_cache(maxsize=256)
def configure(
    head_dim: int,
    causal: bool | str,
    scale: float | None,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    dropout_p: float,
    deterministic: bool,
) -> AttentionConfig:
    """Check the options and fill in the defaults."""
    if causal not in CAUSAL:
        raise ValueError(
            f"attention: got causal={causal!r}, expected False, True, 'top_left' or 'bottom_right'"
        )
    if scale is None:
        scale = head_dim**-0.5
    elif not isinstance(scale, (int, float)):
        raise TypeError(f"attention: got scale of type {type(scale).__name__}, expected a float")
    left, right = window if window is not None else (None, None)
    for side in (left, right):
        if side is not None and side < 0:
            raise ValueError(f"attention: got window={window}, expected sides >= 0 or None")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: got softcap={softcap}, expected a float > 0 or None")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"attention: got dropout_p={dropout_p}, expected 0 <= dropout_p <= 1")
    return AttentionConfig(
        CAUSAL[causal],
        float(scale),
        -1 if left is None else left,
        -1 if right is None else right,
        softcap or 0.0,
        float(dropout_p),
        bool(deterministic),
    )


def validate(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check q, k and v against each other.

    Raises:
        TypeError: not tensors, not floating point, or of different dtypes.
        ValueError: wrong rank, shapes that do not fit together, or different devices.
    """
    try:
        batch, heads, _, head_dim = q.shape
        batch_k, heads_kv, seq_k, head_dim_k = k.shape
        batch_v, heads_v, seq_v, head_dim_v = v.shape
        fits = (
            q.dtype is k.dtype is v.dtype
            and q.dtype in DTYPES
            and q.device == k.device == v.device
            and batch == batch_k == batch_v
            and heads_v == heads_kv
            and seq_v == seq_k
            and head_dim == head_dim_k != 0 != head_dim_v
            and (heads == heads_kv or (heads_kv != 0 and heads % heads_kv == 0))
        )
    except (AttributeError, ValueError):
        fits = False
    if not fits:
        _explain_misfit(q, k, v)


def _explain_misfit(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise the error that says what does not fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"attention: got {name} of type {type(x).__name__}, expected a Tensor")
        if x.dim() != 4:
            raise ValueError(
                f"attention: got {name} of shape {tuple(x.shape)}, expected 4 dimensions "
                "(batch, heads, length, head_dim)"
            )
    dtype, device = q.dtype, q.device
    if dtype not in DTYPES:
        raise TypeError(
            f"attention: got q of dtype {dtype}, expected float16, bfloat16, float32 or float64"
        )
    if k.dtype != dtype or v.dtype != dtype:
        raise TypeError(
            f"attention: got q, k, v of dtypes {dtype}, {k.dtype}, {v.dtype}, expected one dtype"
        )
    if k.device != device or v.device != device:
        raise ValueError(
            f"attention: got q, k, v on devices {device}, {k.device}, {v.device}, "
            "expected one device"
        )
    batch, heads, _, head_dim = q.shape
    batch_k, heads_kv, seq_k, head_dim_k = k.shape
    batch_v, heads_v, seq_v, _ = v.shape
    if batch_k != batch or batch_v != batch:
        raise ValueError(
            f"attention: got batch sizes {batch}, {batch_k}, {batch_v} of q, k, v, expected one"
        )
    if heads_v != heads_kv or seq_v != seq_k:
        raise ValueError(
            f"attention: got v of shape {tuple(v.shape)}, expected the batch, heads and length of "
            f"k, {tuple(k.shape[:3])}"
        )
    if v.shape[3] == 0:
        raise ValueError(
            f"attention: got v of shape {tuple(v.shape)}, expected a head dim of at least 1"
        )
    if head_dim_k != head_dim or head_dim == 0:
        raise ValueError(
            f"attention: got head dims {head_dim} of q and {head_dim_k} of k, "
            "expected one head dim of at least 1"
        )
    if heads != heads_kv and (heads_kv == 0 or heads % heads_kv != 0):
        raise ValueError(
            f"attention: got {heads} query heads and {heads_kv} key heads, "
            "expected a multiple (grouped queries)"
        )


def broadcastable(name: str, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """`x` as a view of 4 dimensions, each 1 or that of the scores (B, Hq, Sq, Sk)."""
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if x.device != q.device:
        raise ValueError(
            f"attention: got {name} on {x.device}, expected the device of q, {q.device}"
        )
    fits = x.dim() <= 4 and all(
        have == 1 or have == want
        for have, want in zip(reversed(x.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(
            f"attention: got {name} of shape {tuple(x.shape)}, expected one that broadcasts to "
            f"(B, Hq, Sq, Sk) = {full}"
        )
    return x if x.dim() == 4 else x[(None,) * (4 - x.dim())]


def validate_extras(
    q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, kv_lengths: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Check mask, bias and kv_lengths; the first two come back with 4 dimensions."""
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(
                f"attention: got mask of type {got}, expected a bool tensor (True = may attend); "
                "a float mask is passed as bias"
            )
        mask = broadcastable("mask", mask, q, k)
    if bias is not None:
        allowed = (q.dtype,) if q.dtype == torch.float64 else (q.dtype, torch.float32)
        if not isinstance(bias, Tensor) or bias.dtype not in allowed:
            got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
            raise TypeError(
                f"attention: got bias of type {got}, expected a tensor of "
                f"{' or '.join(str(dtype) for dtype in dict.fromkeys(allowed))}"
            )
        bias = broadcastable("bias", bias, q, k)
    if kv_lengths is not None:
        if not isinstance(kv_lengths, Tensor) or kv_lengths.dtype not in (torch.int32, torch.int64):
            got = kv_lengths.dtype if isinstance(kv_lengths, Tensor) else type(kv_lengths).__name__
            raise TypeError(
                f"attention: got kv_lengths of type {got}, expected an int32 or int64 tensor"
            )
        if kv_lengths.shape != (q.shape[0],) or kv_lengths.device != q.device:
            raise ValueError(
                f"attention: got kv_lengths of shape {tuple(kv_lengths.shape)} on "
                f"{kv_lengths.device}, expected ({q.shape[0]},) on {q.device}"
            )
    return mask, bias, kv_lengths
