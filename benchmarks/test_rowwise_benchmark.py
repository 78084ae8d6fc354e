"""`pytest benchmarks`: the ops that work on rows under pytest-benchmark, one group per case.

The quick subset by default, `--full-grid` for every case; `-k "softmax and bf16 and fusedattn"`
picks by what stands in the ids. As for attention, the versions run one after the other.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from fusedattn.benchmarks import rowwise_cases
from fusedattn.benchmarks.harness import clock_for
from fusedattn.benchmarks.rowwise_cases import Case, Problem, make_problem
from fusedattn.benchmarks.rowwise_peers import COMPILED, builders, expected_of, peers_of
from fusedattn.benchmarks.run import COPY, copy_of
from fusedattn.benchmarks.versions import OURS, ours_on

pytest.importorskip("pytest_benchmark")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    full = config.getoption("--full-grid")
    grid = rowwise_cases.full_grid if full else rowwise_cases.quick_grid
    compiling = config.getoption("--compile")
    pairs = [
        pytest.param(case, name, id=f"{case.label} {name}".replace(" ", "-"))
        for case in grid(device)
        for name in (*ours_on(device), *peers_of(case), COPY)
        if compiling or name != COMPILED
    ]
    metafunc.parametrize(("case", "name"), pairs)


@pytest.fixture(scope="module")
def problems():
    """Makes the inputs of a case, and keeps those of the last case only."""
    kept: dict[Case, Problem] = {}

    def make(case: Case) -> Problem:
        if case not in kept:
            kept.clear()
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            kept[case] = make_problem(case, device, seed=0)
        return kept[case]

    return make


def test_rowwise(benchmark, problems, case, name):
    problem = problems(case)
    device = problem.device
    clock = clock_for(device)
    turn = itertools.count()

    def call():
        last = next(turn)
        output = version.call(last)
        clock.wait()
        return last, output

    benchmark.group = case.label
    benchmark.extra_info["work"] = case.bytes
    benchmark.extra_info["unit"] = "byte"
    try:
        if name == COPY:
            version = copy_of(case, device)
        else:
            version = builders(device, peers_of(case))[name](problem)
        with version.context():
            call()
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    with version.context():
        # An even number of rounds ends on other inputs than the first call's.
        last, output = benchmark.pedantic(call, rounds=6, warmup_rounds=1)
    if name == COPY:
        return
    error = expected_of(problem, last % len(problem.sets), seed=0).error(output)
    benchmark.extra_info["max_error"] = error.max_abs
    benchmark.extra_info["error_of_allowed"] = error.of_allowed
    if name.startswith(OURS):
        assert error.within, f"error is {error.of_allowed:.2f} of what is allowed"
