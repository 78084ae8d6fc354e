"""`fusedattn.replace`: what it swaps, what it leaves, and the way back."""

from __future__ import annotations

import copy

import fusedattn
import pytest
import torch
from compare import check
from torch import nn


class Mixed(nn.Module):
    """One of everything that is swapped, one norm in two places, and look-alikes that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.norms = nn.ModuleList([nn.RMSNorm(32), nn.LayerNorm((4, 8))])
        self.again = self.norms[0]
        self.softmax = nn.Softmax(dim=1)
        self.unclear = nn.Softmax()
        self.other = nn.GroupNorm(4, 32)

        class Scaled(nn.LayerNorm):
            def forward(self, x):
                return 2 * super().forward(x)

        self.subclass = Scaled(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(self.norms[0](self.encoder(x)))
        x = self.norms[1](x.unflatten(-1, (4, 8))).flatten(-2)
        return self.subclass(self.softmax(x))


SWAPPED = {
    "encoder.self_attn": "MultiheadAttention",
    "encoder.norm1": "LayerNorm",
    "encoder.norm2": "LayerNorm",
    "norms.0": "RMSNorm",
    "norms.1": "LayerNorm",
    "softmax": "Softmax",
}


@pytest.mark.parametrize("training", [True, False])
def test_swaps_in_place_and_computes_the_same(training):
    model = Mixed().train(training)
    plain = copy.deepcopy(model)
    x = torch.randn(2, 7, 32)
    modules = dict(model.named_modules())
    done = fusedattn.replace(model)
    assert {name: new.__name__ for name, (_, new) in done.changed.items()} == SWAPPED
    assert list(done) == list(done.changed)
    assert len(done) == 6
    assert all(modules[name] is module for name, module in model.named_modules())
    for name in SWAPPED:
        assert type(modules[name]).__module__.startswith("fusedattn.nn")
    for name in ("unclear", "other", "subclass"):
        assert not type(modules[name]).__module__.startswith("fusedattn.nn")
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(model(x), plain(x))
    if training:
        exact = copy.deepcopy(plain).double()
        for each, y in ((model, x), (plain, x), (exact, x.double())):
            each(y).square().sum().backward()
        triples = zip(model.named_parameters(), exact.parameters(), plain.parameters(), strict=True)
        for (name, got), ref, eager in triples:
            if ref.grad is not None:
                check(got.grad, ref.grad, eager.grad, what=name, gradient=True)


def test_runs_our_kernels_where_torch_has_a_fast_path(monkeypatch):
    """An encoder layer in evaluation computes attention and norms without calling them."""
    model = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True).eval()
    fusedattn.replace(model)
    called = []
    for name in ("self_attn", "norm1", "norm2"):
        getattr(model, name).register_forward_hook(lambda *a, name=name: called.append(name))
    with torch.no_grad():
        model(torch.randn(2, 5, 32))
    assert called == ["self_attn", "norm1", "norm2"]


def test_undo_restores_classes_and_flags():
    model = Mixed().eval()
    before = {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
    done = fusedattn.replace(model)
    done.undo()
    for name, module in model.named_modules():
        kind, attributes = before[name]
        assert type(module) is kind
        assert vars(module) == attributes
    done.undo()  # twice does no harm
    with fusedattn.replace(model) as done:
        assert len(done) == 6
    assert type(model.softmax) is nn.Softmax


def test_twice_changes_nothing_more():
    model = Mixed()
    fusedattn.replace(model)
    assert len(fusedattn.replace(model)) == 0


def test_the_model_itself_and_its_optimizer():
    model = nn.LayerNorm(8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    done = fusedattn.replace(model)
    assert type(model) is fusedattn.nn.LayerNorm
    assert "(the model itself): torch.nn.modules.normalization.LayerNorm" in repr(done)
    before = model.weight.clone()
    model(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.weight)


def test_copies_and_pickles_keep_the_fused_class():
    model = nn.Sequential(nn.LayerNorm(8))
    fusedattn.replace(model)
    assert type(copy.deepcopy(model)[0]) is fusedattn.nn.LayerNorm


def test_compiles_without_a_break():
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.RMSNorm(16), nn.Softmax(-1))
    fusedattn.replace(model)
    x = torch.randn(4, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_a_model_that_is_none():
    with pytest.raises(TypeError, match="replace: got model of type list, expected a Module"):
        fusedattn.replace([nn.LayerNorm(3)])
