"""Second derivatives as people take them: of inputs that share a history, through any loss."""

from __future__ import annotations

import fusedattn
import pytest
import torch
from fusedattn.reference import functional as reference
from ops import OPS, Op, outputs
from torch.autograd import forward_ad, gradgradcheck
from torch.autograd.functional import jacobian


def of_one_input(call: Op, chosen: tuple[str, ...], backend: str):
    """x → the squares of an op's outputs, whose `chosen` tensors are functions of x; and an x."""
    tensors = call.tensors(torch.float64)
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    maps = {name: torch.randn(6, tensors[name].numel(), dtype=torch.float64) for name in chosen}

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = {name: (x @ m).sin().view(tensors[name].shape) for name, m in maps.items()}
        return tuple(y.square() for y in outputs(call.run(**tensors | made, backend=backend)))

    return function, x


@pytest.mark.parametrize("op", OPS)
def test_inputs_that_share_a_history(op, backend):
    call = OPS[op]
    function, x = of_one_input(call, call.differentiable, backend)
    assert gradgradcheck(function, x, fast_mode=True)


@pytest.mark.parametrize("op", OPS)
def test_a_batch_of_gradients_stays_in_the_graph(op, fast_backend):
    call = OPS[op]
    function, x = of_one_input(call, call.differentiable, fast_backend)

    def penalty(vectorize: bool) -> torch.Tensor:
        found = jacobian(
            lambda x: function(x)[0].flatten()[:3], x, create_graph=True, vectorize=vectorize
        )
        return torch.autograd.grad(found.square().sum(), x)[0]

    torch.testing.assert_close(penalty(True), penalty(False), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_over_an_eager_graph(op, fast_backend):
    """A gradient is linear in the cotangent."""
    call = OPS[op]
    function, x = of_one_input(call, call.differentiable, fast_backend)
    out = function(x)[0]
    dout, tangent = torch.randn_like(out), torch.randn_like(out)
    want = torch.autograd.grad(out, x, tangent, retain_graph=True)[0]
    with forward_ad.dual_level():
        found = torch.autograd.grad(out, x, forward_ad.make_dual(dout, tangent))[0]
        found = forward_ad.unpack_dual(found).tangent
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


def test_one_tensor_in_every_place(backend):
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(
        lambda x: fusedattn.attention(x, x, x[..., :2], bias=x, backend=backend).square(),
        x,
        fast_mode=True,
    )


@pytest.mark.parametrize(
    "module",
    [
        fusedattn.nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64),
        fusedattn.nn.LayerNorm(4, dtype=torch.float64),
        fusedattn.nn.RMSNorm(4, dtype=torch.float64),
        fusedattn.nn.Softmax(-1),
        fusedattn.nn.SwiGLU(4, 6, dtype=torch.float64),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules(module):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    inputs = 3 if isinstance(module, torch.nn.MultiheadAttention) else 1

    def function(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        named = dict(zip(dict(module.named_parameters()), parameters, strict=True))
        return outputs(torch.func.functional_call(module, named, (x.sin(),) * inputs))[0].square()

    assert gradgradcheck(function, (x, *module.parameters()), fast_mode=True)


def test_no_heads():
    """One program for models whose heads were pruned, or lie on another rank."""
    q, k = (torch.randn(2, 0, s, 8, requires_grad=True) for s in (3, 4))
    (dq,) = torch.autograd.grad(fusedattn.attention(q, k, k).sum(), q, create_graph=True)
    assert torch.autograd.grad(dq.sum(), k)[0].shape == k.shape


def test_third_derivatives(backend):
    """The formula of the backward goes on being differentiable."""
    x = torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True)

    def third(attention):
        found = attention(x, x.sin(), x.cos()).square().sum()
        for _ in range(3):
            (found,) = torch.autograd.grad(found, x, create_graph=True)
            found = found.square().sum()
        return found

    want = third(lambda q, k, v: reference.attention(q, k, v)[0])
    found = third(lambda q, k, v: fusedattn.attention(q, k, v, backend=backend))
    torch.testing.assert_close(found, want, rtol=1e-9, atol=0)
