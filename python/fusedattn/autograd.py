"""The ops as `torch.autograd.Function`s, for code that builds on them directly."""

from .ops.attention import AttentionFunction as Attention
from .ops.attention_config import AttentionConfig
from .ops.rotary import RotaryFunction as Rotary
from .ops.rotary import RotaryInPlaceFunction as RotaryInPlace
from .ops.rotary_config import RotaryConfig
from .ops.sinusoidal import SinusoidalConfig
from .ops.sinusoidal import SinusoidalFunction as Sinusoidal

__all__ = [
    "Attention",
    "AttentionConfig",
    "Rotary",
    "RotaryConfig",
    "RotaryInPlace",
    "Sinusoidal",
    "SinusoidalConfig",
]
