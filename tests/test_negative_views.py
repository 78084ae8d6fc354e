"""Tensors that stand for the negative of their memory, as z.conj().imag does, in every op."""

from __future__ import annotations

import fusedattn
import pytest
import torch
from torch import Tensor


def lazily_negated(*shape: int) -> Tensor:
    x = torch.randn(*shape, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    return x


Q, TABLE = (1, 2, 6, 8), (6, 4)
OPS = {
    "attention": (fusedattn.attention, [Q, Q, Q]),
    "attention, bias": (
        lambda q, k, v, bias: fusedattn.attention(q, k, v, bias=bias),
        [Q, Q, Q, (6, 6)],
    ),
    "layer norm": (lambda x, w, b: fusedattn.layer_norm(x, 8, w, b), [(5, 8), (8,), (8,)]),
    "residual": (
        lambda x, r, w: sum(fusedattn.rms_norm(x, 8, w, residual=r)),
        [(5, 8), (5, 8), (8,)],
    ),
    "softmax": (fusedattn.softmax, [(5, 8)]),
    "softmax, bias": (lambda x, b: fusedattn.softmax(x, bias=b), [(5, 8), (8,)]),
    "rotary": (fusedattn.apply_rotary, [Q, TABLE, TABLE]),
    "sinusoidal": (fusedattn.add_sinusoidal, [(2, 6, 8)]),
    "swiglu": (fusedattn.swiglu, [(5, 8), (5, 8)]),
}


@pytest.mark.parametrize(("op", "shapes"), OPS.values(), ids=OPS)
def test_negative_views(op, shapes):
    """Each argument in turn, and the gradient."""
    plain = [torch.randn(shape) for shape in shapes]
    for i, shape in enumerate(shapes):
        negative = lazily_negated(*shape)
        args = [*plain[:i], negative, *plain[i + 1 :]]
        dense = [*plain[:i], negative.resolve_neg().clone(), *plain[i + 1 :]]
        assert torch.equal(op(*args), op(*dense))
        dout = lazily_negated(*op(*args).shape)
        for x in (args[0], dense[0]):
            x.requires_grad_()
        (found,) = torch.autograd.grad(op(*args), args[0], dout)
        (want,) = torch.autograd.grad(op(*dense), dense[0], dout.resolve_neg().clone())
        assert torch.equal(found, want)
        plain[0].requires_grad_(False)


def test_rotary_in_place():
    x, cos, sin = lazily_negated(*Q), torch.randn(TABLE), torch.randn(TABLE)
    want = fusedattn.apply_rotary(x, cos, sin)
    assert torch.equal(fusedattn.apply_rotary(x, cos, sin, inplace=True), want)
    assert torch.equal(x, want)
