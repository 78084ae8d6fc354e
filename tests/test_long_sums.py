"""Many keys, rows and elements: the error of a sum does not grow with them, whoever adds it up."""

from __future__ import annotations

import fusedattn
import pytest
import torch
from cases.norm import NormCase, check_norm
from compare import check
from fusedattn import _native
from fusedattn.reference import functional as reference

pytestmark = pytest.mark.skipif(_native.cpu is None, reason="needs fusedattn._cpu")


def on_threads(count: int, function):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("queries", [1, 4], ids=["one query", "a few"])
def test_few_queries_of_many_keys(queries, instruction_set):
    """Values with a mean, which one chain of additions would round at the size of its sum."""
    q, k = torch.randn(1, 1, queries, 64), torch.randn(1, 1, 2**16, 64)
    v = torch.randn(1, 1, 2**16, 64) + 1
    found = [on_threads(n, lambda: fusedattn.attention(q, k, v)) for n in (1, 2)]
    assert torch.equal(*found)
    ref = reference.attention(q.double(), k.double(), v.double())[0]
    check(found[0], ref, reference.attention(q, k, v)[0], what="out", case=instruction_set)


def test_decoding_depends_on_the_number_of_keys_alone(instruction_set):
    """Not on the threads, nor on what else is in the batch."""
    q, k, v = torch.randn(3, 4, 1, 32), torch.randn(3, 2, 3000, 32), torch.randn(3, 2, 3000, 32)
    lengths = torch.tensor([3000, 0, 777])
    one, two = (
        on_threads(n, lambda: fusedattn.attention(q, k, v, kv_lengths=lengths)) for n in (1, 2)
    )
    assert torch.equal(one, two)
    for b, n in enumerate(lengths):
        alone = fusedattn.attention(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
        assert torch.equal(one[b : b + 1], alone)


@pytest.mark.parametrize("shared", ["batch", "queries", "keys"])
def test_a_bias_added_to_many_scores(shared):
    shape = {"batch": (600, 1, 2, 8), "queries": (1, 1, 3000, 4), "keys": (1, 1, 2, 5000)}[shared]
    batch, heads, seq_q, seq_k = shape
    of_bias = {"batch": (1, 1, 2, 8), "queries": (1, 1, 1, 4), "keys": (1, 1, 2, 1)}[shared]
    made = [torch.randn(batch, heads, n, 8) for n in (seq_q, seq_k, seq_k)]
    bias, dout = torch.randn(of_bias), torch.randn(batch, heads, seq_q, 8) + 1

    def gradient(attention, dtype):
        q, k, v = (x.to(dtype) for x in made)
        leaf = bias.to(dtype).requires_grad_()
        out = attention(q, k, v, bias=leaf)
        out = out[0] if isinstance(out, tuple) else out
        return torch.autograd.grad(out, leaf, dout.to(dtype))[0]

    found = gradient(fusedattn.attention, torch.float32)
    ref, eager = (gradient(reference.attention, t) for t in (torch.float64, torch.float32))
    check(found, ref, eager, what="dbias", case=shared, gradient=True)


@pytest.mark.parametrize("kept", [0.1, 0.01])
@pytest.mark.parametrize("width", [1024, 2048, 8192])
def test_layer_norm_of_sparse_rows(width, kept, instruction_set):
    """A row that begins with zeros says little of its mean."""
    case = NormCase(shape=(200, width), weight=None, bias=None)
    made = case.inputs()
    made["x"] *= torch.rand(made["x"].shape) < kept
    check_norm(case, "cpu", made, ill=True)


@pytest.mark.parametrize("eps", [1e-5, 1e-12])
@pytest.mark.parametrize("value", [0.1, 1e3])
def test_the_oracle_on_constant_rows(value, eps):
    """Whatever eps: the mean of a row of equal elements is that element."""
    out = reference.layer_norm(torch.full((2, 1000), value), 1000, eps=eps)
    assert out.abs().max() <= 1e-3
