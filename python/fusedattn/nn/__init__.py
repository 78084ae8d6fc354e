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
from .softmax import Softmax
from .swiglu import SwiGLU

__all__ = [
    "KVCache",
    "LayerNorm",
    "LearnedPositionalEncoding",
    "MultiheadAttention",
    "PagedKVCache",
    "RMSNorm",
    "RotaryEmbedding",
    "SinusoidalPositionalEncoding",
    "Softmax",
    "SwiGLU",
    "alibi_slopes",
]
