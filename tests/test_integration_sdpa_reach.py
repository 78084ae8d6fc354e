"""How far the switch of SDPA reaches: compiled code, programs, TorchScript, torch.nn, autocast."""

from __future__ import annotations

from typing import Any

import fusedattn
import pytest
import torch
import torch.nn.functional as F
from test_integration_sdpa import calls, off  # noqa: F401
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as imported

sdpa = fusedattn.integrations.sdpa


def by_name(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)


def by_import(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return imported(q, k, v, mask, is_causal=mask is None)


def results(function: Any, *given: Tensor) -> list[Tensor]:
    """The output, and the gradients of what is a float."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in given]
    out = function(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted)]


@pytest.mark.parametrize("function", [by_name, by_import])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_compiled(function: Any, mask: str, calls: list[int]) -> None:  # noqa: F811
    given = list(torch.randn(3, 2, 3, 17, 16))
    if mask == "bool":
        given.append(torch.rand(17, 17) < 0.7)
    if mask == "float":  # flash has no gradient for it: what is compiled is torch's formula
        given.append(torch.randn(2, 3, 17, 17))
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    want = results(function, *given)
    for on in (False, True, False):
        calls.clear()
        with sdpa() if on else torch.enable_grad():
            got = results(compiled, *given)
        assert bool(calls) == (on and not (mask == "float" and function is by_import))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_compiles_anew_after_it_was_on() -> None:
    """Tracing remembers which kernels an op has."""
    given = torch.randn(3, 2, 3, 17, 16)
    want = results(by_import, *given)
    for on in (True, False):
        torch._dynamo.reset()
        compiled = torch.compile(by_import, fullgraph=True, backend="aot_eager")
        with sdpa() if on else torch.enable_grad():
            got = results(compiled, *given)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_lays_out_results_as_aten_does(calls: list[int]) -> None:  # noqa: F811
    """Inductor's code asserts the strides that it knows of flash attention."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for permuted in (False, True):
        q, k, v = (torch.randn(2, n, 3, 16).transpose(1, 2) for n in (17, 9, 9))
        if not permuted:
            q, k, v = (x.contiguous() for x in (q, k, v))
        mask = torch.randn(17, 9)
        found = []
        for on in (False, True):
            with sdpa() if on else torch.no_grad():
                out, lse = flash(q, k, v, 0.0, False, attn_mask=mask)
                grads = backward(out, q, k, v, out, lse, 0.0, False, attn_mask=mask)
            found.append((out, lse, *grads))
        for want, got in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            assert got.stride() == want.stride()
    assert len(calls) == 2


class Model(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_programs(calls: list[int]) -> None:  # noqa: F811
    """TorchScript and exported programs from before run ours, and those made meanwhile torch's."""
    given = tuple(torch.randn(3, 2, 3, 17, 16))
    want = Model()(*given)
    exported = torch.export.export(Model(), given)
    made = [torch.jit.script(Model()), exported.module(), exported.run_decompositions().module()]
    with sdpa():
        for program in made[:2]:
            calls.clear()
            torch.testing.assert_close(program(*given), want)
            assert calls == [1]
        scripted = torch.jit.script(Model())
        torch.testing.assert_close(scripted(*given), want)
    calls.clear()
    torch.testing.assert_close(scripted(*given), want)
    assert not calls


@pytest.mark.parametrize("training", [True, False])
def test_modules_of_torch(training: bool, calls: list[int]) -> None:  # noqa: F811
    """Also in evaluation, where torch's would go another way."""
    x = torch.randn(2, 9, 16)
    padding = torch.arange(9) >= torch.tensor([[9], [5]])
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True).train(training)
    attention = nn.MultiheadAttention(16, 2, batch_first=True).train(training)
    with torch.set_grad_enabled(training):
        want = [layer(x, src_key_padding_mask=padding), attention(x, x, x, need_weights=False)[0]]
        with sdpa():
            got = [layer(x, src_key_padding_mask=padding)]
            got.append(attention(x, x, x, need_weights=False)[0])
    assert calls == [1, 1]
    torch.testing.assert_close(got[0][~padding], want[0][~padding])
    torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("function", [by_name, by_import])
def test_autocast_and_transforms(function: Any, calls: list[int]) -> None:  # noqa: F811
    q, k, v = torch.randn(3, 2, 3, 9, 8)
    with sdpa():
        with torch.autocast("cpu", torch.bfloat16):
            out = function(q, k, v.bfloat16())
        assert out.dtype == torch.bfloat16
        with torch.inference_mode():
            function(q, k, v)
        assert calls == [1, 1]
        gradient = torch.func.grad(lambda x: function(x, k, v).square().sum())(q)
        torch.testing.assert_close(gradient, results(function, q, k, v)[1])
        batched = torch.vmap(function)(q, k, v)
    torch.testing.assert_close(batched, function(q, k, v), rtol=1e-5, atol=1e-5)
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    with sdpa():
        assert torch.autograd.gradgradcheck(lambda x: function(x, x + 1, x - 1), x)
