"""The reference transformer: the classic models, every fused op pluggable.

    EncoderDecoder   Vaswani et al. 2017: post-norm, sinusoidal positions, cross-attention, ReLU
    Encoder          Devlin et al. 2018 (BERT): post-norm, learned positions and segments, GELU,
                     masked-token and next-sentence losses
    Decoder          Radford et al. 2019 (GPT-2): pre-norm, learned positions, GELU, causal loss
    Llama            Touvron et al. 2023: pre-norm by RMS, rotary positions, SwiGLU, grouped heads

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

from .model_ops import Ops as Ops
from .model_ops import rotary_tables

PAD, BEGIN, END, MASK = 256, 257, 258, 259
VOCABULARY = 260

Activation = Callable[[Tensor], Tensor]
Tables = tuple[Tensor, Tensor]  # of rotary: cos, sin


# --- the parts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a model; the encoder-decoder has `layers` on each side.

    kv_heads: key and value heads of `Llama`, a divisor of heads; as many as those by default.
    """

    width: int = 128
    heads: int = 4
    layers: int = 2
    feed_forward: int = 512
    max_length: int = 256
    dropout: float = 0.0
    vocabulary: int = VOCABULARY
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 2:
            raise ValueError(
                f"TransformerConfig: got width={self.width} and heads={self.heads}, "
                "expected an even width that is a multiple of heads"
            )
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(
                f"TransformerConfig: got heads={self.heads} and kv_heads={self.kv_heads}, "
                "expected a divisor of heads"
            )


class LayerNorm(nn.LayerNorm):
    def __init__(self, width: int, ops: Ops) -> None:
        super().__init__(width)
        self.ops = ops

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """norm(x), and given a residual (norm(x + residual), x + residual) in one pass."""
        arguments = (x, self.normalized_shape, self.weight, self.bias, self.eps)
        return self.ops.layer_norm(*arguments, residual=residual)


class RMSNorm(nn.RMSNorm):
    def __init__(self, width: int, ops: Ops) -> None:
        super().__init__(width, eps=1e-5)
        self.ops = ops

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """norm(x), and given a residual (norm(x + residual), x + residual) in one pass."""
        arguments = (x, self.normalized_shape, self.weight, self.eps)
        return self.ops.rms_norm(*arguments, residual=residual)


class Attention(nn.Module):
    """Multi-head attention from x (B, Sq, W) to `source` (B, Sk, W).

    `rotary` (cos, sin), each (S, D / 2), turns the queries and keys by their positions. With a
    cache x are the last tokens, which see those in it as well.
    """

    def __init__(
        self, config: TransformerConfig, ops: Ops, causal: bool = False, *,
        kv_heads: int | None = None, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.ops, self.causal = ops, causal
        self.heads, self.kv_heads = config.heads, kv_heads or config.heads
        kv_width = config.width // self.heads * self.kv_heads
        self.query = nn.Linear(config.width, config.width, bias)
        self.key_value = nn.Linear(config.width, 2 * kv_width, bias)
        self.out = nn.Linear(config.width, config.width, bias)

    def new_cache(self, x: Tensor) -> Any:
        """For the sequences of x (B, S, W)."""
        dim = x.shape[2] // self.heads
        return self.ops.cache(x.shape[0], self.kv_heads, dim, device=x.device, dtype=x.dtype)

    def forward(
        self, x: Tensor, source: Tensor, lengths: Tensor | None, rotary: Tables | None = None,
        cache: Any = None,
    ) -> Tensor:  # fmt: skip
        q = torch.unflatten(self.query(x), -1, (self.heads, -1))
        kv = torch.unflatten(self.key_value(source), -1, (2, self.kv_heads, -1))
        k, v = kv.unbind(-3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, S, D), views
        if cache is not None:
            tables = {} if rotary is None else {"cos": rotary[0], "sin": rotary[1]}
            out = cache.attend(q, k, v, **tables)
        else:
            if rotary is not None:
                q, k = self.ops.apply_rotary_qk(q, k, *rotary)
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


class SwiGLU(nn.Module):
    """down(silu(gate x) ∘ up x), without biases (Shazeer 2020)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.feed_forward, bias=False)
        self.down = nn.Linear(config.feed_forward, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Self-attention, cross-attention if `cross`, feed-forward; each on its residual link.

    x (B, S, W), memory (B, Sk, W) → (B, S, W); `norm_first` norms what a layer reads (pre-norm),
    else the sum it makes (post-norm).
    """

    def __init__(
        self, config: TransformerConfig, ops: Ops, feed_forward: nn.Module, *,
        norm: Callable[[int, Ops], nn.Module] = LayerNorm, norm_first: bool = False,
        causal: bool = False, cross: bool = False, kv_heads: int | None = None, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm_first = norm_first
        self.attention = Attention(config, ops, causal, kv_heads=kv_heads, bias=bias)
        self.cross = Attention(config, ops) if cross else None
        self.feed_forward = feed_forward
        self.norms = nn.ModuleList(norm(config.width, ops) for _ in range(2 + cross))
        self.dropout = nn.Dropout(config.dropout)

    def layers(
        self, lengths: Tensor | None, memory: Tensor | None, memory_lengths: Tensor | None,
        rotary: Tables | None, cache: Any,
    ) -> list[tuple[nn.Module, Activation]]:  # fmt: skip
        """(norm, layer) in the order in which x passes them."""
        attend = partial(self.attention, lengths=lengths, rotary=rotary, cache=cache)
        found = [(self.norms[0], lambda y: attend(y, y))]
        if (cross := self.cross) is not None:
            found.append((self.norms[2], lambda y: cross(y, memory, memory_lengths)))
        return [*found, (self.norms[1], self.feed_forward)]

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, memory: Tensor | None = None,
        memory_lengths: Tensor | None = None, rotary: Tables | None = None, cache: Any = None,
    ) -> Tensor:  # fmt: skip
        layers = self.layers(lengths, memory, memory_lengths, rotary, cache)
        if not self.norm_first:
            for norm, layer in layers:
                x, _ = norm(self.dropout(layer(x)), residual=x)
            return x
        # A layer's sum and the norm that reads it are one pass.
        (norm, layer), *rest = layers
        change = self.dropout(layer(norm(x)))
        for norm, layer in rest:
            y, x = norm(change, residual=x)
            change = self.dropout(layer(y))
        return x + change


class Embeddings(nn.Module):
    """Token plus learned position plus, for `segments` > 0, segment: (B, S) → (B, S, W)."""

    def __init__(self, config: TransformerConfig, segments: int = 0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.max_length, config.width)
        self.segments = nn.Embedding(segments, config.width) if segments else None

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, first: int = 0
    ) -> Tensor:  # fmt: skip
        past = first + tokens.shape[1]
        if past > self.positions.num_embeddings:
            raise ValueError(
                f"got {past} tokens, expected at most max_length={self.positions.num_embeddings}"
            )
        x = self.tokens(tokens) + self.positions.weight[first:past]
        if self.segments is None or segments is None:
            return x
        return x + self.segments(segments)


def initialise(module: nn.Module) -> None:
    """Glorot-uniform products, zero biases, embeddings of deviation 0.02."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, S-1, V), made from tokens[:, :-1], over what follows."""
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD)


# --- the models ----------------------------------------------------------------------------------


def _caches(blocks: Any, x: Tensor, caches: list | None) -> list:
    """One of each block, or None."""
    if caches is None:
        return [None] * len(blocks)
    if not caches:
        caches += [block.attention.new_cache(x) for block in blocks]
    return caches


class Decoder(nn.Module):
    """GPT: a causal, pre-norm stack that predicts each next token; output tied to the embedding."""

    def __init__(self, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.embedding = Embeddings(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config, ops, FeedForward(config, F.gelu), norm_first=True, causal=True)
            for _ in range(config.layers)
        )
        self.norm = LayerNorm(config.width, ops)
        self.apply(initialise)

    def forward(self, tokens: Tensor, first: int = 0, caches: Any = None) -> Tensor:
        """tokens (B, S) → logits (B, S, V). Padding needs no mask: it comes last.

        caches: a list, one of each block, of the `first` tokens before these; an empty one is
        filled.
        """
        x = self.dropout(self.embedding(tokens, first=first))
        for block, cache in zip(self.blocks, _caches(self.blocks, x, caches), strict=True):
            x = block(x, cache=cache)
        return F.linear(self.norm(x), self.embedding.tokens.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """The causal loss of tokens (B, S), PAD not counted."""
        return next_token_loss(self(tokens[:, :-1]), tokens)


class Llama(nn.Module):
    """LLaMA: causal and pre-norm, by RMS, with rotary positions, SwiGLU and grouped heads.

    No biases; the output is tied to the embedding.
    """

    def __init__(self, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(
                config, ops, SwiGLU(config),
                norm=RMSNorm, norm_first=True, causal=True, kv_heads=config.kv_heads, bias=False,
            )
            for _ in range(config.layers)
        )  # fmt: skip
        self.norm = RMSNorm(config.width, ops)
        cos, sin = rotary_tables(config.max_length, config.width // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(initialise)

    def forward(self, tokens: Tensor, first: int = 0, caches: Any = None) -> Tensor:
        """As `Decoder`; the caches know how many tokens are before these."""
        x = self.dropout(self.tokens(tokens))
        for block, cache in zip(self.blocks, _caches(self.blocks, x, caches), strict=True):
            x = block(x, rotary=(self.cos, self.sin), cache=cache)
        return F.linear(self.norm(x), self.tokens.weight)

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
        self.blocks = nn.ModuleList(
            Block(config, ops, FeedForward(config, F.gelu)) for _ in range(config.layers)
        )
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
        self.encoder = nn.ModuleList(
            Block(config, ops, FeedForward(config, F.relu)) for _ in layers
        )
        self.decoder = nn.ModuleList(
            Block(config, ops, FeedForward(config, F.relu), causal=True, cross=True) for _ in layers
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
