"""Whole models in the benchmark: tiny ones of transformers, their rows, tables and plot."""

from __future__ import annotations

import importlib.util
import io
import json

import fusedattn
import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from fusedattn.benchmarks import markdown, model_cases, model_run, suite, transformer
from fusedattn.benchmarks.model_cases import Case, Size
from rich.console import Console

CPU = torch.device("cpu")
TINY = Size(layers=1, width=32, heads=2, length=24, image=32, images=1, prompt=12, tokens=3)
CASES = [x for x in model_cases.grid(TINY) if x.dtype == "fp32" or x.model == "t5"]
PLAN = suite.Plan(
    device=CPU, thorough=False, cases=[], size=transformer.QUICK, parts=("models",),
    model_cases=CASES, model_seconds=0.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    fusedattn.integrations.transformers.unregister()


def run(plan, folder):
    """The results of a run, and what it printed."""
    printed = io.StringIO()
    return suite.run(plan, folder, Console(file=printed, width=220)), printed.getvalue()


def test_every_model_is_the_same_and_has_its_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(model_run, "bf16_pays", lambda: True)
    results, text = run(PLAN, tmp_path)
    rows = {row["case"]["label"]: row for row in results["models"]}
    assert list(rows) == [case.label for case in CASES]
    assert len(rows) == 5 + 1 + 3
    for label, row in rows.items():
        assert row["within_tolerance"], label
        assert 0 < row["difference"] <= model_run.ALLOWED[row["case"]["dtype"]]
        assert set(row["versions"]) == {"as it comes", "fusedattn"}
        assert all(x["rate"] > 0 and x["samples"] >= 2 for x in row["versions"].values())
        assert 0.05 < row["not_ours"] < 1
        assert "attn_implementation='fusedattn'" in row["patched"]
        assert not row["left"]
        assert label in text
    assert "not run: torch.compile in 6 cases: compiled with --full" in text
    stored = json.loads((tmp_path / "results.json").read_text())
    page = markdown.models(stored["models"])
    assert len(page.splitlines()) == 2 + len(rows)
    assert (tmp_path / "models.png").stat().st_size > 10_000
    assert "T5 generation fp32 1x12+3,fusedattn" in (tmp_path / "models.csv").read_text()


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch):
    """Equal weights of all keys, in training and in generation."""
    adapter = fusedattn.integrations.transformers

    def mean(q, k, v, **options):
        return fusedattn.attention(q, k, v, scale=0.0)

    monkeypatch.setattr(adapter, "attention", mean)
    for case in (Case("gpt2", "training", "fp32", TINY), Case("llama", "generation", "fp32", TINY)):
        row = model_run.run_case(case, CPU, seconds=0.0, seed=0)
        assert row["difference"] > 10 * model_run.ALLOWED["fp32"]
        assert row["ours"] is None
        assert "fusedattn" not in row["versions"]
        assert row["skipped"]["fusedattn"] == "its results are not those of the model as it comes"
    results = {"models": [row], "models_left_out": {}}
    printed = io.StringIO()
    suite.model_report.show_models(*results.values(), Console(file=printed, width=200))
    assert "not timed" in printed.getvalue()


def test_left_out_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(model_run, "bf16_pays", lambda: False)
    cases = [Case("vit", "training", dtype, TINY) for dtype in ("fp32", "bf16")]
    plan = suite.replace(PLAN, model_cases=cases)
    results, text = run(plan, tmp_path)
    assert [row["case"]["dtype"] for row in results["models"]] == ["fp32"]
    assert "not run: models in bf16: slower than in fp32 on this processor" in text
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda x: None if x == "transformers" else find(x)
    )
    results, text = run(plan, tmp_path)
    assert not results["models"]
    assert "not run: models of transformers: transformers is not installed" in text


def test_compiled_where_there_is_time(monkeypatch):
    def compile_(model):
        calls.append(model)
        if len(calls) == 2:
            model.forward = no_compiler
        return model

    def no_compiler(**given):
        raise RuntimeError("no compiler\nat all")

    calls = []
    monkeypatch.setattr(torch, "compile", compile_)
    case = Case("vit", "training", "fp32", TINY)
    row = model_run.run_case(case, CPU, seconds=0.0, seed=0, compile_seconds=1.0)
    assert set(row["speedup"]) == {"as it comes", "torch.compile"}
    assert row["compile_s"] > 0
    given = model_cases.batch(case, 0)
    reason = model_run._add_compiled({}, calls[0], case, given)
    assert reason == "no compiler"


def test_cases_that_are_none():
    for wrong in (("gpt3", "training", "fp32"), ("vit", "generation", "fp32")):
        with pytest.raises(ValueError, match=r"Case: got (model='gpt3'|task='generation')"):
            Case(*wrong)
    assert Size(layers=12).words(50257) == 50257
