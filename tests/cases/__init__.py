"""Calls of each family, and the one check that holds them to the rule on every backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HALF_AND_SINGLE = F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
F64 = torch.float64


class Case:
    """Base of a frozen dataclass that is one call; as a string only what is no default."""

    def __str__(self) -> str:
        changed = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value != field.default:
                changed.append(f"{field.name}={str(value).replace('torch.', '')}")
        return " ".join(changed).replace("(", "").replace(")", "")


class Source:
    """Random tensors on a device, the same each time."""

    def __init__(self, device: str, seed: int = 1) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        made = torch.randn(shape, generator=self.generator, dtype=F64)
        return made.to(self.device, dtype)

    def flags(self, *shape: int, share: float = 0.7) -> Tensor:
        return (torch.rand(shape, generator=self.generator) < share).to(self.device)

    def integers(self, below: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(below, shape, generator=self.generator, dtype=dtype).to(self.device)


def on(device: str, made: dict[str, Any]) -> dict[str, Any]:
    """The tensors among them on a device."""
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in made.items()}


def graded(
    run: Callable[..., dict[str, Tensor]],
    inputs: dict[str, Tensor],
    cotangents: dict[str, Tensor],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The named outputs of `run(**inputs)` and, as d<input>, the gradients for `cotangents`.

    Inputs are cast to `dtype`, if given, and cotangents to the dtype of their output.
    """
    leaves = {n: x.detach().to(dtype or x.dtype).requires_grad_() for n, x in inputs.items()}
    outputs = run(**leaves)
    grads = torch.autograd.grad(
        [outputs[name] for name in cotangents],
        list(leaves.values()),
        [y.to(outputs[name].dtype) for name, y in cotangents.items()],
        allow_unused=True,
        materialize_grads=True,
    )
    found = {name: x.detach() for name, x in outputs.items()}
    return found | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
