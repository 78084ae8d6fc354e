"""`nn.Module`s over the ops, state_dict-compatible with `torch.nn`."""

from .attention import MultiheadAttention
from .softmax import Softmax

__all__ = ["MultiheadAttention", "Softmax"]
