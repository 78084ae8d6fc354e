"""The ops as `torch.autograd.Function`s, for code that builds on them directly."""

from .ops.attention import AttentionFunction as Attention
from .ops.attention_config import AttentionConfig
from .ops.norm import NormFunction as Norm
from .ops.norm_config import NormConfig

__all__ = ["Attention", "AttentionConfig", "Norm", "NormConfig"]
