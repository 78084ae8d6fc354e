"""The rows that the row-wise benchmarks give, and which versions stand in them."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
import torch.nn.functional as F
from fusedattn.benchmarks import figures, rowwise_cases, rowwise_peers
from fusedattn.benchmarks.rowwise_cases import make_problem
from fusedattn.benchmarks.run import ROWWISE, run_case, run_cases
from fusedattn.benchmarks.versions import OURS, Unavailable, ours_on
from test_benchmark_rowwise import CPU, GPU, KINDS, named, tiny

# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_a_row_says_what_it_promises(kind):
    op, backward, residual = kind
    case = tiny(op, "fp32", backward, residual)
    problem = make_problem(case, CPU, seed=0)
    names = [name for name in rowwise_peers.peers_of(case) if name != "torch.compile"]
    row = run_case(ROWWISE, problem, budget=0.1, seed=0, peers=names)
    expected = {"fusedattn", "torch"} | ({"two calls"} if residual else set())
    assert set(row["versions"]) == expected
    assert row["ours"] == "fusedattn"
    assert row["unit"] == "byte/s"
    assert row["limit"] == pytest.approx(case.bytes / row["copy"]["median_s"])
    for name, found in row["versions"].items():
        assert found["within_tolerance"], name
        assert found["p20_s"] <= found["median_s"] <= found["p80_s"]
        assert found["rate"] == pytest.approx(case.bytes / found["median_s"])
        assert found["of_limit"] == pytest.approx(found["rate"] / row["limit"])
    assert row["speedup_over_best"] == row["speedup"][row["best_peer"]]
    assert "liger" in row["skipped"]


def figures_with(**seconds):
    wrong = {"wrong", "ours_wrong"}
    return {n: {"median_s": s, "within_tolerance": n not in wrong} for n, s in seconds.items()}


def test_ratios_take_the_best_of_ours_and_the_best_right_peer():
    rows = figures_with(ours=2.0, ours_slow=3.0, ours_wrong=0.5, peer=4.0, slow=8.0, wrong=1.0)
    found = figures.ratios(rows, ["ours", "ours_slow", "ours_wrong", "absent"])
    assert found["ours"] == "ours"
    assert found["best_peer"] == "peer"
    assert found["speedup_over_best"] == 2.0
    assert found["speedup"] == {"peer": 2.0, "slow": 4.0, "wrong": 0.5}
    assert figures.ratios(figures_with(wrong=1.0, ours=1.0), ["ours"])["best_peer"] is None
    assert figures.ratios(figures_with(peer=1.0), ["ours"])["ours"] is None


def test_every_case_is_run_within_the_time_and_says_what_was_left_out():
    cases = [tiny("softmax"), tiny("rms_norm", backward=True)]
    log = []
    rows = run_cases(
        ROWWISE,
        cases,
        CPU,
        seconds=0.2,
        seed=0,
        progress=lambda done, label: log.append((done, label)),
    )
    rows = list(rows)
    assert [row["case"]["label"] for row in rows] == [case.label for case in cases]
    assert [done for done, _ in log] == [0, 1, 2]
    assert all("--full" in row["skipped"]["torch.compile"] for row in rows)


def test_a_few_cases_are_worth_compiling():
    for device, grid in ((CPU, rowwise_cases.quick_grid), (GPU, rowwise_cases.full_grid)):
        chosen = [case for case in grid(device) if rowwise_peers.worth_compiling(case, device)]
        assert 2 <= len(chosen) < len(grid(device)) / 3


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
def test_the_compiled_formula_runs_again_and_again(backward):
    problem = make_problem(tiny("rms_norm", backward=backward), CPU, seed=0)
    row = run_case(ROWWISE, problem, budget=0.1, seed=0, peers=["torch.compile"])
    assert row["versions"]["torch.compile"]["within_tolerance"]
    assert row["versions"]["torch.compile"]["samples"] > 1


# --- which backends ------------------------------------------------------------------------------


def test_on_a_gpu_every_backend_is_a_version_of_its_own():
    assert ours_on(GPU) == {"fusedattn-cuda": "cuda", "fusedattn-triton": "triton"}
    assert "fusedattn-cuda" in rowwise_peers.builders(GPU, [])
    problem = make_problem(tiny("softmax"), CPU, seed=0)
    with pytest.raises(Unavailable, match=r"cuda: .*on cpu"):
        rowwise_peers.ours("cuda")(problem)


def test_without_native_kernels_the_reference_is_timed_and_named(monkeypatch):
    asked = []

    def refusing(x, dim, *, backend):
        asked.append(backend)
        if backend != "reference":
            raise rowwise_peers.fusedattn.UnsupportedError("no native kernels")
        return F.softmax(x, dim)

    monkeypatch.setattr(rowwise_peers.fusedattn, "softmax", refusing)
    row = run_case(
        ROWWISE, make_problem(tiny("softmax"), CPU, seed=0), budget=0.03, seed=0, peers=[]
    )
    assert row["versions"]["fusedattn"]["detail"] == "reference"
    assert set(asked) == {"cpu", "reference"}


def test_liger_says_why_it_is_absent(monkeypatch):
    with pytest.raises(Unavailable, match="GPU"):
        rowwise_peers.liger(SimpleNamespace(device=CPU))
    monkeypatch.setattr(rowwise_peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="pip install liger-kernel"):
        rowwise_peers.liger(SimpleNamespace(device=GPU))
    with pytest.raises(Unavailable, match="no sinusoidal"):
        rowwise_peers.OPS["sinusoidal"].liger(())


def test_liger_says_what_its_version_lacks(monkeypatch):
    monkeypatch.setattr(rowwise_peers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.softmax", None)
    problem = SimpleNamespace(device=GPU, case=tiny("softmax"), sets=[((), ())])
    with pytest.raises(Unavailable, match="this liger-kernel lacks it"):
        rowwise_peers.liger(problem)


# --- the report ----------------------------------------------------------------------------------


SOMEWHERE = {"gpu": {"devices": []}, "cpu": {"model": "a processor"}, "versions": {}}


def shown(row, tmp_path):
    """The text of the table and the notes about `row`; the plot is drawn too."""
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    from fusedattn.benchmarks import plots, report
    from rich.console import Console

    printed = io.StringIO()
    console = Console(file=printed, width=200)
    console.print(report.rowwise_table([row]))
    report.print_skipped([row], console)
    drawn = plots.plot_all(
        {
            "attention": [], "options": [], "rowwise": [row], "training": [], "models": [],
            "models_left_out": {}, "device": "cpu",
            "date": "2026-01-02", "threads": 2, "environment": SOMEWHERE,
        },
        tmp_path,
    )  # fmt: skip
    assert [path.name for path in drawn] == ["rowwise_of_copy.png"]
    return printed.getvalue()


def row_of(versions):
    case = tiny("softmax")
    problem = make_problem(case, CPU, seed=0)
    built = {name: rowwise_peers.version_of(f, problem) for name, f in versions.items()}
    row = run_case(ROWWISE, problem, budget=0.05, seed=0, versions=built)
    ours = [name for name in built if name.startswith(OURS)]
    return {**row, **figures.ratios(row["versions"], ours)}


def right(x):
    return (F.softmax(x, -1),)


def wrong(x):
    return (F.softmax(x, -1) * 1.01,)


def test_the_report_names_the_backend_and_wrong_peers(tmp_path):
    versions = {"fusedattn-cuda": wrong, "fusedattn-triton": right, "torch": wrong, "liger": right}
    text = shown(row_of(versions), tmp_path)
    assert "triton" in text
    assert "x liger" in text
    assert "no best peer: torch in 1 case" in text


def test_the_report_says_why_there_is_nothing_of_ours(tmp_path):
    row = row_of({"torch": right})
    row["skipped"]["fusedattn-cuda"] = "cuda: not built"
    assert "cuda: not built" in shown(row, tmp_path)
