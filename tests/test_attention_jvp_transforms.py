"""Attention in forward mode under torch.func and on dual tensors, alone and nested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fusedattn
import pytest
import torch
from cases.attention_jvp import watched
from fusedattn.reference import functional as reference
from processes import in_a_new_process
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

F64 = torch.float64
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which library ops ran, and on how many batch entries."""
    return watched(monkeypatch)


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    out, lse = fusedattn.attention(
        q, k, v, bias=bias, causal=True, softcap=3.0, scale=0.7, return_lse=True
    )
    return out * lse[..., None].cos()


def formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    out, lse = reference.attention(q, k, v, bias=bias, causal=True, softcap=3.0, scale=0.7)
    return out * lse[..., None].cos()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(sum(shape)))


def composed(attend: Callable) -> Callable[[Tensor], Tensor]:
    """Of inputs that share a history, through a loss that is not linear."""
    return lambda x: attend(x.sin(), x.cos(), x * x, x @ x.mT).square()


def total(attend: Callable) -> Callable[[Tensor], Tensor]:
    return lambda x: composed(attend)(x).sum()


def derivative(function: Callable) -> Callable[[Tensor], Any]:
    return lambda x: jvp(function, (x,), (x.exp(),))


X, SAMPLES = random(1, 2, 4, 3), random(3, 2, 2, 4, 3)
NESTS: dict[str, tuple[Callable, Tensor, list[str]]] = {
    # what is made of an attention, of what, and the ops that run
    "jvp": (lambda f: derivative(composed(f)), X, ["jvp"]),
    "jacfwd": (lambda f: jacfwd(composed(f)), X, ["jvp"]),
    "vmap of jvp": (lambda f: vmap(derivative(composed(f))), SAMPLES, ["jvp"]),
    "jvp of vmap": (lambda f: derivative(vmap(composed(f))), SAMPLES, ["jvp"]),
    "hessian": (lambda f: hessian(total(f)), X, ["fwd", "jvp", "bwd"]),
    "jvp of grad": (lambda f: derivative(grad(total(f))), X, ["fwd", "jvp", "bwd"]),
    "grad of jvp": (lambda f: grad(lambda x: derivative(total(f))(x)[1]), X, ["jvp"]),
    "jacrev of jacfwd": (lambda f: jacrev(jacfwd(total(f))), X, ["jvp"]),
    "jacfwd of jacfwd": (lambda f: jacfwd(jacfwd(total(f))), X, ["jvp"]),
    "jvp thrice": (lambda f: derivative(derivative(derivative(total(f)))), X, ["jvp"]),
}


@pytest.mark.parametrize("nest", NESTS)
def test_transforms(nest: str, ran: list) -> None:
    transform, x, ops = NESTS[nest]
    torch.testing.assert_close(transform(fused)(x), transform(formula)(x), **CLOSE)
    assert [name.removeprefix("attention_") for name, _ in ran] == [
        {"fwd": "attention"}.get(name, name) for name in ops
    ]


@pytest.mark.parametrize("recorded", [False, True])
def test_dual_tensors(recorded: bool, ran: list) -> None:
    """Their derivatives, those of a gradient too, and the gradients of a derivative."""
    found = []
    for attend in (fused, formula):
        x, t = (random(2, 2, 4, n)[..., :3].clone().requires_grad_(recorded) for n in (3, 5))
        with forward_ad.dual_level():
            y = composed(attend)(forward_ad.make_dual(x, t))
            every = list(forward_ad.unpack_dual(y))
            if recorded:
                loss = every[1].sum() + every[0].cos().sum()
                every += torch.autograd.grad(loss, (x, t), create_graph=True)
                (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
                every += forward_ad.unpack_dual(dx)
            found.append([y.detach() for y in every])
    torch.testing.assert_close(*found, **CLOSE)
    assert ("attention_jvp", 2) in ran
    assert (("attention", 2) in ran) == recorded


@pytest.mark.parametrize("name", ["alibi_slopes", "sinks", "table", "scale"])
@pytest.mark.parametrize("dual", [False, True], ids=["func", "dual"])
def test_other_tangents_are_the_formulas(name: str, dual: bool) -> None:
    q = random(1, 2, 5, 4)
    x = random(2) if name != "table" else random(5, 2)

    def attend(x: Tensor, q: Tensor) -> Tensor:
        given = {name: x} if name != "table" else {"bias": fusedattn.biases.relative(x)}
        return fusedattn.attention(q, q.sin(), q, causal=True, **given)

    leaf = x.clone().requires_grad_()
    want = torch.autograd.functional.jvp(lambda x, q: attend(x, q), (leaf, q), (x.cos(), q.cos()))
    if dual:
        with forward_ad.dual_level():
            given = (forward_ad.make_dual(y, y.cos()) for y in (x, q))
            found = tuple(forward_ad.unpack_dual(attend(*given)))
    else:
        found = jvp(attend, (x, q), (x.cos(), q.cos()))
    torch.testing.assert_close(found, want, **CLOSE)


def test_a_backend_without_forward_mode_leaves_it_to_the_next(ran: list) -> None:
    pytest.importorskip("fusedattn._cuda_emulated")
    q = random(1, 2, 16, 8).half()
    found = jvp(lambda q: fusedattn.attention(q, q, q, backend="cuda_emulated"), (q,), (q.cos(),))
    want = jvp(lambda q: fusedattn.attention(q, q, q), (q,), (q.cos(),))
    torch.testing.assert_close(found, want)
    assert [name for name, _ in ran] == ["attention_jvp"] * 2


def test_tangents_of_any_strides(backend: str) -> None:
    q, k, v = (random(2, 2, n, 8) for n in (30, 40, 40))
    t = random(2, 2, 8, 30).mT, random(1, 1, 1, 8).expand_as(k), random(2, 40, 2, 8).transpose(1, 2)

    def attend(*x: Tensor) -> Tensor:
        return fusedattn.attention(*x, backend=backend)

    found = jvp(attend, (q, k, v), t)
    want = jvp(attend, (q, k, v), tuple(x.contiguous() for x in t))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-14)


def test_no_buffer_grows_with_the_square_of_the_length(fast_backend: str) -> None:
    """At 4096 keys one matrix of scores would be 64 MiB; the process may grow by 24 MiB."""
    if fast_backend == "reference":
        pytest.skip("the reference keeps the whole matrix")
    code = (
        "import resource, torch, fusedattn\n"
        "def run(seq):\n"
        "    x = tuple(torch.randn(1, 1, seq, 64) for _ in 'qkv')\n"
        "    attend = lambda q, k, v: fusedattn.attention(q, k, v, causal=True, return_lse=True)\n"
        "    torch.func.jvp(attend, x, tuple(y.cos() for y in x))\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = run(512)\n"
        "print(run(4096) - before)"
    )
    assert int(in_a_new_process(code)) < 24 * 1024
