"""The benchmarks: their arithmetic, their fairness, and that a wrong or cached result shows."""

from __future__ import annotations

import collections
import itertools
import mmap
import sys
import time
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from fusedattn.benchmarks import accuracy, attention_cases, attention_peers, harness
from fusedattn.benchmarks.attention_cases import Case, make_problem
from fusedattn.benchmarks.harness import Limits
from fusedattn.benchmarks.run import ATTENTION, run_case
from fusedattn.benchmarks.versions import DTYPES, OURS, Unavailable, Version

CPU = torch.device("cpu")
LIMITS = Limits(dict.fromkeys(DTYPES, 1e11), 1e10)
TINY = Case(2, 2, 48, 48, 16, True, "fp32")


# --- statistics and schedule ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 30])
@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_percentile_is_linear_between_neighbours(count, fraction):
    samples = torch.rand(count).tolist()
    assert harness.percentile(samples, fraction) == pytest.approx(
        numpy.quantile(samples, fraction), rel=1e-12
    )


@pytest.mark.parametrize(("samples", "fraction"), [([], 0.5), ([1.0], 1.5), ([1.0], -0.1)])
def test_percentile_refuses(samples, fraction):
    with pytest.raises(ValueError, match="percentile: got"):
        harness.percentile(samples, fraction)


def test_timing_orders_its_percentiles():
    timing = harness.Timing.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (timing.p20, timing.median, timing.p80, timing.samples) == (2.0, 3.5, 5.0, 6)


def test_schedule_interleaves_and_nobody_has_a_neighbour_of_his_own():
    order = harness.schedule({"a": 30, "b": 30, "c": 30})
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    followed = collections.Counter(itertools.pairwise(order))
    assert min(followed[x, y] for x, y in itertools.permutations("abc", 2)) >= 8
    assert order == harness.schedule({"a": 30, "b": 30, "c": 30})


def test_schedule_spreads_a_slow_version_over_the_rounds():
    order = harness.schedule({"fast": 8, "slow": 2, "out": 0})
    assert order.count("fast") == 8
    assert order.count("slow") == 2
    assert "out" not in order
    first, second = (n for n, name in enumerate(order) if name == "slow")
    assert second - first >= 4


def test_measure_takes_turns_and_changes_its_inputs():
    log: list[tuple[str, int]] = []
    versions = {
        name: Version(lambda i, name=name: log.append((name, i)) or (torch.zeros(1),))
        for name in "ab"
    }
    measured = harness.measure(versions, device=CPU, budget=0.2)
    for name in "ab":
        turns = [i for n, i in log if n == name]
        assert turns == list(range(len(turns)))
        assert measured[name].timing.samples > 1
    switches = sum(x[0] != y[0] for x, y in itertools.pairwise(log))
    assert switches > 4


@pytest.mark.parametrize(("first", "expected"), [(0.0, 2), (harness.FIRST_SECONDS, 1)])
def test_a_slow_version_has_one_sample(first, expected):
    calls = []

    def slow(i):
        calls.append(i)
        time.sleep(0.1 + (0 if i else first))
        return (torch.zeros(1),)

    measured = harness.measure({"slow": Version(slow)}, device=CPU, budget=0.02)
    assert len(calls) == expected
    assert measured["slow"].timing.samples == 1
    assert measured["slow"].timing.median >= 0.1


@pytest.mark.parametrize("call", range(5))
def test_one_standstill_of_the_machine_tells_nothing(call):
    def quick(i):
        time.sleep(0.3 if i == call else 1e-3)
        return (torch.zeros(1),)

    measured = harness.measure({"quick": Version(quick)}, device=CPU, budget=0.02)
    assert measured["quick"].timing.samples >= harness.FEWEST_TURNS
    assert measured["quick"].timing.median < 0.1


@pytest.mark.skipif(sys.platform != "linux", reason="counts fresh pages there")
@pytest.mark.parametrize(("fresh", "calls"), [(0, 1), (1, 2), (9, harness.MOST_TRIES)])
def test_a_turn_on_fresh_pages_is_taken_again(fresh, calls):
    """What the system takes to hand out pages is not the version's."""

    def call(i: int) -> tuple:
        if i < fresh:
            mmap.mmap(-1, 8 << 20).write(bytes(8 << 20))
            time.sleep(0.2)
        time.sleep(0.05)
        return ()

    contestant = harness.Contestant(Version(call), seconds=1.0)
    contestant.turn(harness.CpuClock())
    (sample,) = contestant.samples
    assert contestant.calls == calls
    assert (sample < 0.2) == (fresh < harness.MOST_TRIES)


@pytest.mark.skipif(sys.platform != "linux", reason="counts fresh pages there")
@pytest.mark.parametrize("fresh", [1, 3])
def test_first_calls_on_fresh_pages_are_no_samples(fresh):
    """However short the time is: 4096×4096 would be measured at the rate of page faults."""

    def call(i: int) -> tuple:
        if i < fresh:
            mmap.mmap(-1, 8 << 20).write(bytes(8 << 20))
            time.sleep(0.2)
        return ()

    measured = harness.measure({"x": Version(call)}, device=CPU, budget=0.02)
    assert measured["x"].timing.median < 0.1


def test_an_allocator_that_had_to_grow_gets_twice_as_much_again(monkeypatch):
    """glibc finds no room for an aligned block between others where an equal one has been."""
    pages, room, calls = iter((0, 1000, 1000, 1000)), [], []
    empty = torch.empty
    monkeypatch.setattr(harness, "_fresh_pages", lambda: next(pages))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: room.append(a) or empty(*a, **k))
    harness.on_kept_pages(harness.CpuClock(), lambda: calls.append(1))
    assert len(calls) == 2
    assert room == [(2000 * mmap.PAGESIZE,)]


def test_measure_reports_a_version_that_raises():
    def broken(i):
        raise RuntimeError("no kernel\nsecond line")

    failed: dict[str, str] = {}
    assert not harness.measure({"x": Version(broken)}, device=CPU, budget=0.1, failed=failed)
    assert failed == {"x": "no kernel"}
    with pytest.raises(RuntimeError, match="no kernel"):
        harness.measure({"x": Version(broken)}, device=CPU, budget=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_sees_a_buffer_that_is_freed_again():
    probe = harness.PeakMemory(CPU)
    with probe:
        torch.ones(64 * 2**18)
    assert 60 * 2**20 < probe.peak_bytes < 80 * 2**20
    with probe:
        torch.ones(16)
    assert probe.peak_bytes < 4 * 2**20


@pytest.mark.slow
def test_limits_are_measured_for_every_dtype():
    limits = harness.measure_limits(CPU, budget=0.1, scale=0.01)
    rates = limits.flops_per_second
    assert set(rates) == set(DTYPES)
    assert rates["fp32"] == min(rates.values()) > 1e6
    assert limits.bytes_per_second > 1e6


def test_a_slow_matmul_does_not_take_more_than_its_time(monkeypatch):
    sizes = []

    def slow(versions, *, device, budget):
        sizes.append(versions["matmul"].call(0)[0].shape[0])
        return {"matmul": SimpleNamespace(timing=harness.Timing.of([sizes[-1] ** 3 * 1e-6]))}

    monkeypatch.setattr(harness, "measure", slow)
    rate = harness._matmul_rate(torch.float32, 1024, CPU, budget=3.0)
    assert sizes == [64, 128]
    assert rate == pytest.approx(2e6)


# --- cases ---------------------------------------------------------------------------------------


def test_flops_and_bytes_follow_the_conventions():
    forward = Case(2, 3, 128, 128, 64, False, "bf16")
    assert forward.flops == 2 * 2 * 3 * 128 * 128 * (64 + 64)
    assert Case(2, 3, 128, 128, 64, True, "bf16").flops == forward.flops / 2
    assert Case(2, 3, 128, 128, 64, True, "bf16", True).flops == forward.flops / 2 * 3.5
    tensor = 2 * 3 * 128 * 64
    assert forward.bytes == 4 * tensor * 2
    assert Case(2, 3, 128, 128, 64, False, "fp32", True).bytes == 9 * tensor * 4
    decode = Case(1, 32, 1, 8192, 128, False, "fp32")
    assert decode.bytes == 4 * 32 * 128 * (1 + 1 + 8192 + 8192)
    assert decode.work == decode.bytes
    assert decode.limit(LIMITS) == LIMITS.bytes_per_second
    assert forward.work == forward.flops
    assert forward.limit(LIMITS) == LIMITS.flops_per_second["bf16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 1, 4, 8, 8, True, "fp32"), "seq_q=4 and seq_k=8"),
        ((1, 1, 4, 4, 8, True, "fp8"), "dtype='fp8'"),
    ],
)
def test_a_case_refuses_what_peers_disagree_on(arguments, message):
    with pytest.raises(ValueError, match=message):
        Case(*arguments)


def test_the_quick_grid_covers_every_regime_of_the_full_one():
    full, quick = attention_cases.full_grid(CPU), attention_cases.quick_grid(CPU)
    assert len(set(full)) == len(full) == 7 * 2 * 2 * 3 * 2 + 9
    assert set(quick) < set(full)
    for name in ("dtype", "head_dim", "causal", "backward", "regime"):
        assert {getattr(c, name) for c in quick} == {getattr(c, name) for c in full}
    assert len({case.label for case in full}) == len(full)


def test_inputs_are_random_and_follow_the_seed():
    sets = make_problem(TINY, CPU, seed=1).sets
    again = make_problem(TINY, CPU, seed=1).sets
    other = make_problem(TINY, CPU, seed=2).sets
    tensors, same = ([x for s in drawn for x in s] for drawn in (sets, again))
    for n, x in enumerate(tensors):
        assert 0.8 < x.std() < 1.2
        assert not any(torch.equal(x, y) for y in tensors[n + 1 :])
    assert all(torch.equal(x, y) for x, y in zip(tensors, same, strict=True))
    assert not torch.equal(sets[0][0], other[0][0])


# --- versions and their errors -------------------------------------------------------------------


def run(case, formula=None, **kwargs):
    problem = make_problem(case, CPU, seed=3, **kwargs)
    versions = formula and {OURS: attention_peers.version_of(formula, problem)}
    return run_case(ATTENTION, problem, limits=LIMITS, budget=0.05, seed=3, versions=versions)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def late_by_one(q, k, v):
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class Stored:
    """Computes once and then hands back what it has."""

    def __init__(self):
        self.out = None

    def __call__(self, q, k, v):
        self.out = sdpa(q, k, v) if self.out is None else self.out
        return self.out


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_right_version_is_within_tolerance(dtype, backward):
    case = Case(2, 2, 48, 48, 16, True, dtype, backward)
    row = run(case, sdpa)["versions"][OURS]
    assert row["within_tolerance"]
    assert 0 < row["max_error"] < 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda q, k, v: sdpa(q, k, v) * 1.01, id="one percent off"),
        pytest.param(late_by_one, id="mask off by one"),
        pytest.param(Stored(), id="cached result"),
        pytest.param(lambda q, k, v: sdpa(q, k, v) * float("nan"), id="nan"),
    ],
)
def test_a_wrong_version_is_caught(wrong):
    row = run(TINY, wrong)["versions"][OURS]
    assert row["samples"] > 1
    assert not row["within_tolerance"]


def test_a_wrong_gradient_is_caught():
    case = Case(1, 2, 48, 48, 16, True, "fp32", True)
    row = run(case, lambda q, k, v: sdpa(q, k, v.detach() * 0.01 + v * 0.99))
    assert not row["versions"][OURS]["within_tolerance"]


def test_the_sample_holds_the_first_and_last_row():
    q, k, v, _ = make_problem(Case(1, 1, 512, 512, 8, True, "fp32"), CPU, 0).sets[0]
    expected = accuracy.expected_attention(q, k, v, causal=True, dout=None, seed=0)
    assert {0, 511} <= set(expected.rows.tolist())
    assert len(expected.rows) <= 64
    whole = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert torch.allclose(expected.ref[0][0], whole[0, 0, expected.rows], atol=1e-12)


@pytest.mark.parametrize("backward", [False, True])
def test_a_row_says_what_it_promises(backward):
    case = Case(2, 2, 48, 48, 16, True, "fp32", backward)
    problem = make_problem(case, CPU, seed=0)
    names = [name for name in attention_peers.peers_on(CPU) if name != "torch.compile"]
    row = run_case(ATTENTION, problem, limits=LIMITS, budget=0.1, seed=0, peers=names)
    assert {"fusedattn", "eager", "sdpa-flash", "sdpa-math"} <= set(row["versions"])
    assert set(row["versions"]) | set(row["skipped"]) == {"fusedattn", *names}
    for name, figures in row["versions"].items():
        assert figures["within_tolerance"], name
        assert figures["p20_s"] <= figures["median_s"] <= figures["p80_s"]
        assert figures["rate"] == pytest.approx(case.flops / figures["median_s"])
        assert figures["of_limit"] == pytest.approx(figures["rate"] / 1e11)
    speedup = row["speedup"]
    assert row["speedup_over_best"] == min(speedup.values()) == speedup[row["best_peer"]]
    ours = row["versions"]["fusedattn"]["median_s"]
    assert speedup["eager"] == pytest.approx(row["versions"]["eager"]["median_s"] / ours)


def test_a_version_that_stores_all_scores_is_left_out_where_they_are_huge():
    row = run(TINY, score_bytes=1000)
    for name in ("eager", "torch.compile", "sdpa-math"):
        assert "matrix of scores" in row["skipped"][name]
    assert "sdpa-flash" in row["versions"]


def test_the_interpreter_is_never_timed(monkeypatch):
    monkeypatch.setattr(attention_peers.fusedattn, "explain", lambda *a, **k: "attention: triton\n")
    problem = make_problem(TINY, CPU, 0)
    with pytest.raises(Unavailable, match="interpreter"):
        attention_peers.fused(problem)


@pytest.mark.parametrize("seq_q", [1, 48])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_is_right(engine, seq_q):
    pytest.importorskip(engine)
    pytest.importorskip("onnx")
    problem = make_problem(Case(2, 3, seq_q, 48, 16, False, "fp32"), CPU, seed=0)
    row = run_case(ATTENTION, problem, limits=LIMITS, budget=0.05, seed=0, peers=[engine])
    assert row["versions"][engine]["within_tolerance"]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_that_is_absent_names_the_extra(monkeypatch, engine):
    monkeypatch.setattr(attention_peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"fusedattn\[bench\]"):
        attention_peers.PEERS[engine](make_problem(TINY, CPU, 0))
