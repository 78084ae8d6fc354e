"""Calls of SwiGLU and its kin, and the check that holds them to the tolerance rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fusedattn
import torch
from compare import check, device_for, once
from fusedattn.ops.swiglu import ACTIVATIONS
from fusedattn.reference import functional as reference
from torch import Tensor

from cases import F32, F64, Source, graded, on

WIDTHS = (1, 7, 63, 65, 128, 4097)
# Where exponentials, squares and cubes overflow, and what has no limit.
EXTREMES = (0.0, 9.0, 90.0, 1e4, 1e19, 1e38, torch.inf)

__all__ = ["ACTIVATIONS", "WIDTHS", "check_extremes", "check_swiglu", "inputs", "results"]


def inputs(*shape: int, dtype: torch.dtype = F32, joined: bool = False) -> dict[str, Tensor]:
    """gate, up and dout of a shape; joined, gate has both."""
    source = Source("cpu")
    gate, up, dout = 2.5 * source.normal(3, *shape, dtype=dtype)
    if joined:
        return {"gate": torch.cat((gate, up), -1), "dout": dout}
    return {"gate": gate, "up": up, "dout": dout}


def results(
    function: Callable[..., Tensor], made: dict[str, Tensor], dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """out and the gradients, of inputs cast to `dtype`."""
    given = {name: x for name, x in made.items() if name != "dout"}
    return graded(
        lambda **x: {"out": function(**x, **options)}, given, {"out": made["dout"]}, dtype
    )


def check_swiglu(backend: str, made: dict[str, Tensor], activation: str) -> dict[str, Tensor]:
    """Hold out, dgate and dup of `backend` to the rule; returns them."""
    dtype, options = made["gate"].dtype, {"activation": activation}
    moved = on(device_for(backend), made)
    found = results(fusedattn.swiglu, moved, dtype, **options, backend=backend)

    def oracle(dtype: torch.dtype) -> dict[str, Tensor]:
        about = ("swiglu", activation, dtype)
        return once(about, made, lambda: results(reference.swiglu, made, dtype, **options))

    ref, eager = oracle(F64), oracle(dtype)
    case = f"{backend} {activation} {tuple(made['gate'].shape)} {dtype}"
    for name, x in found.items():
        assert x.dtype == dtype
        check(x, ref[name], eager[name], what=name, case=case, gradient=name != "out")
    return found


def check_extremes(backend: str, dtype: torch.dtype, activation: str) -> None:
    """Every pair of extreme numbers: NaN where eager has NaN, and nowhere else."""
    largest = torch.finfo(dtype).max
    numbers = torch.tensor([x for x in EXTREMES if x <= largest or x == torch.inf])
    numbers = torch.cat((numbers, -numbers, torch.tensor([torch.nan]))).to(dtype)
    gate, up = numbers.repeat(2), numbers.new_tensor([1.0, -2.0]).repeat_interleave(len(numbers))
    check_swiglu(backend, {"gate": gate, "up": up, "dout": torch.ones_like(gate)}, activation)
