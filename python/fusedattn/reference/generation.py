"""Generation from the reference transformer: greedy, temperature, top-k and top-p sampling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .transformer import END, PAD, Decoder, Llama


class Remembering:
    """A model for `generate` that computes each token once, and keeps its keys and values.

    >>> import torch
    >>> from fusedattn.reference.generation import Remembering, generate
    >>> from fusedattn.reference.transformer import BEGIN, Decoder, Ops, TransformerConfig
    >>> model = Decoder(TransformerConfig(), Ops.fused()).eval()
    >>> generate(Remembering(model), torch.tensor([[BEGIN]]), 5, end_token=None).shape
    torch.Size([1, 6])
    """

    def __init__(self, model: Decoder | Llama) -> None:
        self.model, self.seen = model, 0
        self.caches: list = []

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens (B, S), of which those of the last call are the first → logits of the others."""
        new, first = tokens[:, self.seen :], self.seen
        self.seen = tokens.shape[1]
        return self.model(new, first, self.caches)


def restrict(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """logits (B, V) with -inf outside the k likeliest tokens and outside the nucleus.

    The nucleus is the smallest set of the likeliest tokens whose probabilities, after top_k, reach
    top_p (Holtzman et al. 2019); it always holds one token.
    """
    ranked, order = logits.sort(dim=-1, descending=True)
    if top_k is not None:
        ranked[:, top_k:] = float("-inf")
    if top_p is not None:
        p = ranked.softmax(-1)
        ranked = ranked.masked_fill(p.cumsum(-1) - p >= top_p, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, ranked)


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end_token: int | None = END,
    context: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue `prompt` token by token, until every row has its end token.

    Args:
        model: maps tokens (B, S) to logits (B, S, V): a `Decoder`, or `EncoderDecoder.given(…)`;
            put it in evaluation mode first. `Remembering(decoder)` is much faster, but knows no
            `context`.
        prompt: (B, S) with S at least 1, not padded; BEGIN for an encoder-decoder.
        max_new_tokens: how many tokens to add at most.
        temperature: divides the logits; 0 takes the likeliest token each time (greedy).
        top_k, top_p: sample among the k likeliest tokens, and within the nucleus.
        end_token: ends a row, and is kept; the rest of the row is PAD. None never ends.
        context: the model sees only the last so many tokens.
        generator: source of randomness, torch's global one by default.

    Returns:
        (B, S + n) tokens, n ≤ max_new_tokens.

    Raises:
        ValueError: temperature < 0, top_k < 1, top_p not in (0, 1], or context < 1.
    """
    for name, value, good, expected in (
        ("temperature", temperature, temperature >= 0, ">= 0"),
        ("top_k", top_k, top_k is None or top_k >= 1, ">= 1 or None"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "0 < top_p <= 1 or None"),
        ("context", context, context is None or context >= 1, ">= 1 or None"),
    ):
        if not good:
            raise ValueError(f"generate: got {name}={value}, expected {expected}")
    tokens = prompt
    ended = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    for _ in range(max_new_tokens):
        seen = tokens if context is None else tokens[:, -context:]
        logits = model(seen)[:, -1].float()
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            logits = (logits - logits.amax(-1, keepdim=True)) / temperature
            p = restrict(logits, top_k, top_p).softmax(-1)
            token = torch.multinomial(p, 1, generator=generator).squeeze(-1)
        tokens = torch.cat((tokens, token.masked_fill(ended, PAD)[:, None]), 1)
        if end_token is not None:
            ended = ended | (token == end_token)
            if ended.all():
                break
    return tokens
