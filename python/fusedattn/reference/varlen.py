"""The oracle of packed sequences: attention over all rows, which see those of their own sequence.

q (1, Hq, total_q, D), k (1, Hkv, total_k, D), v (1, Hkv, total_k, Dv); cu_seqlens_q, cu_seqlens_k
(N + 1,): rows cu_seqlens[b] … cu_seqlens[b + 1] − 1 are sequence b. What stands in rows past the
last offset counts for nothing. All scores of all rows are stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional, rules


class Packing(NamedTuple):
    """Which sequence rows belong to, the number N of them where to none, and their place in it."""

    sequences: int
    number_q: Tensor  # (total_q,)
    number_k: Tensor
    local_q: Tensor  # (total_q,)
    local_k: Tensor
    diagonal: Tensor  # (total_q, 1): how far "bottom_right" is to the right of "top_left"

    @property
    def step(self) -> Tensor:
        """(total_q, total_k): keys to the right of the "bottom_right" diagonal."""
        return self.local_k[None, :] - self.local_q[:, None] - self.diagonal

    def places(self) -> functional.Places:
        """For the dropout of each sequence as that of a batch entry."""
        return functional.Places(self.number_q[:, None], self.local_q[:, None], self.local_k)

    @classmethod
    def of(cls, q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Packing:
        """That of tensors (…, total, D)."""
        cu_q, cu_k = cu_seqlens_q.long(), cu_seqlens_k.long()
        rows_q, rows_k = (torch.arange(x.shape[-2], device=x.device) for x in (q, k))
        # A row is past the end of all sequences before its own.
        number_q, number_k = (
            (rows[:, None] >= cu[1:]).sum(-1) for rows, cu in ((rows_q, cu_q), (rows_k, cu_k))
        )
        offset = torch.cat([cu_k.diff() - cu_q.diff(), cu_q.new_zeros(1)])
        diagonal = offset[number_q][:, None]
        local_q, local_k = rows_q - cu_q[number_q], rows_k - cu_k[number_k]
        return cls(cu_q.shape[0] - 1, number_q, number_k, local_q, local_k, diagonal)

    def seen(
        self,
        causal: bool | str,
        window: tuple[int | None, int | None] | None,
        prefix_lengths: Tensor | None,
    ) -> Tensor:
        """`functional.visible_keys` of each sequence, (total_q, total_k)."""
        seen = (self.number_q[:, None] == self.number_k) & (self.number_k < self.sequences)
        step = self.step + self.diagonal if causal == "top_left" else self.step
        left, right = (None, None) if window is None else window
        if causal:
            seen = seen & (step <= 0)
        if left is not None:
            seen = seen & (step >= -left)
        if right is not None:
            seen = seen & (step <= right)
        if prefix_lengths is not None and self.sequences > 0:
            lengths = prefix_lengths[self.number_q.clamp(max=self.sequences - 1)]
            seen = seen & ((self.local_k < lengths[:, None]) | (self.step <= 0))
        return seen

    def present(self, x: Any, number: Tensor) -> Any:
        """x (1, H, total, D) with zeros in rows of no sequence, so that none of them leaks."""
        if x is None:
            return None
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        return torch.where((number < self.sequences)[:, None], x, zero)

    def alibi(self, slopes: Tensor | None, q: Tensor) -> Tensor | None:
        """−slope · distance, (1, Hq, total_q, total_k), of slopes (N or 1, Hq, 1, 1)."""
        if slopes is None or self.sequences == 0:
            return None
        if slopes.shape[0] != 1:
            slopes = slopes[self.number_q.clamp(max=self.sequences - 1)].transpose(0, 2)
        return -slopes.to(q.dtype) * self.step.abs().to(q.dtype)

    def bias(
        self, slopes: Tensor | None, distance_bias: Tensor | None, q: Tensor, total_k: int
    ) -> Tensor | None:
        """What is added to the scores: `alibi`, and `rules.distance_bias` of each sequence."""
        found = self.alibi(slopes, q)
        if distance_bias is None:
            return found
        of_distances = rules.distance_bias(distance_bias, self.step, total_k - 1)
        return of_distances if found is None else found + of_distances

    def slopes_gradient(self, ds: Tensor, slopes: Tensor) -> Tensor:
        """That of `alibi`, from the gradient of the scores."""
        rows = -(ds * self.step.abs().to(ds.dtype)).sum(-1)
        if slopes.shape[0] != 1:
            each = torch.arange(self.sequences, device=ds.device)[:, None, None]
            rows = torch.where(self.number_q == each, rows, torch.zeros_like(rows))
        return rows.sum(-1)[..., None, None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`functional.attention` of each sequence by itself; rows of none get out 0 and lse −inf."""
    packing = Packing.of(q, k, cu_seqlens_q, cu_seqlens_k)
    q = packing.present(q, packing.number_q)
    k, v = (packing.present(x, packing.number_k) for x in (k, v))
    return functional.attention(
        q, k, v, mask=packing.seen(causal, window, prefix_lengths),
        bias=packing.bias(alibi_slopes, distance_bias, q, k.shape[2]), places=packing.places(),
        **options,
    )  # fmt: skip


def attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `attention` as a formula: (dq, dk, dv, dslopes, dsinks, ddistance_bias).

    With sinks, dsinks (1, Hq, total_q, 1) is not yet summed.
    """
    packing = Packing.of(q, k, cu_seqlens_q, cu_seqlens_k)
    dout, q = (packing.present(x, packing.number_q) for x in (dout, q))
    k, v = (packing.present(x, packing.number_k) for x in (k, v))
    dq, dk, dv, ds, dsinks = functional.attention_backward(
        dout, dlse, q, k, v, mask=packing.seen(causal, window, prefix_lengths),
        bias=packing.bias(alibi_slopes, distance_bias, q, k.shape[2]), places=packing.places(),
        **options,
    )  # fmt: skip
    slopes = None if alibi_slopes is None else packing.slopes_gradient(ds, alibi_slopes)
    distances = None
    if distance_bias is not None:
        distances = rules.distance_bias_gradient(ds, distance_bias, packing.step, k.shape[2] - 1)
    return dq, dk, dv, slopes, dsinks, distances


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`functional.attention_jvp` of each sequence by itself."""
    packing = Packing.of(q, k, cu_seqlens_q, cu_seqlens_k)
    q, t_q = (packing.present(x, packing.number_q) for x in (q, t_q))
    k, v, t_k, t_v = (packing.present(x, packing.number_k) for x in (k, v, t_k, t_v))
    return functional.attention_jvp(
        q, k, v, t_q, t_k, t_v, None, mask=packing.seen(causal, window, prefix_lengths),
        bias=packing.bias(alibi_slopes, distance_bias, q, k.shape[2]), places=packing.places(),
        **options,
    )  # fmt: skip
