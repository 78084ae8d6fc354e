"""What the flash-attn package has beside attention: padding, rotary embedding and RMS norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.norm import RMSNorm as _RMSNorm
from ..ops.rms_norm import rms_norm as _rms_norm
from ..ops.rotary import apply_rotary
from ..reference.positions import apply_rotary as _formula

# --- padding -------------------------------------------------------------------------------------


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows of (N, …), differentiable."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, …) with `values` in these rows, 0 elsewhere; differentiable."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The rows of (B, S, …) that attention_mask (B, S) or unused_mask marks, one after the other.

    Returns:
        They (total, …), their indices in B · S, cu_seqlens (B + 1,) int32, the longest length, and
        how many of each sequence attention_mask marks (B,) int32.
    """
    marked = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = marked.sum(-1, dtype=torch.int32)
    used = attention_mask.sum(-1, dtype=torch.int32)
    indices = marked.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, cu_seqlens, int(lengths.max()), used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """(total, …) put back to (batch, seqlen, …), 0 where there was none."""
    rows = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rows.unflatten(0, (batch, seqlen))


BERT_PADDING = {
    f.__name__: f for f in (index_first_axis, index_put_first_axis, pad_input, unpad_input)
}

# --- rotary embedding ----------------------------------------------------------------------------


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate the first R features of x (B, S, H, D), or packed (total, H, D), by cos, sin (T, R/2).

    seqlen_offsets: an int or (B,), what is added to the positions of each sequence.
    """
    if inplace and _is_leaf(x):
        return _leaf_rotated(
            x, lambda y: apply_rotary_emb(
                y, cos, sin, interleaved, True, seqlen_offsets, cu_seqlens, max_seqlen
            ),
        )  # fmt: skip
    if cu_seqlens is None:
        positions, offset = None, seqlen_offsets
        if isinstance(seqlen_offsets, Tensor):
            steps = torch.arange(x.shape[1], device=x.device)
            positions, offset = seqlen_offsets.long()[:, None] + steps, 0
        heads_first = x.transpose(1, 2)
    else:
        row = torch.arange(x.shape[0], device=x.device)
        number = torch.bucketize(row, cu_seqlens[1:].long(), right=True)
        begin = F.pad(cu_seqlens[:-1].long(), (0, 1))  # of rows past the last one any
        positions = row - begin[number]
        if isinstance(seqlen_offsets, Tensor):
            positions = positions + F.pad(seqlen_offsets.long(), (0, 1))[number]
        else:
            positions = positions + seqlen_offsets
        positions = torch.where(number < cu_seqlens.shape[0] - 1, positions, 0)
        heads_first, offset = x.transpose(0, 1), 0
    out = apply_rotary(
        heads_first, cos, sin, interleaved=interleaved, positions=positions, offset=offset,
        inplace=inplace,
    )  # fmt: skip
    return x if inplace else out.transpose(-2, -3)


def _is_leaf(x: Tensor) -> bool:
    """Whether autograd forbids to write to x, or to what x is a view of."""
    root = x if x._base is None else x._base
    return torch.is_grad_enabled() and root.requires_grad and root.is_leaf


def _leaf_rotated(x: Tensor, rotate: Callable[[Tensor], Tensor]) -> Tensor:
    """What `rotate` makes of x; x has the same numbers then, and its gradient, as in flash-attn."""
    out = rotate(x.clone())
    x.data.copy_(out.detach())
    return out


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """`apply_rotary_emb` of x (B, S, H, D) as its formula, cos and sin (S, R/2) or (B, S, R/2)."""
    turned = _formula(x.transpose(1, 2), cos, sin, interleaved=interleaved)
    return turned.transpose(1, 2)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Queries and keys of qkv (B, S, 3, H, D) or (B, S, Hq + 2 Hkv, D) rotated in place."""
    if _is_leaf(qkv):
        return _leaf_rotated(
            qkv, lambda y: apply_rotary_emb_qkv_(
                y, cos, sin, cos_k, sin_k, interleaved, seqlen_offsets, num_heads_q
            ),
        )  # fmt: skip
    if qkv.dim() == 5:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    else:
        if num_heads_q is None:
            raise ValueError("apply_rotary_emb_qkv_: got qkv of 4 dimensions without num_heads_q")
        heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + heads_k]
    further: Any = {"interleaved": interleaved, "inplace": True, "seqlen_offsets": seqlen_offsets}
    apply_rotary_emb(q, cos, sin, **further)
    apply_rotary_emb(k, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, **further)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """The keys of kv (B, S, 2, H, D) rotated in place."""
    if _is_leaf(kv):
        return _leaf_rotated(
            kv, lambda y: apply_rotary_emb_kv_(y, cos, sin, interleaved, seqlen_offsets)
        )
    apply_rotary_emb(
        kv[:, :, 0], cos, sin, interleaved, inplace=True, seqlen_offsets=seqlen_offsets
    )
    return kv


class RotaryEmbedding(nn.Module):
    """flash_attn.layers.rotary.RotaryEmbedding: the rotary tables of a model, and their use.

    With a scale_base they are those of xPos (Sun et al. 2022). Phases are float64, whatever the
    module is cast to.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        pos_idx_in_fp32: bool = True,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved = dim, float(base), interleaved
        self.scale_base, self.pos_idx_in_fp32 = scale_base, pos_idx_in_fp32
        even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        scale = None if scale_base is None else (even + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("inv_freq", self.base ** (-even / dim), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _update_cos_sin_cache(self, seqlen: int, device: Any = None, dtype: Any = None) -> None:
        """Tables for so many positions, made anew where those that there are do not serve."""
        had: Any = self._cos_cached
        if (
            had is not None
            and seqlen <= self._seq_len_cached
            and (had.device, had.dtype) == (device, dtype)
            and not (self.training and had.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        place = torch.arange(seqlen, device=device, dtype=torch.float64)
        even = torch.arange(0, self.dim, 2, device=device, dtype=torch.float64)
        phase = torch.outer(place, self.base ** (-even / self.dim))
        tables = [phase.cos(), phase.sin()]
        if self.scale_base is not None:
            power = (place - seqlen // 2) / self.scale_base
            scale = ((even + 0.4 * self.dim) / (1.4 * self.dim)) ** power[:, None]
            of_keys = [(x / scale).to(dtype) for x in tables]
            self._cos_k_cached, self._sin_k_cached = of_keys
            tables = [x * scale for x in tables]
        self._cos_cached, self._sin_cached = (x.to(dtype) for x in tables)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """qkv (B, S, 3, H, D), or q (B, S, H, D) with kv (B, S, 2, Hkv, D), rotated in place.

        seqlen_offset: an int or (B,); with a tensor max_seqlen says how long the tables must be.
        """
        length = max_seqlen
        if length is None:
            if isinstance(seqlen_offset, Tensor):
                raise ValueError(
                    "RotaryEmbedding: got seqlen_offset as a tensor, expected max_seqlen"
                )
            length = qkv.shape[1] + seqlen_offset
        self._update_cos_sin_cache(length, qkv.device, qkv.dtype)
        cos: Any = self._cos_cached
        sin: Any = self._sin_cached
        apart = self.scale_base is not None
        cos_k: Any = self._cos_k_cached if apart else cos
        sin_k: Any = self._sin_k_cached if apart else sin
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )
        apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)
        return qkv, kv


ROTARY = {
    x.__name__: x
    for x in (
        RotaryEmbedding,
        apply_rotary_emb,
        apply_rotary_emb_kv_,
        apply_rotary_emb_qkv_,
        apply_rotary_emb_torch,
    )
} | {"apply_rotary_emb_func": apply_rotary_emb}

# --- RMS norm ------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm over the last dimension."""
    out: Any = _rms_norm(x, (x.shape[-1],), weight, epsilon)
    return out


class RMSNorm(_RMSNorm):
    """flash_attn.ops.rms_norm.RMSNorm(hidden_size, eps=1e-5, device=None, dtype=None)."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(hidden_size, eps, device=device, dtype=dtype)


RMS_NORM = {"RMSNorm": RMSNorm, "rms_norm": rms_norm}
