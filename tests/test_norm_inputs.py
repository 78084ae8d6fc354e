"""What the norms make of strides, of empty tensors and of bad arguments."""

from __future__ import annotations

import fusedattn
import pytest
import torch
import torch.nn.functional as F
from compare import device_for

OPS = ("layer_norm", "rms_norm")

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
