"""apply_rotary in place, under autograd, torch.compile, torch.func and export."""

from __future__ import annotations

import fusedattn
import pytest
import torch
from fusedattn.reference import functional as reference
from torch.autograd import forward_ad, gradcheck, gradgradcheck

OPTIONS = {
    "plain": {},
    "interleaved": {"interleaved": True, "offset": 2},
    "positions": {"positions": torch.tensor([[3, 0, 5], [1, 1, 2]])},
}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tables(dtype: torch.dtype = torch.float64, rows: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    phase = torch.arange(rows)[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    return phase.cos().to(dtype), phase.sin().to(dtype)


def normal(*shape: int, requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad)


# --- in place ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(2, 1, 3, 6), (1, 1, 2, 6), (3, 6), (2, 3, 6), (2, 2, 2, 3, 6)], ids=str
)
def test_in_place_writes_into_the_tensor(shape, backend):
    """Liger-Kernel#342: with one head a reshape made the write land in a copy."""
    x = normal(*shape)
    want, version = fusedattn.apply_rotary(x, *tables(), backend=backend), x._version
    found = fusedattn.apply_rotary(x, *tables(), inplace=True, backend=backend)
    assert found is x
    assert torch.equal(x, want)
    assert x._version > version


def test_in_place_pair_of_views(backend):
    qkv = normal(2, 3, 4, 3, 6)
    q, k, v = (qkv[:, :, :, i].transpose(1, 2) for i in range(3))
    want = fusedattn.apply_rotary_qk(q, k, *tables(), backend=backend)
    kept = v.clone()
    fusedattn.apply_rotary_qk(q, k, *tables(), inplace=True, backend=backend)
    assert torch.equal(q, want[0])
    assert torch.equal(k, want[1])
    assert torch.equal(v, kept)


def test_in_place_change_is_seen_by_autograd(backend):
    """Liger-Kernel#272, Liger-Kernel#254: exp keeps its result, which is no longer there."""
    x = normal(2, 1, 3, 6, requires_grad=True)
    y = x.exp()
    out = fusedattn.apply_rotary(y, *tables(), inplace=True, backend=backend)
    assert out is y
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    y = x.exp()
    with torch.no_grad():
        fusedattn.apply_rotary(y, *tables(), inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_place_on_a_leaf(backend):
    x = normal(2, 1, 3, 6, requires_grad=True)
    before = x.detach().clone()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        fusedattn.apply_rotary(x, *tables(), inplace=True, backend=backend)
    assert torch.equal(x, before)


def test_in_place_refusals():
    with pytest.raises(RuntimeError, match="single memory location"):
        fusedattn.apply_rotary(normal(1, 1, 3, 6).expand(2, 4, 3, 6), *tables(), inplace=True)
    x = normal(2, 1, 3, 6)
    with pytest.raises(ValueError, match="expected two"):
        fusedattn.apply_rotary_qk(x, x, *tables(), inplace=True)


def test_in_place_in_inference_mode(backend):
    with torch.inference_mode():
        x = normal(2, 1, 3, 6)
        want = fusedattn.apply_rotary(x, *tables(), backend=backend)
        fusedattn.apply_rotary(x, *tables(), inplace=True, backend=backend)
    assert torch.equal(x, want)
    with pytest.raises(RuntimeError, match="x, an inference tensor"):
        fusedattn.apply_rotary(x, *tables(), inplace=True, backend=backend)


@pytest.mark.parametrize("rank", [3, 4, 5])
def test_gradient_through_a_view_changed_in_place(rank, backend):
    def function(x):
        y = (2 * x)[..., 1:]
        fusedattn.apply_rotary(y, *tables(), inplace=True, backend=backend)
        return y.sin()

    assert gradcheck(function, (normal(*(2, 2, 2, 3, 6)[5 - rank :], requires_grad=True),))


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck_in_place(options, fast_backend):
    def function(q, k):
        chosen = {"inplace": True, "backend": fast_backend, **OPTIONS[options]}
        return fusedattn.apply_rotary_qk(q * 1, k * 1, *tables(), **chosen)

    inputs = normal(2, 2, 3, 5, requires_grad=True), normal(2, 1, 3, 5, requires_grad=True)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_gradient_of_one_of_two(backend):
    q, k = normal(2, 2, 3, 6, requires_grad=True), normal(2, 1, 3, 6, requires_grad=True)
    out = fusedattn.apply_rotary_qk(q, k, *tables(), backend=backend)
    (dk,) = torch.autograd.grad(out[1].square().sum(), k, retain_graph=True)
    torch.testing.assert_close(dk, 2 * k)
    frozen = fusedattn.apply_rotary_qk(q.detach(), k, *tables(), backend=backend)
    torch.testing.assert_close(torch.autograd.grad(frozen[1].square().sum(), k)[0], 2 * k)


def test_query_is_key(fast_backend):
    x = normal(2, 2, 3, 6, requires_grad=True)
    compiled = torch.compile(fusedattn.apply_rotary_qk, backend="aot_eager", fullgraph=True)
    for rotate in (fusedattn.apply_rotary_qk, compiled):
        q, k = rotate(x, x, *tables(), backend=fast_backend)
        torch.testing.assert_close(torch.autograd.grad((q * k).sum(), x)[0], 2 * x)


# --- library ops, compile, export ----------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in-place"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiled(requires_grad, inplace, dynamic, fast_backend):
    def function(q, k):
        q, k = 2 * q, 3 * k
        found = fusedattn.apply_rotary_qk(
            q, k, *tables(), offset=1, inplace=inplace, backend=fast_backend
        )
        return (found[0].sin(), found[1], q)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (5, 9, 12):
        inputs = [normal(2, h, length, 6, requires_grad=requires_grad) for h in (2, 1)]
        found, want = compiled(*inputs), function(*inputs)
        torch.testing.assert_close(found, want)
        if requires_grad:
            grads = [torch.autograd.grad(sum(y.sum() for y in x), inputs) for x in (found, want)]
            torch.testing.assert_close(*grads)


def test_compiled_change_of_an_argument(fast_backend):
    x = normal(2, 2, 3, 6)
    want = fusedattn.apply_rotary(x, *tables(), backend=fast_backend)
    version = x._version

    @torch.compile(backend="aot_eager", fullgraph=True)
    def change(x):
        fusedattn.apply_rotary(x, *tables(), inplace=True, backend=fast_backend)

    change(x)
    assert torch.equal(x, want)
    assert x._version > version


# --- torch.func ----------------------------------------------------------------------------------


def test_transforms():
    x, tangent, (cos, sin) = normal(3, 2, 4, 6), normal(3, 2, 4, 6), tables()
    want = reference.apply_rotary(x, cos, sin)
    torch.testing.assert_close(torch.vmap(lambda x: fusedattn.apply_rotary(x, cos, sin))(x), want)
    out, turned = torch.func.jvp(lambda x: fusedattn.apply_rotary(x, cos, sin), (x,), (tangent,))
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(turned, reference.apply_rotary(tangent, cos, sin))
    grad = torch.func.grad(lambda c: fusedattn.apply_rotary(x, c, sin).square().sum())(cos)
    assert grad.shape == cos.shape
    assert grad.abs().max() > 0


def test_forward_mode_in_place():
    x, tangent, (cos, sin) = normal(2, 2, 4, 6), normal(2, 2, 4, 6), tables()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone(), tangent.clone())
        out = fusedattn.apply_rotary(dual, cos, sin, inplace=True)
        found = forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(found, reference.apply_rotary(tangent, cos, sin))
