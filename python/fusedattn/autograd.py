"""The ops as `torch.autograd.Function`s, for code that builds on them directly."""

from .ops.attention import AttentionFunction as Attention
from .ops.attention_config import AttentionConfig
from .ops.norm import NormFunction as Norm
from .ops.norm_config import NormConfig
from .ops.softmax import SoftmaxFunction as Softmax
from .ops.softmax_config import SoftmaxConfig

__all__ = ["Attention", "AttentionConfig", "Norm", "NormConfig", "Softmax", "SoftmaxConfig"]
