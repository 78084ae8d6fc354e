"""The autograd contract of softmax: derivatives of any order, transforms, compile, the module."""

from __future__ import annotations

import contextlib
import gc
import pickle
import weakref

import fusedattn
import pytest
import torch
from fusedattn.reference import functional as reference
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck

F64 = torch.float64
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "top-left, scale": {"causal": "top_left", "scale": -0.7},
    "rows that see nothing": {"mask": torch.tensor([[True], [False], [True]])},
    "another dimension": {"dim": 0, "scale": 1.3},
}


def leaves(*shapes, dtype=F64) -> list:
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def bound(backend="auto", **options):
    return lambda x, bias: fusedattn.softmax(x, bias=bias, backend=backend, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 1), ()], ids=str)
def test_derivatives(shape, options, fast_backend):
    inputs = leaves((2, 3, 4), shape)
    assert gradcheck(bound(fast_backend, **options), inputs)
    assert gradgradcheck(bound(fast_backend, **options), inputs)


def test_gradients_of_bias_alone_and_of_x_alone(backend):
    x, bias = leaves((4, 5), (5,))
    both = torch.autograd.grad(bound(backend)(x, bias).square().sum(), (x, bias))
    (dx,) = torch.autograd.grad(bound(backend)(x, bias.detach()).square().sum(), x)
    (dbias,) = torch.autograd.grad(bound(backend)(x.detach(), bias).square().sum(), bias)
    assert torch.equal(dx, both[0])
    assert torch.equal(dbias, both[1])


def test_second_derivative_of_bias_alone(fast_backend):
    x, bias = torch.randn(3, 4, dtype=F64), leaves((4,))[0]
    assert gradgradcheck(lambda b: bound(fast_backend)(x, b), [bias])


@pytest.mark.parametrize("dim", [-1, 0])
def test_grad_output_of_any_layout(dim, backend):
    """flash-attention#355, Liger-Kernel#376: read as it lies, and left as it was."""
    x = torch.randn(40, 70, requires_grad=True)
    wide = torch.randn(40, 140)
    layouts = [
        torch.ones(()).expand(40, 70), torch.randn(1, 70).expand(40, 70), wide[:, ::2],
        torch.randn(70, 40).t(), wide[:, 3:73],
    ]  # fmt: skip
    out = fusedattn.softmax(x, dim, backend=backend)
    for dout in layouts:
        before = dout.clone()
        (found,) = torch.autograd.grad(out, x, dout, retain_graph=True)
        (again,) = torch.autograd.grad(out, x, dout, retain_graph=True)
        want = torch._softmax_backward_data(before.contiguous(), out.detach(), dim, x.dtype)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
        assert torch.equal(found, again)
        assert torch.equal(dout, before)
        if dim == -1:
            (dense,) = torch.autograd.grad(out, x, before.contiguous(), retain_graph=True)
            assert torch.equal(found, dense)


def test_nothing_is_leaked(backend):
    """pytorch#25340: the output on the node that saves it is no cycle."""
    x = torch.randn(4, 5, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        out = fusedattn.softmax(x, backend=backend)
        node = weakref.ref(out.grad_fn)
        saved = weakref.ref(out)
        del out
        assert node() is None
        assert saved() is None
    finally:
        gc.enable()


def test_saved_tensors_pass_through_hooks(backend):
    seen = []
    x = torch.randn(4, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
        fusedattn.softmax(x, backend=backend)
    assert seen == [x.shape]


def formula(x, bias):
    return reference.softmax(x, -1, bias=bias, causal=True)


def causal(x, bias):
    return fusedattn.softmax(x, bias=bias, causal=True)


def test_transforms():
    x, bias = (t.detach() for t in leaves((3, 4, 5), (3, 5)))
    found = torch.vmap(causal)(x, bias)
    torch.testing.assert_close(found, torch.stack([causal(*y) for y in zip(x, bias, strict=True)]))
    tangents = torch.randn_like(x), torch.randn_like(bias)
    found = torch.func.jvp(torch.vmap(causal), (x, bias), tangents)
    torch.testing.assert_close(found, torch.func.jvp(torch.vmap(formula), (x, bias), tangents))
    found = torch.func.grad(lambda x: causal(x, bias[0]).square().sum())(x)
    want = torch.func.grad(lambda x: formula(x, bias[0]).square().sum())(x)
    torch.testing.assert_close(found, want)


def test_forward_mode():
    x, tangent = torch.randn(4, 5, dtype=F64), torch.randn(4, 5, dtype=F64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        found = forward_ad.unpack_dual(fusedattn.softmax(dual, 0)).tangent
    want = torch.func.jvp(lambda x: torch.softmax(x, 0), (x,), (tangent,))[1]
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck(dtype, dim, fast_backend):
    x, mask = torch.randn(3, 4, 5).to(dtype), torch.rand(4, 5) < 0.8
    bias = torch.randn(4, 1)
    opcheck(torch.ops.fusedattn.softmax_fwd, (x, mask, bias, dim, fast_backend, 0, 0.5))
    out = torch.softmax(x, dim)
    for wanted in ((True, False), (False, True), (True, True)):
        args = (torch.randn_like(x), out, dim, fast_backend, 0, 0.5, *wanted)
        opcheck(torch.ops.fusedattn.softmax_bwd, args)


@pytest.mark.parametrize(
    ("compiler", "dynamic"),
    [("aot_eager", False), ("aot_eager", True),
     pytest.param("inductor", True, marks=pytest.mark.slow)],
)  # fmt: skip
def test_compile(compiler, dynamic, fast_backend):
    torch._dynamo.reset()

    def function(x, mask, bias):
        y = fusedattn.softmax(2 * x, 1, mask=mask, bias=bias, backend=fast_backend)
        return y + fusedattn.softmax(x, causal=True, scale=0.5, backend=fast_backend).sin()

    compiled = torch.compile(function, backend=compiler, fullgraph=True, dynamic=dynamic)
    for rows, width in ((6, 9), (11, 7)):
        x, bias = leaves((2, 3, rows, width), (rows, 1), dtype=torch.float32)
        mask = torch.rand(rows, width) < 0.7
        found, want = compiled(x, mask, bias), function(x, mask, bias)
        torch.testing.assert_close(found, want)
        dout = torch.randn_like(x)
        grads = [torch.autograd.grad(y, (x, bias), dout) for y in (found, want)]
        torch.testing.assert_close(*grads)


def test_module():
    x, mask = torch.randn(3, 4, 5), torch.rand(4, 5) < 0.7
    for dim in (None, 0, 1, -1):
        with (
            pytest.warns(UserWarning, match="Implicit") if dim is None else contextlib.nullcontext()
        ):
            want = torch.nn.Softmax(dim)(x)
        torch.testing.assert_close(fusedattn.nn.Softmax(dim)(x), want)
    module = fusedattn.nn.Softmax(-1, scale=0.5, causal=True)
    want = fusedattn.softmax(x, mask=mask, bias=x[0], scale=0.5, causal=True)
    assert torch.equal(module(x, mask=mask, bias=x[0]), want)
    assert repr(module) == "Softmax(dim=-1, scale=0.5, causal=True)"
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))
    swapped = torch.nn.Softmax(1)
    swapped.__class__ = fusedattn.nn.Softmax
    assert torch.equal(swapped(x), fusedattn.softmax(x, 1))
    assert not module.state_dict()
