"""`nn.Module`s over the ops, state_dict-compatible with `torch.nn`."""

from .attention import MultiheadAttention
from .positional import LearnedPositionalEncoding, RotaryEmbedding, SinusoidalPositionalEncoding

__all__ = [
    "LearnedPositionalEncoding",
    "MultiheadAttention",
    "RotaryEmbedding",
    "SinusoidalPositionalEncoding",
]
