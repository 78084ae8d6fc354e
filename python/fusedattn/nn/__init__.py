"""`nn.Module`s over the ops, state_dict-compatible with `torch.nn`."""

from .attention import MultiheadAttention

__all__ = ["MultiheadAttention"]
