"""What the transformer modules promise around their results: who is called, by whom they are taken.

The results are those of test_nn_transformer.py.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fusedattn import nn as ours
from torch import Tensor, nn

E, H, N, L, S = 16, 4, 3, 5, 7
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
FLOATS = torch.zeros(L, L).masked_fill(CAUSAL, float("-inf"))
PADDING = torch.arange(S) >= torch.tensor([[S], [4], [5]])

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


def layer(kind: str = "Encoder", **options: Any) -> nn.Module:
    options = {"dropout": 0.0, "batch_first": True, **options}
    return getattr(ours, f"Transformer{kind}Layer")(E, H, 32, **options)


@pytest.mark.parametrize("where", ["module", "everywhere", "instance", "other"])
def test_who_watches_or_stands_in_is_called(where: str) -> None:
    model, x, seen = layer().eval(), torch.randn(N, S, E), []
    expected = model(x)
    if where == "module":
        for each in (model.norm1, model.dropout2):
            each.register_forward_hook(lambda *args: seen.append(args[2].shape))
    elif where == "everywhere":
        hook = lambda module, args, out: (  # noqa: E731
            seen.append(out.shape) if module in (model.norm1, model.dropout2) else None
        )
        handle = nn.modules.module.register_module_forward_hook(hook)
    elif where == "instance":
        for each in (model.norm1, model.dropout2):
            each.forward = lambda x, f=each.forward: (seen.append(x.shape), f(x))[1]
    else:
        for name in ("norm1", "dropout2"):
            each = getattr(model, name)
            kind = type("Own", (type(each),), {"forward": lambda self, x: (
                seen.append(x.shape), super(type(self), self).forward(x))[1]})  # fmt: skip
            each.__class__ = kind
    torch.testing.assert_close(model(x), expected)
    if where == "everywhere":
        handle.remove()
    assert seen == [x.shape] * 2


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_blocks_of_a_subclass_are_called(kind: str, norm_first: bool) -> None:
    """With what torch hands them: an encoder layer's masks are floats."""
    plain = layer(kind, norm_first=norm_first)
    given, masks = [], {"Encoder": {"src_mask": CAUSAL}, "Decoder": {"tgt_mask": CAUSAL}}[kind]

    class Own(type(plain)):
        def _sa_block(self, x, attn_mask, *args, **kwargs):
            given.append(attn_mask.dtype)
            return super()._sa_block(x, attn_mask, *args, **kwargs)

    own, patched = copy.deepcopy(plain), copy.deepcopy(plain)
    own.__class__ = Own
    patched._ff_block = lambda x, f=patched._ff_block: (given.append("ff"), f(x))[1]
    args = [torch.randn(N, L, E)] * (1 if kind == "Encoder" else 2)
    expected = plain(*args, **masks)
    for model in (own, patched):
        torch.testing.assert_close(model(*args, **masks), expected)
    assert given == [torch.float32 if kind == "Encoder" else torch.bool, "ff"]


def test_causal_masks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where a gradient is asked of the mask, nor against what the caller says."""
    seen = []
    stacks = {
        "src": ours.TransformerEncoder(layer(), 2),
        "tgt": ours.TransformerDecoder(layer("Decoder"), 2),
    }
    for stack in stacks.values():
        for each in stack.layers:
            each.register_forward_pre_hook(
                lambda module, args, kwargs: seen.extend(
                    v for k, v in kwargs.items() if k in ("is_causal", "tgt_is_causal")
                ),
                with_kwargs=True,
            )
    x, floats = torch.randn(N, L, E), FLOATS
    learned = floats.clone().requires_grad_()
    stacks["src"](x, learned).sum().backward()
    assert learned.grad.tril().any()
    calls: list[tuple[Any, bool | None, bool]] = [
        (floats, None, True), (CAUSAL, None, True), (CAUSAL.T, None, False), (None, None, False),
        (CAUSAL, False, False), (learned, None, False), (learned.detach(), True, True),
        (floats + 1, None, False), (CAUSAL.expand(N * H, L, L), None, False),
    ]  # fmt: skip
    for mask, says, found in calls:
        seen.clear()
        one = stacks["src"](x, mask, is_causal=says)
        stacks["tgt"](x, x, tgt_mask=mask, tgt_is_causal=says)
        assert seen == [found] * 4
        if says is None and mask is not None:
            torch.testing.assert_close(one, stacks["src"](x, mask, is_causal=False))


def test_layers_written_for_torch() -> None:
    """In our stack they get masks of floats and nested tensors, as in torch's."""
    given = []

    class Own(nn.TransformerEncoderLayer):
        def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
            masks = (src_mask, src_key_padding_mask)
            given.append((src.is_nested, *(None if m is None else m.dtype for m in masks)))
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)

    theirs = nn.TransformerEncoder(Own(E, H, 32, 0.0, batch_first=True), 1).eval()
    stack = ours.TransformerEncoder(Own(E, H, 32, 0.0, batch_first=True), 1).eval()
    stack.load_state_dict(theirs.state_dict())
    x, square = torch.randn(N, S, E), torch.ones(S, S, dtype=torch.bool).triu(1)
    with torch.no_grad():
        for masks in ((square, PADDING), (None, PADDING), (square, None)):
            given.clear()
            torch.testing.assert_close(stack(x, *masks), theirs(x, *masks))
            assert given[0] == given[1]


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Root(nn.Module):
    """Of a trace, which is no module of ours."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, src: Tensor, tgt: Tensor, tgt_mask: Tensor) -> Tensor:
        return self.model(src, tgt, tgt_mask=tgt_mask)


def exported(model: nn.Module) -> nn.Module:
    args = (torch.randn(N, S, E), torch.randn(N, L, E))
    return torch.export.export(model, args, {"tgt_mask": CAUSAL}).module()


AS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": lambda model: torch.compile(model, fullgraph=True, backend="aot_eager"),
    "exported": exported,
    "deepcopy": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "saved": saved,
    "traced": lambda model: torch.fx.symbolic_trace(Root(model)),
}


@pytest.mark.parametrize("how", AS)
def test_in_the_hands_of_torch(how: str) -> None:
    x, y = torch.randn(N, S, E), torch.randn(N, L, E)
    for norm_first in (False, True):
        model = ours.Transformer(E, H, 1, 1, 32, 0.0, batch_first=True, norm_first=norm_first)
        torch._dynamo.reset()
        other = AS[how](model)
        with torch.set_grad_enabled(norm_first):
            got, expected = (each(x, y, tgt_mask=CAUSAL) for each in (other, model))
        torch.testing.assert_close(got, expected)
        if norm_first:
            got.square().sum().backward()


MADE = ours.Transformer(E, H, 1, 1, 32, batch_first=True)
X, Y = torch.randn(N, S, E), torch.randn(N, L, E)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "src": (
        lambda: MADE(X[..., 1:], Y),
        r"Transformer: got src of shape \(3, 7, 15\), expected 16",
    ),
    "tgt": (lambda: MADE(X, None), "Transformer: got tgt of type NoneType, expected a Tensor"),
    "batch": (lambda: MADE(X[:2], Y), r"got src of shape \(2, 7, 16\), expected a batch of 3"),
    "unbatched": (lambda: MADE(X, Y[0]), r"got src of shape \(3, 7, 16\), expected no batch"),
    "src-mask": (
        lambda: MADE(X, Y, CAUSAL),
        r"Transformer: got src_mask of shape \(5, 5\), expected \(7, 7\) or \(12, 7, 7\)",
    ),
    "memory-mask": (
        lambda: MADE(X, Y, memory_mask=CAUSAL),
        r"Transformer: got memory_mask of shape \(5, 5\), expected \(5, 7\) or \(12, 5, 7\)",
    ),
    "padding": (
        lambda: MADE(X, Y, tgt_key_padding_mask=PADDING),
        r"Transformer: got tgt_key_padding_mask of shape \(3, 7\), expected \(3, 5\)",
    ),
    "promise": (
        lambda: MADE(X, Y, tgt_is_causal=True),
        "Transformer: got tgt_is_causal=True without tgt_mask, expected the causal tgt_mask too",
    ),
    "promise-of-1": (
        lambda: MADE.encoder(X, is_causal=1),
        "TransformerEncoder: got is_causal of type int, expected a bool",
    ),
    "mask-dtype": (
        lambda: MADE.encoder(X, torch.ones(S, S, dtype=torch.uint8)),
        "TransformerEncoder: got mask of type torch.uint8, expected a bool",
    ),
    "layer": (
        lambda: MADE.encoder.layers[0](X, CAUSAL),
        r"TransformerEncoderLayer: got src_mask of shape \(5, 5\), expected \(7, 7\)",
    ),
    "dtype": (
        lambda: MADE.decoder(Y, X.double()),
        "TransformerDecoder: got memory of dtype torch.float64, expected torch.float32",
    ),
    "decoder-layer": (
        lambda: MADE.decoder.layers[0](Y[0, 0], X),
        r"TransformerDecoderLayer: got tgt of shape \(16,\), expected \(L, features\), or 3",
    ),
    "nested": (
        lambda: MADE.encoder(torch.nested.as_nested_tensor([X[0]]), PADDING),
        "TransformerEncoder: got mask with a nested tensor, expected no mask",
    ),
    "nested-tgt": (
        lambda: MADE.decoder(torch.nested.as_nested_tensor([X[0]]), X),
        "TransformerDecoder: got tgt that is nested, expected a dense tensor",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises((TypeError, ValueError), match=message):
        call()
