"""The tolerance rule itself: planted mutants are caught, correct results pass."""

from __future__ import annotations

import collections
import dataclasses
import math

import compare
import pytest
import torch
from cases.attention import AttentionCase, check_results, results
from compare import check, check_sum, ulp
from fusedattn.reference import functional as reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CASE = AttentionCase(
    heads=4, kv_heads=2, seq_q=40, seq_k=56, causal=True, bias=(1, 4, 40, 56), grads=("out", "lse")
)


def in_dtype(dtype: torch.dtype) -> AttentionCase:
    return AttentionCase(**{**vars(CASE), "dtype": dtype})


def exact(case: AttentionCase) -> tuple[dict, dict]:
    """The inputs of a case and its results as a good kernel gives them: computed wide, rounded."""
    made = case.inputs()
    wide = results(made, case, reference.attention, torch.float64)
    return made, {
        name: x.to(torch.float32 if name == "lse" and case.dtype != torch.float64 else case.dtype)
        for name, x in wide.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_oracle_passes(dtype):
    case = in_dtype(dtype)
    made, found = exact(case)
    check_results(found, made, case, label="oracle, rounded")


@pytest.mark.parametrize("dtype", DTYPES)
def test_eager_passes(dtype):
    case = in_dtype(dtype)
    made = case.inputs()
    found = results(made, case, reference.attention, dtype)
    wide = results(made, case, reference.attention, torch.promote_types(dtype, torch.float32))
    check_results({**found, "lse": wide["lse"]}, made, case, label="eager")


def scaled(x):
    return x * 1.01


def one_wrong_element(x):
    x = x.clone()
    x[1, 2 % x.shape[1], 17] += 0.25 * x.double().abs().max().to(x.dtype)
    return x


def nan_in_place_of_a_number(x):
    x = x.clone()
    x[0, 1, 3] = math.nan
    return x


def zero_row(x):
    x = x.clone()
    x[1, 0, 20] = 0
    return x


def mutants():
    """Every mutant in every dtype; but 1 % of a bf16 number is 2.5 ulp, no more than eager's."""
    for mutant in (scaled, one_wrong_element, nan_in_place_of_a_number, zero_row):
        for name in ("out", "lse", "dq", "dk", "dv"):
            for dtype in DTYPES:
                if mutant is not scaled or dtype != torch.bfloat16 or name == "lse":
                    yield mutant, name, dtype


@pytest.mark.parametrize(("mutant", "name", "dtype"), list(mutants()))
def test_mutant_is_caught(mutant, name, dtype):
    case = in_dtype(dtype)
    made, found = exact(case)
    found[name] = mutant(found[name])
    with pytest.raises(AssertionError, match=rf"^{name}\b"):
        check_results(found, made, case, label="mutant")


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_error_of_one_percent_is_caught(dtype):
    """A softmax scale that is 1 % off moves out, and the log-sum-exp gives it away in half too."""
    case = in_dtype(dtype)
    made, _ = exact(case)
    wrong = AttentionCase(**{**vars(case), "scale": 1.01 * case.dim**-0.5})
    _, found = exact(wrong)
    with pytest.raises(AssertionError, match=r"^(out|lse)"):
        check_results(found, made, case, label="mutant")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [-1, 1])
def test_causal_mask_off_by_one_is_caught(dtype, shift):
    case = in_dtype(dtype)
    made, _ = exact(case)

    def off_by_one(q, k, v, *, causal, mask, **options):
        below = torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2] + shift).bool()
        return reference.attention(q, k, v, mask=below, **options)

    found = results(made, case, off_by_one, torch.float64)
    found = {name: x.to(made["q"].dtype) for name, x in found.items()}
    with pytest.raises(AssertionError, match=r"^out\b.* error over allowed"):
        check_results(found, made, case, label="mutant")


def test_log2_in_place_of_ln_is_caught():
    made, found = exact(CASE)
    found["lse"] = found["lse"] / math.log(2)
    with pytest.raises(AssertionError, match=r"^lse: error over allowed"):
        check_results(found, made, CASE, label="mutant")


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_gradient_of_the_wrong_size_is_caught(dtype):
    """One of the summed rows left out of dbias (rule 3), in each dtype."""
    case = AttentionCase(**{**vars(in_dtype(dtype)), "bias": (1, 4, 1, 56)})
    made, found = exact(case)
    check_results(found, made, case, label="oracle, rounded")
    whole = dict(made, bias=made["bias"].expand(2, 4, 40, 56))
    summand = results(whole, case, reference.attention, torch.float64)["dbias"]
    found["dbias"] = (summand.sum((0, 2), keepdim=True) - summand[:1, :, 7:8]).to(dtype)
    with pytest.raises(AssertionError, match=r"^dbias"):
        check_results(found, made, case, label="mutant")


def test_fp32_bias_gradient_of_half_queries_is_held_to_half():
    """Rule 2 goes by the dtype of q: rounding to bf16 alone is ten times the cap of fp32."""
    case = dataclasses.replace(CASE, dtype=torch.bfloat16, bias_dtype=torch.float32)
    made, found = exact(case)
    found["dbias"] = found["dbias"].float()
    check_results(found, made, case, label="oracle, rounded")
    found["dbias"][0, 1, 20] = 0
    with pytest.raises(AssertionError, match=r"^dbias"):
        check_results(found, made, case, label="mutant")


def test_message_names_index_values_ratio_and_case():
    ref = torch.zeros(3, 4, dtype=torch.float64)
    actual = ref.float().clone()
    actual[1, 2] = 0.5
    with pytest.raises(AssertionError) as error:
        check(actual, ref, ref.float(), what="out", case="B=2 causal")
    for part in ("out", "(1, 2)", "got 0.5", "expected 0", "1 of 12 over", "[B=2 causal]"):
        assert part in str(error.value)


def test_bad_eager_does_not_hide_a_bug():
    ref = torch.ones(8, dtype=torch.float64)
    with pytest.raises(AssertionError, match="cap"):
        check(ref.float() + 0.1, ref, ref.float() + 0.3, what="out")
    with pytest.raises(AssertionError, match="cap"):
        check(ref.half() + 0.1, ref, ref.half() * math.inf, what="out")


def test_error_spread_over_all_elements_is_caught_by_its_rms():
    """Eager has one bad element; a result that is that bad everywhere fails by the rms alone."""
    ref = torch.ones(1000, dtype=torch.float64)
    eager = ref.half()
    eager[0] += 2**-9
    check(eager, ref, eager, what="out")
    with pytest.raises(AssertionError, match=r"^out: .* 0\.\d+ \(max\), 1\.\d+ \(rms\)"):
        check(ref.half() + 3 * 2**-10, ref, eager, what="out")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_pattern(bad):
    ref = torch.tensor([1.0, bad, 2.0], dtype=torch.float64)
    check(ref.float(), ref, ref.float(), what="out")
    for wrong in ([1.0, 0.0, 2.0], [1.0, -bad if bad == bad else 1.0, 2.0], [bad, bad, 2.0]):
        with pytest.raises(AssertionError, match="where the reference is not"):
            check(torch.tensor(wrong), ref, ref.float(), what="out")


def test_wrong_shape():
    with pytest.raises(AssertionError, match=r"shape \(2, 3\), expected \(3, 2\)"):
        check(torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(3, 2), what="out")


def test_sum_rule_grows_with_the_root_of_the_rows():
    ref = torch.zeros(4, dtype=torch.float64)
    check_sum(ref.float() + 4.9e-5, ref, rows=100, largest_summand=1.0, what="dbias")
    with pytest.raises(AssertionError, match="sum"):
        check_sum(ref.float() + 5.1e-5, ref, rows=100, largest_summand=1.0, what="dbias")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("largest", [1e-3, 0.75, 1.0, 1.5, 2.0, 1000.0])
def test_ulp(dtype, largest):
    x = torch.tensor(largest, dtype=dtype)
    after = torch.nextafter(x.double() if dtype == torch.float64 else x, x.new_tensor(math.inf))
    assert ulp(x.item(), dtype) == (after.double() - x.double()).item()


def test_every_case_has_its_own_text():
    assert str(AttentionCase()) == ""
    assert str(AttentionCase(dim=64, causal=True)) == "dim=64 causal=True"


# --- oracles, once a session ---------------------------------------------------------------------


def test_an_oracle_is_computed_once_for_the_same_tensors():
    made = {"x": torch.randn(3, 4), "mask": None}
    computed = []

    def compute():
        computed.append(made["x"].sum())
        return {"out": made["x"] + 1}

    first = compare.once("sum", made, compute)
    assert compare.once("sum", {**made, "x": made["x"].clone()}, compute) is first
    for other in (
        made["x"].t().contiguous().t(),
        made["x"].double(),
        made["x"].view(4, 3),
        -made["x"],
    ):
        assert compare.once("sum", {**made, "x": other}, compute) is not first
    assert compare.once("product", made, compute) is not first
    assert len(computed) == 6
    first["out"].zero_()
    with pytest.raises(AssertionError, match="changed an oracle"):
        compare.once("sum", made, compute)


def test_oracles_take_little_memory(monkeypatch):
    monkeypatch.setattr(compare, "_kept", collections.OrderedDict())
    monkeypatch.setattr(compare, "MOST_KEPT", 3000)
    for i in range(5):
        compare.once(i, {}, lambda: {"out": torch.zeros(256)})
    assert [about for about, *_ in compare._kept] == [3, 4]
