"""Attention with a mask or a bias by rule, held to the same call with that written out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import fusedattn
import torch
from compare import check, check_sum, device_for
from fusedattn import biases, masks
from torch import Tensor

from cases import Source, on
from cases.attention import AttentionCase, check_results, eager_results, oracle, results


def t5_bucket(distance: int, buckets: int, bidirectional: bool, most: int) -> int:
    """By Python's numbers, as the paper's code has it."""
    first, n = 0, -distance
    if bidirectional:
        buckets //= 2
        first, n = (buckets, -n) if n < 0 else (0, n)
    n = max(n, 0)
    exact = buckets // 2
    if n < exact:
        return first + n
    share = math.log(n / exact) / math.log(most / exact)
    return first + min(exact + int(share * (buckets - exact) + 1e-5), buckets - 1)


def distance_of(seq_q: int, seq_k: int) -> Tensor:
    return torch.arange(seq_k) - torch.arange(seq_q)[:, None] - (seq_k - seq_q)


BIASES: dict[str, tuple[int, Callable, Callable]] = {
    # rows of the table, the rule, the row for a distance
    "t5": (32, lambda x: biases.t5(x, bidirectional=True), lambda d: t5_bucket(d, 32, True, 128)),
    "t5 decoder": (
        16, lambda x: biases.t5(x, bidirectional=False, max_distance=50),
        lambda d: t5_bucket(d, 16, False, 50),
    ),
    "relative": (21, biases.relative, lambda d: min(max(d, -10), 10) + 10),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RuleCase(AttentionCase):
    """rules: names of a bias and of masks; `mask` is the shape of a dense one beside them."""

    rules: tuple[str, ...] = ()
    size: int = 48  # of blocks

    def written_out(self) -> tuple[dict[str, Tensor | None], Any, Any]:
        """The inputs, and the rules as `mask` and `bias`; the table stands for the bias."""
        made = super().inputs()
        source = Source("cpu", 7)
        seq_q, seq_k = made["q"].shape[2], made["k"].shape[2]  # type: ignore[union-attr]
        seen = None if made["mask"] is None else made["mask"]
        rule: Any = None
        for name in self.rules:
            if name in BIASES:
                made["bias"] = source.normal(BIASES[name][0], self.heads, dtype=self.dtype)
                continue
            own, shown = getattr(self, f"_{name}")(source, seq_q, seq_k)
            rule = own if rule is None else rule & own
            seen = shown if seen is None else seen & shown
        if rule is not None and made["mask"] is not None:
            rule = rule & made["mask"]
        made["mask"] = seen
        bias = next((BIASES[name] for name in self.rules if name in BIASES), None)
        return made, rule, bias

    def _documents(self, source: Source, seq_q: int, seq_k: int) -> tuple[Any, Tensor]:
        """Of ids that begin again, so that ranges of ids overlap where no two are equal."""
        longest = max(seq_q, seq_k)
        ids = source.integers(4, self.batch, longest // 29 + 1).repeat_interleave(29, 1)
        of_q, of_k = ids[:, :seq_q], ids[:1, :seq_k]
        return masks.documents(of_q, of_k), (of_q[:, :, None] == of_k[:, None, :])[:, None]

    def _prefix(self, source: Source, seq_q: int, seq_k: int) -> tuple[Any, Tensor]:
        lengths = torch.tensor([seq_k // 3, seq_k + 5, -2], dtype=torch.int32)[: self.batch]
        seen = torch.arange(seq_k) < lengths[:, None, None, None]
        return masks.prefix(lengths), seen | (distance_of(seq_q, seq_k) <= 0)

    def _blocks(self, source: Source, seq_q: int, seq_k: int) -> tuple[Any, Tensor]:
        rows, columns = -(-seq_q // self.size), -(-seq_k // self.size)
        seen = source.flags(1, self.heads, rows, columns, share=0.6)
        whole = seen.repeat_interleave(self.size, 2).repeat_interleave(self.size, 3)
        return masks.blocks(seen[0], self.size), whole[:, :, :seq_q, :seq_k]


def check_rules(case: RuleCase, backend: str, slack: float = 1.0) -> None:
    """Hold all results of the rules to those of what they stand for."""
    made, mask, bias = case.written_out()
    table = made["bias"]

    def by_rule(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        if bias is not None:
            given["bias"] = bias[1](given["bias"])
        if mask is not None:
            given["mask"] = torch.utils._pytree.tree_map_only(
                Tensor, lambda x: x.to(q.device), mask
            )
        return fusedattn.attention(q, k, v, **given, return_lse=True, backend=backend)

    actual = results(on(device_for(backend), made), case, by_rule)
    label = f"{backend} {case}"
    if bias is None:
        check_results(actual, made, case, label=label, slack=slack)
        return
    seq_q, seq_k = made["q"].shape[2], made["k"].shape[2]  # type: ignore[union-attr]
    rows = distance_of(seq_q, seq_k).apply_(bias[2])
    made["bias"] = table[rows].permute(2, 0, 1)[None].contiguous()  # type: ignore[index]
    found = actual.pop("dbias")
    check_results(actual, made, case, label=label, slack=slack)

    def of_table(ds: Tensor) -> Tensor:
        each = ds.double().sum(0).flatten(1).t()
        return torch.zeros(table.shape).double().index_add(0, rows.flatten(), each)  # type: ignore[union-attr]

    ds = oracle(made, case)["dbias"]
    addends = case.batch * int(rows.flatten().bincount().max())
    if case.dtype == torch.float32:
        check_sum(
            found, of_table(ds), rows=addends, largest_summand=ds.abs().max().item(),
            what="dtable", case=label,
        )  # fmt: skip
    else:
        eager = of_table(eager_results(made, case)["dbias"]).to(case.dtype)
        check(
            found, of_table(ds), eager, what="dtable", gradient=True, tested=case.dtype,
            rows=addends, slack=slack, case=label,
        )  # fmt: skip
