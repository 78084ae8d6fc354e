"""One call of attention, its inputs, and how its results are held to the rule."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import fusedattn
import pytest
import torch
from compare import LSE_FLOORS, check, check_sum, device_for, once
from fusedattn.reference import functional as reference
from torch import Tensor

from cases import Case, Source, graded, on


@dataclasses.dataclass(frozen=True)
class AttentionCase(Case):
    """One call of attention; `mask`, `bias` and `alibi_slopes` are the shapes of these.

    `grads` are the outputs that receive a gradient: "out", "lse" or both. `large`: v and the
    gradients are such that ds exceeds what fp16 holds.
    """

    batch: int = 2
    heads: int = 2
    kv_heads: int | None = None
    seq_q: int = 32
    seq_k: int | None = None
    dim: int = 32
    dim_v: int | None = None
    dtype: torch.dtype = torch.float32
    causal: bool | str = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    mask: tuple[int, ...] | None = None
    bias: tuple[int, ...] | None = None
    bias_dtype: torch.dtype | None = None
    alibi_slopes: tuple[int, ...] | None = None
    sinks: bool = False
    kv_lengths: tuple[int, ...] | None = None
    dropout_p: float = 0.0
    grads: tuple[str, ...] = ("out",)
    large: bool = False

    def inputs(self, device: str = "cpu") -> dict[str, Tensor | None]:
        """Random q, k, v, mask, bias, kv_lengths, dout and dlse; the same for the same case."""
        source = Source(device)
        seq_k = self.seq_q if self.seq_k is None else self.seq_k
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        dim_v = self.dim if self.dim_v is None else self.dim_v
        queries, keys = (self.batch, self.heads, self.seq_q), (self.batch, kv_heads, seq_k)
        made: dict[str, Tensor | None] = {
            "q": source.normal(*queries, self.dim, dtype=self.dtype),
            "k": source.normal(*keys, self.dim, dtype=self.dtype),
            "v": source.normal(*keys, dim_v, dtype=self.dtype),
            "dout": source.normal(*queries, dim_v, dtype=self.dtype),
            "mask": None,
            "bias": None,
            "kv_lengths": None,
            "alibi_slopes": None,
            "sinks": None,
        }
        made["dlse"] = source.normal(*queries, dtype=lse_dtype(self.dtype))
        for name, factor in {"v": 1e3, "dout": 1e3, "dlse": 1e6}.items() if self.large else ():
            made[name] = made[name] * factor
        if self.mask is not None:
            made["mask"] = source.flags(*self.mask)
        if self.bias is not None:
            # Representable in q's dtype, so that eager, which casts it there, loses nothing.
            made["bias"] = source.normal(*self.bias, dtype=self.dtype)
            made["bias"] = made["bias"].to(self.bias_dtype or self.dtype)
        if self.alibi_slopes is not None:
            slopes = source.normal(*self.alibi_slopes, dtype=lse_dtype(self.dtype))
            made["alibi_slopes"] = slopes / 16  # as the trained ones, some the other way
        if self.sinks:
            made["sinks"] = source.normal(self.heads, dtype=lse_dtype(self.dtype))
        if self.kv_lengths is not None:
            made["kv_lengths"] = torch.tensor(self.kv_lengths, dtype=torch.int32, device=device)
        return made

    def options(self) -> dict[str, object]:
        """What is no tensor, as attention and the oracle take it."""
        names = ("causal", "window", "scale", "softcap")
        dropout = {"dropout_p": self.dropout_p, "seed": -1234567890123} if self.dropout_p else {}
        return {name: getattr(self, name) for name in names} | dropout


OF_HEADS = ("alibi_slopes", "sinks")


def regimes(*rows: tuple[str, dict], **common: object) -> list:
    """(name of the regime, what differs from the default case) → parameters with that name."""
    return [
        pytest.param(AttentionCase(**{**common, **changes}), id=name.replace(" ", "_"))
        for name, changes in rows
    ]


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The log-sum-exp is fp64 for fp64 inputs and fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def results(
    made: dict, case: AttentionCase, forward: Callable, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """out, lse and the gradients of `forward(q, k, v, mask=…, …)`, inputs cast to `dtype`."""
    options = {name: made[name] for name in ("mask", "kv_lengths")} | case.options()

    def run(q: Tensor, k: Tensor, v: Tensor, **further: Tensor) -> dict[str, Tensor]:
        return dict(zip(("out", "lse"), forward(q, k, v, **further, **options), strict=True))

    names = ("q", "k", "v", "bias", *OF_HEADS)
    inputs = {name: made[name] for name in names if made.get(name) is not None}
    return graded(run, inputs, {name: made[f"d{name}"] for name in case.grads}, dtype)


def fused(
    made: dict, case: AttentionCase, backend: str, deterministic: bool = False
) -> dict[str, Tensor]:
    """out, lse and gradients of `fusedattn.attention` on `backend`, inputs as they were made.

    Skips the running test where the emulated GPU would take seconds.
    """
    batch, heads, seq_q, dim = made["q"].shape
    products = batch * heads * (seq_q + 127) // 128 * 128 * made["k"].shape[2] * dim
    if backend == "cuda_emulated" and products > 1 << 24:
        pytest.skip("too much for the emulated GPU")
    # What a user gets by default, also under the flag that fills fresh memory.
    forward = functools.partial(
        fusedattn.attention, return_lse=True, backend=backend, deterministic=deterministic
    )
    return results(made, case, forward)


def check_attention(
    case: AttentionCase, backend: str, made: dict | None = None, slack: float = 1.0
) -> dict[str, Tensor]:
    """Hold out, lse, dq, dk, dv and dbias of `backend` to the rule; returns what it computed.

    The inputs are those of the case, or `made` where a test has changed them.
    """
    made = on(device_for(backend), made or case.inputs())
    actual = fused(made, case, backend)
    check_results(actual, made, case, label=f"{backend} {case}", slack=slack)
    return actual


def oracle(made: dict, case: AttentionCase) -> dict[str, Tensor]:
    """The results in fp64; dbias for each score, not yet summed."""

    def compute() -> dict[str, Tensor]:
        full = dict(made)
        if made["bias"] is not None:
            scores = (*made["q"].shape[:3], made["k"].shape[2])
            full["bias"] = made["bias"].expand(scores)
        return results(full, case, reference.attention, torch.float64)

    return once(("oracle", case), made, compute)


def eager_results(made: dict, case: AttentionCase) -> dict[str, Tensor]:
    """The results of plain PyTorch in the dtype of the case."""

    def compute() -> dict[str, Tensor]:
        found = results(made, case, reference.attention, case.dtype)
        # The log-sum-exp is a statistic in fp32, so it is held to eager in fp32, not in half.
        if case.dtype != lse_dtype(case.dtype):
            exact = results(made, case, reference.attention, lse_dtype(case.dtype))
            found["lse"] = exact["lse"]
        return found

    return once(("eager", case), made, compute)


def rounding_of_out(made: dict, ref: dict, case: AttentionCase) -> dict[str, float]:
    """Of gradients in halves, what they owe to Δ = Σ dout ∘ out: `out` is in memory, rounded.

    Where a query sees one key, ds = p (dp − Δ) is all but zero, and eager, which needs no Δ, has no
    such error. Roundings differ from column to column: twice the norm of half units is 3.5 σ.
    """
    if case.dtype.itemsize != 2 or "out" not in case.grads or not ref["out"].numel():
        return {}
    products = made["dout"].double() * ref["out"]
    delta = torch.finfo(case.dtype).eps * products.nan_to_num(0.0, 0.0, 0.0).norm(dim=-1).max()
    scale = abs(made["q"].shape[-1] ** -0.5 if case.scale is None else case.scale)
    most = {name: scale * made[other].abs().max() for name, other in (("dq", "k"), ("dk", "q"))}
    found = {name: float(delta * x) for name, x in (most | {"dbias": 1.0}).items()}
    return {x: y / max(1.0, ref[x].abs().max().item()) for x, y in found.items() if x in ref}


def check_results(
    actual: dict, made: dict, case: AttentionCase, *, label: str, slack: float = 1.0
) -> None:
    """Hold results, however computed, to the rule for `case` on the inputs `made`."""
    made = on("cpu", made)
    ref, eager = oracle(made, case), eager_results(made, case)
    rule = {"case": label, "slack": slack}
    floors = {"lse": LSE_FLOORS.get(case.dtype, 0.0)} | rounding_of_out(made, ref, case)
    for name in ("out", "lse", "dq", "dk", "dv"):
        floor = floors.get(name, 0.0)
        x = (actual[name], ref[name], eager[name])
        check(*x, what=name, gradient=name.startswith("d"), floor=floor, **rule)
    for name in OF_HEADS:
        if made.get(name) is not None:
            x = (actual[f"d{name}"], ref[f"d{name}"], eager[f"d{name}"])
            pairs = made["q"].shape[0] * made["q"].shape[2] * made["k"].shape[2]
            # Sums over all pairs of a head, of both signs, in an order of their own. Of halves, the
            # rounding of out errs the same way at all keys of a query, which does not cancel.
            of_head = {"gradient": True, "tested": case.dtype, "rows": pairs}
            wider = 8 if case.dtype.itemsize == 2 else 2
            check(*x, what=f"d{name}", **rule | of_head | {"slack": wider * slack})
    if made["bias"] is None or "dbias" not in actual:  # by rule: cases/rules.py
        return
    summand = ref["dbias"]
    total = summand.sum_to_size(made["bias"].shape)
    rows = summand.numel() // max(1, total.numel())
    x = (actual["dbias"], total)
    if rows > 1 and actual["dbias"].dtype == torch.float32 == case.dtype:
        largest = summand.abs().max().item()
        check_sum(*x, rows=rows, largest_summand=largest, what="dbias", case=label)
    else:
        # In the dtype of q: a float32 bias of half queries gets its gradient through half results.
        rule |= {"gradient": True, "tested": case.dtype, "rows": rows}
        rule["floor"] = floors.get("dbias", 0.0)
        check(*x, eager["dbias"], what="dbias", **rule)
