"""Dense masks: what they hide costs nothing, and what they show is right wherever it begins."""

from __future__ import annotations

from typing import Any

import fusedattn
import pytest
import torch
from cases.attention import AttentionCase, check_attention
from compare import device_for
from fusedattn import masks
from torch import Tensor

pytestmark = [
    pytest.mark.backends("cpu", "triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


def documents(seq: int, *ends: int) -> Tensor:
    ids = torch.zeros(seq, dtype=torch.int)
    for end in ends:
        ids[end:] += 1
    return ids[:, None] == ids


def with_holes(seq_q: int, seq_k: int, size: int) -> Tensor:
    """Squares that are empty, full and mixed, by turns; and rows that see nothing."""
    i, j = torch.arange(seq_q)[:, None], torch.arange(seq_k)
    kind = (i // size + j // size) % 3
    return ((kind == 1) | ((kind == 2) & ((i + j) % 5 > 2))) & (i % 31 != 7)


def triangle(seq_q: int, seq_k: int) -> Tensor:
    return torch.ones(seq_q, seq_k, dtype=torch.bool).tril(seq_k - seq_q)


# Cells are 32 queries by 64 keys on a CPU; interpreted tiles 32 by 16.
MASKS = {
    "causal, tails": triangle(301, 389),
    "window": triangle(301, 301) & ~triangle(301, 301).tril(-70),
    "documents": documents(290, 20, 65, 200),
    "causal documents": documents(290, 20, 65, 200) & triangle(290, 290),
    "holes": with_holes(270, 470, 64),
    "holes off the cells": with_holes(270, 470, 71),
    "padding": (torch.arange(260) < torch.tensor([260, 130])[:, None])[:, None, None],
    "padding of queries": (torch.arange(260) < 130)[:, None].expand(260, 140),
    "one row of many": triangle(300, 300) & (torch.arange(300) == 190)[:, None],
    "of a batch entry and head": torch.stack(
        [
            triangle(140, 200),
            with_holes(140, 200, 64),
            ~triangle(140, 200),
            triangle(140, 200) & False,
        ]
    ).unflatten(0, (2, 2)),
}

INTERPRETED = ("window", "causal documents", "holes off the cells", "of a batch entry and head")


@pytest.mark.parametrize("name", MASKS)
def test_masks_with_a_shape(name: str, backend: str) -> None:
    mask = MASKS[name]
    if backend == "triton":
        if name not in INTERPRETED:
            pytest.skip("too slow when interpreted")
        mask = mask[..., :75, :60]
    seq_q, seq_k = mask.shape[-2:]
    case = AttentionCase(
        batch=mask.shape[0] if mask.dim() == 4 else 1, kv_heads=1, dim=16,
        seq_q=260 if seq_q == 1 else seq_q, seq_k=seq_k, grads=("out", "lse"),
    )  # fmt: skip
    check_attention(case, backend, case.inputs() | {"mask": mask})


@pytest.mark.backends("cpu")
def test_mask_with_bias_window_and_lengths(backend: str) -> None:
    case = AttentionCase(
        dim=16, seq_q=200, seq_k=230, bias=(1, 2, 200, 230), window=(90, 100), softcap=2.0,
        kv_lengths=(230, 150), dtype=torch.bfloat16,
    )  # fmt: skip
    check_attention(case, backend, case.inputs() | {"mask": with_holes(200, 230, 64)})


@pytest.mark.backends("cpu")
def test_strided_mask(backend: str) -> None:
    case = AttentionCase(dim=16, seq_q=130, seq_k=130)
    mask = torch.ones(130, 260, dtype=torch.bool)
    mask[:, ::2] = triangle(130, 130).T
    check_attention(case, backend, case.inputs() | {"mask": mask[:, ::2].T})


def test_tiles_without_a_visible_key_are_not_read(backend: str) -> None:
    """0 · NaN would show that they were."""
    device, half = device_for(backend), 768 if backend == "cpu" else 64
    q, k, v = (torch.randn(1, 1, 2 * half, 16, device=device) for _ in range(3))
    k[:, :, half:], v[:, :, half:] = float("nan"), float("nan")
    q[:, :, half:] = float("nan")
    for x in (q, k, v):
        x.requires_grad_()
    mask = documents(2 * half, half).to(device)
    out = fusedattn.attention(q, k, v, mask=mask, backend=backend)
    grads = torch.autograd.grad(out[:, :, :half].sum(), (q, k, v))
    for x in (out, *grads):
        assert x[:, :, :half].isfinite().all()


@pytest.mark.backends("cpu", "triton")
@pytest.mark.parametrize("kind", ["dense", "blocks"])
def test_holes_are_not_read(backend: str, kind: str) -> None:
    """Between keys that are seen some that nobody sees, and queries that see none."""
    device, third = device_for(backend), 768 if backend == "cpu" else 64
    seen = torch.tensor([[True, False, True], [False] * 3, [True, False, True]])
    dense = seen.repeat_interleave(third, 0).repeat_interleave(third, 1)
    dense[3, 5] = False
    inputs = [torch.randn(1, 1, 3 * third, 16, device=device) for _ in range(3)]
    for x in inputs:
        x[:, :, third : 2 * third] = float("nan")
        x.requires_grad_()
    mask = dense.to(device) if kind == "dense" else masks.blocks(seen.to(device), third)
    shown = torch.cat([torch.arange(third), torch.arange(2 * third, 3 * third)]).to(device)

    def found(backend: str, mask: Any, *inputs: Tensor) -> list[Tensor]:
        out = fusedattn.attention(*inputs, mask=mask, causal=True, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    rest = dense.to(device)[shown][:, shown] if kind == "dense" else None
    expected = found("reference", rest, *(x[:, :, shown] for x in inputs))
    for x, y in zip(found(backend, mask, *inputs), expected, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x[:, :, shown], y)


def test_pairs_past_a_packed_prefix_are_not_read(backend: str) -> None:
    """By the queries that come before those keys."""
    device, unit = device_for(backend), 768 if backend == "cpu" else 16
    offsets = torch.tensor([0, 4 * unit], dtype=torch.int32, device=device)
    mask = masks.prefix(torch.tensor([unit + 4], device=device))

    def found(hidden: slice, rows: slice) -> list[Tensor]:
        inputs = [torch.randn(4 * unit, 1, 16, device=device) for _ in range(3)]
        for x in inputs[hidden]:
            x[rows] = float("nan")
        for x in inputs:
            x.requires_grad_()
        packed = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "mask": mask}
        out = fusedattn.attention_varlen(*inputs, **packed, backend=backend)
        return [out, *torch.autograd.grad(out.sum(), inputs)]

    out, dq, *_ = found(slice(1, 3), slice(3 * unit, None))
    *_, dk, dv = found(slice(1), slice(2 * unit))
    for x in (out[: 2 * unit], dq[: 2 * unit], dk[3 * unit :], dv[3 * unit :]):
        assert x.isfinite().all()


@pytest.mark.backends("cpu")
def test_of_a_cache_only_what_one_query_may_see_is_read(backend: str) -> None:
    """As in a static cache, padded on the left; a task has 256 keys here."""
    q, k, v = torch.randn(2, 4, 1, 16), *torch.randn(2, 2, 2, 2048, 16)
    seen = ((600, 1100), (0, 100))
    mask = torch.zeros(2, 1, 1, 2048, dtype=torch.bool)
    for b, (first, end) in enumerate(seen):
        mask[b, ..., first:end] = True
        for x in (k, v):
            x[b, :, : first // 256 * 256] = x[b, :, -(-end // 256) * 256 :] = float("nan")
    out = fusedattn.attention(q, k, v, mask=mask, backend=backend)
    for b, (first, end) in enumerate(seen):
        alone = (x[b : b + 1, :, first:end] for x in (k, v))
        want = fusedattn.attention(q[b : b + 1], *alone, backend=backend)
        torch.testing.assert_close(out[b : b + 1], want)
    case = AttentionCase(batch=2, heads=4, kv_heads=2, dim=16, seq_q=1, seq_k=2048)
    check_attention(case, backend, case.inputs() | {"mask": mask})
