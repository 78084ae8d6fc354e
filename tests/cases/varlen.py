"""One call of attention on packed sequences, held to the rule by the oracle of each by itself."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import fusedattn
import pytest
import torch
from compare import LSE_FLOORS, check, device_for, once
from fusedattn.reference import functional as reference
from torch import Tensor

from cases import Case, Source, graded, on
from cases.attention import OF_HEADS, lse_dtype


@dataclasses.dataclass(frozen=True)
class VarlenCase(Case):
    """`rest`: rows of q and of k past the last offset. They, and their gradients, are NaN.

    alibi_slopes: "heads" or "sequences", for each of which there are some.
    """

    lengths_q: tuple[int, ...] = (5, 0, 33, 1)
    lengths_k: tuple[int, ...] | None = None
    rest: tuple[int, int] = (0, 0)
    heads: int = 2
    kv_heads: int | None = None
    dim: int = 16
    dim_v: int | None = None
    dtype: torch.dtype = torch.float32
    causal: bool | str = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi_slopes: str = ""
    sinks: bool = False

    def inputs(self, device: str = "cpu") -> dict[str, Tensor | None]:
        """Random tensors and the offsets; the same for the same case."""
        source = Source(device)
        lengths = self.lengths_q, self.lengths_q if self.lengths_k is None else self.lengths_k
        cu_q, cu_k = (
            torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in lengths
        )
        end_q, end_k = int(cu_q[-1]), int(cu_k[-1])
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        queries = (end_q + self.rest[0], self.heads)
        keys = (end_k + self.rest[1], kv_heads)
        dim_v, wide = self.dim if self.dim_v is None else self.dim_v, lse_dtype(self.dtype)
        made: dict[str, Tensor | None] = {
            "q": source.normal(*queries, self.dim, dtype=self.dtype),
            "k": source.normal(*keys, self.dim, dtype=self.dtype),
            "v": source.normal(*keys, dim_v, dtype=self.dtype),
            "dout": source.normal(*queries, dim_v, dtype=self.dtype),
            "dlse": source.normal(*reversed(queries), dtype=wide),
        }
        for name, end in (("q", end_q), ("k", end_k), ("v", end_k), ("dout", end_q)):
            made[name][end:] = float("nan")
        made["dlse"][:, end_q:] = float("nan")
        shape = {"": None, "heads": (self.heads,), "sequences": (len(lengths[0]), self.heads)}
        if shape[self.alibi_slopes] is not None:
            made["alibi_slopes"] = source.normal(*shape[self.alibi_slopes], dtype=wide) / 16
        if self.sinks:
            made["sinks"] = source.normal(self.heads, dtype=wide)
        return made | {"cu_seqlens_q": cu_q.to(device), "cu_seqlens_k": cu_k.to(device)}

    def options(self) -> dict[str, object]:
        names = ("causal", "window", "scale", "softcap")
        return {name: getattr(self, name) for name in names}


def regimes(*rows: tuple[str, dict]) -> list:
    return [
        pytest.param(VarlenCase(**changes), id=name.replace(" ", "_")) for name, changes in rows
    ]


def one_by_one(attend: Callable, q: Tensor, k: Tensor, v: Tensor, **given: object) -> tuple:
    """out and lse of `attend` on each sequence alone, (1, H, S, D); 0 and −inf in other rows."""
    cu_q, cu_k = (given.pop(f"cu_seqlens_{x}").tolist() for x in "qk")
    slopes = given.pop("alibi_slopes", None)
    outs, lses = [], []
    for b, (first_q, end_q) in enumerate(itertools.pairwise(cu_q)):
        rows = slice(first_q, end_q), *[slice(cu_k[b], cu_k[b + 1])] * 2
        views = (x[i].transpose(0, 1)[None] for x, i in zip((q, k, v), rows, strict=True))
        own = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        out, lse = attend(*views, alibi_slopes=own, **given)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    rest = q.shape[0] - cu_q[-1]
    outs.append(q.new_zeros(rest, q.shape[1], v.shape[2]))
    lses.append(lses[0].new_full((q.shape[1], rest), float("-inf")))
    return torch.cat(outs), torch.cat(lses, 1)


def results(
    made: dict, case: VarlenCase, forward: Callable, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """out, lse and the gradients of `forward(q, k, v, cu_seqlens_q=…, …)`."""
    options = {name: x for name, x in made.items() if "cu" in name} | case.options()

    def run(q: Tensor, k: Tensor, v: Tensor, **further: Tensor) -> dict[str, Tensor]:
        return dict(zip(("out", "lse"), forward(q, k, v, **further, **options), strict=True))

    names = ("q", "k", "v", *OF_HEADS)
    inputs = {name: made[name] for name in names if made.get(name) is not None}
    return graded(run, inputs, {name: made[f"d{name}"] for name in ("out", "lse")}, dtype)


def packed(made: dict, case: VarlenCase, backend: str) -> dict[str, Tensor]:
    """What `fusedattn.attention_varlen` makes of it on `backend`."""
    forward = functools.partial(
        fusedattn.attention_varlen, return_lse=True, backend=backend, deterministic=False
    )
    return results(made, case, forward)


def check_varlen(case: VarlenCase, backend: str) -> dict[str, Tensor]:
    """Hold out, lse and every gradient of `backend` to the rule; returns what it computed."""
    made = case.inputs()
    actual = packed(on(device_for(backend), made), case, backend)
    alone = functools.partial(one_by_one, reference.attention)
    ref = once(("oracle", case), made, lambda: results(made, case, alone, torch.float64))
    eager = once(("eager", case), made, lambda: results(made, case, alone, case.dtype))
    wide = lse_dtype(case.dtype)
    single = once(("eager", case, wide), made, lambda: results(made, case, alone, wide))
    rule = {"case": f"{backend} {case}"}
    for name in ("out", "lse", "dq", "dk", "dv"):
        floor = LSE_FLOORS.get(case.dtype, 0.0) if name == "lse" else 0.0
        x = (actual[name], ref[name], (single if name == "lse" else eager)[name])
        check(*x, what=name, gradient=name.startswith("d"), floor=floor, **rule)
    for name in OF_HEADS:
        if made.get(name) is not None:  # sums over all pairs, as in cases/attention.py
            x = (actual[f"d{name}"], ref[f"d{name}"], eager[f"d{name}"])
            rows = made["q"].shape[0] * max(1, made["k"].shape[0])
            check(*x, what=f"d{name}", gradient=True, tested=case.dtype, rows=rows, slack=2, **rule)
    return actual
