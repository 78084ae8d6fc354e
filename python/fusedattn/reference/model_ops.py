"""The ops of the reference transformer, each of which is pluggable: in plain PyTorch, or fused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.cache import KVCache
from ..ops import attention as _attention
from ..ops import layer_norm as _layer_norm
from ..ops import rms_norm as _rms_norm
from ..ops import rotary as _rotary
from ..ops import sinusoidal as _sinusoidal
from . import functional


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, kv_lengths: Tensor | None = None
) -> Tensor:
    """softmax(q kᵀ / √D) v as plain PyTorch spells it, building the whole (Sq, Sk) matrix."""
    k, v = (functional.expand_heads(x, q.shape[1]) for x in (k, v))
    seen = functional.visible_keys(q, k, causal=causal, kv_lengths=kv_lengths)
    scores = functional.scores(q, k, q.shape[-1] ** -0.5, None, seen)
    return torch.matmul(torch.softmax(scores, dim=-1), v)


class PlainCache:
    """The keys and values of a batch so far: `KVCache` in plain PyTorch, of one length for all."""

    def __init__(self, batch: int, heads: int, head_dim: int, **_: Any) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **rotary: Tensor) -> Tensor:
        if rotary:
            first = 0 if self.k is None else self.k.shape[2]
            q, k = rotate_half(q, k, *(rotary[name][first:] for name in ("cos", "sin")))
        new = ((self.k, k), (self.v, v))
        k, v = (x if old is None else torch.cat((old, x), 2) for old, x in new)
        self.k, self.v = k, v
        return softmax_attention(q, k, v, causal=True)


def residual_norm(norm: Callable[..., Tensor]) -> Callable[..., Any]:
    """`norm(x, …)`, and given a residual (norm(x + residual, …), x + residual)."""

    def normed(x: Tensor, *args: Any, residual: Tensor | None = None) -> Any:
        if residual is None:
            return norm(x, *args)
        total = x + residual
        return norm(total, *args), total

    return normed


layer_norm = residual_norm(F.layer_norm)
rms_norm = residual_norm(F.rms_norm)


def add_sinusoidal(x: Tensor, *, base: float = 10000.0, scale: float = 1.0) -> Tensor:
    """x · scale plus sin(p / baseⁱ) in the even and cos(p / baseⁱ) in the odd features, i = 2j/W.

    x (B, S, W), W even; the phases are fp64 (Vaswani et al. 2017, §3.5).
    """
    length, width = x.shape[-2:]
    cos, sin = rotary_tables(length, width, base, device=x.device)
    return x * scale + torch.stack((sin, cos), -1).flatten(-2).to(x.dtype)


def rotary_tables(
    length: int, dim: int, base: float = 10000.0, device: Any = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of p / baseⁱ, i = 2j/dim: (length, dim / 2), fp32 from fp64 phases."""
    position = torch.arange(length, dtype=torch.float64, device=device)
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    phase = position[:, None] / base**exponent
    return phase.cos().float(), phase.sin().float()


def rotate_half(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions as models spell them: feature j pairs with j + D/2 (Su et al. 2021)."""
    cos, sin = (torch.cat((t, t), -1)[: q.shape[-2]].to(q.dtype) for t in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return rotate(q), rotate(k)


@dataclass(frozen=True)
class Ops:
    """The ops a model is built on; each has the signature of its plain version here or in torch.

    attention(q, k, v, *, causal, kv_lengths), layer_norm(x, shape, weight, bias, eps, *, residual),
    rms_norm(x, shape, weight, eps, *, residual), add_sinusoidal(x, *, scale),
    apply_rotary_qk(q, k, cos, sin), cache(batch, heads, head_dim, *, device, dtype).
    """

    attention: Callable[..., Any]
    layer_norm: Callable[..., Any] = layer_norm
    rms_norm: Callable[..., Any] = rms_norm
    add_sinusoidal: Callable[..., Tensor] = add_sinusoidal
    apply_rotary_qk: Callable[..., tuple[Tensor, Tensor]] = rotate_half
    cache: Callable[..., Any] = PlainCache

    @classmethod
    def plain(cls) -> Ops:
        """Everything in plain PyTorch."""
        return cls(attention=softmax_attention)

    @classmethod
    def fused(cls) -> Ops:
        """Everything that this library has a kernel for."""
        return cls(
            attention=_attention.attention,
            layer_norm=_layer_norm.layer_norm,
            rms_norm=_rms_norm.rms_norm,
            add_sinusoidal=_sinusoidal.add_sinusoidal,
            apply_rotary_qk=_rotary.apply_rotary_qk,
            cache=KVCache,
        )
