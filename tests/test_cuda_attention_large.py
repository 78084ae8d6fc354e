"""Attention in CUDA C++ where a GPU is full: many blocks, long rows, other streams.

On the emulator the same on a few blocks.
"""

from __future__ import annotations

import dataclasses

import fusedattn
import pytest
import torch
from cases import BF16, F16
from cases.attention import AttentionCase, check_attention
from compare import device_for, far_apart

pytestmark = pytest.mark.backends("cuda_emulated", "cuda")


def sized(backend: str, small: dict, large: dict) -> AttentionCase:
    case = AttentionCase(**{"dtype": BF16, **small})
    return dataclasses.replace(case, **large) if backend == "cuda" else case


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_many_blocks(dim: int, causal: bool, backend: str) -> None:
    small = {"batch": 1, "heads": 2, "kv_heads": 1, "seq_q": 40, "dim": dim, "causal": causal}
    large = {"batch": 2, "heads": 16, "kv_heads": 4, "seq_q": 1001, "seq_k": 1111}
    check_attention(sized(backend, small, large), backend)


@pytest.mark.parametrize("dim", [64, 128])
def test_long_rows(dim: int, backend: str) -> None:
    small = {"batch": 1, "heads": 1, "seq_q": 20, "seq_k": 260, "dim": dim, "dtype": F16}
    check_attention(sized(backend, small, {"seq_q": 200, "seq_k": 9000, "heads": 4}), backend)


def gradients(made: dict, deterministic: bool, backend: str) -> list:
    leaves = [made[name].detach().requires_grad_() for name in "qkv"]
    out = fusedattn.attention(*leaves, causal=True, deterministic=deterministic, backend=backend)
    return [out, *torch.autograd.grad(out, leaves, made["dout"])]


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_deterministic_gradients_are_the_same_bit_for_bit(dim: int, backend: str) -> None:
    small = {"batch": 1, "heads": 2, "kv_heads": 1, "seq_q": 70, "dim": dim}
    case = sized(backend, small, {"batch": 2, "heads": 16, "kv_heads": 4, "seq_q": 1001})
    made = case.inputs(device_for(backend))
    want = gradients(made, True, backend)
    for _ in range(10 if backend == "cuda" else 2):
        found = gradients(made, True, backend)
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
    fast = gradients(made, False, backend)
    assert all(torch.equal(fast[n], want[n]) for n in (0, 2, 3))
    torch.testing.assert_close(fast[1], want[1], rtol=0.02, atol=0.02)


def test_more_heads_than_a_grid_dimension_has(backend: str) -> None:
    small = {"batch": 70, "heads": 1, "seq_q": 1, "seq_k": 2, "dim": 16}
    check_attention(sized(backend, small, {"batch": 70_000}), backend)


@pytest.mark.gpu
def test_on_another_stream() -> None:
    """What the stream is still computing is waited for: the inputs are scaled right before."""
    made = AttentionCase(heads=8, seq_q=700, dim=64, dtype=BF16).inputs("cuda")
    want = gradients(made, True, "cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(stream):
            late = {n: x if x is None else (x * 2).mul_(0.5) for n, x in made.items()}
            found = gradients(late, True, "cuda")
        stream.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_offsets_past_two_billion_elements(name: str) -> None:
    """Rows so far apart that their offsets pass 2³¹ elements: address space, not memory."""
    seq, stride = 34, 2**26
    case = AttentionCase(batch=1, heads=1, seq_q=seq, dim=64, dtype=BF16)
    made = case.inputs("cuda")
    want = gradients(made, True, "cuda")
    found = gradients(made | {name: far_apart(made[name], stride)}, True, "cuda")
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
