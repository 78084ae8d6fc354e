"""add_sinusoidal against the oracle: shapes, far positions, gradients, compile, bad input."""

from __future__ import annotations

import fusedattn
import pytest
import torch
from cases.position import check_sinusoidal
from compare import device_for, ulp
from fusedattn.reference import functional as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


SHAPES = {
    "vectors": (2, 9, 64), "wide": (1, 5, 1000), "odd": (3, 7, 45), "narrow": (2, 5, 1),
    "rank-2": (9, 48), "rank-4": (2, 3, 5, 32), "many-rows": (2, 300, 96),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(dtype, shape, instruction_set):
    x = torch.randn(SHAPES[shape], dtype=torch.float64).to(dtype)
    check_sinusoidal(x, "cpu", scale=1.5, offset=3)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_positions(index, backend):
    x = torch.randn(2, 6, 40)
    for shape in ((6,), (1, 6), (2, 6)):
        check_sinusoidal(x, backend, positions=torch.randint(0, 5000, shape).to(index), offset=7)
    check_sinusoidal(x[None], backend, positions=torch.randint(0, 99, (1, 2, 6)).to(index))
    # Decoding: each sequence is at a position of its own.
    check_sinusoidal(x[:, :1], backend, positions=torch.tensor([[3], [8]]).to(index))


def test_positions_of_32_bits_do_not_wrap(any_backend):
    x = torch.zeros(1, 2, 8, device=device_for(any_backend))
    last = torch.tensor([5, 2**31 - 1], device=x.device)
    found, want = (
        fusedattn.add_sinusoidal(x, positions=positions, offset=offset, backend=any_backend)
        for positions, offset in ((last.int(), 1), (last + 1, 0))
    )
    assert torch.equal(found, want)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("first", [0, 255, 65_535, 1_000_000, 2**27 - 32])
def test_an_ulp_at_any_position(first, dtype, instruction_set):
    """gpt-neox#1003, sglang-jax#1473: fp32 phases are off by 6e-2 at position 10⁶."""
    x = torch.zeros(1, 64, 128, dtype=dtype)
    out = fusedattn.add_sinusoidal(x, offset=first, backend="cpu")
    want = reference.add_sinusoidal(x.double(), offset=first)
    assert (out.double() - want).abs().max() <= ulp(1.0, dtype)


def test_no_position_leaves_the_circle(instruction_set):
    x, offset = torch.zeros(1, 1, 40), torch.tensor([2**61])
    assert fusedattn.add_sinusoidal(x, offset=offset, backend="cpu").abs().max() <= 1.0


def test_strides(instruction_set):
    x = torch.randn(3, 7, 40)
    want = fusedattn.add_sinusoidal(x, backend="cpu")
    apart = (x.mT.contiguous().mT, x.repeat_interleave(2, -1)[..., ::2], x.flip(1).flip(1))
    for each in apart:
        assert torch.equal(fusedattn.add_sinusoidal(each, backend="cpu"), want)


def test_empty(backend):
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        assert fusedattn.add_sinusoidal(torch.empty(shape), backend=backend).shape == shape


BAD = {
    "integer": ({"x": torch.zeros(2, 4).long()}, TypeError, "x of dtype"),
    "rank": ({"x": torch.zeros(4)}, ValueError, "at least 2"),
    "positions": ({"positions": torch.zeros(4)}, TypeError, "positions of dtype"),
    "shape": ({"positions": torch.zeros(5).long()}, ValueError, r"expected \(4,\)"),
    "device": ({"positions": torch.zeros(4, device="meta").long()}, ValueError, "on meta"),
    "offset": ({"offset": 0.5}, TypeError, "offset of type float"),
    "offset tensor": ({"offset": torch.zeros(2).long()}, ValueError, "expected one number"),
    "base": ({"base": 0.0}, ValueError, "base=0.0"),
    "scale": ({"scale": "1"}, TypeError, "scale of type str"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changed, error, message = BAD[name]
    with pytest.raises(error, match=message):
        fusedattn.add_sinusoidal(**{"x": torch.zeros(2, 4, 6), **changed})
