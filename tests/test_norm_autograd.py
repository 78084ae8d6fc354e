"""The norms' autograd contract, layouts, compilation and bad input."""

from __future__ import annotations

import gc
import weakref

import fusedattn
import pytest
import torch
import torch.nn.functional as F
from compare import device_for
from fusedattn.ops.norm_config import NormConfig
from fusedattn.reference import functional as reference
from torch.autograd import forward_ad, gradcheck, gradgradcheck

OPS = ("layer_norm", "rms_norm")
OPTIONS = {"plain": {}, "dropout": {"dropout_p": 0.4, "seed": 7}}
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def leaves(*shapes, dtype=torch.float64, device="cpu"):
    return [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in shapes]


def with_residual(op: str, **options):
    def function(x, residual, weight, bias):
        more = {"bias": bias} if op == "layer_norm" else {"weight_offset": 1.0}
        return getattr(fusedattn, op)(
            x, x.shape[-1], weight, residual=residual, eps=1e-3, **more, **options
        )

    return function


def alone(op: str, **options):
    return lambda x, w: getattr(fusedattn, op)(x, x.shape[-1], w, eps=1e-3, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op, options, fast_backend):
    options = {**options, "backend": fast_backend}
    inputs = leaves((3, 5), (3, 5), (5,), (5,))
    with_bias = inputs if op == "layer_norm" else [*inputs[:3], inputs[3].detach()]
    for check in (gradcheck, gradgradcheck):
        assert check(with_residual(op, **options), with_bias)
        assert check(alone(op, **options), inputs[::2])


@pytest.mark.parametrize("op", OPS)
def test_second_derivatives_of_each_input(op, fast_backend):
    """Whatever subset asks for them, they exist and agree with the formula's."""
    made = leaves((4, 6), (4, 6), (6,), (6,))
    for wanted in ([0], [1], [2], [0, 2], [0, 1, 2]):
        for output in (0, 1):
            found = []
            for backend in (fast_backend, "reference"):
                outputs = with_residual(op, backend=backend)(*made)
                chosen = [made[i] for i in wanted]
                rule = {"allow_unused": True, "materialize_grads": True}
                first = torch.autograd.grad(
                    outputs[output].sin().sum(), chosen, create_graph=True, **rule
                )
                loss = sum(g.square().sum() for g in first)
                if loss.requires_grad:
                    found.append(torch.autograd.grad(loss, made, **rule))
            for pair in zip(*found, strict=True):
                torch.testing.assert_close(*pair, **CLOSE)


def test_a_weight_alone(fast_backend):
    (w,) = leaves((6,))
    out = fusedattn.layer_norm(torch.randn(4, 6).double(), 6, w, backend=fast_backend)
    (grad,) = torch.autograd.grad(out.sum(), w, create_graph=True)
    assert torch.autograd.grad(grad.sum(), w, allow_unused=True) == (None,)


@pytest.mark.parametrize("op", OPS)
def test_transforms(op, fast_backend):
    x, t = torch.randn(2, 3, 4, 6, dtype=torch.float64)

    def fused(x):
        return getattr(fusedattn, op)(x, 6, eps=1e-3, backend=fast_backend)

    def formula(x):
        return getattr(reference, op)(x, 6, eps=1e-3)

    torch.testing.assert_close(torch.vmap(fused)(x), formula(x), **CLOSE)
    pair = torch.func.jvp(fused, (x,), (t,)), torch.func.jvp(formula, (x,), (t,))
    torch.testing.assert_close(*pair, **CLOSE)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(fused(forward_ad.make_dual(x, t))).tangent
    torch.testing.assert_close(found, pair[1][1], **CLOSE)


@pytest.mark.parametrize("op", ["norm_fwd", "norm_bwd"])
@pytest.mark.parametrize("centre", [True, False])
def test_opcheck(op, centre, fast_backend):
    x, r, w, b = (y.detach() for y in leaves((3, 8), (3, 8), (8,), (8,), dtype=torch.float32))
    seed, config = torch.tensor([3]), NormConfig(centre, 1e-5, 0.0, 0.5)
    raw = getattr(torch.ops.fusedattn, op)
    if op == "norm_fwd":
        args = (x, r, w, b, seed, 1, torch.bfloat16, fast_backend, *config, True)
    else:
        mean, rstd = (torch.rand(3) if centre else None), torch.rand(3)
        dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16 if centre else None)
        args = (x, r, x, w, mean, rstd, seed, 1, *dtypes, fast_backend, *config)
    torch.library.opcheck(raw, args)


@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.float32, True), (torch.bfloat16, False)])
def test_compile(dtype, dynamic, fast_backend):
    torch._dynamo.reset()

    def block(x, r, w, b):
        options = {"residual": r, "dropout_p": 0.2, "seed": 3, "backend": fast_backend}
        out, z = fusedattn.layer_norm(x, x.shape[-1], w, b, **options)
        return fusedattn.rms_norm(out, (4, x.shape[-1]), backend=fast_backend) + z

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        made = leaves((rows, 4, 16), (rows, 4, 16), (16,), (16,), dtype=dtype)
        pair = compiled(*made), block(*made)
        torch.testing.assert_close(*pair)
        pair = [torch.autograd.grad(y.square().sum(), made) for y in pair]
        torch.testing.assert_close(*pair)
    torch._dynamo.reset()


def test_meta():
    x = torch.empty(3, 8, device="meta", requires_grad=True)
    out, z = fusedattn.layer_norm(x, 8, residual=x.bfloat16(), dropout_p=0.5)
    assert out.is_meta
    assert z.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


# --- layouts -------------------------------------------------------------------------------------

LAYOUTS = {
    "every other column": lambda: torch.randn(6, 80)[:, ::2],
    "transposed": lambda: torch.randn(40, 6).t(),
    "expanded": lambda: torch.randn(1, 40).expand(6, 40),
    "row slice": lambda: torch.randn(6, 100)[:, 7:47],
    "scalar expanded": lambda: torch.randn(()).expand(6, 40),
    "batch transposed": lambda: torch.randn(3, 2, 40).transpose(0, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_strides(op, layout, dtype, backend):
    """unsloth#10675: of x, of the residual and of what comes back."""
    x = layout().to(device_for(backend), dtype)
    dout = layout().to(x)
    found = []
    for contiguous in (False, True):
        made = [y.contiguous() if contiguous else y for y in (x.detach(), x.flip(0), dout)]
        x_leaf, r_leaf = (y.detach().requires_grad_() for y in made[:2])
        w = torch.ones(40, dtype=dtype, device=x.device).requires_grad_()
        call = getattr(fusedattn, op)
        out, z = call(x_leaf, 40, w, residual=r_leaf, eps=1e-5, backend=backend)
        grads = torch.autograd.grad([out, z], (x_leaf, r_leaf, w), [made[2], made[2]])
        found.append((out, z, *grads))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_gradient_is_left_alone(backend):
    """Liger-Kernel#376: grad_output is read, never written."""
    x = torch.randn(5, 32, device=device_for(backend), requires_grad=True)
    out = fusedattn.layer_norm(x, 32, backend=backend)
    dout = torch.randn_like(out)
    before = dout.clone()
    first = torch.autograd.grad(out, x, dout, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(out, x, dout)[0])
    assert torch.equal(dout, before)
    (x + fusedattn.layer_norm(x, 32, backend=backend)).sum().backward()


@pytest.mark.parametrize("shape", [(0, 8), (1, 0, 8), (3, 0)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_empty(op, shape, backend):
    """pytorch#28614"""
    x = torch.randn(shape, device=device_for(backend), requires_grad=True)
    w = torch.ones(shape[-1:], device=x.device, requires_grad=True)
    out, z = getattr(fusedattn, op)(x, shape[-1:], w, residual=x.detach(), backend=backend)
    assert out.shape == z.shape == shape
    dx, dw = torch.autograd.grad(out.sum() + z.sum(), (x, w))
    assert dx.shape == shape
    assert torch.equal(dw, torch.zeros_like(w))


def test_forwards_without_backward_are_freed(fast_backend):
    """pytorch#25340"""
    x = torch.randn(4, 8, requires_grad=True)
    out, z = fusedattn.layer_norm(x, 8, residual=x.detach(), backend=fast_backend)
    node = weakref.ref(out.grad_fn)
    del out, z
    gc.collect()
    assert node() is None


def test_saved_tensors_pass_through_hooks(fast_backend):
    x = torch.randn(4, 8, requires_grad=True)
    saved: list = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t.detach().numpy().copy(), torch.from_numpy
    )
    with hooks:
        out, _ = fusedattn.layer_norm(x, 8, residual=x.detach(), backend=fast_backend)
    assert sorted(saved) == [(4,), (4,), (4, 8)]  # mean, rstd and z
    (found,) = torch.autograd.grad(out.square().sum(), x)
    again, _ = fusedattn.layer_norm(x, 8, residual=x.detach(), backend=fast_backend)
    assert torch.equal(found, torch.autograd.grad(again.square().sum(), x)[0])


# --- against torch, and bad input ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_torch(dtype, backend):
    x = (torch.randn(5, 48) * 1e-3).to(device_for(backend), dtype)
    rule = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    found = fusedattn.rms_norm(x, [48], backend=backend)
    torch.testing.assert_close(found, F.rms_norm(x, (48,)), **rule)
    found = fusedattn.layer_norm(x, torch.Size([48]), backend=backend)
    torch.testing.assert_close(found, F.layer_norm(x, (48,)), **rule)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "x of dtype torch.int64", {"x": torch.ones(3, 8).long()}),
        (TypeError, "x of type list", {"x": [1.0]}),
        (ValueError, r"x of shape \(3, 8\)", {"normalized_shape": 7}),
        (ValueError, "normalized_shape", {"normalized_shape": ()}),
        (ValueError, "normalized_shape", {"normalized_shape": (1, 3, 8)}),
        (TypeError, "normalized_shape", {"normalized_shape": 8.0}),
        (TypeError, "normalized_shape", {"normalized_shape": (8.0,)}),
        (ValueError, "weight of shape", {"weight": torch.ones(7)}),
        (ValueError, "weight of shape", {"weight": torch.ones(1, 8)}),
        (TypeError, "weight of dtype", {"weight": torch.ones(8).int()}),
        (TypeError, "weight of type float", {"weight": 1.0}),
        (ValueError, "weight on meta", {"weight": torch.ones(8, device="meta")}),
        (ValueError, "residual of shape", {"residual": torch.ones(8)}),
        (ValueError, "without a residual", {"residual_dtype": torch.float32}),
        (TypeError, "residual_dtype", {"residual": torch.ones(3, 8), "residual_dtype": torch.int8}),
        (ValueError, "eps=-1", {"eps": -1.0}),
        (TypeError, "eps of type str", {"eps": "1"}),
        (ValueError, "dropout_p=1.5", {"dropout_p": 1.5}),
        (TypeError, "seed of type", {"dropout_p": 0.5, "seed": 1.0}),
        (TypeError, "seed of dtype", {"dropout_p": 0.5, "seed": torch.ones(1)}),
        (ValueError, "seed of shape", {"dropout_p": 0.5, "seed": torch.ones(2).long()}),
        (ValueError, "seed of 64 bits", {"dropout_p": 0.5, "seed": 2**63}),
        (ValueError, "backend=", {"backend": "cpuu"}),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_bad_input(op, error, match, change):
    arguments = {"x": torch.ones(3, 8), "normalized_shape": 8, **change}
    with pytest.raises(error, match=match):
        getattr(fusedattn, op)(**arguments)
