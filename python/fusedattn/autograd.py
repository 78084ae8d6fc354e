"""The ops as `torch.autograd.Function`s, for code that builds on them directly.

Each is apply(config, backend, *fields): the options as a config, a backend's name, and the fields
of the op's call in their order, of which the last may be left out. Nothing is checked.
"""

from .ops import attention, norm, rotary, sinusoidal, softmax, swiglu
from .ops._op import public
from .ops.attention_config import AttentionConfig
from .ops.norm_config import NormConfig
from .ops.rotary import RotaryInPlaceFunction as RotaryInPlace
from .ops.rotary_config import RotaryConfig
from .ops.sinusoidal import SinusoidalConfig
from .ops.softmax_config import SoftmaxConfig
from .ops.swiglu import SwigluConfig

Attention = public(attention.op, "Attention")
LayerNorm = public(norm.layer_norm_op, "LayerNorm")
RMSNorm = public(norm.rms_norm_op, "RMSNorm")
Rotary = public(rotary.op, "Rotary")
Sinusoidal = public(sinusoidal.op, "Sinusoidal")
Softmax = public(softmax.op, "Softmax")
SwiGLU = public(swiglu.op, "SwiGLU")

__all__ = [
    "Attention",
    "AttentionConfig",
    "LayerNorm",
    "NormConfig",
    "RMSNorm",
    "Rotary",
    "RotaryConfig",
    "RotaryInPlace",
    "Sinusoidal",
    "SinusoidalConfig",
    "Softmax",
    "SoftmaxConfig",
    "SwiGLU",
    "SwigluConfig",
]
