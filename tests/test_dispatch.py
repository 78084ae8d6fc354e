"""How a call reaches its kernel: what is not plain goes through torch's dispatcher."""

import fusedattn
import pytest
import torch

OPS = {
    "attention": lambda x: fusedattn.attention(x, x, x),
    "layer_norm": lambda x: fusedattn.layer_norm(x, 8),
    "rms_norm": lambda x: fusedattn.rms_norm(x, 8, residual=x)[0],
    "softmax": lambda x: fusedattn.softmax(x),
    "apply_rotary": lambda x: fusedattn.apply_rotary(x, torch.ones(5, 4), torch.ones(5, 4)),
    "add_sinusoidal": lambda x: fusedattn.add_sinusoidal(x),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_what_a_transform_leaves_behind(op, grad):
    """A wrapper that outlives its transform has no storage of its own, but is a tensor still."""
    kept = []

    def loss(x):
        kept.append(x * 2)
        return kept[0].sum()

    x = torch.randn(1, 2, 5, 8)
    torch.func.grad(loss)(x)
    (left,) = kept
    given = (x * 2).requires_grad_()
    with torch.set_grad_enabled(grad):
        found, want = OPS[op](left), OPS[op](given)
    torch.testing.assert_close(found.detach(), want.detach())


@pytest.mark.parametrize("op", OPS)
def test_empty_tensors(op):
    x = torch.randn(0, 2, 5, 8, requires_grad=True)
    out = OPS[op](x)
    out.sum().backward()
    assert out.shape == x.shape
    assert x.grad is not None


@pytest.mark.parametrize("name", ["Attention", "Norm", "Rotary", "Sinusoidal", "Softmax"])
def test_functions_refuse_transforms(name):
    """They have no rule for torch.func; its `apply` says so, and is theirs in public."""
    function = getattr(fusedattn.autograd, name)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: function.apply(x).sum())(torch.randn(3))
