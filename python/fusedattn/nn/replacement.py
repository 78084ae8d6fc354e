"""Swapping torch's modules for fused ones inside a model that exists."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch

from ..ops._registry import _stacklevel_of_the_caller
from .attention import MultiheadAttention
from .norm import LayerNorm, RMSNorm
from .softmax import Softmax
from .transformer import Transformer, TransformerDecoder, TransformerEncoder
from .transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer

FUSED: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.LayerNorm: LayerNorm,
    torch.nn.RMSNorm: RMSNorm,
    torch.nn.Softmax: Softmax,
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.Transformer: Transformer,
    torch.nn.TransformerEncoder: TransformerEncoder,
    torch.nn.TransformerDecoder: TransformerDecoder,
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: TransformerDecoderLayer,
}


# A swapped module keeps its old class in its __dict__ under this name, and so do its copies.
_OLD_CLASS = "_class_before_replace"


class Replacement(Mapping[str, tuple[type, type]]):
    """What `replace` changed: a mapping of module names to (old class, new class).

    `undo()` gives every module its old class back; as a context manager it does so on exit. The
    modules themselves know what they were, so that a deep copy of the model, or one that was
    unpickled, has a replacement of its own: `Replacement.of(copy).undo()`.

    Attributes:
        left: by name, why `replace` left a module alone that is like those it swaps.
    """

    def __init__(self) -> None:
        self.left: dict[str, str] = {}
        self._changed: dict[str, tuple[type, type]] = {}
        self._modules: dict[str, torch.nn.Module] = {}

    @classmethod
    def of(cls, model: torch.nn.Module) -> Replacement:
        """All that is replaced in `model`, whoever did it and whichever model this is a copy of.

        Raises:
            TypeError: `model` is no `torch.nn.Module`.
        """
        found = cls()
        for name, module in _modules_of(model, "Replacement.of"):
            if _OLD_CLASS in vars(module):
                found._note(name, module)
        return found

    def undo(self) -> None:
        """Turn the modules back into what they were; parameters and buffers stay as they are.

        A module whose class somebody has changed since (a parametrization, `fully_shard`) is left
        as it is, with a warning that names it; once that is taken back, `undo()` finishes the work.
        """
        left = {}
        for name, module in self._modules.items():
            old, new = self._changed[name]
            if _OLD_CLASS not in vars(module):  # undone already
                continue
            if type(module) is not new:
                left[name] = module
                continue
            if isinstance(module, MultiheadAttention):
                module._let_torch_fast_path()
            module.__class__ = old
            del vars(module)[_OLD_CLASS]
        self._modules = left
        if left:
            names = (f"{name or 'the model'} ({type(m).__name__})" for name, m in left.items())
            warnings.warn(
                f"Replacement.undo: left as they are, for somebody changed their classes after "
                f"replace(): {', '.join(names)}",
                stacklevel=_stacklevel_of_the_caller(),
            )

    def _note(self, name: str, module: torch.nn.Module) -> None:
        old = vars(module)[_OLD_CLASS]
        self._changed[name] = (old, FUSED[old])
        self._modules[name] = module

    def _swap(self, name: str, module: torch.nn.Module, new: type[torch.nn.Module]) -> None:
        vars(module)[_OLD_CLASS] = type(module)
        module.__class__ = new
        if isinstance(module, MultiheadAttention):
            module._keep_off_torch_fast_path()
        self._note(name, module)

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()

    def __getitem__(self, name: str) -> tuple[type, type]:
        return self._changed[name]

    def __len__(self) -> int:
        return len(self._changed)

    def __iter__(self) -> Iterator[str]:
        return iter(self._changed)

    def __repr__(self) -> str:
        lines = [
            f"  {name or '(the model itself)'}: {old.__module__}.{old.__qualname__} → "
            f"fusedattn.nn.{new.__name__}"
            for name, (old, new) in self._changed.items()
        ]
        left = [f"  {name or '(the model itself)'}: left, {why}" for name, why in self.left.items()]
        return "\n".join([f"Replacement of {len(lines)} modules", *lines, *left])


def replace(model: torch.nn.Module) -> Replacement:
    """Make the norms, softmaxes, attentions and transformers of `model` fused ones, in place.

    Swaps `torch.nn.LayerNorm`, `RMSNorm`, `Softmax`, `MultiheadAttention`, `Transformer`, its
    encoder, its decoder and their layers, wherever they stand in the model, for those of
    `fusedattn.nn`. A module stays the same object, with its parameters, hooks and place in the
    `state_dict`: optimizers and checkpoints do not notice. Subclasses, which may compute something
    else, and a `Softmax` without a `dim` are left alone, but for what they consist of.

    Returns:
        What was changed, by module name; its `left` says what was not and why, its `undo()` takes
        it back. For a copy of the model, or where this was not kept, `Replacement.of(model)` finds
        it again.

    Raises:
        TypeError: `model` is no `torch.nn.Module`.
    """
    done = Replacement()
    for name, module in _modules_of(model, "replace"):
        new, kind = FUSED.get(type(module)), type(module)
        if new is None:
            base = next((base for base in kind.__mro__ if base in FUSED), None)
            if base is not None and not issubclass(kind, tuple(FUSED.values())):
                done.left[name] = (
                    f"for {kind.__module__}.{kind.__qualname__} is a subclass of "
                    f"torch.nn.{base.__name__}, and may compute something else"
                )
        elif getattr(module, "dim", 0) is None:
            done.left[name] = "for it has no dim"
        else:
            done._swap(name, module, new)
    return done


def _modules_of(model: torch.nn.Module, what: str) -> list[tuple[str, torch.nn.Module]]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{what}: got model of type {type(model).__name__}, expected a Module")
    return list(model.named_modules())
