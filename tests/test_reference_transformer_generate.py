"""Generation with the reference transformer: greedy, sampled, and until the end token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from fusedattn.reference.generation import Remembering, generate
from fusedattn.reference.transformer import (
    BEGIN,
    END,
    PAD,
    VOCABULARY,
    Decoder,
    EncoderDecoder,
    Llama,
    Ops,
    TransformerConfig,
)
from torch import Tensor, nn

CONFIG = TransformerConfig(width=32, heads=4, layers=2, feed_forward=64, max_length=48)


def random_decoder() -> Decoder:
    """A decoder with a mind of its own: at its small initial values it only repeats itself."""
    torch.manual_seed(0)
    net = Decoder(CONFIG, Ops.plain()).eval()
    for parameter in (*net.embedding.parameters(), net.norm.weight):
        nn.init.normal_(parameter)
    return net


def continuations(**options: object) -> Tensor:
    """Two prompts of three tokens, continued by twelve."""
    prompt = torch.tensor([[BEGIN, 1, 2], [BEGIN, 3, 4]])
    return generate(random_decoder(), prompt, 12, **options)


def test_greedy_takes_the_likeliest() -> None:
    greedy = continuations(temperature=0, end_token=None)
    assert greedy.shape == (2, 15)
    assert len(greedy[:, 3:].unique()) > 6
    assert torch.equal(random_decoder()(greedy)[:, 2:-1].argmax(-1), greedy[:, 3:])


@pytest.mark.parametrize("ops", [Ops.plain(), Ops.fused()], ids=["plain", "fused"])
@pytest.mark.parametrize("kind", [Decoder, Llama])
def test_remembering_what_was_computed_changes_nothing(kind: type, ops: Ops) -> None:
    torch.manual_seed(0)
    net = kind(dataclasses.replace(CONFIG, kv_heads=2), ops).eval()
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    prompt = torch.tensor([[BEGIN, 1, 2], [BEGIN, 3, 4]])
    want = generate(net, prompt, 30, temperature=0, end_token=None)
    remembering = Remembering(net)
    assert torch.equal(generate(remembering, prompt, 30, temperature=0, end_token=None), want)
    assert remembering.seen == 32
    with torch.no_grad():
        torch.testing.assert_close(net(want)[:, 20:], _from(net, want, 20))


def _from(net: nn.Module, tokens: Tensor, first: int) -> Tensor:
    caches: list = []
    net(tokens[:, :first], 0, caches)
    return net(tokens[:, first:], first, caches)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-30}])
def test_narrow_sampling_is_greedy(options: dict[str, float]) -> None:
    greedy = continuations(temperature=0, end_token=None)
    assert torch.equal(continuations(**options, end_token=None), greedy)


def test_seed_decides() -> None:
    first, again, other = (
        continuations(generator=torch.Generator().manual_seed(seed), end_token=None)
        for seed in (7, 7, 8)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def fixed(p: list[float]) -> Callable[[Tensor], Tensor]:
    """A model that gives tokens 0, 1, … the probabilities p, whatever came before."""
    return lambda tokens: torch.tensor(p).log().expand(*tokens.shape, -1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 99}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.45}, [1, 0, 0, 0]),
        ({"top_p": 0.75}, [0.625, 0.375, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0.625, 0.375, 0, 0]),
        ({"temperature": 0.5}, [0.6849, 0.2466, 0.0616, 0.0068]),
    ],
    ids=str,
)
def test_sampled_frequencies(options: dict[str, float], expected: list[float]) -> None:
    order = torch.tensor([2, 0, 3, 1])
    model = fixed([[0.5, 0.3, 0.15, 0.05][i] for i in order])
    prompt = torch.zeros(8000, 1, dtype=torch.long)
    got = generate(model, prompt, 1, end_token=None, **options)[:, 1]
    frequency = torch.bincount(got, minlength=4) / 8000
    wanted = torch.tensor(expected, dtype=torch.float32)[order]
    torch.testing.assert_close(frequency, wanted, atol=0.025, rtol=0)
    assert torch.equal(frequency == 0, wanted == 0)


def test_ends_at_the_end_token() -> None:
    """Rows end apart: row r counts up from r, and 5 is its end."""
    model = lambda tokens: nn.functional.one_hot(tokens + 1, VOCABULARY).float()  # noqa: E731
    prompt = torch.tensor([[3], [1]])
    got = generate(model, prompt, 9, temperature=0, end_token=5)
    assert got.tolist() == [[3, 4, 5, PAD, PAD], [1, 2, 3, 4, 5]]
    assert generate(model, prompt, 0).tolist() == prompt.tolist()


def test_context_bounds_what_is_seen() -> None:
    seen = []

    def model(tokens: Tensor) -> Tensor:
        seen.append(tokens.shape[1])
        return torch.zeros(*tokens.shape, VOCABULARY)

    generate(model, torch.zeros(1, 2, dtype=torch.long), 4, context=3, end_token=None)
    assert seen == [2, 3, 3, 3]


@pytest.mark.parametrize("ops", [Ops.plain(), Ops.fused()], ids=["plain", "fused"])
def test_translates_what_it_learnt(ops: Ops) -> None:
    """The encoder-decoder learns four padded pairs by heart and then recites them."""
    source = torch.tensor([[1, PAD, PAD], [2, 9, PAD], [3, 9, 9], [4, PAD, PAD]])
    lengths = torch.tensor([1, 2, 3, 1], dtype=torch.int32)
    answers = torch.tensor([[8, 7, END, PAD], [7, END, PAD, PAD], [6, 6, 8, END], [5, 8, END, PAD]])
    target = torch.cat((torch.full((4, 1), BEGIN), answers), 1)
    net = EncoderDecoder(CONFIG, ops)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        net.loss(source, target, lengths).backward()
        optimizer.step()
    with torch.no_grad():
        model = net.eval().given(source, lengths)
    assert torch.equal(generate(model, target[:, :1], 8, temperature=0), target)


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.5}, {"context": 0}]
)
def test_bad_options(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"generate: got {name}="):
        continuations(**options)
