"""LayerNorm and RMSNorm as modules: torch's state and results, residual and dropout."""

from __future__ import annotations

import pytest
import torch
from fusedattn.nn import LayerNorm, RMSNorm

PAIRS = {"layer": (LayerNorm, torch.nn.LayerNorm), "rms": (RMSNorm, torch.nn.RMSNorm)}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [8, (4, 8)], ids=str)
@pytest.mark.parametrize(("ours", "torchs"), PAIRS.values(), ids=PAIRS)
def test_drop_in(ours, torchs, shape, affine):
    twin = torchs(shape, elementwise_affine=affine)
    for parameter in twin.parameters():
        torch.nn.init.normal_(parameter)
    module = ours(shape, elementwise_affine=affine)
    module.load_state_dict(twin.state_dict())
    assert list(module.state_dict()) == list(twin.state_dict())
    x = torch.randn(3, 4, 8)
    torch.testing.assert_close(module(x), twin(x))
    assert repr(module) == repr(twin)


def test_residual():
    x, r = torch.randn(3, 8).bfloat16(), torch.randn(3, 8)
    out, z = LayerNorm(8)(x, r)
    assert (out.dtype, z.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(z, x.float() + r)
    assert RMSNorm(8, residual_dtype=torch.float64)(x, r)[1].dtype == torch.float64


def test_weight_offset_starts_as_the_same_function():
    x = torch.randn(3, 8)
    gemma = RMSNorm(8, weight_offset=1.0)
    assert not gemma.weight.any()
    torch.testing.assert_close(gemma(x), RMSNorm(8)(x))
    assert "weight_offset=1.0" in repr(gemma)


def test_dropout_only_while_training():
    x = torch.randn(50, 8)
    module = LayerNorm(8, dropout_p=0.5)
    assert not torch.equal(module(x), module(x))
    torch.testing.assert_close(module.eval()(x), torch.nn.LayerNorm(8)(x))
    assert "dropout_p=0.5" in repr(module)


@pytest.mark.parametrize("module", [LayerNorm, RMSNorm])
def test_bad_dropout(module):
    with pytest.raises(ValueError, match="dropout_p=2"):
        module(8, dropout_p=2)
