"""The reference transformer: plain against fused, and what each model may see."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import pytest
import torch
from fusedattn.reference import model_ops
from fusedattn.reference.transformer import (
    BEGIN,
    MASK,
    PAD,
    VOCABULARY,
    Block,
    Decoder,
    Encoder,
    EncoderDecoder,
    Llama,
    Ops,
    TransformerConfig,
)
from torch import Tensor, nn

CONFIG = TransformerConfig(width=32, heads=4, layers=2, feed_forward=64, max_length=48)
GROUPED = dataclasses.replace(CONFIG, kv_heads=2)
MODELS = [Decoder, Encoder, EncoderDecoder, Llama]
LENGTHS = torch.tensor([24, 17, 5], dtype=torch.int32)


def batch(model: type[nn.Module]) -> tuple[Tensor, ...]:
    """Arguments for the loss of `model`: three padded sequences of random bytes."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 256, (3, 24), generator=draw)
    tokens[:, 0] = BEGIN
    tokens = tokens.masked_fill(torch.arange(24) >= LENGTHS[:, None], PAD)
    if model in (Decoder, Llama):
        return (tokens,)
    if model is EncoderDecoder:
        return tokens, tokens.flip(0)[:, :16], LENGTHS
    hidden = (torch.rand(tokens.shape, generator=draw) < 0.3) & (tokens < 256)
    targets = torch.where(hidden, tokens, PAD)
    segments = (torch.arange(24) >= 3).long().expand(3, 24)
    return tokens.masked_fill(hidden, MASK), targets, torch.tensor([0, 1, 1]), segments, LENGTHS


def build(model: type[nn.Module], ops: Ops, config: TransformerConfig | None = None) -> nn.Module:
    torch.manual_seed(0)
    return model(config or (GROUPED if model is Llama else CONFIG), ops)


@pytest.mark.parametrize("model", MODELS)
def test_fused_equals_plain(model: type[nn.Module]) -> None:
    """Same seed: the same parameters, the same loss, the same gradient of every parameter."""
    plain, fused = build(model, Ops.plain()), build(model, Ops.fused())
    losses = [m.loss(*batch(model)) for m in (plain, fused)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    for loss in losses:
        loss.backward()
    named = dict(plain.named_parameters())
    assert named.keys() == dict(fused.named_parameters()).keys()
    for name, parameter in fused.named_parameters():
        assert named[name].grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, named[name].grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("ops", [Ops.plain(), Ops.fused()], ids=["plain", "fused"])
@pytest.mark.parametrize("model", [Decoder, EncoderDecoder, Llama])
def test_no_look_ahead(model: type[nn.Module], ops: Ops) -> None:
    net = build(model, ops)
    tokens = torch.randint(0, 256, (2, 20))
    changed = tokens.clone()
    changed[:, 13] += 1
    source = torch.randint(0, 256, (2, 9))
    run = net.given(source) if model is EncoderDecoder else net
    before, after = run(tokens), run(changed)
    assert torch.equal(before[:, :13], after[:, :13])
    assert (before[:, 13:] != after[:, 13:]).any(-1).all()


def test_encoder_looks_both_ways() -> None:
    net = build(Encoder, Ops.fused())
    tokens = torch.randint(0, 256, (1, 20))
    changed = tokens.clone()
    changed[:, 13] += 1
    assert (net(tokens) != net(changed)).any(-1).all()


@pytest.mark.parametrize("ops", [Ops.plain(), Ops.fused()], ids=["plain", "fused"])
@pytest.mark.parametrize("model", MODELS)
def test_padding_changes_nothing(model: type[nn.Module], ops: Ops) -> None:
    net = build(model, ops)
    short = torch.randint(0, 256, (1, 11))
    padded = torch.cat((short, torch.full((1, 6), PAD)), 1)
    lengths = torch.tensor([11], dtype=torch.int32)
    if model in (Decoder, Llama):
        pair = net(short), net(padded)[:, :11]
    elif model is Encoder:
        pair = net(short), net(padded, None, lengths)[:, :11]
    else:
        pair = net(short, short), net.given(padded, lengths)(short)
        assert torch.equal(pair[1], net(padded, short, lengths))
    torch.testing.assert_close(*pair, atol=1e-5, rtol=0)
    if model in (Decoder, Llama):
        torch.testing.assert_close(net.loss(short), net.loss(padded), atol=1e-5, rtol=0)


def as_torch(block: Block, config: TransformerConfig) -> nn.Module:
    """torch's own layer with the weights of `block`, without dropout."""
    kind = nn.TransformerEncoderLayer if block.cross is None else nn.TransformerDecoderLayer
    layer = kind(
        config.width, config.heads, config.feed_forward, 0.0, block.feed_forward.activation,
        batch_first=True, norm_first=block.norm_first,
    )  # fmt: skip
    pairs = [(layer.self_attn, block.attention)]
    if block.cross is not None:
        pairs.append((layer.multihead_attn, block.cross))
        layer.norm3.load_state_dict(block.norms[1].state_dict())
        layer.norm2.load_state_dict(block.norms[2].state_dict())
    else:
        layer.norm2.load_state_dict(block.norms[1].state_dict())
    for theirs, ours in pairs:
        packed = (ours.query, ours.key_value)
        theirs.in_proj_weight.data = torch.cat([x.weight for x in packed])
        theirs.in_proj_bias.data = torch.cat([x.bias for x in packed])
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    layer.norm1.load_state_dict(block.norms[0].state_dict())
    layer.linear1.load_state_dict(block.feed_forward.up.state_dict())
    layer.linear2.load_state_dict(block.feed_forward.down.state_dict())
    return layer


@pytest.mark.parametrize("model", [Decoder, Encoder, EncoderDecoder])
def test_blocks_are_the_papers(model: type[nn.Module]) -> None:
    """Each model's block against torch's layer in the style of its paper, weight for weight."""
    net = build(model, Ops.plain())
    block = net.decoder[1] if model is EncoderDecoder else net.blocks[1]
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert block.norm_first == (model is Decoder)
    activation = nn.functional.relu if model is EncoderDecoder else nn.functional.gelu
    assert block.feed_forward.activation is activation
    x, memory = torch.randn(2, 9, 32), torch.randn(2, 5, 32)
    causal = torch.ones(9, 9, dtype=torch.bool).triu(1)
    layer = as_torch(block, CONFIG)
    if model is EncoderDecoder:
        pair = block(x, None, memory), layer(x, memory, causal)
    else:
        pair = block(x), layer(x, None if model is Encoder else causal)
    torch.testing.assert_close(*pair, atol=2e-5, rtol=1e-5)


def test_llama_is_llama() -> None:
    """The whole model against that of Hugging Face, weight for weight."""
    transformers = pytest.importorskip("transformers")
    net = build(Llama, Ops.plain())
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    body = theirs.model
    body.embed_tokens.load_state_dict(net.tokens.state_dict())
    body.norm.load_state_dict(net.norm.state_dict())
    for layer, block in zip(body.layers, net.blocks, strict=True):
        key, value = block.attention.key_value.weight.chunk(2)
        gate, up = block.feed_forward.gate_up.weight.chunk(2)
        for target, weight in (
            (layer.self_attn.q_proj, block.attention.query.weight),
            (layer.self_attn.k_proj, key),
            (layer.self_attn.v_proj, value),
            (layer.self_attn.o_proj, block.attention.out.weight),
            (layer.mlp.gate_proj, gate),
            (layer.mlp.up_proj, up),
            (layer.mlp.down_proj, block.feed_forward.down.weight),
            (layer.input_layernorm, block.norms[0].weight),
            (layer.post_attention_layernorm, block.norms[1].weight),
        ):
            target.weight.data = weight.data
    tokens = torch.randint(0, 256, (2, 20))
    torch.testing.assert_close(net(tokens), theirs(tokens).logits, atol=2e-5, rtol=1e-4)


def test_encoder_loss() -> None:
    """Against the two likelihoods, taken by hand at the hidden positions alone."""
    net = build(Encoder, Ops.plain())
    tokens, targets, is_next, *rest = batch(Encoder)
    features = net(tokens, *rest)
    likelihood = net.token_logits(features).log_softmax(-1)
    guessed = [likelihood[b, s, targets[b, s]] for b, s in (tokens == MASK).nonzero().tolist()]
    follows = net.sentence_head(features[:, 0]).log_softmax(-1)
    sentence = torch.stack([row[label] for row, label in zip(follows, is_next, strict=True)])
    expected = -torch.stack(guessed).mean() - sentence.mean()
    torch.testing.assert_close(net.loss(*batch(Encoder)), expected)


@pytest.mark.parametrize("model", MODELS)
def test_learns(model: type[nn.Module]) -> None:
    net = build(model, Ops.fused())
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = net.loss(*batch(model))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_ties_embeddings_and_drops_out() -> None:
    config = TransformerConfig(width=32, heads=4, layers=1, feed_forward=64, dropout=0.5)
    for model in MODELS:
        net = build(model, Ops.plain(), config)
        wide = [name for name, p in net.named_parameters() if p.shape == (VOCABULARY, 32)]
        assert len(wide) == 1
        assert net.loss(*batch(model)) != net.loss(*batch(model))
        net.eval()
        assert net.loss(*batch(model)) == net.loss(*batch(model))


def test_sinusoidal_positions() -> None:
    """Against the formula of Vaswani et al. (2017), §3.5, term by term."""
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    out = model_ops.add_sinusoidal(x, scale=3.0)
    for position in range(5):
        for i in range(6):
            phase = torch.tensor(position / 10000 ** ((i - i % 2) / 6), dtype=torch.float64)
            wave = phase.cos() if i % 2 else phase.sin()
            torch.testing.assert_close(out[:, position, i], 3 * x[:, position, i] + wave)


def test_every_op_is_pluggable() -> None:
    called = set()

    def spy(name: str, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: object, **options: object) -> Tensor:
            called.add(name)
            return op(*args, **options)

        return run

    plain = Ops.plain()
    ops = Ops(**{name: spy(name, op) for name, op in vars(plain).items()})
    for model in (EncoderDecoder, Llama):
        loss = build(model, ops).loss(*batch(model))
        assert torch.equal(loss, build(model, plain).loss(*batch(model)))
    build(Llama, ops)(batch(Llama)[0], 0, [])
    assert called == set(vars(plain))


@pytest.mark.parametrize("model", [Decoder, EncoderDecoder, Llama])
def test_compiles_without_a_break(model: type[nn.Module]) -> None:
    net = build(model, Ops.fused())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = torch.compile(net.loss, fullgraph=True, backend="aot_eager")(*batch(model))
        loss.backward()
    torch.testing.assert_close(loss, net.loss(*batch(model)))


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="got width=30 and heads=4, expected"):
        TransformerConfig(width=30, heads=4)
    with pytest.raises(ValueError, match="got heads=4 and kv_heads=3, expected a divisor"):
        TransformerConfig(kv_heads=3, heads=4)
    with pytest.raises(ValueError, match="got 49 tokens, expected at most max_length=48"):
        build(Decoder, Ops.plain())(torch.zeros(1, 49, dtype=torch.long))
