"""Attention in forward mode: outputs and their derivatives along tangents, in one pass."""

from __future__ import annotations

from typing import Any

import fusedattn
import pytest
import torch
from cases import BF16, F16, F32, F64, on
from cases.attention import AttentionCase, regimes
from cases.attention_jvp import along, check_along, check_jvp, watched, with_tangents
from cases.rules import RuleCase, distance_of
from cases.varlen import VarlenCase, one_by_one
from compare import device_for
from fusedattn.reference import functional as reference
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
KERNELS = pytest.mark.backends("fast", "triton")


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which library ops ran, and on how many batch entries."""
    return watched(monkeypatch)


# --- every option, held to the derivative of the oracle -------------------------------------------

OPTIONS = regimes(
    ("plain", {}),
    ("causal", {"seq_q": 70, "seq_k": 133, "causal": True}),
    ("causal top left", {"seq_q": 37, "seq_k": 20, "causal": "top_left"}),
    ("rows that see nothing", {"seq_q": 40, "seq_k": 24, "causal": True}),
    ("window", {"seq_q": 90, "window": (17, 5)}),
    ("softcap", {"softcap": 1.5, "scale": -0.4}),
    ("softcap and bias", {"softcap": 2.0, "bias": (2, 2, 32, 32)}),
    ("bias for all", {"bias": (1, 1, 1, 32), "scale": 0.0}),
    ("mask and bias", {"seq_k": 133, "mask": (2, 1, 32, 133), "bias": (1, 2, 32, 133)}),
    ("slopes", {"alibi_slopes": (2, 2), "causal": True}),
    ("sinks", {"sinks": True, "kv_lengths": (0, 19)}),
    ("dropout", {"seq_q": 70, "dropout_p": 0.4, "causal": True}),
    ("grouped", {"heads": 6, "kv_heads": 2, "dim": 24, "dim_v": 40, "seq_k": 300}),
    ("one query", {"seq_q": 1, "seq_k": 150, "kv_lengths": (150, 77)}),
)  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: AttentionCase, backend: str, ran: list) -> None:
    check_jvp(case, backend)
    assert ran == [("attention_jvp", case.batch)]


# For an interpreter: few programs of few tiles, with many options each.
TOGETHER = regimes(
    ("plain", {}),
    ("causal, bias, sinks, dropout", {
        "causal": True, "bias": (1, 2, 20, 37), "sinks": True, "dropout_p": 0.3, "kv_heads": 1,
    }),
    ("window, softcap, slopes", {
        "window": (9, 3), "softcap": 2.0, "alibi_slopes": (2,), "kv_lengths": (23,), "dim_v": 24,
    }),
    ("mask, bias for all, scale", {"mask": (1, 1, 20, 37), "bias": (1, 1, 1, 37), "scale": -0.3}),
    ("bf16", {"dtype": BF16, "causal": "top_left", "bias": (1, 2, 20, 37), "bias_dtype": F32}),
    ("fp16", {"dtype": F16, "causal": True, "kv_lengths": (5,)}),
    batch=1, seq_q=20, seq_k=37, dim=16,
)  # fmt: skip


@pytest.mark.backends("triton")
@pytest.mark.parametrize("case", TOGETHER)
def test_options_together(case: AttentionCase, backend: str, ran: list) -> None:
    check_jvp(case, backend)
    assert ran == [("attention_jvp", 1)]


@KERNELS
@pytest.mark.parametrize("factor", [1e4, 1e-4])
def test_what_fp16_does_not_hold(factor: float, backend: str) -> None:
    """Derivatives of scores of 1e5, where v is small; and tangents that are as small."""
    case = AttentionCase(batch=1, heads=1, seq_q=20, seq_k=37, dim=16, scale=1.0, dtype=F16)
    made = with_tangents(case.inputs(), "qk")
    made = {n: x * factor if n.startswith("t_") else x for n, x in made.items() if x is not None}
    made["v"] = made["v"] * 1e-3

    def attend(*x: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        return fusedattn.attention(*x, **given, return_lse=True, backend=backend)

    found = along(on(device_for(backend), made), attend, case.options())["t_out"].double().cpu()
    want = along(made, reference.attention, case.options(), F64)["t_out"]
    assert (found - want).abs().max() <= 2e-3 * want.abs().max() + 2.0**-24


DTYPES = regimes(
    ("bf16", {"dtype": BF16, "bias": (2, 2, 70, 133)}),
    ("bf16, bias in fp32", {"dtype": BF16, "bias": (1, 2, 70, 133), "bias_dtype": F32}),
    ("fp16", {"dtype": F16, "softcap": 2.0}),
    ("fp16, dropout", {"dtype": F16, "dropout_p": 0.2}),
    seq_q=70, seq_k=133, causal=True,
)  # fmt: skip


@pytest.mark.parametrize("case", DTYPES)
def test_half_precision(case: AttentionCase, backend: str) -> None:
    check_jvp(case, backend)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_each_instruction_set(dtype: torch.dtype, instruction_set: str) -> None:
    """Whole strips and rests of them."""
    case = AttentionCase(
        dtype=dtype, batch=1, seq_q=403 if dtype == F32 else 70, seq_k=277, dim=40, dim_v=24,
        bias=(1, 2, 1, 277), window=(200, 100), kv_heads=1,
    )  # fmt: skip
    check_jvp(case, "cpu")
    check_jvp(AttentionCase(dtype=dtype, batch=1, dropout_p=0.3, softcap=3.0), "cpu")


@KERNELS
@pytest.mark.parametrize("names", ["q", "k", "v", "bias", "qv", "kv"])
def test_what_has_a_tangent(names: str, backend: str) -> None:
    small = {"batch": 1, "seq_q": 20, "seq_k": 37, "dim": 16, "bias": (1, 1, 20, 37)}
    case = AttentionCase(**small, causal=True)
    check_jvp(case, backend, (names,) if names == "bias" else tuple(names))


@KERNELS
@pytest.mark.parametrize(
    "rules", [("documents", "t5"), ("prefix", "blocks"), ("blocks", "relative")], ids=" ".join
)
def test_rules(rules: tuple[str, ...], backend: str) -> None:
    """More than one block, document and tile."""
    case = RuleCase(batch=1, seq_q=20, seq_k=70, dim=16, rules=rules, size=16)
    made, mask, bias = case.written_out()
    given = with_tangents(made, "qkv")

    def by_rule(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        on_device = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(q.device), mask)
        given |= {"mask": on_device, "bias": None if bias is None else bias[1](given["bias"])}
        return fusedattn.attention(q, k, v, **given, return_lse=True, backend=backend)

    actual = along(on(device_for(backend), given), by_rule, case.options())
    if bias is not None:
        rows = distance_of(20, 70).apply_(bias[2])
        given["bias"] = made["bias"][rows].permute(2, 0, 1)[None]  # type: ignore[index]
    check_along(actual, given, case, reference.attention, label=f"{backend} {case}")


@KERNELS
@pytest.mark.parametrize("causal", [True, "top_left"])
def test_packed(causal: bool | str, backend: str, ran: list) -> None:
    """Rows past the last offset are NaN, and so are their tangents."""
    case = VarlenCase(
        (5, 0, 17), (9, 4, 20), (3, 2), heads=2, kv_heads=1, causal=causal, sinks=True,
        alibi_slopes="sequences",
    )  # fmt: skip
    made = with_tangents(case.inputs(), "qkv")
    for name, offsets in (("q", "q"), ("k", "k"), ("v", "k")):
        made[f"t_{name}"][made[f"cu_seqlens_{offsets}"][-1] :] = float("nan")
    of_op = {"return_lse": True, "backend": backend}
    actual = along(
        on(device_for(backend), made),
        lambda *x, **given: fusedattn.attention_varlen(*x, **given, **of_op), case.options(),
    )  # fmt: skip
    assert ran == [("attention_jvp", 1)]

    def alone(*x: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        return one_by_one(reference.attention, *x, **given)

    present = {name: x.nan_to_num() if "t_" in name else x for name, x in made.items()}
    check_along(actual, present, case, alone, label=f"{backend} {case}")
