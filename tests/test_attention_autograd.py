"""The autograd contract of attention: first, second and forward derivatives, memory, transforms."""

from __future__ import annotations

import fusedattn
import pytest
import torch
from cases.attention import AttentionCase
from compare import check, device_for
from fusedattn.reference import functional as reference

pytestmark = pytest.mark.backends("fast", "cuda_emulated")


def leaves(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> list:
    return [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradient_penalty(dtype, bias_dtype, backend):
    """The gradient of |dq|² + |dbias|² is that of the oracle: right, and never silently zero."""
    case = AttentionCase(seq_q=12, dim=8, bias=(1, 2, 12, 12), causal=True, dtype=dtype,
                         bias_dtype=bias_dtype)  # fmt: skip
    made = case.inputs(device_for(backend))

    def penalty(forward, cast: torch.dtype | None = None) -> list:
        x = {n: made[n].to(cast or made[n].dtype).requires_grad_() for n in ("q", "k", "v", "bias")}
        out = forward(x["q"], x["k"], x["v"], bias=x["bias"], causal=True)
        out = out[0] if isinstance(out, tuple) else out
        dq, dbias = torch.autograd.grad(
            out, (x["q"], x["bias"]), made["dout"].to(out.dtype), create_graph=True
        )
        return torch.autograd.grad(dq.square().sum() + dbias.square().sum(), list(x.values()))

    def forward(q, k, v, **options):
        return fusedattn.attention(q, k, v, backend=backend, **options)

    found = penalty(forward)
    want, eager = (penalty(reference.attention, cast) for cast in (torch.float64, dtype))
    for name, *grads in zip(("q", "k", "v", "bias"), found, want, eager, strict=True):
        what = f"second derivative by {name}"
        check(*grads, what=what, case=case, gradient=True, tested=dtype)
        assert grads[0].abs().max() > 0


@pytest.mark.parametrize("changed", ["q", "v", "bias", "mask", "out"])
def test_saved_tensor_modified_in_place(changed, backend):
    """fusedattn must not compute a gradient from what is no longer there."""
    device = device_for(backend)
    q, k, v = (x * 1 for x in leaves(*[(1, 2, 5, 4)] * 3, dtype=torch.float32, device=device))
    x = {"q": q, "v": v, "bias": torch.zeros(1, 1, 5, 5, device=device)}
    x["mask"] = torch.ones(1, 1, 5, 5, dtype=torch.bool, device=device)
    x["out"] = fusedattn.attention(q, k, v, bias=x["bias"], mask=x["mask"], backend=backend)
    total = x["out"].sum()
    x[changed].detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_lse_gradient_strides_and_unused_outputs(backend):
    q, k, v = leaves((2, 4, 33, 8), (2, 2, 33, 8), (2, 2, 33, 8), dtype=torch.float32,
                     device=device_for(backend))  # fmt: skip
    _, lse = fusedattn.attention(q, k, v, return_lse=True, backend=backend)
    found = torch.autograd.grad(lse.sum(), (q, k, v), retain_graph=True, materialize_grads=True)
    want = torch.autograd.grad(lse, (q, k, v), torch.ones_like(lse), materialize_grads=True)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert torch.equal(found[2], torch.zeros_like(v))
    assert found[0].abs().max() > 0


def test_public_function(fast_backend):
    """`fusedattn.autograd.Attention` is what `attention` itself applies."""
    q, k, v = leaves(*[(1, 2, 5, 4)] * 3, dtype=torch.float32)
    config = fusedattn.autograd.AttentionConfig(causal=2, scale=0.5)
    out, _ = fusedattn.autograd.Attention.apply(config, fast_backend, q, k, v)
    want = fusedattn.attention(q, k, v, causal=True, scale=0.5, backend=fast_backend)
    assert torch.equal(out, want)


# --- torch.func ---------------------------------------------------------------------------------


CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def inputs(*lead: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    shapes = ((2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 4))
    return tuple(torch.randn(*lead, *shape, dtype=dtype) for shape in shapes)


def attend(q, k, v, **options):
    return fusedattn.attention(q, k, v, causal=True, **options)


def formula(q, k, v, **options):
    return reference.attention(q, k, v, causal=True, **options)[0]


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


def test_hessian():
    x = tuple(y[:1, :2, :2, :2].contiguous() for y in inputs())

    def second(function):
        return torch.func.hessian(lambda q: function(q, *x[1:]).square().sum())(x[0])

    found = second(fusedattn.attention)
    torch.testing.assert_close(found, second(lambda *x: reference.attention(*x)[0]), **CLOSE)
    assert found.abs().max() > 0


def test_half_with_float32_bias():
    q, k, v = inputs(dtype=torch.bfloat16)
    bias = torch.randn(4, 5, 6)
    grad = torch.func.grad(lambda b: attend(q, k, v, bias=b).float().square().sum())(bias)
    assert grad.dtype == torch.float32
    leaf = bias.clone().requires_grad_()
    attend(q, k, v, bias=leaf).float().square().sum().backward()
    torch.testing.assert_close(grad, leaf.grad, rtol=0.02, atol=0.02)
