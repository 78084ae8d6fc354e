"""torch's transformers after `replace`: the same results, from the fused modules, on every path.

In evaluation without gradients torch's encoder makes padded batches nested tensors, and its layers
compute themselves without calling their modules, unless something keeps them from it.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from typing import Any

import fusedattn
import fusedattn.nn.attention as attention_file
import pytest
import torch
from torch import Tensor, nn

E, H, N, L = 8, 2, 3, 5
LENGTHS = (3, 5, 0)
PADDING = torch.arange(L) >= torch.tensor([[4], [L], [2]])
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)

# torch says once per process that the strided layout is a prototype.
pytestmark = [
    pytest.mark.usefixtures("fp64_on_one_thread"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call of the fused attention, packed or not."""
    seen: list[int] = []

    def counted(op: Any, *args: Any, **options: Any) -> Any:
        seen.append(1)
        return op(*args, **options)

    for name in ("attention", "attention_varlen"):
        op = getattr(attention_file, name)
        monkeypatch.setattr(attention_file, name, functools.partial(counted, op))
    return seen


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"src_key_padding_mask": PADDING},
    "mask": {"mask": CAUSAL},
    "both": {"mask": CAUSAL, "src_key_padding_mask": PADDING},
}
FLAGS = list(itertools.product([False, True], repeat=4))


def encoder(norm_first: bool, batch_first: bool, nest: bool, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        E, H, 2 * E, 0.0, norm_first=norm_first, batch_first=batch_first, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will not nest for its other options
        return nn.TransformerEncoder(layer, 2, nn.LayerNorm(E), enable_nested_tensor=nest)


def run(model: nn.Module, x: Tensor, gradients: bool, **masks: Any) -> list[Tensor]:
    """The result and, with gradients, those of all parameters."""
    with torch.set_grad_enabled(gradients):
        out = model(x, **masks)
    if not gradients:
        return [out]
    model.zero_grad()
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(("training", "gradients"), [(True, True), (False, True), (False, False)])
def test_encoder(
    calls: list[int], masks: str, activation: str, training: bool, gradients: bool
) -> None:
    for norm_first, batch_first, nest, biased in FLAGS:
        model = encoder(norm_first, batch_first, nest, activation=activation, bias=biased)
        model.train(training)
        x = torch.randn(N, L, E) if batch_first else torch.randn(L, N, E)
        expected = run(model, x, gradients, **MASKS[masks])
        fusedattn.replace(model)
        calls.clear()
        got = run(model, x, gradients, **MASKS[masks])
        case = f"{norm_first=} {batch_first=} {nest=} {biased=}"
        assert len(calls) == 2, case
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, case=case: f"{case}: {text}")


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_encoder_over_nested(layout: torch.layout, training: bool, gradients: bool) -> None:
    """Where torch's takes it the same, layout and all; elsewhere what each sequence alone gives."""
    for norm_first in (False, True):
        model = encoder(norm_first, True, True).train(training)
        x = torch.nested.nested_tensor([torch.randn(n, E) for n in LENGTHS], layout=layout)
        with torch.set_grad_enabled(gradients):
            rows = [model(part[None])[0] if len(part) else part for part in x.unbind()]
            expected = torch.nested.as_nested_tensor(rows, layout=layout)
            takes = layout is torch.strided and not training and not gradients
            found = [model(x)] if takes else []
            fusedattn.replace(model)
            found.append(model(x))
        for got in found:
            assert got.layout is layout
            for a, b in zip(got.unbind(), expected.unbind(), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_transformer(calls: list[int], training: bool, gradients: bool) -> None:
    """`torch.nn.Transformer` and with it `TransformerDecoder`, padded and causal."""
    for norm_first, batch_first, masked in itertools.product([False, True], repeat=3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = nn.Transformer(
                E, H, 1, 2, 2 * E, 0.0, norm_first=norm_first, batch_first=batch_first
            ).train(training)
        x = torch.randn(N, L, E) if batch_first else torch.randn(L, N, E)
        masks: dict[str, Any] = {}
        if masked:
            masks = {"src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
            masks |= {"tgt_mask": CAUSAL, "tgt_key_padding_mask": PADDING}
        expected = run(model, x, gradients, tgt=x + 1, **masks)
        fusedattn.replace(model)
        calls.clear()
        got = run(model, x, gradients, tgt=x + 1, **masks)
        assert len(calls) == 5
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
