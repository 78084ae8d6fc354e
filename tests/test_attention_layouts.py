"""Strides, offsets and views: attention reads them in place, bit for bit as if contiguous."""

from __future__ import annotations

import itertools

import fusedattn
import pytest
import torch
from compare import device_for, far_apart

pytestmark = pytest.mark.backends("fast", "cuda_emulated")

every = pytest.mark.backends("cpu", "reference", "triton", "cuda_emulated")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def run(x: dict, backend: str, **options) -> dict[str, torch.Tensor]:
    """out, lse and the gradients of the tensors in `x`, whose strides are kept; dout among them."""
    x = {name: y.detach() for name, y in x.items()}
    dout = x.pop("dout", None)
    leaves = {name: y.requires_grad_() for name, y in x.items() if y.is_floating_point()}
    out, lse = fusedattn.attention(**x, **options, return_lse=True, backend=backend)
    dout = torch.ones_like(out) if dout is None else dout
    grads = torch.autograd.grad(
        (out, lse), list(leaves.values()), (dout, lse.detach().sin().nan_to_num())
    )
    return {"out": out, "lse": lse} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def equals_contiguous(x: dict, backend: str, **options) -> None:
    before = {name: y.clone() for name, y in x.items()}
    found = run(x, backend, **options)
    want = run({name: y.contiguous().clone() for name, y in x.items()}, backend, **options)
    for name in want:
        assert torch.equal(found[name], want[name]), (
            f"{name} differs from that of contiguous inputs"
        )
    for name, y in x.items():
        assert torch.equal(y, before[name]), f"{name} was written to"


def heads_last(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """(B, H, S, D), stored as (B, S, H, D)."""
    batch, heads, seq, dim = shape
    return torch.randn(batch, seq, heads, dim, device=device).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("transposed", list(itertools.product("ny", repeat=3)), ids="".join)
def test_heads_first_or_last(transposed, dtype, backend):
    """flash-attention#818, FlagGems#5896: each of q, k, v in either layout."""
    device = device_for(backend)
    shapes = {"q": (1, 2, 257, 40), "k": (1, 2, 257, 40), "v": (1, 2, 257, 24)}
    x = {}
    for (name, shape), flip in zip(shapes.items(), transposed, strict=True):
        y = heads_last(shape, dtype, device)
        x[name] = y if flip == "y" else y.contiguous()
    x["dout"] = heads_last((1, 2, 257, 24), dtype, device)
    equals_contiguous(x, backend, causal=True)


@pytest.mark.parametrize("seq", [1, 70])
def test_slices_of_fused_qkv(seq, backend):
    qkv = torch.randn(2, seq, 3, 4, 24, device=device_for(backend))
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    equals_contiguous({"q": q, "k": k, "v": v}, backend, causal=True)


def test_slices_of_fused_multi_query_qkv(backend):
    """TransformerEngine#1195"""
    qkv = torch.randn(1, 130, 18, 64, device=device_for(backend))
    q, k, v = (x.transpose(1, 2) for x in qkv.split([16, 1, 1], dim=2))
    equals_contiguous({"q": q, "k": k, "v": v}, backend, causal=True)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_last_dim_of_stride_two(dtype, backend):
    device = device_for(backend)
    x = {n: torch.randn(2, 2, 33, 48, device=device).to(dtype)[..., ::2] for n in ("q", "k", "v")}
    equals_contiguous(x, backend, causal=True)


@pytest.mark.parametrize("expanded", [(1, 2, 33, 16), (2, 1, 33, 16), (2, 2, 1, 16), (1, 1, 1, 1)])
def test_expanded_keys_and_values(expanded, backend):
    device = device_for(backend)
    x = {name: torch.randn(expanded, device=device).expand(2, 2, 33, 16) for name in ("k", "v")}
    x["q"] = torch.randn(2, 4, 20, 16, device=device)
    equals_contiguous(x, backend)


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("shifted", ["q", "k", "v", "mask", "bias", "dout", "all"])
def test_unaligned_storage_offset(shifted, dtype, backend):
    """pytorch#183484: a contiguous view that starts one element into its storage."""
    device = device_for(backend)
    x = {
        name: torch.randn(2, 2, 35, 46, device=device).to(dtype) for name in ("q", "k", "v", "dout")
    }
    x["mask"] = torch.rand(2, 1, 35, 35, device=device) < 0.8
    x["bias"] = torch.randn(2, 35, 35, device=device).to(dtype)
    for name in x if shifted == "all" else (shifted,):
        buffer = torch.empty(x[name].numel() + 1, dtype=x[name].dtype, device=device)
        x[name] = buffer[1:].view(x[name].shape).copy_(x[name])
    equals_contiguous(x, backend)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_address_that_is_not_a_multiple_of_the_element(dtype, fast_backend):
    """pytorch#191238: torch.frombuffer makes such tensors."""
    want = torch.randn(3, 1, 2, 21, 16).to(dtype)
    data = bytearray(1) + want.view(torch.uint8).numpy().tobytes()
    q, k, v = torch.frombuffer(data, dtype=dtype, offset=1).view(want.shape)
    assert q.data_ptr() % dtype.itemsize
    equals_contiguous({"q": q, "k": k, "v": v}, fast_backend)


@pytest.mark.parametrize("far", ["q", "k", "v"])
def test_stride_beyond_32_bits(far, fast_backend):
    """Liger-Kernel#803: an offset of 2³¹ elements; the memory between is mapped, never touched."""
    x = {name: torch.randn(2, 1, 64, 16).bfloat16() for name in ("q", "k", "v")}
    want = {name: y.clone() for name, y in x.items()}
    x[far] = far_apart(x[far], 2**31, dim=0)
    found, want = (run(y, fast_backend, causal=True) for y in (x, want))
    assert all(torch.equal(found[name], want[name]) for name in want)


VIEWS = {
    "slice": lambda m: m[..., 7:60, 11:90],
    "transposed": lambda m: m[..., :79, :53].mT,
    "stride 2": lambda m: torch.stack((m, m), -1).flatten(-2)[..., :53, :158:2],
    "expanded over batch and heads": lambda m: m[:1, :1, :53, :79].expand(2, 4, 53, 79),
    "expanded over queries": lambda m: m[..., :1, 3:82].expand(2, 4, 53, 79),
    "expanded over keys": lambda m: m[..., :53, :1].expand(2, 4, 53, 79),
    "one element": lambda m: m.amax().expand(2, 4, 53, 79),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_mask_views(view, backend):
    """pytorch#158424: a mask that is a slice or whose last stride is not 1."""
    device = device_for(backend)
    x = {
        "q": torch.randn(2, 4, 53, 16, device=device),
        "k": torch.randn(2, 2, 79, 16, device=device),
    }
    x["v"] = torch.randn_like(x["k"])
    x["mask"] = view(torch.rand(2, 4, 100, 100, device=device) < 0.7)
    equals_contiguous(x, backend)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_bias_views(view, dtype, backend):
    device = device_for(backend)
    shapes = {"q": (2, 4, 53, 16), "k": (2, 2, 79, 16), "v": (2, 2, 79, 16)}
    x = {name: torch.randn(shape, device=device).to(dtype) for name, shape in shapes.items()}
    x["bias"] = view(torch.randn(2, 4, 100, 100, device=device).to(dtype))
    equals_contiguous(x, backend, causal=True)


@pytest.mark.parametrize("seq_k", [43, 361, 364])
def test_bias_after_save_and_restore(seq_k, backend):
    """pytorch#134995: what comes back from the hooks need not be aligned as what went in."""
    device = device_for(backend)
    x = {name: torch.randn(1, 2, s, 16, device=device) for name, s in (("q", 20), ("k", seq_k))}
    x |= {"v": torch.randn_like(x["k"]), "bias": torch.randn(1, 2, 20, seq_k, device=device)}
    want = run(x, backend)
    with torch.autograd.graph.save_on_cpu():
        found = run(x, backend)
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_all_at_once_in_each_instruction_set(instruction_set):
    for dtype in (F16, BF16, F32, F64):
        x = {"q": torch.randn(2, 4, 70, 80).to(dtype)[..., ::2]}
        x["k"] = torch.randn(2, 90, 2, 40).to(dtype).transpose(1, 2)
        x["v"] = torch.randn(1, 2, 24, 90).to(dtype).mT.expand(2, 2, 90, 24)
        x["dout"] = torch.randn(2, 70, 4, 24).to(dtype).transpose(1, 2)
        x["mask"] = (torch.rand(90, 100) < 0.8)[:, 13:83].mT
        x["bias"] = torch.randn(1, 4, 90, 70).to(dtype).mT
        equals_contiguous(x, "cpu", causal=True)


def test_heads_of_the_output_merge_without_a_copy(backend):
    q, k, v = torch.randn(3, 2, 4, 9, 16, device=device_for(backend))
    out = fusedattn.attention(q, k, v, backend=backend)
    assert out.transpose(1, 2).is_contiguous()


def test_one_tensor_as_query_key_and_value(backend):
    x = torch.randn(2, 2, 40, 16, device=device_for(backend), requires_grad=True)
    copies = [x.detach().clone().requires_grad_() for _ in range(3)]
    out = fusedattn.attention(x, x, x, causal=True, backend=backend)
    want = fusedattn.attention(*copies, causal=True, backend=backend)
    out.sum().backward()
    want.sum().backward()
    assert torch.equal(out, want)
    torch.testing.assert_close(x.grad, sum(y.grad for y in copies))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@every
def test_lengths_of_any_value_and_stride(backend, dtype):
    """Those of 2³¹ and more are no limit, negative ones no key; they may lie apart."""
    narrow, wide = [4, -1, 2**31 - 1, -(2**31)], [2**31, 2**32 + 3, -(2**63)]
    lengths = narrow if dtype == torch.int32 else wide
    device = device_for(backend)
    x = {n: torch.randn(len(lengths), 1, 6, 8, device=device).half() for n in ("q", "k", "v")}
    clamped = torch.tensor([min(max(n, 0), 6) for n in lengths], dtype=torch.int32, device=device)
    apart = torch.tensor([[n, 1] for n in lengths], dtype=dtype, device=device)[:, 0]
    found, want = (run({**x, "kv_lengths": n}, backend, causal=True) for n in (apart, clamped))
    for name in want:
        assert torch.equal(found[name], want[name]), name


@every
def test_saved_tensors_of_any_stride(backend):
    """Hooks may give back what the backward needs, lse above all, in other strides."""
    x = {n: torch.randn(1, 1, 9, 8, device=device_for(backend)).half() for n in ("q", "k", "v")}
    want = run(x, backend)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda y: torch.stack([y, y], -1), lambda y: y[..., 0]
    ):
        found = run(x, backend)
    for name in want:
        assert torch.equal(found[name], want[name]), name
