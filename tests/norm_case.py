"""One call of layer_norm or rms_norm, its inputs, and how its results are held to the rule."""

from __future__ import annotations

import dataclasses
from typing import Any

import fusedattn
import torch
from compare import check, check_normalised, check_sum, device_for, once
from fusedattn.reference import functional as reference
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class NormCase:
    """The last `dims` dimensions of `shape` are normalised; weight, bias and residual are dtypes.

    x has the mean `mean` and the standard deviation `sigma`.
    """

    op: str = "layer_norm"
    shape: tuple[int, ...] = (6, 40)
    dims: int = 1
    dtype: torch.dtype = torch.float32
    weight: torch.dtype | None = torch.float32
    bias: torch.dtype | None = torch.float32
    residual: torch.dtype | None = None
    weight_offset: float = 0.0
    dropout_p: float = 0.0
    mean: float = 0.0
    sigma: float = 1.0
    grads: tuple[str, ...] = ("out", "z")

    @property
    def options(self) -> dict[str, Any]:
        """The keyword options of the call."""
        made: dict[str, Any] = {"eps": 1e-6, "dropout_p": self.dropout_p}
        if self.op == "rms_norm":
            made["weight_offset"] = self.weight_offset
        return made | ({"seed": 1234567890123} if self.dropout_p else {})

    def inputs(self, device: str = "cpu") -> dict[str, Tensor]:
        """x, weight, bias, residual (where there are some), dout and dz; always the same."""
        source = torch.Generator().manual_seed(1)

        def normal(shape: tuple[int, ...], dtype: torch.dtype, scale=1.0, mean=0.0) -> Tensor:
            made = torch.randn(shape, generator=source, dtype=torch.float64) * scale + mean
            return made.to(device, dtype)

        tail = self.shape[len(self.shape) - self.dims :]
        made = {"x": normal(self.shape, self.dtype, self.sigma, self.mean)}
        if self.weight is not None:
            made["weight"] = normal(tail, self.weight)
        if self.bias is not None and self.op == "layer_norm":
            made["bias"] = normal(tail, self.bias)
        if self.residual is not None:
            made["residual"] = normal(self.shape, self.residual)
            made["dz"] = normal(self.shape, self.residual)
        return made | {"dout": normal(self.shape, self.dtype)}

    def __str__(self) -> str:
        changed = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                changed.append(f"{field.name}={str(value).replace('torch.', '')}")
        return " ".join(changed)


def results(
    made: dict, case: NormCase, module: Any, dtype: Any = None, **more
) -> dict[str, Tensor]:
    """out, z and the gradients of the op as `module` has it, inputs cast to `dtype`."""
    leaves = {
        name: made[name].detach().to(dtype or made[name].dtype).requires_grad_()
        for name in ("x", "weight", "bias", "residual")
        if name in made
    }
    options = {**case.options, **more}
    options.update({name: leaves[name] for name in ("residual", "bias") if name in leaves})
    shape = case.shape[len(case.shape) - case.dims :]
    found = getattr(module, case.op)(leaves["x"], shape, leaves.get("weight"), **options)
    outputs = dict(zip(("out", "z"), found, strict=True)) if case.residual else {"out": found}
    chosen = [name for name in outputs if name in case.grads]
    grads = torch.autograd.grad(
        [outputs[name] for name in chosen],
        list(leaves.values()),
        [made[f"d{name}"].to(outputs[name].dtype) for name in chosen],
        allow_unused=True,
        materialize_grads=True,
    )
    detached = {name: x.detach() for name, x in outputs.items()}
    return detached | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def check_norm(
    case: NormCase, backend: str, made: dict | None = None, *, ill: bool = False
) -> dict[str, Tensor]:
    """Hold the outputs and the gradients of `backend` to the rule; returns what it computed.

    `ill`: an ill-conditioned x, whose mean is large beside its deviation; eager is as wrong as its
    dtype, so that rule 4 alone says what out may be, and gradients are not looked at.
    """
    made = made or case.inputs(device_for(backend))
    actual = results(made, case, fusedattn, backend=backend)
    made = {name: x.cpu() for name, x in made.items()}
    ref = once((case, "oracle"), made, lambda: results(made, case, reference, torch.float64))
    label = f"{backend} {case}"
    for name, x in {**made, "out": made["x"], "z": made.get("residual")}.items():
        name = name if name in ("out", "z") else f"d{name}"
        if name in actual:
            assert actual[name].dtype == x.dtype, (name, label)
    if case.op == "layer_norm" and case.dtype != torch.float64:
        _check_rule_4(actual, made, case, label)
    if ill:
        return actual
    eager = once((case, "eager"), made, lambda: results(made, case, reference))
    rows = max(1, ref["out"].numel() // max(1, made["x"].shape[-case.dims :].numel()))
    for name in ("out", "z", "dx", "dresidual"):
        if name in actual:
            coarse = _coarser(case.dtype, actual[name].dtype, case.residual)
            check(
                actual[name], ref[name], eager[name],
                what=name, case=label, gradient=name.startswith("d"), tested=coarse,
            )  # fmt: skip
    for name in ("dweight", "dbias"):
        if name in actual:
            _check_row_sum(name, actual, ref, eager, case, rows, label)
    return actual


def _coarser(*dtypes: torch.dtype | None) -> torch.dtype:
    """The least exact dtype that a result went through."""
    return max((d for d in dtypes if d is not None), key=lambda d: torch.finfo(d).eps)


def _check_rule_4(actual: dict, made: dict, case: NormCase, label: str) -> None:
    source = actual["z"] if "z" in actual else made["x"]
    if case.dropout_p and "z" not in actual:
        return
    tail = made["x"].shape[len(case.shape) - case.dims :]
    flat = source.cpu().double().reshape(-1, tail.numel())
    weight, bias = (
        made[name].double().reshape(-1) if name in made else None for name in ("weight", "bias")
    )
    ref = reference.norm(flat, weight, bias, centre=True, eps=case.options["eps"])[0]
    out = actual["out"].reshape(flat.shape)
    check_normalised(out, ref, flat, weight, what="out (rule 4)", case=label)


def _check_row_sum(name, actual, ref, eager, case, rows, label) -> None:
    """Rule 3 where everything is float32; else rules 1 and 2, the cap growing with the rows."""
    coarse = _coarser(case.dtype, actual[name].dtype, case.residual)
    if coarse == torch.float32:
        largest = max(1.0, ref["out"].abs().max().item()) * 5  # |dout| stays below 5
        check_sum(
            actual[name], ref[name], rows=rows, largest_summand=largest, what=name, case=label
        )
    else:
        check(
            actual[name], ref[name], eager[name],
            what=name, case=label, gradient=True, tested=coarse, rows=rows,
        )  # fmt: skip
