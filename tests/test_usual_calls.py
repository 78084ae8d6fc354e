"""Calls that skip Python's checks on the CPU: which they are, and that they compute the same."""

from __future__ import annotations

import fusedattn
import pytest
import torch
from fusedattn import _native
from fusedattn.ops import _library, norm, norm_kernels, softmax, softmax_kernels
from fusedattn.ops.norm_config import NormConfig
from fusedattn.ops.softmax_config import SoftmaxConfig
from torch import Tensor

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

pytestmark = pytest.mark.skipif(_native.cpu is None, reason="needs fusedattn._cpu")


class Subclass(Tensor):
    pass


def sparse() -> Tensor:
    return torch.eye(8).to_sparse()


def left_behind() -> Tensor:
    """Without storage once the transform is over."""
    kept = []
    torch.func.vmap(lambda row: kept.append(row) or row)(torch.ones(3, 8))
    return kept[0]


X, W = torch.randn(4, 8), torch.randn(8)
USUAL_NORMS = {
    "no weight": (X, 8, None, None, None),
    "one row": (W, (8,), W, W, None),
    "of any rank": (torch.randn(1, 2, 1, 2, 1, 8), torch.Size([8]), W, None, None),
    "mixed dtypes": (X.to(BF16), [8], W, W.to(F16), X.to(F64).to(F32)),
    "parameters": (X, 8, torch.nn.Parameter(W), torch.nn.Parameter(W), X.clone()),
    "float64": (X.to(F64), 8, W, None, X.to(F64)),
    "strides of no step": (torch.randn(4, 8)[:1], 8, W, None, None),
}
OTHER_NORMS = {
    "no tensor": ("x", 8, None, None, None),
    "no shape": (X, None, None, None, None),
    "a float": (X, 8.0, None, None, None),
    "a bool": (torch.randn(4, 1), True, None, None, None),
    "beyond 64 bits": (X, 2**64 + 8, None, None, None),
    "another width": (X, 4, None, None, None),
    "two dimensions": (X, (4, 8), None, None, None),
    "integers": (torch.ones(4, 8, dtype=torch.int32), 8, None, None, None),
    "booleans": (torch.ones(4, 8, dtype=torch.bool), 8, None, None, None),
    "complex": (torch.ones(4, 8, dtype=torch.complex64), 8, None, None, None),
    "a subclass": (X.as_subclass(Subclass), 8, None, None, None),
    "a weight of a subclass": (X, 8, W.as_subclass(Subclass), None, None),
    "columns": (torch.randn(8, 4).t(), 8, None, None, None),
    "a slice": (torch.randn(4, 9)[:, :8], 8, None, None, None),
    "no rows": (X[:0], 8, None, None, None),
    "a number": (torch.tensor(1.0), 1, None, None, None),
    "meta": (X.to("meta"), 8, None, None, None),
    "a weight on meta": (X, 8, W.to("meta"), None, None),
    "sparse": (sparse(), 8, None, None, None),
    "without storage": (left_behind(), 8, None, None, None),
    "a weight with steps": (X, 8, torch.randn(16)[::2], None, None),
    "a weight too long": (X, 8, torch.randn(9), None, None),
    "a matrix as bias": (X, 8, W, torch.randn(1, 8), None),
    "an integer weight": (X, 8, torch.ones(8, dtype=torch.int64), None, None),
    "a negative": (torch._neg_view(X), 8, None, None, None),
    "a negative weight": (X, 8, torch._neg_view(W), None, None),
    "x as residual": (X, 8, None, None, X),
    "a residual of another shape": (X, 8, None, None, torch.randn(1, 4, 8)),
    "a residual of other sizes": (X, 8, None, None, torch.randn(3, 8)),
    "a residual in columns": (X, 8, None, None, torch.randn(8, 4).t()),
    "a wider residual": (X, 8, None, None, X.to(F64)),
}
LAYER_NORM = NormConfig(True, 1e-5, 0.0, 0.0)
ROWS, WANTED = torch.rand(4), (F32, None, F32, F32)
# dout, dz, z, weight, mean, rstd, dtypes
USUAL_BACKWARDS = {
    "layer norm": (X, None, X, W, ROWS, ROWS, WANTED),
    "RMS norm": (X, None, X, W, None, ROWS, (F32, None, F32, None)),
    "no weight": (X, None, X, None, ROWS, ROWS, (F32, None, None, None)),
    "a stream": (X.to(BF16), X, X, W, ROWS, ROWS, (BF16, F32, F32, None)),
    "a parameter": (X, X, X, torch.nn.Parameter(W), ROWS, ROWS, WANTED),
}
OTHER_BACKWARDS = {
    "no dout": (None, X, X, W, ROWS, ROWS, WANTED),
    "one number as dout": (torch.ones(()).expand(4, 8), None, X, W, ROWS, ROWS, WANTED),
    "dout of another shape": (X[:2], None, X, W, ROWS, ROWS, WANTED),
    "dout of another dtype": (X.to(BF16), None, X, W, ROWS, ROWS, WANTED),
    "a negative dout": (torch._neg_view(X), None, X, W, ROWS, ROWS, WANTED),
    "dz in columns": (X, torch.randn(8, 4).t(), X, W, ROWS, ROWS, WANTED),
    "a subclass": (X, None, X.as_subclass(Subclass), W, ROWS, ROWS, WANTED),
    "rows of another tensor": (X, None, X, W, ROWS[:2], ROWS[:2], WANTED),
    "a bias alone": (X, None, X, None, ROWS, ROWS, (F32, None, None, F32)),
    "a bias of another dtype": (X, None, X, W, ROWS, ROWS, (F32, None, F32, F64)),
    "a stream of another dtype": (X, None, X, W, ROWS, ROWS, (F32, BF16, F32, F32)),
}
SOFTMAXES = {
    "last": ((X, -1), True),
    "last, counted from the first": ((X, 1), True),
    "of one dimension": ((W, 0), True),
    "of four": ((torch.randn(2, 2, 2, 2, dtype=F64), 3), True),
    "columns": ((torch.randn(8, 4).t(), -1), True),
    "another dimension": ((X, 0), False),
    "out of range": ((X, 2), False),
    "a bool": ((torch.randn(2, 2), True), False),
    "a float": ((X, -1.0), False),
    "beyond 64 bits": ((X, 2**64 - 1), False),
    "of five": ((torch.randn(1, 2, 2, 2, 2), -1), False),
    "a number": ((torch.tensor(1.0), -1), False),
    "no rows": ((X[:0], -1), False),
    "integers": ((torch.ones(4, 8, dtype=torch.int32), -1), False),
    "a subclass": ((X.as_subclass(Subclass), -1), False),
    "meta": ((X.to("meta"), -1), False),
    "a negative": ((torch._neg_view(X), -1), False),
    "without storage": ((left_behind(), -1), False),
}


@pytest.mark.parametrize("arguments", USUAL_NORMS.values(), ids=USUAL_NORMS)
def test_usual_norms(arguments):
    out, z, mean, rstd = _native.cpu.usual_norm_forward(*arguments, LAYER_NORM, False)
    assert out.dtype == arguments[0].dtype
    assert (z is None) == (arguments[4] is None)
    assert mean is rstd is None


@pytest.mark.parametrize("arguments", OTHER_NORMS.values(), ids=OTHER_NORMS)
def test_norms_that_python_looks_at(arguments):
    for with_gradient in (False, True):
        assert _native.cpu.usual_norm_forward(*arguments, LAYER_NORM, with_gradient) is None


@pytest.mark.parametrize("arguments", USUAL_BACKWARDS.values(), ids=USUAL_BACKWARDS)
def test_usual_backwards_of_norms(arguments):
    config = LAYER_NORM._replace(centre=arguments[4] is not None)  # there is a mean
    found = _native.cpu.usual_norm_backward(*arguments, config)
    assert tuple(None if x is None else x.dtype for x in found) == arguments[-1]


@pytest.mark.parametrize("arguments", OTHER_BACKWARDS.values(), ids=OTHER_BACKWARDS)
def test_backwards_of_norms_that_python_looks_at(arguments):
    assert _native.cpu.usual_norm_backward(*arguments, LAYER_NORM) is None


@pytest.mark.parametrize(("arguments", "usual"), SOFTMAXES.values(), ids=SOFTMAXES)
def test_usual_softmaxes(arguments, usual):
    assert _native.cpu.usual_softmax(*arguments) == usual
    config = SoftmaxConfig(0, 1.0)
    assert (_native.cpu.usual_softmax_forward(*arguments, config) is not None) == usual
    x, dim = arguments
    assert (_native.cpu.usual_softmax_backward(X, x, dim, config) is not None) == (
        usual and x.shape == X.shape
    )


def _outcome(call, leaves) -> list[Tensor]:
    """Outputs with and without a gradient, and the gradients."""
    with torch.no_grad():
        alone = call()
    found = call()
    outs = found if isinstance(found, tuple) else (found,)
    grads = torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])
    return [*(alone if isinstance(alone, tuple) else (alone,)), *outs, *grads]


def _check_same(monkeypatch, modules, call, leaves) -> None:
    usual = _outcome(call, leaves)
    looked = []
    for module in modules:
        monkeypatch.setattr(module, "cpu_at_once", looked.append)
    checked = _outcome(call, leaves)
    assert looked
    for a, b in zip(usual, checked, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


@pytest.mark.parametrize("arguments", USUAL_NORMS.values(), ids=USUAL_NORMS)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_a_usual_norm_is_the_checked_one(op, arguments, monkeypatch):
    x, shape, weight, bias, residual = (
        y.detach().clone().requires_grad_() if isinstance(y, Tensor) else y for y in arguments
    )
    bias = bias if op == "layer_norm" else None
    options = {} if op == "rms_norm" else {"bias": bias}
    leaves = [y for y in (x, weight, bias, residual) if y is not None]

    def call():
        return getattr(fusedattn, op)(x, shape, weight, residual=residual, **options)

    _check_same(monkeypatch, (norm, _library), call, leaves)


@pytest.mark.parametrize(
    ("arguments", "usual"), [case for case in SOFTMAXES.values() if case[1]],
    ids=[name for name, case in SOFTMAXES.items() if case[1]],
)  # fmt: skip
def test_a_usual_softmax_is_the_checked_one(arguments, usual, monkeypatch):
    x = arguments[0].detach().clone(memory_format=torch.preserve_format).requires_grad_()
    options = {"scale": 0.5, "causal": x.dim() > 1}
    _check_same(
        monkeypatch, (softmax, _library), lambda: fusedattn.softmax(x, arguments[1], **options), [x]
    )


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "softmax"])
def test_a_usual_call_with_a_gradient_stays_native(op, monkeypatch):
    norms = (norm_kernels.norm_fwd, norm_kernels.norm_bwd)
    for library in (*norms, softmax_kernels.softmax_fwd, softmax_kernels.softmax_bwd):
        monkeypatch.delattr(library, "_run")
    leaves = [y.clone().requires_grad_() for y in (X, W, X)]
    x, weight, residual = leaves
    if op == "softmax":
        fusedattn.softmax(x, -1).backward(torch.ones_like(X))
        assert x.grad is not None
        return
    out, _ = getattr(fusedattn, op)(x, 8, weight, residual=residual)
    out.backward(torch.ones_like(out))
    assert all(y.grad is not None for y in leaves)
