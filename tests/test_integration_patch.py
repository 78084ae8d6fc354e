"""`fusedattn.patch`: what it finds in a live model, that it computes the same, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

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
    "t5": {OURS: 1, "fusedattn.biases.t5": 2, "fusedattn.rms_norm": 12,
           "fusedattn.swiglu of gelu_tanh": 4},
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


def test_relative_biases_by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the last query stands at the last key; with a static cache, or a mask of floats, a
    tensor is made of them."""
    adapter, kinds = fusedattn.integrations.transformers, set()

    def seen(*args: Tensor, **options: Any) -> Any:
        kinds.add(type(options["bias"]).__name__)
        return fusedattn.attention(*args, **options)

    monkeypatch.setattr(adapter, "attention", seen)
    model = hf.build("t5")
    given = hf.inputs("t5", "left")
    del given["labels"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for cache, expected in ((None, "DistanceBias"), ("static", "Tensor")):
        options["cache_implementation"] = cache
        want = model.generate(**given, **options, disable_compile=True)
        with fusedattn.patch(model) as done:
            assert list(done.values()).count("fusedattn.biases.t5") == 2
            assert torch.equal(model.generate(**given, **options, disable_compile=True), want)
            assert expected in kinds
    bias = fusedattn.biases.t5(torch.randn(32, 2), bidirectional=True)
    q, k, v = torch.randn(1, 2, 5, 8), *torch.randn(2, 1, 2, 9, 8)
    hidden = torch.arange(9) < 3
    masks = ~hidden[None, None, None], torch.zeros(9).masked_fill(hidden, float("-inf"))
    outs = [
        adapter.attention_forward(nn.Identity(), q, k, v, x.view(1, 1, 1, 9), position_bias=bias)[0]
        for x in masks
    ]
    torch.testing.assert_close(outs[1], outs[0])


@pytest.mark.slow
def test_compiled_in_one_graph() -> None:
    given = hf.inputs("llama")
    ids = given["input_ids"]
    for model, arguments in (
        (hf.build("llama"), given),
        (hf.build("t5").encoder, {"input_ids": ids}),
    ):
        with fusedattn.patch(model):
            want = model(**arguments)[0]
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(**arguments)[0], want)


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
    def __init__(self, activation=F.silu, swapped: bool = False, functional: float = 0.0) -> None:
        super().__init__()
        self.activation, self.swapped, self.functional = activation, swapped, functional
        self.w1, self.w2, self.w3 = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12)
        self.inner, self.outer = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        a, b = (self.w3, self.w1) if self.swapped else (self.w1, self.w3)
        product = F.dropout(self.activation(a(x)) * b(x), self.functional, self.training)
        return self.outer(self.w2(self.inner(product)))


def test_tells_by_results_not_by_names() -> None:
    model = nn.ModuleDict({
        "plain": Norm(), "mean": Norm("about the mean"), "last": ChannelsLast(8),
        "bare": BareNorm(), "eps": Norm("eps outside"),
        "clipped": Norm("clipped"), "silu": Gated(), "relu": Gated(F.relu),
        "tanh": Gated(torch.tanh), "swapped": Gated(swapped=True),
        "functional": Gated(functional=0.5),
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
    assert set(done.left) == {"eps", "clipped", "tanh", "swapped", "functional", "group"}
    x, gate = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    torch.testing.assert_close(model["plain"](x, gate), Norm.forward(model["plain"], x, gate))
    torch.testing.assert_close(model["silu"](x), Gated.forward(model["silu"], x))
    assert model["silu"].inner.training  # trying it has not changed that
    model["silu"].inner.p = 1.0
    torch.testing.assert_close(model["silu"](x), model["silu"].w2.bias.expand(2, 3, 8))
    model["silu"].outer.p = 1.0
    assert not model["silu"](x).any()
    assert len(fusedattn.patch(model)) == 0  # twice changes nothing more
    own = model["plain"].forward = lambda x: x
    done.undo()
    assert model["plain"].forward is own
    assert "forward" not in vars(model["silu"])
    with pytest.raises(TypeError, match="patch: got model of type list, expected a Module"):
        fusedattn.patch([model])
