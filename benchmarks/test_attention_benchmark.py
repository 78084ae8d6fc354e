"""`pytest benchmarks`: the attention cases under pytest-benchmark, one group per case.

The quick subset by default, `--full-grid` for every case; `-k "bf16 and causal and fusedattn"`
picks by what stands in the ids. Here the versions of a case run one after the other; for ratios
with interleaved turns, memory and limits use `fusedattn bench`.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from fusedattn.benchmarks import attention_cases
from fusedattn.benchmarks.attention_cases import Case, Problem, make_problem
from fusedattn.benchmarks.attention_peers import COMPILED, builders, expected_of, peers_on
from fusedattn.benchmarks.harness import clock_for
from fusedattn.benchmarks.versions import OURS, Unavailable, ours_on

pytest.importorskip("pytest_benchmark")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    full = config.getoption("--full-grid")
    grid = attention_cases.full_grid if full else attention_cases.quick_grid
    compiling = config.getoption("--compile")
    known = (*ours_on(device), *peers_on(device))
    names = [name for name in known if compiling or name not in COMPILED]
    pairs = [
        pytest.param(case, name, id=f"{case.label} {name}".replace(" ", "-"))
        for case, name in itertools.product(grid(device), names)
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
            kept[case] = make_problem(case, device, seed=0, score_bytes=2**27)
        return kept[case]

    return make


def test_attention(benchmark, problems, case, name):
    problem = problems(case)
    try:
        version = builders(problem.device, peers_on(problem.device))[name](problem)
    except Unavailable as reason:
        pytest.skip(str(reason))
    clock = clock_for(problem.device)
    turn = itertools.count()

    def call():
        last = next(turn)
        output = version.call(last)
        clock.wait()
        return last, output

    benchmark.group = case.label
    benchmark.extra_info["work"] = case.work
    benchmark.extra_info["unit"] = "byte" if case.bound_by_bytes else "FLOP"
    with version.context():
        try:
            call()
        except RuntimeError as error:
            pytest.skip(str(error).splitlines()[0])
        # An even number of rounds ends on other inputs than the first call's.
        last, output = benchmark.pedantic(call, rounds=6, warmup_rounds=1)
    error = expected_of(problem, last % len(problem.sets), seed=0).error(output)
    benchmark.extra_info["max_error"] = error.max_abs
    benchmark.extra_info["error_of_allowed"] = error.of_allowed
    if name.startswith(OURS):
        assert error.within, f"error is {error.of_allowed:.2f} of what is allowed"
