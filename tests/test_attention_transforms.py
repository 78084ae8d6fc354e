"""Attention under torch.func: the kernels serve grad and vmap, and all of them compose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fusedattn
import pytest
import torch
from fusedattn import biases, masks
from fusedattn.ops.attention import op
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vjp

SAMPLES, BATCH, HEADS, SEQ, DIM = 3, 2, 2, 7, 4
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which kernels ran, and on how many batch entries."""
    found: list[tuple[str, int]] = []

    def watch(each: Any, name: str) -> None:
        run = each.library._run
        monkeypatch.setattr(
            each.library, "_run",
            lambda call, kernels: found.append((name, call.q.shape[0])) or run(call, kernels),
        )  # fmt: skip

    watch(op, "forward")
    watch(op.backward, "backward")
    return found


def given() -> dict[str, Tensor]:
    return {
        "q": random(SAMPLES, BATCH, HEADS, SEQ, DIM), "k": random(SAMPLES, BATCH, 1, SEQ, DIM),
        "v": random(SAMPLES, BATCH, 1, SEQ, 3), "bias": random(SAMPLES, 1, HEADS, SEQ, SEQ),
        "alibi_slopes": random(SAMPLES, HEADS), "table": random(SAMPLES, 9, HEADS),
        "ids": torch.arange(SAMPLES * SEQ).view(SAMPLES, 1, SEQ) // 4,
    }  # fmt: skip


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, slopes: Tensor, ids: Tensor) -> Tensor:
    return fusedattn.attention(
        q, k, v, bias=bias, alibi_slopes=slopes, mask=masks.documents(ids), causal=True, scale=0.7
    )


def with_table(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return fusedattn.attention(q, k, v, bias=biases.relative(table), softcap=2.0)


DIMS = {
    "all": (0, 0, 0, 0, 0, 0),
    "values and slopes": (None, None, 0, None, 0, None),
    "keys, bias for all": (None, 0, None, None, None, 0),
    "bias": (None, None, None, 0, None, None),
}


@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
def test_gradients_of_each_sample_run_the_kernels_once(
    dims: tuple[int | None, ...], calls: list
) -> None:
    """What is shared by samples, or in a sample by the batch, has a gradient of each sample."""
    names = ("q", "k", "v", "bias", "alibi_slopes", "ids")
    made = given()
    x = [made[n] if d == 0 else made[n][0] for n, d in zip(names, dims, strict=True)]

    def loss(*x: Tensor) -> Tensor:
        return attend(*x).square().sum()

    found = torch.vmap(grad(loss, argnums=tuple(range(5))), dims)(*x)
    assert calls == [("forward", SAMPLES * BATCH), ("backward", SAMPLES * BATCH)]
    for sample in range(SAMPLES):
        own = [y[sample] if d == 0 else y for y, d in zip(x, dims, strict=True)]
        leaves = [y.clone().requires_grad_(y.is_floating_point()) for y in own]
        want = torch.autograd.grad(loss(*leaves), leaves[:5])
        for each, other in zip(found, want, strict=True):
            torch.testing.assert_close(each[sample], other, **CLOSE)


def test_a_table_of_each_sample(calls: list) -> None:
    made = given()
    x = [made[name] for name in ("q", "k", "v", "table")]

    def loss(*x: Tensor) -> Tensor:
        return with_table(*x).square().sum()

    found = torch.vmap(grad(loss, argnums=3))(*x)
    assert [name for name, _ in calls] == ["forward", "backward"]
    want = torch.stack([grad(loss, argnums=3)(*(y[i] for y in x)) for i in range(SAMPLES)])
    torch.testing.assert_close(found, want, **CLOSE)


def test_jacrev_maps_the_backward_over_the_batch(calls: list) -> None:
    x = random(1, 1, 3, DIM)

    def function(x: Tensor) -> Tensor:
        return fusedattn.attention(x, x.sin(), x.cos(), causal=True)

    found = jacrev(function)(x)
    assert calls == [("forward", 1), ("backward", x.numel())]
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(function, x), **CLOSE)


def plain(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(function(leaf), leaf, create_graph=True)[0]

    return gradient


def test_transforms_nest() -> None:
    """grad of grad, hessian, vmap of hessian, jvp of grad, vjp of vmap; inputs share a history."""
    samples = random(SAMPLES, 1, 2, 3, DIM)
    sinks = random(2)

    def loss(x: Tensor) -> Tensor:
        out = fusedattn.attention(x, x.sin(), x.cos(), causal=True, sinks=sinks + x.mean())
        return out.square().sum()

    x = samples[0]
    torch.testing.assert_close(grad(loss)(x), plain(loss)(x), **CLOSE)
    twice = plain(lambda x: plain(loss)(x).square().sum())(x)
    torch.testing.assert_close(grad(lambda x: grad(loss)(x).square().sum())(x), twice, **CLOSE)
    want = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(hessian(loss)(x), want, **CLOSE)
    torch.testing.assert_close(torch.vmap(hessian(loss))(samples)[0], want, **CLOSE)
    tangent = random(*x.shape).cos()
    _, along = jvp(grad(loss), (x,), (tangent,))
    want = torch.einsum("...bhij,bhij->...", want, tangent)
    torch.testing.assert_close(along, want, **CLOSE)
    _, back = vjp(torch.vmap(loss), samples)
    torch.testing.assert_close(back(torch.ones(SAMPLES).double())[0][1], plain(loss)(samples[1]))


def test_what_cannot_be_folded_is_the_formula(calls: list) -> None:
    """Gradients of sinks, dropout and packed sequences."""
    made = given()
    q = made["q"]
    sinks = random(HEADS)

    def of_sinks(sinks: Tensor, q: Tensor) -> Tensor:
        return fusedattn.attention(q, q, q, sinks=sinks).square().sum()

    found = torch.vmap(grad(of_sinks), (None, 0))(sinks, q)
    want = torch.stack([grad(of_sinks)(sinks, each) for each in q])
    torch.testing.assert_close(found, want, **CLOSE)
    calls.clear()
    dropped = torch.vmap(lambda q: fusedattn.attention(q, q, q, dropout_p=0.5, seed=3))(q)
    assert calls == []
    alone = fusedattn.attention(q[1], q[1], q[1], dropout_p=0.5, seed=3)
    torch.testing.assert_close(dropped[1], alone, **CLOSE)
    offsets = torch.tensor([0, 3, SEQ])
    rows = random(SAMPLES, SEQ, HEADS, DIM)

    def packed(x: Tensor) -> Tensor:
        return fusedattn.attention_varlen(x, x, x, cu_seqlens_q=offsets, cu_seqlens_k=offsets)

    want = torch.stack([packed(each) for each in rows])
    torch.testing.assert_close(torch.vmap(packed)(rows), want, **CLOSE)


def test_half_precision_keeps_its_dtypes() -> None:
    q = random(SAMPLES, BATCH, HEADS, SEQ, DIM).bfloat16()

    def loss(q: Tensor) -> Tensor:
        out, lse = fusedattn.attention(q, q, q, return_lse=True)
        assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
        return out.float().square().sum() + lse.sum()

    found = torch.vmap(grad(loss))(q)
    leaf = q.clone().requires_grad_()
    loss(leaf.flatten(0, 1)).backward()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, leaf.grad)
