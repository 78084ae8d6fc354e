"""The autograd contract of attention: first, second and forward derivatives, memory, transforms."""

from __future__ import annotations

import gc
import weakref

import fusedattn
import pytest
import torch
from cases.attention import AttentionCase, fused
from compare import check, device_for
from fusedattn.reference import functional as reference
from torch.autograd import gradcheck, gradgradcheck

pytestmark = pytest.mark.backends("fast", "cuda_emulated")

OPTIONS = {
    "full": {},
    "causal, cross": {"causal": True},
    "top-left": {"causal": "top_left"},
    "rows that see nothing": {"mask": torch.tensor([[True], [False], [True]])},
    "lengths": {"kv_lengths": torch.tensor([4, 1], dtype=torch.int32)},
    "scale": {"scale": -0.7},
}


def leaves(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> list:
    return [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in shapes]


def finite_outputs(backend: str, **options):
    """attention as a function of tensors, for numerical derivatives: −inf has none."""

    def function(q, k, v, bias):
        out, lse = fusedattn.attention(
            q, k, v, bias=bias, return_lse=True, backend=backend, **options
        )
        return out, lse.masked_fill(lse.isinf(), 0.0)

    return function


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options, fast_backend):
    inputs = leaves((2, 2, 3, 3), (2, 1, 4, 3), (2, 1, 4, 2), (1, 2, 3, 4))
    assert gradcheck(finite_outputs(fast_backend, **options), inputs)


@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (2, 1, 1, 4), (3, 1), ()], ids=str)
def test_gradcheck_of_broadcast_bias(shape, fast_backend):
    inputs = leaves((2, 2, 3, 3), (2, 2, 4, 3), (2, 2, 4, 2), shape)
    assert gradcheck(finite_outputs(fast_backend, causal=True), inputs)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradgradcheck(options, fast_backend):
    inputs = leaves((2, 2, 3, 2), (2, 1, 4, 2), (2, 1, 4, 2), (2, 1, 4))
    assert gradgradcheck(finite_outputs(fast_backend, **options), inputs)


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


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias"])
def test_gradient_only_for_what_requires_it(wanted, backend):
    device = device_for(backend)
    shapes = {"q": (2, 4, 9, 8), "k": (2, 2, 11, 8), "v": (2, 2, 11, 6), "bias": (4, 9, 11)}
    x = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}

    def grads(names):
        for name in x:
            x[name] = x[name].detach().requires_grad_(name in names)
        fusedattn.attention(**x, causal=True, backend=backend).square().sum().backward()
        return {name: leaf.grad for name, leaf in x.items()}

    every, one = grads(tuple(x)), grads((wanted,))
    assert torch.equal(one[wanted], every[wanted])
    assert [name for name in x if one[name] is not None] == [wanted]


def test_no_gradient_needed_leaves_no_graph(backend):
    q, k, v = leaves(*[(1, 2, 5, 4)] * 3, dtype=torch.float32, device=device_for(backend))
    with torch.no_grad():
        out, lse = fusedattn.attention(q, k, v, return_lse=True, backend=backend)
    assert not out.requires_grad
    assert not lse.requires_grad
    with torch.inference_mode():
        assert torch.equal(fusedattn.attention(q, k, v, backend=backend), out)


def test_repeated_backward_is_bitwise_equal(backend):
    """flash-attention#359: with retain_graph, gradients do not drift."""
    device = device_for(backend)
    q, k, v = leaves(
        (2, 4, 70, 16), (2, 2, 90, 16), (2, 2, 90, 16), dtype=torch.float32, device=device
    )
    out = fusedattn.attention(q, k, v, causal=True, backend=backend)
    dout = torch.randn_like(out)
    kept = dout.clone()
    first = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    for _ in range(20):
        again = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(dout, kept)


def test_forward_without_backward_frees_everything(backend):
    """pytorch#25340: an output kept on the context is a cycle that only the collector ends."""
    q, k, v = leaves(*[(1, 2, 5, 4)] * 3, dtype=torch.float32, device=device_for(backend))
    gc.collect()
    gc.disable()
    try:
        watched = []
        for _ in range(50):
            out, lse = fusedattn.attention(q, k, v, return_lse=True, backend=backend)
            watched += [weakref.ref(out), weakref.ref(lse), weakref.ref(out.grad_fn)]
            del out, lse
        assert not any(ref() is not None for ref in watched)
    finally:
        gc.enable()


def test_saved_tensors_pass_through_hooks(backend):
    """Everything that is kept can be moved elsewhere (save_on_cpu), and nothing else is kept."""
    case = AttentionCase(seq_q=20, seq_k=43, bias=(2, 20, 43), mask=(20, 43), kv_lengths=(43, 9))
    made = case.inputs(device_for(backend))
    plain = fused(made, case, backend)
    packed = []

    def pack(x):
        packed.append(tuple(x.shape))
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.clone()):
        hooked = fused(made, case, backend)
    assert all(torch.equal(plain[name], hooked[name]) for name in plain)
    for name in ("q", "k", "v", "kv_lengths"):
        assert tuple(made[name].shape) in packed
    assert tuple(plain["out"].shape) in packed
    assert tuple(plain["lse"].shape) in packed


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


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.new_ones(()).expand_as(x),
        lambda x: torch.randn(x.shape[:-1], device=x.device)[..., None].expand_as(x),
        lambda x: torch.randn(*x.shape[:-1], 2 * x.shape[-1], device=x.device)[..., ::2],
        lambda x: torch.randn_like(x.transpose(1, 3)).transpose(1, 3),
        lambda x: torch.randn(1, *x.shape[1:], device=x.device).expand_as(x),
    ],
    ids=["one number", "rows", "stride 2", "transposed", "batch"],
)
def test_strides_of_the_output_gradient(view, backend):
    """flash-attention#355: out.sum() sends an expanded gradient."""
    device = device_for(backend)
    q, k, v = leaves(
        (2, 4, 33, 8), (2, 2, 33, 8), (2, 2, 33, 12), dtype=torch.float32, device=device
    )
    out = fusedattn.attention(q, k, v, causal=True, backend=backend)
    dout = view(out.detach())
    found = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    want = torch.autograd.grad(out, (q, k, v), dout.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


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
