"""Modules made with and called on what they do not take: every refusal names what was wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusedattn import nn

X = torch.randn(2, 5, 16)
# Neither floating-point tensors nor, but for their width, such as the modules were made for.
HOSTILE: dict[str, Any] = {
    "none": None,
    "list": [1.0],
    "array": X.numpy(),
    "int": X.long(),
    "bool": X > 0,
    "complex": X.cfloat(),
    "scalar": torch.tensor(1.0),
    "float8": X.to(torch.float8_e4m3fn),
    "elsewhere": X.to("meta"),
}
MODULES: dict[str, Callable[[], torch.nn.Module]] = {
    "layer": lambda: nn.LayerNorm(16),
    "rms": lambda: nn.RMSNorm(16),
    "softmax": lambda: nn.Softmax(-1),
    "softmax-no-dim": lambda: nn.Softmax(),
    "attention": lambda: nn.MultiheadAttention(16, 4, batch_first=True),
    "rotary": lambda: nn.RotaryEmbedding(16),
    "sinusoidal": lambda: nn.SinusoidalPositionalEncoding(),
    "learned": lambda: nn.LearnedPositionalEncoding(9, 16),
    "swiglu": lambda: nn.SwiGLU(16, 8),
    "encoder-layer": lambda: nn.TransformerEncoderLayer(16, 4, 8, batch_first=True),
    "decoder-layer": lambda: nn.TransformerDecoderLayer(16, 4, 8, norm_first=True),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 8), 1),
    "decoder": lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 8), 1),
    "transformer": lambda: nn.Transformer(16, 4, 1, 1, 8, batch_first=True),
}
NAMED = r"^\w+: got \w+( and \w+)? (of|on) .*, expected "


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("name", MODULES)
def test_inputs(name: str, what: str) -> None:
    module, x = MODULES[name](), HOSTILE[what]
    calls = {
        "attention": [(x, X, X), (X, x, X), (X, X, x), (x, x, x)],
        "rotary": [(x, X), (X, x)],
        **{each: [(x, X), (X, x), (x, x)] for each in ("decoder-layer", "decoder", "transformer")},
    }.get(name, [(x,)])
    taken = {("scalar", "softmax"), ("scalar", "softmax-no-dim")}  # as torch's does
    on_meta = ("softmax", "softmax-no-dim", "sinusoidal", "rotary", "swiglu")
    taken |= {("elsewhere", name) for name in on_meta}
    for args in calls if (what, name) not in taken else ():
        with pytest.raises((TypeError, ValueError), match=NAMED):
            module(*args)


POSITIONS = (X.numpy(), [0], X, X > 0, torch.arange(4), torch.arange(5).to("meta"))


@pytest.mark.parametrize("name", ["rotary", "sinusoidal", "learned"])
def test_positions(name: str) -> None:
    module = MODULES[name]()
    args = (X, X) if name == "rotary" else (X,)
    for wrong in POSITIONS:
        with pytest.raises((TypeError, ValueError), match=r"^\w+: got positions o[fn]"):
            module(*args, positions=wrong)
    for offset in (None, 1.5, "1", torch.tensor(1.5), torch.arange(2)):
        with pytest.raises((TypeError, ValueError), match=r"^\w+: got offset o[fn]"):
            module(*args, offset=offset)


def test_attention_dtypes_and_autocast() -> None:
    """The dtype is that of the weights unless autocast sees to it; compiled too."""
    module, half = nn.MultiheadAttention(16, 4, batch_first=True), X.bfloat16()
    with pytest.raises(TypeError, match=r"query of dtype torch.bfloat16, expected torch.float32"):
        module(half, half, half)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for run in (module, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            assert run(half, half, half, need_weights=False)[0].dtype == torch.bfloat16


MADE: list[tuple[type, dict[str, Any], str]] = [
    (nn.MultiheadAttention, {"embed_dim": 16.0, "num_heads": 4}, "embed_dim of type float"),
    (nn.MultiheadAttention, {"embed_dim": 16, "num_heads": 2.0}, "num_heads of type float"),
    (nn.MultiheadAttention, {"embed_dim": 16, "num_heads": 4, "kdim": 0}, "kdim=0"),
    (nn.MultiheadAttention, {"embed_dim": 16, "num_heads": 4, "vdim": -1}, "vdim=-1"),
    (nn.MultiheadAttention, {"embed_dim": 16, "num_heads": 4, "dropout": None}, "dropout of type"),
    (nn.MultiheadAttention, {"embed_dim": 16, "num_heads": 4, "dtype": torch.int8}, "dtype=torch"),
    (nn.LayerNorm, {"normalized_shape": -1}, "normalized_shape=-1, expected sizes"),
    (nn.LayerNorm, {"normalized_shape": [2, "a"]}, r"normalized_shape=\[2, 'a'\], exp"),
    (nn.LayerNorm, {"normalized_shape": None}, "normalized_shape=None, expected integers"),
    (nn.RMSNorm, {"normalized_shape": 8, "dtype": "float"}, "dtype=float"),
    (nn.RMSNorm, {"normalized_shape": 8, "weight_offset": "a"}, "weight_offset of type str"),
    (nn.RMSNorm, {"normalized_shape": 8, "dropout_p": "a"}, "dropout_p of type str"),
    (nn.RotaryEmbedding, {"dim": 2.0}, "dim of type float"),
    (nn.RotaryEmbedding, {"dim": 8, "base": "a"}, "base of type str"),
    (nn.RotaryEmbedding, {"dim": 8, "scaling": "yarn"}, "scaling of type str"),
    (nn.RotaryEmbedding, {"dim": 8, "scaling": {"factor": "a"}}, r"scaling\['factor'\] of type"),
    (
        nn.RotaryEmbedding,
        {"dim": 8, "scaling": {"rope_type": "longrope", "short_factor": 3, "long_factor": 4}},
        "short_factor of type int",
    ),
    (nn.SinusoidalPositionalEncoding, {"dropout": 2}, "dropout=2"),
    (nn.LearnedPositionalEncoding, {"max_length": 2.5, "width": 8}, "max_length of type float"),
    (nn.LearnedPositionalEncoding, {"max_length": 9, "width": 0}, "width=0"),
    (nn.LearnedPositionalEncoding, {"max_length": 9, "width": 8, "dtype": torch.int8}, "dtype=to"),
    (nn.SwiGLU, {"dim": 8, "hidden_dim": 0}, "hidden_dim=0"),
    (nn.SwiGLU, {"dim": 8, "hidden_dim": 8, "activation": "tanh"}, "activation='tanh'"),
    (nn.TransformerEncoderLayer, {"d_model": 8, "nhead": 3}, "d_model=8 and nhead=3"),
    (nn.TransformerEncoderLayer, {"d_model": 8, "nhead": 0}, "nhead=0"),
    (nn.TransformerEncoderLayer, {"d_model": 8, "nhead": 2, "dropout": 2}, "dropout=2"),
    (nn.TransformerDecoderLayer, {"d_model": 8.0, "nhead": 2}, "d_model of type float"),
    (nn.TransformerDecoderLayer, {"d_model": 8, "nhead": 2, "activation": "silu"}, "activation='"),
    (nn.TransformerDecoderLayer, {"d_model": 8, "nhead": 2, "activation": 3}, "activation of type"),
    (nn.TransformerDecoderLayer, {"d_model": 8, "nhead": 2, "norm_first": 1}, "norm_first of type"),
    (nn.TransformerEncoder, {"encoder_layer": None, "num_layers": 1}, "encoder_layer of type None"),
    (nn.TransformerEncoder, {"encoder_layer": nn.Softmax(-1), "num_layers": 0}, "num_layers=0"),
    (
        nn.TransformerDecoder,
        {"decoder_layer": nn.Softmax(-1), "num_layers": 1, "norm": 1},
        "norm of type int",
    ),
    (nn.Transformer, {"num_decoder_layers": -1}, "num_decoder_layers=-1"),
    (nn.Transformer, {"d_model": 8, "nhead": 3}, "d_model=8 and nhead=3"),
    (nn.Transformer, {"layer_norm_eps": "a"}, "layer_norm_eps of type str"),
]


@pytest.mark.parametrize(("module", "options", "message"), MADE)
def test_construction(module: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{module.__name__}: got {message}"):
        module(**options)


def test_from_torch_of_another_module() -> None:
    with pytest.raises(TypeError, match="MultiheadAttention: got module of type Linear, expected"):
        nn.MultiheadAttention.from_torch(torch.nn.Linear(3, 3))
