"""One call of layer_norm or rms_norm, its inputs, and how its results are held to the rule."""

from __future__ import annotations

import dataclasses
from typing import Any

import fusedattn
import torch
from compare import check, check_normalised, check_sum, device_for, once
from fusedattn.reference import functional as reference
from torch import Tensor

from cases import F32, F64, Case, Source, graded, on


@dataclasses.dataclass(frozen=True)
class NormCase(Case):
    """The last `dims` dimensions of `shape` are normalised.

    `dtype`, `weight`, `bias`, `residual` and `stream` are the dtypes of x, of what goes with it and
    of z, where that is not the residual's. x has the mean `mean` and the deviation `sigma`.
    """

    op: str = "layer_norm"
    shape: tuple[int, ...] = (6, 40)
    dims: int = 1
    dtype: torch.dtype = F32
    weight: torch.dtype | None = F32
    bias: torch.dtype | None = F32
    residual: torch.dtype | None = None
    stream: torch.dtype | None = None
    weight_offset: float = 0.0
    dropout_p: float = 0.0
    mean: float = 0.0
    sigma: float = 1.0
    grads: tuple[str, ...] = ("out", "z")  # which outputs receive one

    @property
    def tail(self) -> tuple[int, ...]:
        return self.shape[len(self.shape) - self.dims :]

    @property
    def options(self) -> dict[str, Any]:
        """The keyword options of the call."""
        made: dict[str, Any] = {"eps": 1e-6, "dropout_p": self.dropout_p}
        if self.op == "rms_norm":
            made["weight_offset"] = self.weight_offset
        return made | ({"seed": -1234567890123} if self.dropout_p else {})

    def inputs(self, device: str = "cpu") -> dict[str, Tensor]:
        """x, weight, bias, residual (where there are some), dout and dz; always the same."""
        source = Source(device)
        x = source.normal(*self.shape, dtype=F64) * self.sigma + self.mean
        made = {"x": x.to(self.dtype)}
        if self.weight is not None:
            made["weight"] = source.normal(*self.tail, dtype=self.weight)
        if self.bias is not None and self.op == "layer_norm":
            made["bias"] = source.normal(*self.tail, dtype=self.bias)
        if self.residual is not None:
            made["residual"] = source.normal(*self.shape, dtype=self.residual)
            made["dz"] = source.normal(*self.shape, dtype=self.stream or self.residual)
        return made | {"dout": source.normal(*self.shape, dtype=self.dtype)}


def results(
    made: dict, case: NormCase, module: Any, dtype: Any = None, **more: Any
) -> dict[str, Tensor]:
    """out, z and the gradients of the op as `module` has it, inputs cast to `dtype`."""

    if case.stream is not None and module is fusedattn:  # the oracle's is that of what it is given
        more["residual_dtype"] = case.stream

    def run(x: Tensor, weight: Tensor | None = None, **rest: Tensor) -> dict[str, Tensor]:
        options = case.options | more | rest
        found = getattr(module, case.op)(x, case.tail, weight, **options)
        return dict(zip(("out", "z"), found, strict=True)) if case.residual else {"out": found}

    inputs = {name: x for name, x in made.items() if name not in ("dout", "dz")}
    return graded(run, inputs, {n: made[f"d{n}"] for n in case.grads if f"d{n}" in made}, dtype)


def check_norm(
    case: NormCase, backend: str, made: dict | None = None, *, ill: bool = False
) -> dict[str, Tensor]:
    """Hold the outputs and the gradients of `backend` to the rule; returns what it computed.

    `ill`: an ill-conditioned x, whose mean is large beside its deviation; eager is as wrong as its
    dtype, so that rule 4 alone says what out may be, and gradients are not looked at.
    """
    made = made or case.inputs(device_for(backend))
    actual = results(made, case, fusedattn, backend=backend)
    made = on("cpu", made)
    ref = once((case, "oracle"), made, lambda: results(made, case, reference, F64))
    label = f"{backend} {case}"
    given = {**made, "out": made["x"], "z": made.get("dz")}
    for name, x in actual.items():
        own = name if name in ("out", "z") else name.removeprefix("d")
        assert x.dtype == given[own].dtype, (name, label)
    if case.op == "layer_norm" and case.dtype != F64:
        _check_rule_4(actual, made, case, label)
    if ill:
        return actual
    eager = once((case, "eager"), made, lambda: results(made, case, reference))
    rows = max(1, ref["out"].numel() // max(1, made["x"].shape[-case.dims :].numel()))
    for name, x in actual.items():
        coarse = _coarser(case.dtype, x.dtype, case.residual, case.stream)
        if name not in ("dweight", "dbias"):
            rule = {"what": name, "case": label, "gradient": name.startswith("d")}
            check(x, ref[name], eager[name], tested=coarse, **rule)
        elif coarse == F32:
            largest = max(1.0, ref["out"].abs().max().item()) * 5  # |dout| stays below 5
            check_sum(x, ref[name], rows=rows, largest_summand=largest, what=name, case=label)
        else:
            # Rules 1 and 2, the cap growing with the rows.
            rule = {"what": name, "case": label, "gradient": True, "rows": rows}
            check(x, ref[name], eager[name], tested=coarse, **rule)
    return actual


def _coarser(*dtypes: torch.dtype | None) -> torch.dtype:
    """The least exact dtype that a result went through."""
    return max((d for d in dtypes if d is not None), key=lambda d: torch.finfo(d).eps)


def _check_rule_4(actual: dict, made: dict, case: NormCase, label: str) -> None:
    if case.dropout_p and "z" not in actual:
        return
    tail = torch.Size(case.tail)
    flat = actual.get("z", made["x"]).cpu().double().reshape(-1, tail.numel())
    weight, bias = (
        made[name].double().reshape(-1) if name in made else None for name in ("weight", "bias")
    )
    ref = reference.norm(flat, weight, bias, centre=True, eps=case.options["eps"])[0]
    out = actual["out"].reshape(flat.shape)
    check_normalised(out, ref, flat, weight, what="out (rule 4)", case=label)
