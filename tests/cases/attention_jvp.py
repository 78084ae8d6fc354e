"""One call of attention in forward mode, held to the rule by the derivative of the oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import fusedattn
import pytest
import torch
from compare import LSE_FLOORS, check, device_for, once
from fusedattn.ops.attention import op
from fusedattn.reference import functional as reference
from torch import Tensor

from cases import Source, on
from cases.attention import AttentionCase, lse_dtype

MOVED = ("q", "k", "v", "bias")
OUTPUTS = ("out", "lse")


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which of attention's ops run from now on, and on how many batch entries."""
    found: list[tuple[str, int]] = []
    for each in (op, op.backward, op.forward_mode.op):

        def run(
            call: Any, kernels: Any, own: Any = each.library._run, name: str = each.name
        ) -> Any:
            found.append((name, call.q.shape[0]))
            return own(call, kernels)

        monkeypatch.setattr(each.library, "_run", run)
    return found


def with_tangents(made: dict, names: Iterable[str]) -> dict:
    """The inputs and, as t_<name>, random tangents of those of `names` that there are."""
    source, found = Source("cpu", 11), dict(made)
    for name in names:
        if made.get(name) is not None:
            tangent = source.normal(*made[name].shape, dtype=made[name].dtype)
            found[f"t_{name}"] = tangent.to(made[name].device)
    return found


def along(
    made: dict, forward: Callable, options: dict[str, Any], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The outputs of `forward(q, k, v, …)` and, as t_<output>, their derivatives.

    What is floating is cast to `dtype`, if given.
    """

    def cast(x: Any) -> Any:
        return x.to(dtype) if dtype is not None and x is not None and x.is_floating_point() else x

    given = {name: cast(x) for name, x in made.items() if name not in ("dout", "dlse")}
    moved = {name: given.pop(f"t_{name}") for name in list(given) if f"t_{name}" in given}

    def function(*some: Tensor) -> tuple[Tensor, ...]:
        tensors = given | dict(zip(moved, some, strict=True))
        q, k, v = (tensors.pop(x) for x in "qkv")
        return forward(q, k, v, **tensors, **options)

    primals = tuple(given[name] for name in moved)
    found, tangents = torch.func.jvp(function, primals, tuple(moved.values()))
    return dict(zip(OUTPUTS, found, strict=True)) | dict(
        zip(("t_out", "t_lse"), tangents, strict=True)
    )


def check_jvp(case: AttentionCase, backend: str, names: Iterable[str] = MOVED) -> None:
    """Hold outputs and derivatives of `fusedattn.attention` on `backend` to the rule."""
    made = with_tangents(case.inputs(), names)
    forward = functools.partial(fusedattn.attention, return_lse=True, backend=backend)
    actual = along(on(device_for(backend), made), forward, case.options())
    check_along(actual, made, case, reference.attention, label=f"{backend} {case}")


def check_along(actual: dict, made: dict, case: Any, oracle: Callable, *, label: str) -> None:
    """Hold what `along` found to what it finds of the oracle."""

    def found(dtype: torch.dtype) -> dict[str, Tensor]:
        about = ("jvp", case, dtype)
        return once(about, made, lambda: along(made, oracle, case.options(), dtype))

    ref, eager, wide = (found(x) for x in (torch.float64, case.dtype, lse_dtype(case.dtype)))
    for name, x in actual.items():
        of_lse = name.endswith("lse")
        check(
            x, ref[name], (wide if of_lse else eager)[name], what=name,
            gradient=name.startswith("t_"), floor=LSE_FLOORS.get(case.dtype, 0.0) * of_lse,
            case=label,
        )  # fmt: skip
