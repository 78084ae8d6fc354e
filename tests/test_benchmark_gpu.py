"""The attention benchmark as a GPU runs it, as far as a CPU can show it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from concurrent.futures import Executor, Future

import pytest
import torch
import torch.nn.functional as F
from fusedattn.benchmarks import (
    ahead,
    attention_cases,
    attention_peers,
    figures,
    harness,
    rowwise_cases,
    rowwise_peers,
    run,
)
from fusedattn.benchmarks.accuracy import Error
from fusedattn.benchmarks.attention_cases import Case, make_problem
from fusedattn.benchmarks.harness import Limits
from fusedattn.benchmarks.run import ATTENTION, ROWWISE, run_case
from fusedattn.benchmarks.versions import DTYPES, FLASH, Unavailable, Version, build_versions

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LIMITS = Limits(dict.fromkeys(DTYPES, 1e14), 1e12)
OURS = ("fusedattn-cuda", "fusedattn-triton")


def alone(length: int, causal: bool = True, dtype: str = "fp32") -> Case:
    return Case(2, 2, length, length, 16, causal, dtype, True, alone=True)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# --- the grid ------------------------------------------------------------------------------------


def test_the_grid_is_the_one_in_which_kernels_are_published():
    grid = attention_cases.gpu_grid(GPU)
    cells = [case for case in grid if case.regime == "self-attention"]
    assert len(set(grid)) == len(grid) == len(cells) + 3
    assert len(cells) == 6 * 2 * 2 * 2
    assert {case.seq_q for case in cells} == {512, 1024, 2048, 4096, 8192, 16384}
    assert {case.batch * case.seq_q for case in cells} == {16384}
    assert {case.heads * case.head_dim for case in cells} == {2048}
    assert {case.dtype for case in grid} == {"bf16"}
    assert {case.passes for case in cells} == {"fwd", "bwd"}
    assert len({case.label for case in grid}) == len(grid)
    assert set(grid) < set(attention_cases.full_grid(GPU))


def test_the_backward_pass_alone_has_its_own_work():
    case = alone(48)
    forward = Case(2, 2, 48, 48, 16, True, "fp32")
    assert case.label.endswith("causal bwd")
    assert case.flops == 2.5 * forward.flops
    assert case.bytes == 8 * 2 * 2 * 48 * 16 * 4
    with pytest.raises(ValueError, match="alone without backward"):
        Case(1, 1, 4, 4, 8, True, "fp32", alone=True)


# --- versions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_backward_pass_alone_is_right(dtype):
    problem = make_problem(alone(48, dtype=dtype), CPU, seed=0)
    names = ["eager", "sdpa-flash"]
    row = run_case(ATTENTION, problem, limits=LIMITS, budget=1.0, seed=0, peers=names)
    assert set(row["versions"]) == {"fusedattn", *names}
    for name, found in row["versions"].items():
        assert found["within_tolerance"], name
    ratio = row["versions"]["sdpa-flash"]["median_s"] / row["versions"]["fusedattn"]["median_s"]
    assert row["times_flash"] == {"fusedattn": pytest.approx(ratio)}


def test_the_backward_pass_alone_runs_no_forward():
    calls = []

    def counted(q, k, v):
        calls.append(1)
        return sdpa(q, k, v)

    problem = make_problem(alone(16), CPU, seed=0)
    version = attention_peers.version_of(counted, problem)
    outputs = [version.call(i) for i in range(6)]
    assert len(calls) == len(problem.sets)
    assert all(torch.equal(x, y) for x, y in zip(outputs[0], outputs[2], strict=True))
    assert not torch.equal(outputs[0][1], outputs[1][1])


def test_a_forced_backend_is_in_force_where_the_graph_is_recorded():
    entered = []

    @contextlib.contextmanager
    def forced():
        entered.append(True)
        yield
        entered.pop()

    def formula(q, k, v):
        assert entered
        return sdpa(q, k, v)

    attention_peers.version_of(formula, make_problem(alone(16), CPU, seed=0), forced)


@pytest.mark.slow
def test_flex_attention_compiles_with_its_block_mask():
    case = Case(1, 2, 256, 256, 64, True, "bf16")
    problem = make_problem(case, CPU, seed=0)
    row = run_case(ATTENTION, problem, limits=LIMITS, budget=0.2, seed=0, peers=["flex"])
    assert row["skipped"] == {}
    assert row["versions"]["flex"]["within_tolerance"]
    assert row["prepared_s"]["flex"] > 0


@pytest.mark.slow
def test_the_compiled_backward_pass_alone_runs_again_and_again():
    problem = make_problem(alone(32), CPU, seed=0)
    found, plain = attention_peers.compiled(problem), attention_peers.eager(problem)
    for i in range(5):
        for got, want in zip(found.call(i), plain.call(i), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_on_a_gpu_every_backend_is_a_version_of_its_own():
    names = attention_peers.peers_on(GPU)
    assert list(attention_peers.builders(GPU, names)) == [*OURS, *names]
    assert {"sdpa-flash", "sdpa-cudnn", "flex"} <= set(names)
    problem = make_problem(Case(1, 1, 16, 16, 16, True, "fp32"), CPU, seed=0)
    with pytest.raises(Unavailable, match=r"^cuda: .*on cpu"):
        attention_peers.ours("cuda")(problem)


@pytest.mark.parametrize("error", [ValueError("no kernel\nat all"), KeyError(), Unavailable("x")])
def test_a_peer_that_fails_is_named_with_the_reason(monkeypatch, error):
    def broken(problem):
        raise error

    monkeypatch.setitem(attention_peers.PEERS, "sdpa-math", broken)
    problem = make_problem(Case(1, 1, 16, 16, 16, True, "fp32"), CPU, seed=0)
    names = ["sdpa-math", "sdpa-flash"]
    row = run_case(ATTENTION, problem, limits=LIMITS, budget=0.05, seed=0, peers=names)
    assert set(row["versions"]) == {"fusedattn", "sdpa-flash"}
    assert row["skipped"]["sdpa-math"] in ("no kernel", "KeyError", "x")


def test_on_a_gpu_each_version_is_called_once_before_it_is_timed(monkeypatch):
    """What a driver raises at the first call would otherwise end the run."""

    def failing(problem):
        def call(i):
            raise LookupError("out of registers")

        return Version(call)

    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    monkeypatch.setattr(attention_peers, "ours", lambda backend: failing)
    monkeypatch.setitem(attention_peers.PEERS, "eager", lambda problem: Version(lambda i: ()))
    problem = make_problem(Case(1, 1, 16, 16, 16, True, "fp32"), CPU, seed=0)
    object.__setattr__(problem, "device", GPU)
    skipped: dict[str, str] = {}
    versions, seconds = build_versions(problem, attention_peers.builders(GPU, ["eager"]), skipped)
    assert skipped == dict.fromkeys(OURS, "out of registers")
    assert list(versions) == ["eager"]
    assert set(seconds) == {*OURS, "eager"}
    assert waited == [True]


# --- the time for compiling ----------------------------------------------------------------------


@pytest.mark.parametrize(("thorough", "timed"), [(False, 3), (True, 6)])
def test_what_is_compiled_for_each_length_has_a_bound(monkeypatch, thorough, timed):
    asked = []

    def run_case(part, problem, *, peers, **options):
        asked.append(peers)
        seconds = {name: 30.0 for name in peers if name == "flex"}
        return {"skipped": {}, "prepared_s": seconds}

    monkeypatch.setattr(ATTENTION, "problem", lambda *arguments: None)
    monkeypatch.setattr(run, "run_case", run_case)
    cases = [Case(2, 32, n, n, 64, False, "bf16") for n in (1024, 2048, 4096, 8192, 16384, 512)]
    options = {"limits": LIMITS, "seconds": 1.0, "seed": 0, "thorough": thorough}
    rows = list(run.run_cases(ATTENTION, cases, GPU, **options))
    assert sum("flex" in names for names in asked) == timed
    for names, row in zip(asked, rows, strict=True):
        assert "sdpa-flash" in names
        assert ("flex" in row["skipped"]) == ("flex" not in names)


def test_torch_compile_of_ops_on_rows_has_a_bound_too(monkeypatch):
    asked = []

    def run_case(part, problem, *, peers, **options):
        asked.append("torch.compile" in peers)
        return {"skipped": {}, "prepared_s": {"torch.compile": 6.0} if asked[-1] else {}}

    monkeypatch.setattr(ROWWISE, "problem", lambda *arguments: None)
    monkeypatch.setattr(run, "run_case", run_case)
    cases = [
        case for case in rowwise_cases.full_grid(GPU) if rowwise_peers.worth_compiling(case, GPU)
    ]
    rows = list(run.run_cases(ROWWISE, cases, GPU, seconds=1.0, seed=0))
    assert asked == [True] * 3 + [False] * (len(cases) - 3)
    assert all("torch.compile" in row["skipped"] for row in rows[3:])


def test_the_grid_asks_for_flex_attention_in_every_cell():
    grid = attention_cases.gpu_grid(GPU)
    for case in grid:
        assert attention_peers.worth_compiling("flex", case, GPU) == (case.regime != "decode")
    chosen = [case for case in grid if attention_peers.worth_compiling("torch.compile", case, GPU)]
    assert 2 <= len(chosen) <= 4


class AtOnce(Executor):
    """Runs a job where it is submitted."""

    def submit(self, function, /, *arguments, **options):
        done = Future()
        done.set_result(function(*arguments, **options))
        return done


def test_compiling_ahead_begins_with_what_is_slow_and_names_real_versions():
    chosen = ahead.jobs(GPU)
    assert len(set(chosen)) == len(chosen)
    assert chosen[0][2] == "fusedattn-triton"
    assert chosen[0][1].alone
    cells = {case for part, case, name in chosen if name == "flex"}
    assert cells == {c for c in attention_cases.gpu_grid(GPU) if c.regime == "self-attention"}
    for part, case, name in chosen:
        kind = ahead.PARTS[part]
        assert name in (*kind.builders(GPU, []), *kind.peers(case, GPU))


def test_compiling_ahead_calls_each_version_and_outlives_errors(monkeypatch, capsys):
    called = []

    def fine(problem):
        return Version(lambda i: called.append(problem.case) or ())

    def broken(problem):
        raise ValueError("does not lower\nhere")

    monkeypatch.setitem(attention_peers.PEERS, "flex", broken)
    monkeypatch.setattr(attention_peers, "ours", lambda backend: fine)
    monkeypatch.setattr(rowwise_peers, "ours", lambda backend: fine)
    cases = [alone(16), rowwise_cases.Case("softmax", (4, 8), "fp32")]
    chosen = [("attention", cases[0], "fusedattn"), ("attention", cases[0], "flex")]
    chosen.append(("rowwise", cases[1], "fusedattn"))
    told = ahead.prepare_all(chosen, CPU, AtOnce())
    assert called == cases
    assert capsys.readouterr().out.splitlines() == told
    assert sum(line.endswith(" s") for line in told) == 2
    assert f"{cases[0].label}, flex: does not lower" in told


def test_compiling_ahead_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ahead.main() == 2
    assert "no GPU" in capsys.readouterr().err


# --- the report ----------------------------------------------------------------------------------


def measured(case: Case, seconds: dict[str, float], wrong: tuple[str, ...] = ()) -> dict:
    """A row with these times."""
    limit = case.limit(LIMITS)
    rows = {}
    for name, each in seconds.items():
        timing = harness.Timing(each, 0.9 * each, 1.1 * each, 9)
        found = harness.Measured(timing, 2**20, (), 0)
        share = 2.0 if name in wrong else 0.5
        version = Version(lambda i: (), detail=name)
        rows[name] = figures.figures_of(found, version, Error(1e-3, share), case.work, limit)
    kept = {name: getattr(case, name) for name in ATTENTION.derived}
    return {
        "case": {**dataclasses.asdict(case), **kept},
        "unit": "byte/s" if case.bound_by_bytes else "FLOP/s",
        "limit": limit,
        "versions": rows,
        "skipped": {"sdpa-cudnn": "no engine"},
        **figures.ratios(rows, OURS),
        "times_flash": figures.times_as_fast(rows, OURS, FLASH),
    }


def grid_rows() -> list[dict]:
    """Ours in CUDA C++ is as fast as FlashAttention-2, but in one cell; Triton is half as fast."""
    rows = []
    for case in attention_cases.gpu_grid(GPU):
        seconds = case.work / 4e14
        slow = (case.seq_q, case.head_dim, case.causal, case.passes) == (512, 64, True, "bwd")
        found = {"fusedattn-cuda": seconds * (1.25 if slow else 1.0), "sdpa-flash": seconds}
        rows.append(measured(case, found | {"fusedattn-triton": 2 * seconds, "flex": seconds}))
    return rows


def printed(show) -> str:
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=144)
    show(console)
    return console.file.getvalue()


def test_the_report_holds_each_of_ours_to_flash_attention():
    pytest.importorskip("rich")
    from fusedattn.benchmarks import report

    rows = grid_rows()
    text = printed(lambda console: console.print(report.flash_table(rows)))
    line = next(x for x in text.splitlines() if "bf16 32x32x512x64 causal bwd" in x)
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    assert cells[1:] == ["320", "200", "400", "-", "400", "0.80x", "0.50x"]
    goal = printed(lambda console: report.print_goal(rows, console)).splitlines()
    reaches = "at least 0.95x of FlashAttention-2 in"
    assert goal[0].strip() == f"fusedattn-cuda: {reaches} 50 of 51 cases"
    assert goal[1].strip() == "below: bf16 32x32x512x64 causal bwd 0.80x"
    assert goal[2].strip() == f"fusedattn-triton: {reaches} 0 of 51 cases"
    assert len(goal) == 3 + 51


def test_the_report_outlives_a_missing_flash_attention_and_marks_what_is_wrong():
    pytest.importorskip("rich")
    from fusedattn.benchmarks import report

    case = attention_cases.gpu_grid(GPU)[0]
    rows = [measured(case, {"fusedattn-cuda": 1e-3}, wrong=("fusedattn-cuda",))]
    rows.append(measured(case, {"sdpa-flash": 1e-3}))
    text = printed(lambda console: console.print(report.flash_table(rows)))
    assert case.label in text
    assert printed(lambda console: report.print_goal(rows, console)) == ""
    assert "[bold red]" in report._rate(rows[0]["versions"]["fusedattn-cuda"], 1e12)
    assert (
        printed(lambda console: console.print(report.attention_table(rows))).count(case.label) == 2
    )


@pytest.mark.parametrize("ending", [None, KeyboardInterrupt, RuntimeError])
def test_a_run_on_a_gpu_leaves_a_panel_for_each_pass_even_if_it_is_ended(
    monkeypatch, tmp_path, ending
):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    from fusedattn.benchmarks import suite, transformer

    def run_cases(part, cases, device, **options):
        yield from grid_rows()
        if ending:
            raise ending("stopped")

    monkeypatch.setattr(suite, "run_cases", run_cases)
    monkeypatch.setattr(suite, "measure_limits", lambda *arguments: LIMITS)
    plan = suite.Plan(
        GPU, False, attention_cases.gpu_grid(GPU), transformer.GPU, parts=("attention",)
    )
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=144)
    with pytest.raises(ending) if ending else contextlib.nullcontext():
        suite.run(plan, tmp_path, console)
    names = {path.name for path in tmp_path.iterdir()}
    plots = {"attention_bf16.png", "attention_ratios.png"}
    assert names == {"results.json", "attention.csv", *plots}
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["attention"][0]["times_flash"] == {
        "fusedattn-cuda": pytest.approx(1.0),
        "fusedattn-triton": pytest.approx(0.5),
    }
    text = console.file.getvalue()
    assert "against FlashAttention-2" in text
    assert "below: bf16 32x32x512x64 causal bwd 0.80x" in text
    assert "not run: sdpa-cudnn in 51 cases: no engine" in text


def test_on_a_gpu_the_plan_is_its_own_grid(monkeypatch):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    from fusedattn.benchmarks import suite

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plan = suite.make_plan()
    assert plan.cases == attention_cases.gpu_grid(GPU)
    assert len(plan.rowwise_cases) > 50
    total = plan.seconds + plan.rowwise_seconds + 4 * plan.size.seconds
    assert total < 200
    assert suite.make_plan(full=True).cases == attention_cases.full_grid(GPU)
    assert suite.make_plan(quick=True).cases == attention_cases.quick_grid(GPU)
    assert suite.make_plan(full=True).size.seconds > plan.size.seconds
