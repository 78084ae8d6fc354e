"""attention under torch.func: grad, vmap, jvp, and their nesting; and plain forward-mode AD."""

from __future__ import annotations

import fusedattn
import pytest
import torch
from fusedattn.reference import functional as reference
from torch.autograd import forward_ad

CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def inputs(*lead: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    shapes = ((2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 4))
    return tuple(torch.randn(*lead, *shape, dtype=dtype) for shape in shapes)


def attend(q, k, v, **options):
    return fusedattn.attention(q, k, v, causal=True, **options)


def formula(q, k, v, **options):
    return reference.attention(q, k, v, causal=True, **options)[0]


def test_grad():
    x = inputs()
    found = torch.func.grad(lambda *x: attend(*x).square().sum(), argnums=(0, 1, 2))(*x)
    want = torch.func.grad(lambda *x: formula(*x).square().sum(), argnums=(0, 1, 2))(*x)
    torch.testing.assert_close(found, want, **CLOSE)


def test_grad_of_log_sum_exp():
    x = inputs()

    def loss(*x):
        return fusedattn.attention(*x, return_lse=True)[1].square().sum()

    found = torch.func.grad(loss)(*x)
    want = torch.func.grad(lambda *x: reference.attention(*x)[1].square().sum())(*x)
    torch.testing.assert_close(found, want, **CLOSE)


@pytest.mark.parametrize(
    "in_dims", [(0, 0, 0), (0, None, None), (None, 0, 0), (2, 0, None)], ids=str
)
def test_vmap(in_dims):
    x = tuple(
        y if d == 0 else y[0] if d is None else y.movedim(0, d)
        for y, d in zip(inputs(3), in_dims, strict=True)
    )
    found = torch.vmap(attend, in_dims)(*x)
    rows = [
        attend(*(y if d is None else y.select(d, i) for y, d in zip(x, in_dims, strict=True)))
        for i in range(3)
    ]
    torch.testing.assert_close(found, torch.stack(rows), **CLOSE)


def test_vmap_over_mask_and_bias():
    q, k, v = inputs()
    mask, bias = torch.rand(3, 5, 6) < 0.7, torch.randn(3, 4, 1, 6, dtype=torch.float64)
    found = torch.vmap(lambda m, b: attend(q, k, v, mask=m, bias=b))(mask, bias)
    rows = [attend(q, k, v, mask=m, bias=b) for m, b in zip(mask, bias, strict=True)]
    torch.testing.assert_close(found, torch.stack(rows), **CLOSE)


def test_gradients_per_sample():
    x = inputs(3)
    grad = torch.func.grad(lambda *x: attend(*x).square().sum())
    want = torch.stack([grad(*(y[i] for y in x)) for i in range(3)])
    torch.testing.assert_close(torch.vmap(grad)(*x), want, **CLOSE)


def test_jvp():
    x, tangents = inputs(), inputs()
    found = torch.func.jvp(attend, x, tangents)
    torch.testing.assert_close(found, torch.func.jvp(formula, x, tangents), **CLOSE)


def test_hessian():
    x = tuple(y[:1, :2, :2, :2].contiguous() for y in inputs())

    def second(function):
        return torch.func.hessian(lambda q: function(q, *x[1:]).square().sum())(x[0])

    found = second(fusedattn.attention)
    torch.testing.assert_close(found, second(lambda *x: reference.attention(*x)[0]), **CLOSE)
    assert found.abs().max() > 0


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode(requires_grad):
    """Dual tensors outside torch.func: the tangent is right, not dropped."""
    x, tangents = inputs(), inputs()
    with forward_ad.dual_level():
        dual = [
            forward_ad.make_dual(y.requires_grad_(requires_grad), t)
            for y, t in zip(x, tangents, strict=True)
        ]
        found = forward_ad.unpack_dual(attend(*dual)).tangent
    assert found is not None
    want = torch.func.jvp(formula, tuple(y.detach() for y in x), tangents)[1]
    torch.testing.assert_close(found, want, **CLOSE)


def test_half_with_float32_bias():
    q, k, v = inputs(dtype=torch.bfloat16)
    bias = torch.randn(4, 5, 6)
    grad = torch.func.grad(lambda b: attend(q, k, v, bias=b).float().square().sum())(bias)
    assert grad.dtype == torch.float32
    leaf = bias.clone().requires_grad_()
    attend(q, k, v, bias=leaf).float().square().sum().backward()
    torch.testing.assert_close(grad, leaf.grad, rtol=0.02, atol=0.02)
