"""Every op, called by its public name: what to pass it, and which of it carries a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fusedattn
import torch
from torch import Tensor


class OpCall(NamedTuple):
    """`run(**tensors(dtype))` is one call of an op with all its tensors."""

    run: Callable[..., Any]
    tensors: Callable[[torch.dtype], dict[str, Tensor]]
    differentiable: tuple[str, ...]


def _normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def _attention(dtype: torch.dtype) -> dict[str, Tensor]:
    """Every query sees a key."""
    mask = torch.rand(2, 1, 5, 6) > 0.2
    mask[..., 0] = True
    return {
        "q": _normal(2, 2, 5, 8, dtype=dtype),
        "k": _normal(2, 1, 6, 8, dtype=dtype),
        "v": _normal(2, 1, 6, 8, dtype=dtype),
        "mask": mask,
        "bias": _normal(2, 5, 6, dtype=dtype),
        "kv_lengths": torch.tensor([6, 4], dtype=torch.int32),
    }


def _norm(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "x": _normal(2, 3, 8, dtype=dtype),
        "weight": _normal(8, dtype=dtype),
        "bias": _normal(8, dtype=dtype),
        "residual": _normal(2, 3, 8, dtype=dtype),
    }


def _softmax(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "x": _normal(2, 3, 8, dtype=dtype),
        "mask": torch.rand(3, 8) > 0.2,
        "bias": _normal(2, 1, 8, dtype=dtype),
    }


def _rotary(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "x": _normal(2, 2, 5, 8, dtype=dtype),
        "cos": _normal(9, 3, dtype=dtype),
        "sin": _normal(9, 3, dtype=dtype),
        "positions": torch.randint(7, (2, 5)),
        "offset": torch.tensor([1]),
    }


def _sinusoidal(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "x": _normal(2, 5, 8, dtype=dtype),
        "positions": torch.randint(9, (2, 5)),
        "offset": torch.tensor([1]),
    }


def _swiglu(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"gate": _normal(2, 3, 8, dtype=dtype), "up": _normal(2, 3, 8, dtype=dtype)}


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, **options: Any) -> Any:
    return fusedattn.layer_norm(x, 8, weight, bias, residual=residual, **options)


def _rms_norm(x: Tensor, weight: Tensor, residual: Tensor, **options: Any) -> Any:
    return fusedattn.rms_norm(x, 8, weight, 1e-6, residual=residual, **options)


def _attention_and_lse(**given: Any) -> tuple[Tensor, Tensor]:
    return fusedattn.attention(**given, causal=True, return_lse=True)


def _scaled_softmax(x: Tensor, **given: Any) -> Tensor:
    return fusedattn.softmax(x, **given, scale=0.7)


def _scaled_sinusoidal(x: Tensor, **given: Any) -> Tensor:
    return fusedattn.add_sinusoidal(x, **given, scale=1.5)


def _without_bias(dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x for name, x in _norm(dtype).items() if name != "bias"}


OPS = {
    "attention": OpCall(_attention_and_lse, _attention, ("q", "k", "v", "bias")),
    "layer_norm": OpCall(_layer_norm, _norm, ("x", "weight", "bias", "residual")),
    "rms_norm": OpCall(_rms_norm, _without_bias, ("x", "weight", "residual")),
    "softmax": OpCall(_scaled_softmax, _softmax, ("x", "bias")),
    "apply_rotary": OpCall(fusedattn.apply_rotary, _rotary, ("x",)),
    "add_sinusoidal": OpCall(_scaled_sinusoidal, _sinusoidal, ("x",)),
    "swiglu": OpCall(fusedattn.swiglu, _swiglu, ("gate", "up")),
}


def arguments() -> Iterator[tuple[str, str]]:
    """(op, name) of every tensor that an op takes."""
    for op, call in OPS.items():
        for name in call.tensors(torch.float32):
            yield op, name


def outputs(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)
