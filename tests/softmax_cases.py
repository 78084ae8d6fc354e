"""Softmax's inputs, and its results held to the rule of compare.py."""

from __future__ import annotations

import fusedattn
import torch
from compare import check, check_sum, device_for, once
from fusedattn.reference import functional as reference
from torch import Tensor

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def results(x, dim, dout, softmax, dtype=None, **options) -> dict[str, Tensor]:
    """out, dx and, of a bias, dbias of `softmax`, tensors cast to `dtype`."""
    leaves = {"x": x.detach().to(dtype or x.dtype).requires_grad_()}
    if (bias := options.pop("bias", None)) is not None:
        leaves["bias"] = bias.detach().to(dtype or bias.dtype).requires_grad_()
    out = softmax(leaves["x"], dim, bias=leaves.get("bias"), **options)
    grads = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
    return {"out": out.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def check_softmax(x: Tensor, backend: str, dim: int = -1, *, dout=None, **options) -> dict:
    """Hold out, dx and dbias of `backend` to the rule; returns what it computed."""
    device = device_for(backend)
    dout = torch.randn(x.shape, dtype=F64).to(x.dtype) if dout is None else dout
    case = f"{backend} {tuple(x.shape)} {x.dtype} dim {dim} {sorted(options)}"
    moved = {n: o.to(device) if isinstance(o, Tensor) else o for n, o in options.items()}
    actual = results(
        x.to(device), dim, dout.to(device),
        lambda *a, **k: fusedattn.softmax(*a, backend=backend, **k), **moved,
    )  # fmt: skip
    full = dict(options)
    if "bias" in options:
        full["bias"] = options["bias"].expand(x.shape)
    tensors = {n: o for n, o in options.items() if isinstance(o, Tensor)} | {"x": x, "dout": dout}
    about = (dim, *((n, o) for n, o in options.items() if not isinstance(o, Tensor)))
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
