"""The ops as `torch.autograd.Function`s, for code that builds on them directly."""

from .ops.attention import AttentionFunction as Attention

__all__ = ["Attention"]
