"""Swapping torch's modules for fused ones inside a model that exists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .attention import MultiheadAttention
from .norm import LayerNorm, RMSNorm
from .softmax import Softmax

FUSED: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.LayerNorm: LayerNorm,
    torch.nn.RMSNorm: RMSNorm,
    torch.nn.Softmax: Softmax,
    torch.nn.MultiheadAttention: MultiheadAttention,
}


class Replacement:
    """What `replace` changed: a mapping of module names to (old class, new class).

    `undo()` gives every module its old class back; as a context manager it does so on exit.
    """

    def __init__(self) -> None:
        self.changed: dict[str, tuple[type, type]] = {}
        self._before: list[tuple[torch.nn.Module, type, dict[str, Any]]] = []

    def undo(self) -> None:
        """Turn the modules back into what they were; parameters and buffers stay as they are."""
        for module, old, flags in self._before:
            module.__class__ = old
            module.__dict__.update(flags)
        self._before.clear()

    def _swap(self, name: str, module: torch.nn.Module, new: type[torch.nn.Module]) -> None:
        old = type(module)
        flags = {}
        module.__class__ = new
        if isinstance(module, MultiheadAttention):
            flags = {"_qkv_same_embed_dim": module._qkv_same_embed_dim}
            module._keep_off_torch_fast_path()
        self._before.append((module, old, flags))
        self.changed[name] = (old, new)

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()

    def __len__(self) -> int:
        return len(self.changed)

    def __iter__(self) -> Iterator[str]:
        return iter(self.changed)

    def __repr__(self) -> str:
        lines = [
            f"  {name or '(the model itself)'}: {old.__module__}.{old.__qualname__} → "
            f"fusedattn.nn.{new.__name__}"
            for name, (old, new) in self.changed.items()
        ]
        return "\n".join([f"Replacement of {len(lines)} modules", *lines])


def replace(model: torch.nn.Module) -> Replacement:
    """Make the norms, softmaxes and attentions of `model` fused ones, in place.

    Swaps `torch.nn.LayerNorm`, `RMSNorm`, `Softmax` and `MultiheadAttention`, wherever they stand
    in the model, for those of `fusedattn.nn`. A module stays the same object, with its parameters,
    hooks and place in the `state_dict`: optimizers and checkpoints do not notice. Subclasses, which
    may compute something else, and a `Softmax` without a `dim` are left alone.

    Returns:
        What was changed, by module name; its `undo()` takes it back.

    Raises:
        TypeError: `model` is no `torch.nn.Module`.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"replace: got model of type {type(model).__name__}, expected a Module")
    done = Replacement()
    for name, module in model.named_modules():
        new = FUSED.get(type(module))
        if new is not None and getattr(module, "dim", 0) is not None:
            done._swap(name, module, new)
    return done
