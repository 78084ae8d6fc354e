"""nn.RotaryEmbedding, nn.SinusoidalPositionalEncoding and nn.LearnedPositionalEncoding."""

from __future__ import annotations

import copy
import pickle

import fusedattn
import pytest
import torch
from compare import ulp
from fusedattn.nn import (
    LearnedPositionalEncoding,
    RotaryEmbedding,
    SinusoidalPositionalEncoding,
)
from fusedattn.nn.rotary_scaling import RotaryScaling
from fusedattn.reference import functional as reference

M = 512  # max_position_embeddings
HALF = 32
LONG = {
    "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
    "long_factor": [2.0 + 0.5 * i for i in range(HALF)],
}
SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "older name": {"type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0},
    "yarn original": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128},
    "yarn betas": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16, "beta_slow": 2},
    "yarn mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25},
    "yarn smooth": {"rope_type": "yarn", "factor": 4.0, "truncate": False},
    "yarn ratio": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64},
    "yarn small": {"rope_type": "yarn", "factor": 0.5},
    "yarn sharp": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1, "truncate": False},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 128, **LONG},
    "longrope factor": {"rope_type": "longrope", "factor": 4.0, **LONG},
    "longrope attention": {"rope_type": "longrope", "attention_factor": 1.5, **LONG},
}  # fmt: skip


@pytest.mark.parametrize("length", [100, 700, 5000])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_hugging_face(name, length):
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    configs = pytest.importorskip("transformers")
    given = SCALINGS[name]
    own = RotaryScaling(2 * HALF, 5e5, copy.deepcopy(given), M)
    if given is None:
        exponent = torch.arange(0, 2 * HALF, 2, dtype=torch.float64) / (2 * HALF)
        torch.testing.assert_close(own.frequencies(length), 5e5**-exponent)
        return
    kind = given.get("rope_type", given.get("type"))
    config = configs.LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=M,
        rope_parameters={"rope_theta": 5e5, **copy.deepcopy(given), "rope_type": kind},
    )  # fmt: skip
    want, factor = rope.ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    found = own.frequencies(length)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), want, rtol=2e-6, atol=0)
    assert own.attention_factor == pytest.approx(factor, rel=1e-12)


def rotated(module, length, positions=None, offset=0) -> torch.Tensor:
    """What the module should compute, in fp64, for q of ones."""
    rows = (torch.arange(length) if positions is None else positions) + offset
    phase = rows.double()[..., None] * module.scaling.frequencies(int(rows.max()) + 1)
    cos, sin = (f(phase) * module.scaling.attention_factor for f in (torch.cos, torch.sin))
    return torch.cat((cos - sin, cos + sin), -1)


@pytest.mark.parametrize("name", SCALINGS)
def test_rotation(name):
    module = RotaryEmbedding(2 * HALF, scaling=SCALINGS[name], max_position_embeddings=M)
    q = torch.ones(1, 2, 6, 2 * HALF)
    for offset in (0, 300, 900, 2000, 120, 5):
        for given in (offset, torch.tensor(offset)):
            out, _ = module(q, q[:, :1], offset=given)
            want = rotated(module, 6, offset=offset).expand(1, 2, 6, -1)
            torch.testing.assert_close(out.double(), want, rtol=0, atol=4e-7)
    positions = torch.tensor([[0, 7, 3, 40, 41, 9], [600, 700, 701, 4, 5, 6]])
    out, _ = module(q.expand(2, 2, 6, -1), q.expand(2, 2, 6, -1), positions=positions)
    want = rotated(module, 6, positions)[:, None].expand(2, 2, 6, -1)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=4e-7)


@pytest.mark.parametrize("first", [255, 1857, 4095, 65_535, 131_071, 1_000_000])
def test_tables_at_far_positions(first):
    """gpt-neox#1003, transformers#29285: phases in fp32 or less."""
    module = RotaryEmbedding(128)
    cos, sin, rows, start = module._lookup(torch.empty(1, 1, 6, 128), None, first)
    assert rows is None
    phase = (first + torch.arange(6.0).double())[:, None] * module.scaling.frequencies(0)
    for table, want in ((cos, phase.cos()), (sin, phase.sin())):
        got = table[start : start + 6].double()
        assert (got - want).abs().max() <= ulp(1.0, torch.float32)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_casts_leave_the_tables_alone(cast):
    """Megatron-LM#744, transformers#25681."""
    q = torch.randn(1, 2, 9, 16).to(torch.bfloat16)
    want = RotaryEmbedding(16)(q, q, offset=3000)
    module = RotaryEmbedding(16)
    module(q, q)
    getattr(module, cast)()
    with torch.autocast("cpu", torch.bfloat16):
        found = module(q, q, offset=3000)
    assert all(map(torch.equal, found, want))
    assert module.state_dict() == {}


def test_float64_queries_get_float64_tables():
    q = torch.ones(1, 1, 3, 4, dtype=torch.float64)
    module = RotaryEmbedding(4)
    torch.testing.assert_close(module(q, q, offset=9)[0][0, 0], rotated(module, 3, offset=9))


def test_inference_mode_then_training():
    """flash-attention#299: a table made in inference mode cannot be saved for backward."""
    module, q = RotaryEmbedding(8), torch.randn(1, 2, 5, 8, requires_grad=True)
    with torch.inference_mode():
        module(q, q, offset=3)
    sum(x.sum() for x in module(q, q)).backward()
    assert q.grad.isfinite().all()


def test_meta_and_copies():
    """transformers#26448 and others: tables on a stale device, or shared by models."""
    with torch.device("meta"):
        module = RotaryEmbedding(8, scaling={"rope_type": "yarn", "factor": 2.0})
    meta = torch.empty(1, 2, 5, 8, device="meta")
    assert module(meta, meta)[0].is_meta
    module.to_empty(device="cpu")
    q = torch.randn(1, 2, 5, 8)
    want = RotaryEmbedding(8, scaling={"rope_type": "yarn", "factor": 2.0})(q, q)[0]
    twins = [module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    twins[1].to("meta")
    for twin in twins:
        assert torch.equal(twin(q, q)[0], want)


def test_tables_grow_and_are_kept():
    module, q = RotaryEmbedding(8, max_position_embeddings=16), torch.randn(1, 1, 4, 8)
    module(q, q)
    first = next(iter(module._tables.values()))[0]
    module(q, q, offset=12)
    assert next(iter(module._tables.values()))[0] is first
    assert first.shape == (16, 4)
    module(q, q, offset=13)
    assert next(iter(module._tables.values()))[0].shape == (32, 4)


@pytest.mark.parametrize(("dynamic", "warm"), [(False, False), (True, True)])
def test_rotary_compiled(dynamic, warm):
    torch._dynamo.reset()
    module = RotaryEmbedding(8, max_position_embeddings=16)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (4, 30):
        q = torch.randn(2, 2, length, 8, requires_grad=True)
        if warm:
            module(q, q)
        for options in ({}, {"positions": torch.arange(length) + 3}, {"offset": torch.tensor(3)}):
            found, want = compiled(q, q.sin(), **options), module(q, q.sin(), **options)
            torch.testing.assert_close(found, want)
    torch._dynamo.reset()


FACTORS = ("low_freq_factor", "high_freq_factor")
BAD = {
    "odd": ({"dim": 7}, "even number"),
    "zero": ({"dim": 0}, "dim=0, expected a number above 0"),
    "length": ({"max_position_embeddings": 0}, "max_position_embeddings=0, expected a number abo"),
    "base": ({"base": 0.0}, "base=0.0"),
    "kind": ({"scaling": {"rope_type": "new"}}, "type 'new'"),
    "missing": ({"scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    "count": ({"scaling": {"rope_type": "longrope", **LONG}}, "of 32 numbers, expected 4"),
    "factor": ({"scaling": {"rope_type": "linear", "factor": 0}}, r"\['factor'\]=0, expected one"),
    "order": (
        {"scaling": {"rope_type": "llama3", "factor": 8} | dict.fromkeys(FACTORS, 4)},
        "low_freq_factor=4 and high_freq_factor=4, expected the first to be smaller",
    ),
    "partial": ({"scaling": {"partial_rotary_factor": 0.5}}, "rotary dim already"),
    "dynamic": ({"dim": 2, "scaling": {"rope_type": "dynamic", "factor": 2.0}}, "at least 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rotary(name):
    changed, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(**{"dim": 8, **changed})


# --- sinusoidal and learned ----------------------------------------------------------------------


def test_sinusoidal():
    module, x = (
        SinusoidalPositionalEncoding(scale=3.0, base=100.0, dropout=0.5),
        torch.randn(2, 5, 8),
    )
    assert "scale=3.0" in repr(module)
    assert module.state_dict() == {}
    module.eval()
    want = fusedattn.add_sinusoidal(x, scale=3.0, base=100.0, offset=2)
    assert torch.equal(module(x, offset=2), want)
    module.train()
    dropped = module(x, offset=2)
    kept = dropped != 0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(dropped[kept], 2 * want[kept])


def test_learned():
    module, x = LearnedPositionalEncoding(9, 8), torch.randn(2, 5, 8, requires_grad=True)
    torch.nn.Embedding(9, 8).load_state_dict(module.state_dict())
    assert torch.equal(module(x, offset=4), x + module.weight[4:])
    positions = torch.tensor([[0, 0, 3, 8, 1]])
    out = module(x.bfloat16(), positions=positions)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert module.weight.grad[:, 0].tolist() == [4, 2, 0, 2, 0, 0, 0, 0, 2]
    assert x.grad.shape == x.shape
    assert "9, 8" in repr(module)
    assert (LearnedPositionalEncoding(9, 8, dropout=1.0)(x) == 0).all()


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 10, 8), {}, "positions 0 to 9"),
        ((2, 5, 8), {"offset": 5}, "positions 5 to 9"),
        ((2, 5, 8), {"offset": -1}, "positions -1 to 3"),
        ((2, 5, 8), {"positions": torch.tensor([0, 1, 2, 3, 9])}, "positions 0 to 9"),
        ((2, 5, 7), {}, "x of shape"),
        ((8,), {}, "x of shape"),
        ((2, 5, 8), {"positions": torch.arange(4)}, r"positions of shape \(4,\)"),
        ((2, 5, 8), {"positions": torch.arange(15).view(3, 5)}, r"positions of shape \(3, 5\)"),
    ],
)
def test_bad_learned(shape, options, message):
    with pytest.raises(ValueError, match=message):
        LearnedPositionalEncoding(9, 8)(torch.zeros(shape), **options)


def test_bad_options():
    for make in (
        SinusoidalPositionalEncoding,
        lambda dropout: LearnedPositionalEncoding(3, 4, dropout),
    ):
        with pytest.raises(ValueError, match="dropout=2"):
            make(dropout=2.0)
    with pytest.raises(ValueError, match="max_length=0"):
        LearnedPositionalEncoding(0, 4)


def test_rotary_against_the_formula():
    q, k = torch.randn(2, 4, 7, 24), torch.randn(2, 2, 7, 24)
    module = RotaryEmbedding(16, interleaved=True)
    assert "16" in repr(module)
    phase = torch.arange(7).double()[:, None] * module.scaling.frequencies(7)
    tables = phase.cos().float(), phase.sin().float()
    for out, x in zip(module(q, k), (q, k), strict=True):
        want = reference.apply_rotary(x, *tables, interleaved=True)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-6)
