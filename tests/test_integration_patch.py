"""`fusedattn.patch`: what it finds in a live model, that it computes the same, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import fusedattn
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

hf = pytest.importorskip("cases.hf")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    fusedattn.integrations.transformers.unregister()


OURS = "attn_implementation='fusedattn'"
# How many modules run what.
FOUND = {
    "llama": {OURS: 1, "fusedattn.apply_rotary_qk": 2, "fusedattn.rms_norm": 5,
              "fusedattn.swiglu of silu": 2},
    "gemma3": {OURS: 1, "fusedattn.apply_rotary_qk": 2, "fusedattn.rms_norm of 1 + weight": 13,
               "fusedattn.swiglu of gelu_tanh": 2},
    "phi3": {OURS: 1, "fusedattn.apply_rotary_qk": 2, "fusedattn.rms_norm": 5,
             "fusedattn.swiglu of silu": 2},
    "deepseek_v3": {OURS: 1, "fusedattn.apply_rotary_qk": 2, "fusedattn.rms_norm": 9,
                    "fusedattn.swiglu of silu": 2},
    "gpt_neox": {OURS: 1, "fusedattn.apply_rotary_qk": 2, "fusedattn.nn.LayerNorm": 5},
    "t5": {OURS: 1, "fusedattn.rms_norm": 12},
    "bert": {OURS: 1, "fusedattn.nn.LayerNorm": 6},
    "clip": {OURS: 1, "fusedattn.nn.LayerNorm": 11},
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_models(name: str) -> None:
    model = hf.build(name)
    states = {n: (m.__class__, set(vars(m))) for n, m in model.named_modules()}
    given = hf.inputs(name, "right" if name in ("llama", "bert") else "none")
    done = []
    hf.compared(model, given, name, lambda model: done.append(fusedattn.patch(model)))
    (patch,) = done
    found = [what for each in patch.values() for what in each.split(", ")]
    assert {what: found.count(what) for what in found} == FOUND[name]
    want = model(**given, **({} if "labels" in given else {"return_loss": True})).loss
    twin = copy.deepcopy(model)
    patch.undo()
    patch.undo()
    assert model.config._attn_implementation == "eager"
    for n, module in model.named_modules():
        assert (module.__class__, set(vars(module))) == states[n]
        assert "forward" not in vars(module)
    got = twin(**given, **({} if "labels" in given else {"return_loss": True})).loss
    assert got == want  # patched still
    if name == "llama":
        assert twin.model.norm.forward.__self__ is twin.model.norm


def test_halves_and_autocast() -> None:
    for name in ("llama", "t5"):
        model = hf.build(name).bfloat16()
        given = hf.inputs(name)
        want = model(**given).loss
        with fusedattn.patch(model) as done:
            got = model(**given).loss
        assert "fusedattn.rms_norm" in done.values()
        torch.testing.assert_close(got, want, rtol=2e-2, atol=0)
        model = hf.build(name)
        with fusedattn.patch(model), torch.autocast("cpu", torch.bfloat16):
            got = model(**given).loss
        torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=0)


def test_compiled_in_one_graph() -> None:
    model = hf.build("llama")
    given = hf.inputs("llama")
    with fusedattn.patch(model):
        want = model(**given).loss
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**given).loss, want)


def test_a_model_that_computes_attention_itself() -> None:
    """Its norms are changed all the same."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=99)
    model = transformers.BloomForCausalLM(config)
    before = model.config._attn_implementation
    done = fusedattn.patch(model)
    assert "does not call transformers' AttentionInterface" in done.left[""]
    assert set(done.values()) == {"fusedattn.nn.LayerNorm"}
    assert "(the model itself): left, BloomForCausalLM" in repr(done)
    assert model.config._attn_implementation == before


class Norm(nn.Module):
    """An RMS norm with something of its own, or none."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind, self.variance_epsilon = kind, 1e-5
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is not None:
            x = x * F.silu(gate)
        if self.kind == "about the mean":
            x = x - x.mean(-1, keepdim=True)
        square = x.square().mean(-1, keepdim=True)
        if self.kind == "eps outside":
            return x / (square.sqrt() + self.variance_epsilon) * self.weight
        if self.kind == "clipped":
            x = x.clamp(-50, 50)
        return x * torch.rsqrt(square + self.variance_epsilon) * self.weight


class BareNorm(nn.Module):
    eps = 1e-6

    def norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)

    forward = norm


class ChannelsLast(nn.LayerNorm):
    """Refuses weights of another dtype than its input's."""


class Gated(nn.Module):
    def __init__(self, activation=F.silu, swapped: bool = False) -> None:
        super().__init__()
        self.activation, self.swapped = activation, swapped
        self.w1, self.w2, self.w3 = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        a, b = (self.w3, self.w1) if self.swapped else (self.w1, self.w3)
        return self.w2(self.activation(a(x)) * b(x))


def test_tells_by_results_not_by_names() -> None:
    model = nn.ModuleDict({
        "plain": Norm(), "mean": Norm("about the mean"), "last": ChannelsLast(8),
        "bare": BareNorm(), "eps": Norm("eps outside"),
        "clipped": Norm("clipped"), "silu": Gated(), "relu": Gated(F.relu),
        "tanh": Gated(torch.tanh), "swapped": Gated(swapped=True),
        "group": nn.GroupNorm(2, 8), "linear": nn.Linear(8, 8),
    })  # fmt: skip
    state = torch.get_rng_state()
    done = fusedattn.patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(done) == {
        "plain": "fusedattn.rms_norm", "mean": "fusedattn.layer_norm",
        "last": "fusedattn.layer_norm", "bare": "fusedattn.rms_norm without a weight",
        "silu": "fusedattn.swiglu of silu", "relu": "fusedattn.swiglu of relu",
    }  # fmt: skip
    assert set(done.left) == {"eps", "clipped", "tanh", "swapped", "group"}
    x, gate = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    torch.testing.assert_close(model["plain"](x, gate), Norm.forward(model["plain"], x, gate))
    torch.testing.assert_close(model["silu"](x), Gated.forward(model["silu"], x))
    assert len(fusedattn.patch(model)) == 0  # twice changes nothing more
    own = model["plain"].forward = lambda x: x
    done.undo()
    assert model["plain"].forward is own
    assert "forward" not in vars(model["silu"])
    with pytest.raises(TypeError, match="patch: got model of type list, expected a Module"):
        fusedattn.patch([model])
