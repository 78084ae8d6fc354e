"""Calls of softmax, and how their results are held to the rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import fusedattn
import torch
from compare import check, check_sum, device_for, once
from fusedattn.reference import functional as reference
from torch import Tensor

from cases import F32, F64, Case, Source, graded, on


@dataclasses.dataclass(frozen=True)
class SoftmaxCase(Case):
    """`mask` and `bias` are the shapes they are given in."""

    shape: tuple[int, ...] = (2, 3, 5, 37)
    dtype: torch.dtype = F32
    mask: tuple[int, ...] | None = None
    bias: tuple[int, ...] | None = None
    bias_dtype: torch.dtype | None = None
    causal: bool | str = False
    scale: float = 1.0
    dim: int = -1

    def inputs(self) -> dict[str, Tensor]:
        """x, dout, mask and bias, where there are some; always the same."""
        source = Source("cpu")
        x, dout = (source.normal(*self.shape, dtype=self.dtype) for _ in range(2))
        made = {"x": 3 * x, "dout": dout}
        if self.mask is not None:
            made["mask"] = source.flags(*self.mask, share=0.6)
        if self.bias is not None:
            made["bias"] = source.normal(*self.bias, dtype=self.dtype)
            made["bias"] = made["bias"].to(self.bias_dtype or self.dtype)
        return made

    def check(self, backend: str) -> dict[str, Tensor]:
        """`check_softmax` of this call."""
        options = {"dim": self.dim, "causal": self.causal, "scale": self.scale}
        return check_softmax(backend=backend, **self.inputs(), **options)


def results(
    x: Tensor, dim: int, dout: Tensor, softmax: Callable, dtype: Any = None, **options: Any
) -> dict[str, Tensor]:
    """out, dx and, of a bias, dbias of `softmax`, tensors cast to `dtype`."""
    inputs = {"x": x} | ({"bias": options.pop("bias")} if "bias" in options else {})

    def run(x: Tensor, **bias: Tensor) -> dict[str, Tensor]:
        return {"out": softmax(x, dim, **bias, **options)}

    return graded(run, inputs, {"out": dout}, dtype)


def check_softmax(
    x: Tensor, backend: str, dim: int = -1, *, dout: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """Hold out, dx and dbias of `backend` to the rule; returns what it computed."""
    dout = torch.randn(x.shape, dtype=F64).to(x.dtype) if dout is None else dout
    case = f"{backend} {tuple(x.shape)} {x.dtype} dim {dim} {sorted(options)}"
    moved = on(device_for(backend), {"x": x, "dim": dim, "dout": dout, **options})
    actual = results(softmax=fusedattn.softmax, backend=backend, **moved)
    full = options | {n: y.expand(x.shape) for n, y in options.items() if n == "bias"}
    tensors = {n: o for n, o in options.items() if isinstance(o, Tensor)} | {"x": x, "dout": dout}
    about = (dim, *((n, o) for n, o in options.items() if not isinstance(o, Tensor)))
    # dbias of each score, not yet summed.
    ref = once(("oracle", about), tensors,
               lambda: results(x, dim, dout, reference.softmax, F64, **full))  # fmt: skip
    eager = once(("eager", about), tensors,
                 lambda: results(x, dim, dout, reference.softmax, x.dtype, **options))  # fmt: skip
    assert actual["out"].dtype == x.dtype
    check(actual["out"], ref["out"], eager["out"], what="out", case=case)
    check(actual["dx"], ref["dx"], eager["dx"], what="dx", case=case, gradient=True)
    if "bias" in options:
        check_dbias(actual["dbias"], ref["dbias"], eager["dbias"], x.dtype, options["bias"], case)
    return actual


def check_dbias(actual, summand, eager, dtype, bias, case) -> None:
    assert actual.shape == bias.shape
    assert actual.dtype == bias.dtype
    total = summand.sum_to_size(bias.shape)
    rows = summand.numel() // max(1, total.numel())
    if rows > 1 and bias.dtype == dtype == F32:
        check_sum(actual, total, rows=rows, largest_summand=summand.abs().max().item(),
                  what="dbias", case=case)  # fmt: skip
    else:
        check(actual, total, eager, what="dbias", case=case, gradient=True, tested=dtype, rows=rows)


FAR_SCALES = [1.0, 1e4, 1e6, 1e30]


def check_far_scores(backend: str, width: int, scale: float, dtype: torch.dtype) -> None:
    """Hold out to float64 where the largest score times log2(e) is rounded by more than the error
    of a row may be, and at the larger scales by more than an exponent's range."""
    x = (5000 + 20 * torch.randn(4, width)).to(dtype)
    x[:, 1] = x[:, 0]
    out = fusedattn.softmax(x.to(device_for(backend)), scale=scale, backend=backend)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        out.double().cpu(), torch.softmax(x.double() * scale, -1), atol=eps, rtol=max(2 * eps, 2e-5)
    )
