"""What softmax makes of strides, of empty tensors and of bad arguments; compiled; the module."""

from __future__ import annotations

import contextlib
import pickle

import fusedattn
import pytest
import torch
from cases.softmax import check_softmax
from compare import far_apart

BF16, F32 = torch.bfloat16, torch.float32

LAYOUTS = {
    "column slice": lambda: torch.randn(33, 90)[:, 7:77],
    "every other column": lambda: torch.randn(33, 140)[:, ::2],
    "every other row": lambda: torch.randn(66, 70)[::2],
    "rows of one": lambda: torch.randn(1, 70).expand(33, 70),
    "one number": lambda: torch.randn(()).expand(33, 70),
    "heads between": lambda: torch.randn(2, 9, 3, 40).transpose(1, 2),
    "batch strided": lambda: torch.randn(4, 3, 9, 40)[::2, :, 1:],
}


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_change_nothing(make, dtype, backend):
    x = make().to(dtype, memory_format=torch.preserve_format)
    dense = x.contiguous()
    for options in ({}, {"causal": True}, {"mask": torch.rand(dense.shape) < 0.7}):
        out = fusedattn.softmax(x, backend=backend, **options)
        want = fusedattn.softmax(dense, backend=backend, **options)
        assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_permuted(dim, dtype, backend):
    """Rows side by side in memory, in every dimension; the sums run in another order."""
    x = torch.randn(3, 20, 18, 33).to(dtype)
    for order in ((0, 1, 3, 2), (3, 2, 1, 0), (0, 2, 3, 1)):
        y = x.permute(order)
        mask = torch.rand(x.shape).permute(order) < 0.7
        found = check_softmax(y, backend, dim, mask=mask)
        assert found["out"].stride() == torch.empty_like(y).stride()
    check_softmax(x.transpose(2, 3), backend, causal=True)


@pytest.mark.parametrize("dim", [-1, 0])
def test_mask_and_bias_of_any_layout(dim, backend):
    """pytorch#158424: slices, transposes and steps of a larger mask are read as they lie."""
    x = torch.randn(40, 50)
    masks = [torch.rand(40, 127)[:, 77:], torch.rand(50, 40).t(), torch.rand(40, 100)[:, ::2]]
    for values in masks:
        mask = values < 0.6
        out = fusedattn.softmax(x, dim, mask=mask, bias=values, backend=backend)
        want = fusedattn.softmax(
            x, dim, mask=mask.contiguous(), bias=values.contiguous(), backend=backend
        )
        torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_stride_beyond_int32(fast_backend):
    """Liger-Kernel#803: offsets of 2³¹ elements; pages that nothing touches cost nothing."""
    x = far_apart(torch.randn(2, 64).to(BF16), 2**31)
    out = fusedattn.softmax(x, backend=fast_backend)
    assert torch.equal(out, fusedattn.softmax(x.contiguous(), backend=fast_backend))


EMPTY = [
    ((0, 4), -1),
    ((4, 0), -1),
    ((4, 0), 0),
    ((2, 0, 3, 5), 1),
    ((0,), 0),
    ((1, 2, 0, 2, 3), 4),
]


@pytest.mark.parametrize(("shape", "dim"), EMPTY, ids=str)
def test_empty(shape, dim, backend):
    x = torch.empty(shape, requires_grad=True)
    bias = torch.zeros(shape[-1], requires_grad=True)
    out = fusedattn.softmax(x, dim, bias=bias, backend=backend)
    assert out.shape == shape
    out.sum().backward()
    assert x.grad.shape == shape
    assert (bias.grad == 0).all()


def of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


# What is passed, the error, and what its message names: argument, what was got, what is expected.
BAD = {
    "x is a list": ({"x": [1.0]}, TypeError, ["x of type list", "a dense float32, bf"]),
    "integers": ({"x": of(torch.int64, 3)}, TypeError, ["x of dtype torch.int64", "float16"]),
    "dim too high": ({"dim": 3}, ValueError, ["dim=3", "-3 <= dim < 3", "3 dimensions"]),
    "dim too low": ({"dim": -4}, ValueError, ["dim=-4", "-3 <= dim < 3"]),
    "dim is a float": ({"dim": 1.0}, TypeError, ["dim of type float", "expected an int"]),
    "dim of a scalar": ({"x": of(F32), "dim": 1}, ValueError, ["dim=1", "-1 <= dim < 1"]),
    "causal misspelt": ({"causal": "lower"}, ValueError, ["causal='lower'", "'top_left'"]),
    "causal and dim": ({"causal": True, "dim": 1}, ValueError, ["causal=True", "expected dim=-1"]),
    "causal of rank 1": ({"x": of(F32, 3), "causal": True}, ValueError, ["at least 2 dimensions"]),
    "scale is a string": ({"scale": "1"}, TypeError, ["scale of type str", "expected a float"]),
    "float mask": ({"mask": of(F32, 4)}, TypeError, ["mask", "torch.float32", "passed as bias"]),
    "mask is a list": ({"mask": [True]}, TypeError, ["mask of type list", "a dense bool"]),
    "mask does not broadcast": ({"mask": of(torch.bool, 3)}, ValueError, ["(3,)", "(2, 3, 4)"]),
    "mask of higher rank": ({"mask": of(torch.bool, 1, 2, 3, 4)}, ValueError, ["(1, 2, 3, 4)"]),
    "mask elsewhere": ({"mask": of(torch.bool, 4).to("meta")}, ValueError, ["mask on meta", "cpu"]),
    "integer bias": ({"bias": of(torch.int32, 4)}, TypeError, ["bias", "torch.int32", "float32"]),
    "float64 bias": ({"bias": of(torch.float64, 4)}, TypeError, ["torch.float64", "bfloat16"]),
    "bias is a float": ({"bias": 1.0}, TypeError, ["bias of type float", "a dense float32, bf"]),
    "bias does not broadcast": ({"bias": of(F32, 2, 1)}, ValueError, ["bias of shape (2, 1)"]),
    "unknown backend": ({"backend": "cuda9"}, ValueError, ["backend='cuda9'", "'reference'"]),
}  # fmt: skip


@pytest.mark.parametrize(("options", "error", "parts"), BAD.values(), ids=BAD)
def test_bad_argument(options, error, parts):
    with pytest.raises(error, match=r"^softmax: got ") as raised:
        fusedattn.softmax(**{"x": torch.zeros(2, 3, 4)} | options)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.slow
def test_inductor(fast_backend):
    torch._dynamo.reset()

    def function(x, mask, bias):
        y = fusedattn.softmax(2 * x, 1, mask=mask, bias=bias, backend=fast_backend)
        return y + fusedattn.softmax(x, causal=True, scale=0.5, backend=fast_backend).sin()

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for rows, width in ((6, 9), (11, 7)):
        x, bias = (torch.randn(s, requires_grad=True) for s in ((2, 3, rows, width), (rows, 1)))
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
