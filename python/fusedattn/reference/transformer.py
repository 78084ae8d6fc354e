"""The reference transformer: the three classic models, every fused op pluggable.

    EncoderDecoder   Vaswani et al. 2017: post-norm, sinusoidal positions, cross-attention, ReLU
    Encoder          Devlin et al. 2018 (BERT): post-norm, learned positions and segments, GELU,
                     masked-token and next-sentence losses
    Decoder          Radford et al. 2019 (GPT-2): pre-norm, learned positions, GELU, causal loss

Each takes a `TransformerConfig` and an `Ops`, and `Ops.plain()` and `Ops.fused()` give the same
model with the same parameters, so that one can be trained against the other step by step. Text is
bytes: token t < 256 is the byte t, and four tokens follow for padding, begin, end and mask.

Shapes: B sequences of S tokens, width W. Token tensors are int64 (B, S), padded at the end with
PAD; `lengths` (B,) int32, at least 1, says where the padding starts, None for nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.attention import attention as fused_attention
from . import functional

PAD, BEGIN, END, MASK = 256, 257, 258, 259
VOCABULARY = 260

Activation = Callable[[Tensor], Tensor]


# --- the pluggable ops ---------------------------------------------------------------------------


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, kv_lengths: Tensor | None = None
) -> Tensor:
    """softmax(q kᵀ / √D) v as plain PyTorch spells it, building the whole (Sq, Sk) matrix."""
    seen = functional.visible_keys(q, k, causal=causal, kv_lengths=kv_lengths)
    scores = functional.scores(q, k, q.shape[-1] ** -0.5, None, seen)
    return torch.matmul(torch.softmax(scores, dim=-1), v)


def add_sinusoidal(x: Tensor, *, base: float = 10000.0, scale: float = 1.0) -> Tensor:
    """x · scale plus sin(p / baseⁱ) in the even and cos(p / baseⁱ) in the odd features, i = 2j/W.

    x (B, S, W), W even; the phases are fp64 (Vaswani et al. 2017, §3.5).
    """
    length, width = x.shape[-2:]
    position = torch.arange(length, dtype=torch.float64, device=x.device)
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=x.device) / width
    phase = position[:, None] / base**exponent
    return x * scale + torch.stack((phase.sin(), phase.cos()), -1).flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class Ops:
    """The ops a model is built on; each has the signature of its plain version here or in torch.

    attention(q, k, v, *, causal, kv_lengths), layer_norm(x, shape, weight, bias, eps),
    add_sinusoidal(x, *, scale).
    """

    attention: Callable[..., Any]
    layer_norm: Callable[..., Tensor] = F.layer_norm
    add_sinusoidal: Callable[..., Tensor] = add_sinusoidal

    @classmethod
    def plain(cls) -> Ops:
        """Everything in plain PyTorch."""
        return cls(attention=softmax_attention)

    @classmethod
    def fused(cls) -> Ops:
        """Everything that this library has a kernel for."""
        return cls(attention=fused_attention)


# --- the parts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a model; the encoder-decoder has `layers` on each side."""

    width: int = 128
    heads: int = 4
    layers: int = 2
    feed_forward: int = 512
    max_length: int = 256
    dropout: float = 0.0
    vocabulary: int = VOCABULARY

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 2:
            raise ValueError(
                f"TransformerConfig: got width={self.width} and heads={self.heads}, "
                "expected an even width that is a multiple of heads"
            )


class LayerNorm(nn.LayerNorm):
    def __init__(self, width: int, ops: Ops) -> None:
        super().__init__(width)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Multi-head attention from x (B, Sq, W) to `source` (B, Sk, W)."""

    def __init__(self, config: TransformerConfig, ops: Ops, causal: bool = False) -> None:
        super().__init__()
        self.ops, self.heads, self.causal = ops, config.heads, causal
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, source: Tensor, lengths: Tensor | None) -> Tensor:
        q = self.query(x).unflatten(-1, (self.heads, -1))
        k, v = self.key_value(source).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, S, W / heads), views
        out = self.ops.attention(q, k, v, causal=self.causal, kv_lengths=lengths)
        return self.out(out.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, config: TransformerConfig, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(config.width, config.feed_forward)
        self.down = nn.Linear(config.feed_forward, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """Self-attention, cross-attention if `cross`, feed-forward; each on its residual link.

    x (B, S, W), memory (B, Sk, W) → (B, S, W); `norm_first` norms what a layer reads (pre-norm),
    else the sum it makes (post-norm).
    """

    def __init__(
        self, config: TransformerConfig, ops: Ops, activation: Activation, *,
        norm_first: bool = False, causal: bool = False, cross: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm_first = norm_first
        self.attention = Attention(config, ops, causal)
        self.cross = Attention(config, ops) if cross else None
        self.feed_forward = FeedForward(config, activation)
        self.norms = nn.ModuleList(LayerNorm(config.width, ops) for _ in range(2 + cross))
        self.dropout = nn.Dropout(config.dropout)

    def residual(self, x: Tensor, norm: nn.Module, layer: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_first:
            return x + self.dropout(layer(norm(x)))
        return norm(x + self.dropout(layer(x)))

    def forward(
        self, x: Tensor, lengths: Tensor | None = None,
        memory: Tensor | None = None, memory_lengths: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        x = self.residual(x, self.norms[0], lambda y: self.attention(y, y, lengths))
        if (cross := self.cross) is not None:
            x = self.residual(x, self.norms[2], lambda y: cross(y, memory, memory_lengths))
        return self.residual(x, self.norms[1], self.feed_forward)


class Embeddings(nn.Module):
    """Token plus learned position plus, for `segments` > 0, segment: (B, S) → (B, S, W)."""

    def __init__(self, config: TransformerConfig, segments: int = 0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.max_length, config.width)
        self.segments = nn.Embedding(segments, config.width) if segments else None

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        if tokens.shape[1] > self.positions.num_embeddings:
            raise ValueError(
                f"got {tokens.shape[1]} tokens, expected at most max_length="
                f"{self.positions.num_embeddings}"
            )
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        if self.segments is None or segments is None:
            return x
        return x + self.segments(segments)


def initialise(module: nn.Module) -> None:
    """Glorot-uniform products, zero biases, embeddings of deviation 0.02."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, S-1, V), made from tokens[:, :-1], over what follows."""
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD)


# --- the models ----------------------------------------------------------------------------------


class Decoder(nn.Module):
    """GPT: a causal, pre-norm stack that predicts each next token; output tied to the embedding."""

    def __init__(self, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.embedding = Embeddings(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config, ops, F.gelu, norm_first=True, causal=True) for _ in range(config.layers)
        )
        self.norm = LayerNorm(config.width, ops)
        self.apply(initialise)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, S) → logits (B, S, V). Padding needs no mask: it comes last."""
        x = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.tokens.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """The causal loss of tokens (B, S), PAD not counted."""
        return next_token_loss(self(tokens[:, :-1]), tokens)


class Encoder(nn.Module):
    """BERT: sees the whole text; learns from masked tokens and from pairs of sentences.

    A sequence is BEGIN, first sentence, END, second sentence, END, with segments 0 and 1.
    """

    def __init__(self, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.embedding = Embeddings(config, segments=2)
        self.norm = LayerNorm(config.width, ops)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, ops, F.gelu) for _ in range(config.layers))
        self.token_head = nn.Sequential(
            nn.Linear(config.width, config.width), nn.GELU(), LayerNorm(config.width, ops)
        )
        self.token_bias = nn.Parameter(torch.zeros(config.vocabulary))
        self.sentence_head = nn.Sequential(
            nn.Linear(config.width, config.width), nn.Tanh(), nn.Linear(config.width, 2)
        )
        self.apply(initialise)

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """tokens and segments (B, S) → features (B, S, W)."""
        x = self.dropout(self.norm(self.embedding(tokens, segments)))
        for block in self.blocks:
            x = block(x, lengths)
        return x

    def token_logits(self, features: Tensor) -> Tensor:
        """features (…, W) → logits (…, V), through the tied embedding."""
        return F.linear(self.token_head(features), self.embedding.tokens.weight, self.token_bias)

    def loss(
        self, tokens: Tensor, targets: Tensor, is_next: Tensor,
        segments: Tensor | None = None, lengths: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Masked-token plus next-sentence loss.

        targets (B, S) holds the true token where one is to be guessed and PAD elsewhere; is_next
        (B,) is 1 where the second sentence does follow the first.
        """
        features = self(tokens, segments, lengths)
        guesses = self.token_logits(features).flatten(0, 1)
        masked_token = F.cross_entropy(guesses, targets.flatten(), ignore_index=PAD)
        return masked_token + F.cross_entropy(self.sentence_head(features[:, 0]), is_next)


class EncoderDecoder(nn.Module):
    """The 2017 transformer; one embedding serves the source, the target and the output."""

    def __init__(self, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.ops, self.scale = ops, config.width**0.5
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.dropout = nn.Dropout(config.dropout)
        layers = range(config.layers)
        self.encoder = nn.ModuleList(Block(config, ops, F.relu) for _ in layers)
        self.decoder = nn.ModuleList(
            Block(config, ops, F.relu, causal=True, cross=True) for _ in layers
        )
        self.apply(initialise)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.ops.add_sinusoidal(self.tokens(tokens), scale=self.scale))

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> Tensor:
        """source (B, Sk) → memory (B, Sk, W)."""
        x = self.embed(source)
        for block in self.encoder:
            x = block(x, lengths)
        return x

    def decode(self, target: Tensor, memory: Tensor, lengths: Tensor | None = None) -> Tensor:
        """target (B, Sq), memory (B, Sk, W) and its lengths → logits (B, Sq, V)."""
        x = self.embed(target)
        for block in self.decoder:
            x = block(x, None, memory, lengths)
        return F.linear(x, self.tokens.weight)

    def forward(self, source: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
        """source (B, Sk), target (B, Sq) → logits (B, Sq, V); `lengths` are the source's."""
        return self.decode(target, self.encode(source, lengths), lengths)

    def loss(self, source: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The causal loss of target (B, Sq), BEGIN … END, given the source; PAD not counted."""
        return next_token_loss(self(source, target[:, :-1], lengths), target)

    def given(self, source: Tensor, lengths: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """The decoder as a function of the target alone, which is what `generate` takes."""
        return partial(self.decode, memory=self.encode(source, lengths), lengths=lengths)


# --- generation ----------------------------------------------------------------------------------


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
            put it in evaluation mode first.
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
