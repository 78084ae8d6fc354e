"""The ops as `torch.autograd.Function`s, for code that builds on them directly."""

from .ops.attention import AttentionFunction as Attention
from .ops.attention_config import AttentionConfig
from .ops.norm import NormFunction as Norm
from .ops.norm_config import NormConfig
from .ops.rotary import RotaryFunction as Rotary
from .ops.rotary import RotaryInPlaceFunction as RotaryInPlace
from .ops.rotary_config import RotaryConfig
from .ops.sinusoidal import SinusoidalConfig
from .ops.sinusoidal import SinusoidalFunction as Sinusoidal
from .ops.softmax import SoftmaxFunction as Softmax
from .ops.softmax_config import SoftmaxConfig

__all__ = [
    "Attention",
    "AttentionConfig",
    "Norm",
    "NormConfig",
    "Rotary",
    "RotaryConfig",
    "RotaryInPlace",
    "Sinusoidal",
    "SinusoidalConfig",
    "Softmax",
    "SoftmaxConfig",
]
