"""`fusedattn.nn.Transformer` and its parts against torch's, weight for weight.

What `replace` makes of torch's, over all flags, stands in test_nn_transformers.py.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import compare
import fusedattn.nn.transformer_layers as layers_file
import pytest
import torch
from fusedattn import nn as ours
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

E, H, N, L, S = 16, 4, 3, 5, 7
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
PADDING = torch.arange(S) >= torch.tensor([[S], [4], [5]])
NAMES = [
    "Transformer", "TransformerEncoder", "TransformerEncoderLayer", "TransformerDecoder",
    "TransformerDecoderLayer",
]  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),  # torch's, at most it will
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask"),  # and so it does
]


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclasses.dataclass(frozen=True)
class Case:
    """One regime of a Transformer; its masks lie (T, S) by the names of the arguments."""

    build: dict[str, Any] = dataclasses.field(default_factory=dict)
    masks: dict[str, Any] = dataclasses.field(default_factory=dict)
    batched: bool = True
    training: bool = True


FLOATS = {"tgt_mask": torch.zeros(L, L).masked_fill(CAUSAL, float("-inf"))}
PADDED = {"src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
SOFT = {"memory_mask": torch.linspace(-1, 1, L * S).view(L, S)}
PER_HEAD = {"src_mask": torch.linspace(-1, 1, N * H * S * S).view(N * H, S, S) > 0.9}
FIRST = {"batch_first": True}
CASES = {
    "plain": Case(),
    "norm-first": Case({"norm_first": True} | FIRST),
    "no-bias-gelu": Case({"bias": False, "activation": "gelu"}),
    "function": Case({"activation": nn.SiLU()} | FIRST, FLOATS),
    "causal-bool": Case(FIRST, {"tgt_mask": CAUSAL}),
    "causal-hint": Case({}, {"tgt_mask": CAUSAL, "tgt_is_causal": True}),
    "padding": Case(FIRST, PADDED | FLOATS),
    "padding-norm-first": Case({"norm_first": True}, PADDED | {"tgt_mask": CAUSAL}),
    "memory-floats": Case(FIRST, SOFT | PADDED),
    "per-head": Case({"norm_first": True} | FIRST, PER_HEAD),
    "unbatched": Case({}, FLOATS | SOFT, batched=False),
    "evaluation": Case(FIRST, training=False),
    "evaluation-nested": Case(FIRST | {"activation": "gelu"}, PADDED, training=False),
}


def twins(**build: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Ours, torch's and torch's in fp64, of one state_dict, which loads in both directions."""
    options = {"d_model": E, "nhead": H, "num_encoder_layers": 2, "num_decoder_layers": 1}
    options |= {"dim_feedforward": 32, "dropout": 0.0} | build
    torch.manual_seed(3)
    theirs = nn.Transformer(**options)
    torch.manual_seed(3)
    model = ours.Transformer(**options)
    for (name, a), (other, b) in zip(
        model.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)  # and from one seed the same start
    for parameter in theirs.parameters():  # norms and biases too
        nn.init.normal_(parameter, std=0.3)
    model.load_state_dict(theirs.state_dict(), strict=True)
    nn.Transformer(**options).load_state_dict(model.state_dict(), strict=True)
    return model, theirs, copy.deepcopy(theirs).double()


def results(model: nn.Module, x: Tensor, y: Tensor, case: Case) -> dict[str, Tensor]:
    """The output and, when training, the gradients of inputs and parameters."""
    masks = {
        name: mask.to(x.dtype) if isinstance(mask, Tensor) and mask.is_floating_point() else mask
        for name, mask in case.masks.items()
    }
    if not case.training:
        with torch.no_grad():
            return {"out": model(x, y, **masks)}
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    out = model(x, y, **masks)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"out": out.detach(), "src": x.grad, "tgt": y.grad, **grads}


@pytest.mark.parametrize("name", CASES)
def test_as_torch(name: str) -> None:
    case = CASES[name]
    models = [model.train(case.training) for model in twins(**case.build)]
    x, y = torch.randn(N, S, E), torch.randn(N, L, E)
    if not case.batched:
        x, y = x[0], y[0]
    elif not case.build.get("batch_first"):
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    got, eager = (results(model, x, y, case) for model in models[:2])
    ref = results(models[2], x.double(), y.double(), case)
    for key, actual in got.items():
        what = {"what": key, "case": name, "gradient": key != "out"}
        compare.check(actual, ref[key], eager[key], **what)


@pytest.mark.parametrize("name", NAMES)
def test_takes_what_torch_takes(name: str) -> None:
    for method in ("__init__", "forward"):
        signatures = [
            [(p.name, p.default, p.kind) for p in inspect.signature(f).parameters.values()]
            for f in (getattr(getattr(module, name), method) for module in (ours, nn))
        ]
        assert signatures[0] == signatures[1]


def layer(kind: str = "Encoder", **options: Any) -> nn.Module:
    options = {"dropout": 0.0, "batch_first": True, **options}
    return getattr(ours, f"Transformer{kind}Layer")(E, H, 32, **options)


def encoder(**options: Any) -> nn.Module:
    return ours.TransformerEncoder(layer(**options), 2, ours.LayerNorm(E))


def test_neither_paths_of_torch_nor_passes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's inference path is kept out; every norm that can takes its sum along."""

    def fail(*args: Any) -> None:
        raise AssertionError("torch's fast path")

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", fail)
    seen = []
    op = layers_file.layer_norm
    monkeypatch.setattr(layers_file, "layer_norm", lambda *a, **k: (seen.append(k), op(*a, **k))[1])
    x = torch.randn(N, S, E)
    with torch.no_grad():
        for kind, norm_first, norms in (("Encoder", False, 2), ("Encoder", True, 1),
                                        ("Decoder", False, 3), ("Decoder", True, 2)):  # fmt: skip
            seen.clear()
            model = layer(kind, norm_first=norm_first).eval()
            model(x, x + 1) if kind == "Decoder" else model(x)
            assert [each["residual"].shape for each in seen] == [x.shape] * norms


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_dropout(kind: str) -> None:
    """Blocks of 1 and of 10 alone: each is dropped or 1/(1 - p) times itself, as often as p says.

    One seed draws the same, also where a checkpoint computes it again.
    """
    p, x = 0.3, torch.randn(8, 64, E, requires_grad=True)
    model = layer(kind, norm_first=True, dropout=p)
    args = (x,) if kind == "Encoder" else (x, torch.randn(8, 9, E))
    torch.manual_seed(1)
    model(*args).square().sum().backward()
    grads = [q.grad.clone() for q in (x, *model.parameters())]
    x.grad = None
    model.zero_grad()
    torch.manual_seed(1)
    checkpoint(model, *args, use_reentrant=False).square().sum().backward()
    for parameter, grad in zip((x, *model.parameters()), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    for part, value in (("self_attn.out_proj", 1.0), ("multihead_attn.out_proj", 10.0),
                        ("linear2", 100.0)):  # fmt: skip
        if kind == "Decoder" or not part.startswith("multi"):
            nn.init.zeros_(model.get_submodule(part).weight)
            nn.init.constant_(model.get_submodule(part).bias, value)
    with torch.no_grad():
        found = ((model(*args) - x) * (1 - p)).round().int()
        for digit in (1, 100) if kind == "Encoder" else (1, 10, 100):
            kept = found // digit % 10
            assert ((kept == 0) | (kept == 1)).all()
            assert abs(kept.float().mean() - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
        assert not torch.equal(model(*args), model(*args))
        model.eval()
        torch.testing.assert_close(model(*args), x + (111 if kind == "Decoder" else 101))


@pytest.mark.parametrize("mask_check", [True, False])
def test_padding_is_dropped_where_torch_drops_it(mask_check: bool) -> None:
    """And is 0 before the last norm; compiled without the check too."""
    theirs = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True), 2, nn.LayerNorm(E),
        mask_check=mask_check,
    ).eval()  # fmt: skip
    model = encoder().eval()
    model.mask_check = mask_check
    model.load_state_dict(theirs.state_dict())
    x = torch.randn(N, S, E)
    floats = torch.zeros(N, S).masked_fill(PADDING, float("-inf"))
    aligned = [PADDING, floats] + ([PADDING.flip(1), None] if mask_check else [])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for padding in aligned:
            expected = theirs(x, src_key_padding_mask=padding)
            torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected)
        expected = theirs(x, src_key_padding_mask=PADDING)
        assert not expected[PADDING].any()
        got = compiled(x, src_key_padding_mask=PADDING)
        torch.testing.assert_close(got[~PADDING], expected[~PADDING])
        assert got[PADDING].any() == mask_check
        some = floats.masked_fill(~PADDING, 0.5)  # a bias, and the same one on all keys
        torch.testing.assert_close(model(x, src_key_padding_mask=some)[~PADDING], got[~PADDING])


@pytest.mark.parametrize("norm_first", [False, True])
def test_autocast(norm_first: bool) -> None:
    """The stream stays as wide as torch's, and no farther from fp32 than 3 times as torch's."""
    models = twins(norm_first=norm_first, batch_first=True)
    x, y = torch.randn(N, S, E), torch.randn(N, L, E)
    ref = models[2](x.double(), y.double())
    with torch.autocast("cpu", torch.bfloat16):
        got, eager = (model(x, y) for model in models[:2])
    assert got.dtype == eager.dtype == torch.float32
    compare.check(got, ref, eager, what="out", case="autocast", tested=torch.bfloat16)
