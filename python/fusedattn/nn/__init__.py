"""`nn.Module`s over the ops, state_dict-compatible with `torch.nn`."""

from .attention import MultiheadAttention
from .cache import KVCache, PagedKVCache
from .norm import LayerNorm, RMSNorm
from .positional import (
    LearnedPositionalEncoding,
    RotaryEmbedding,
    SinusoidalPositionalEncoding,
    alibi_slopes,
)
from .replacement import Replacement, replace
from .softmax import Softmax
from .swiglu import SwiGLU
from .transformer import Transformer, TransformerDecoder, TransformerEncoder
from .transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "KVCache",
    "LayerNorm",
    "LearnedPositionalEncoding",
    "MultiheadAttention",
    "PagedKVCache",
    "RMSNorm",
    "Replacement",
    "RotaryEmbedding",
    "SinusoidalPositionalEncoding",
    "Softmax",
    "SwiGLU",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "alibi_slopes",
    "replace",
]
