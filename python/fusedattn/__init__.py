"""fusedattn: fused transformer kernels for PyTorch, on the GPU and on the CPU.

>>> import torch
>>> import fusedattn
>>> q, k, v = torch.randn(3, 2, 8, 128, 64)
>>> out, lse = fusedattn.attention(q, k, v, causal=True, return_lse=True)
>>> out.shape, lse.shape
(torch.Size([2, 8, 128, 64]), torch.Size([2, 8, 128]))
"""

from . import autograd, biases, integrations, masks, nn
from .integrations.patch import Patch, patch
from .integrations.sdpa import scaled_dot_product_attention
from .nn.replacement import Replacement, replace
from .ops._explain import explain
from .ops._registry import UnsupportedError, strict
from .ops._warmup import warmup
from .ops.attention import attention
from .ops.attention_decode import attention_decode
from .ops.attention_varlen import attention_varlen
from .ops.layer_norm import layer_norm
from .ops.rms_norm import rms_norm
from .ops.rotary import apply_rotary, apply_rotary_qk
from .ops.sinusoidal import add_sinusoidal
from .ops.softmax import softmax
from .ops.swiglu import swiglu

__version__ = "0.1.0"
__all__ = [
    "Patch",
    "Replacement",
    "UnsupportedError",
    "add_sinusoidal",
    "apply_rotary",
    "apply_rotary_qk",
    "attention",
    "attention_decode",
    "attention_varlen",
    "autograd",
    "biases",
    "explain",
    "integrations",
    "layer_norm",
    "masks",
    "nn",
    "patch",
    "replace",
    "rms_norm",
    "scaled_dot_product_attention",
    "softmax",
    "strict",
    "swiglu",
    "warmup",
]
