"""The run of the benchmark's group of options: its plan, its files and its tables."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from fusedattn.benchmarks import markdown, option_cases, option_peers, run, suite, transformer
from fusedattn.benchmarks.option_cases import Case
from fusedattn.benchmarks.versions import Unavailable
from rich.console import Console

CPU = torch.device("cpu")
CASES = [
    Case("window", 1, 2, 32, 32, 16, "fp32", False, 8),
    Case("window", 1, 2, 32, 32, 16, "bf16", True, 8),
    Case("packed", 2, 2, 32, 32, 16, "fp32", True),
    Case("sinks", 1, 2, 32, 32, 16, "fp32"),
    Case("dropout", 1, 2, 256, 256, 16, "fp32"),
    Case("grouped", 1, 4, 32, 32, 16, "fp32", True, 0, 2),
]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The results, the folder and the printed text of one tiny run; dropout has no peer in it."""
    folder, printed = tmp_path_factory.mktemp("bench") / "out", io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(option_peers, "PEERS", {n: option_peers.PEERS[n] for n in ("eager", "sdpa")})
        patch.setattr(option_cases.Problem, "refuse_huge_scores", no_dropout)
        patch.setattr(run._Options, "least_seconds", 0.02)
        plan = suite.Plan(
            CPU, False, (), transformer.QUICK, option_cases=CASES,
            parts=("options",), option_seconds=0.2, limit_seconds=0.05, limit_scale=0.01,
        )  # fmt: skip
        results = suite.run(plan, folder, Console(file=printed, width=200))
    return results, folder, printed.getvalue()


def no_dropout(problem):
    if problem.case.option == "dropout":
        raise Unavailable("its matrix of scores is too large")


@pytest.mark.slow
def test_the_run_leaves_json_csv_and_a_plot(finished):
    results, folder, _ = finished
    assert {x.name for x in folder.iterdir()} == {
        "results.json", "options.csv", "options_ratios.png"
    }  # fmt: skip
    stored = json.loads((folder / "results.json").read_text())
    assert stored["limits"]["flops_per_second"]["fp32"] > 0
    assert [row["case"]["option"] for row in stored["options"]] == [case.option for case in CASES]
    for row in stored["options"]:
        assert row["versions"]["fusedattn"]["within_tolerance"]
        assert (row["best_peer"] is None) == (row["case"]["option"] == "dropout")
    with (folder / "options.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(row["versions"]) for row in results["options"])
    assert {line["version"] for line in lines} == {"fusedattn", "eager", "sdpa"}
    content = (folder / "options_ratios.png").read_bytes()
    assert content.startswith(PNG)
    assert len(content) > 10_000


@pytest.mark.slow
def test_the_run_shows_a_line_for_each_option(finished):
    results, _, text = finished
    for row in results["options"]:
        assert row["case"]["label"] in text
    assert "attention's options" in text
    assert "limits measured here: matmul fp32" in text
    assert "not run: sdpa in 1 case: scaled_dot_product_attention has no sinks" in text


@pytest.mark.slow
def test_the_tables_of_a_kept_run_have_the_options(finished):
    _, folder, _ = finished
    page = markdown.page("results", json.loads((folder / "results.json").read_text()))
    lines = page[page.index("## options") :].splitlines()
    assert "× eager" in lines[2]
    assert "× SDPA" in lines[2]
    assert sum(line.startswith("| grouped fp32 1x4/2x32x16 fwd+bwd |") for line in lines) == 1


def test_the_plan_of_a_cpu_has_the_options(monkeypatch):
    plan = suite.make_plan("cpu")
    assert "options" in plan.parts
    assert plan.option_cases == option_cases.quick_grid(CPU)
    assert plan.option_seconds <= 40
    assert suite.make_plan("cpu", only="options").parts == ("options",)
    full = suite.make_plan("cpu", full=True)
    assert full.option_cases == option_cases.full_grid(CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "options" not in suite.make_plan().parts
    assert "options" in suite.make_plan(full=True).parts
