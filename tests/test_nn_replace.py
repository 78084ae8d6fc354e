"""`fusedattn.replace`: what it swaps, what it leaves, and the way back."""

from __future__ import annotations

import copy
import io
import pickle

import fusedattn
import pytest
import torch
from compare import check
from torch import nn
from torch.nn.utils import parametrize


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
    "encoder": "TransformerEncoderLayer",
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
    assert {name: new.__name__ for name, (_, new) in done.items()} == SWAPPED
    assert dict(done)[next(iter(done))] == done[next(iter(done))]
    assert len(done) == 7
    assert all(modules[name] is module for name, module in model.named_modules())
    assert done.left.keys() == {"unclear", "subclass"}
    assert "\n  unclear: left, for it has no dim\n  subclass: left, for test_nn_rep" in repr(done)
    assert "Scaled is a subclass of torch.nn.LayerNorm, and may" in done.left["subclass"]
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
        assert len(done) == 7
    assert type(model.softmax) is nn.Softmax


def test_twice_changes_nothing_more():
    model = Mixed()
    fusedattn.replace(model)
    assert len(fusedattn.replace(model)) == 0


def test_transformers_and_their_subclasses():
    """A class that overrides is reported and keeps its ways; what it consists of is replaced."""

    class Own(nn.TransformerEncoderLayer):
        def forward(self, src, *args, **kwargs):
            return super().forward(2 * src, *args, **kwargs)

    own = nn.TransformerEncoder(Own(32, 4, 64, 0.0, batch_first=True), 1)
    model = nn.Transformer(32, 4, 1, 1, 64, 0.0, custom_encoder=own, batch_first=True).eval()
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        expected = model(x, x)
        done = fusedattn.replace(model)
        torch.testing.assert_close(model(x, x), expected)
    assert done.left.keys() == {"encoder.layers.0"}
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["encoder.layers.0"] == "Own"
    assert done["encoder.layers.0.self_attn"][1] is fusedattn.nn.MultiheadAttention
    for name in ("", "encoder", "decoder", "decoder.layers.0"):
        assert done[name][1] is getattr(fusedattn.nn, kinds[name])
    done.undo()
    assert type(model.decoder.layers[0]) is nn.TransformerDecoderLayer


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


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}
COPIES["saved"] = saved


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_can_be_undone(how):
    model = nn.Sequential(
        nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True),
        nn.ModuleList([nn.RMSNorm(32), nn.Softmax(-1), fusedattn.nn.LayerNorm(32)]),
    )
    before = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    done = fusedattn.replace(model)
    twin = COPIES[how](model)
    of_twin = fusedattn.Replacement.of(twin)
    assert dict(of_twin) == dict(done)
    assert type(twin[1][0]) is fusedattn.nn.RMSNorm
    of_twin.undo()
    assert len(fusedattn.Replacement.of(twin)) == 0
    for name, module in twin.named_modules():  # what was a fused one before stays one
        assert (type(module), set(vars(module))) == before[name]
        assert not module._forward_pre_hooks
    assert type(model[1][0]) is fusedattn.nn.RMSNorm
    done.undo()
    assert type(model[1][0]) is nn.RMSNorm


def test_undo_leaves_what_others_have_changed_and_says_so():
    model = Mixed().eval()
    done = fusedattn.replace(model)
    for module in (model.norms[0], model.encoder.self_attn.out_proj):
        parametrize.register_parametrization(module, "weight", nn.Tanh())
    model.softmax.__class__ = type("Mine", (fusedattn.nn.Softmax,), {})
    x = torch.randn(2, 7, 32)
    expected = model(x)
    message = r"left as they are.*: norms.0 \(ParametrizedRMSNorm\), softmax \(Mine\)$"
    with pytest.warns(UserWarning, match=message) as warned:
        done.undo()
    assert warned[0].filename == __file__
    assert type(model.encoder.self_attn) is nn.MultiheadAttention
    torch.testing.assert_close(model(x), expected)
    parametrize.remove_parametrizations(model.norms[0], "weight")
    model.softmax.__class__ = fusedattn.nn.Softmax
    done.undo()
    assert type(model.norms[0]) is nn.RMSNorm
    assert type(model.softmax) is nn.Softmax


def test_undo_after_an_exception_and_of_a_shared_module():
    shared = nn.LayerNorm(8)
    one, other = nn.Sequential(shared, nn.Softmax(-1)), nn.Sequential(shared)

    def fail_within() -> None:
        with fusedattn.replace(one):
            inner = fusedattn.replace(other)
            assert len(inner) == 0
            inner.undo()
            assert type(shared) is fusedattn.nn.LayerNorm
            raise KeyError

    with pytest.raises(KeyError):
        fail_within()
    assert type(shared) is nn.LayerNorm
    assert type(one[1]) is nn.Softmax
    with fusedattn.replace(one):
        fusedattn.Replacement.of(other).undo()
        assert type(shared) is nn.LayerNorm  # and the exit finds it undone


def test_compiles_without_a_break_and_anew_after_undo(monkeypatch):
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.RMSNorm(16), nn.Softmax(-1))
    done = fusedattn.replace(model)
    x = torch.randn(4, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    done.undo()
    monkeypatch.setattr(fusedattn.nn.norm, "layer_norm", None)  # nothing of ours is called
    torch.testing.assert_close(compiled(x), model(x))


def test_a_model_that_is_none():
    with pytest.raises(TypeError, match="replace: got model of type list, expected a Module"):
        fusedattn.replace([nn.LayerNorm(3)])
    with pytest.raises(TypeError, match=r"Replacement.of: got model of type NoneType, expected a"):
        fusedattn.Replacement.of(None)
