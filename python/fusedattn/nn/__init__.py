"""`nn.Module`s over the ops, state_dict-compatible with `torch.nn`."""

from .attention import MultiheadAttention
from .norm import LayerNorm, RMSNorm

__all__ = ["LayerNorm", "MultiheadAttention", "RMSNorm"]
