"""The cases of the row-wise benchmarks: their accounting, and that a wrong result shows."""

from __future__ import annotations

import itertools

import pytest
import torch
from fusedattn.benchmarks import accuracy, rowwise_cases, rowwise_peers
from fusedattn.benchmarks.rowwise_cases import Case, make_problem
from fusedattn.benchmarks.rowwise_peers import OPS
from fusedattn.benchmarks.run import ROWWISE, copy_of, run_case
from fusedattn.benchmarks.versions import DTYPES, OURS, Version

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPES = {"rotary": (1, 2, 12, 8), "sinusoidal": (2, 12, 16)}
KINDS = [(op, False, False) for op in OPS]
KINDS += [(op, True, False) for op in OPS if op != "sinusoidal"]
KINDS += [(op, backward, True) for op in rowwise_cases.NORMS for backward in (False, True)]


def tiny(op, dtype="fp32", backward=False, residual=False):
    return Case(op, SHAPES.get(op, (24, 40)), dtype, backward, residual)


def named(kind):
    op, backward, residual = kind
    return f"{'add_' * residual}{op}-{'bwd' if backward else 'fwd'}"


# --- cases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "elements"),
    [
        (Case("layer_norm", (8, 32), "bf16"), 2 * 256 + 2 * 32),
        (Case("layer_norm", (8, 32), "bf16", True), 3 * 256 + 3 * 32),
        (Case("layer_norm", (8, 32), "bf16", False, True), 4 * 256 + 2 * 32),
        (Case("rms_norm", (8, 32), "bf16", True, True), 4 * 256 + 2 * 32),
        (Case("rms_norm", (8, 32), "bf16"), 2 * 256 + 32),
        (Case("softmax", (8, 32), "bf16"), 2 * 256),
        (Case("softmax", (8, 32), "bf16", True), 3 * 256),
        (Case("rotary", (1, 2, 8, 16), "bf16"), 4 * 256 + 2 * 8 * 8),
        (Case("rotary", (1, 2, 8, 16), "bf16", True), 4 * 256 + 2 * 8 * 8),
        (Case("sinusoidal", (1, 8, 32), "bf16"), 2 * 256),
        (Case("swiglu", (8, 32), "bf16"), 3 * 256),
        (Case("swiglu", (8, 32), "bf16", True), 5 * 256),
    ],
    ids=lambda x: x.label.replace(" ", "-") if isinstance(x, Case) else "",
)
def test_bytes_count_every_tensor_once(case, elements):
    assert case.bytes == 2 * elements


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("batch_norm", (4, 4), "fp32"), "op='batch_norm'"),
        (("softmax", (4, 4), "fp8"), "dtype='fp8'"),
        (("rotary", (4, 4), "fp32"), "expected 4 dimensions"),
        (("softmax", (4, 4), "fp32", False, True), "residual for softmax"),
        (("sinusoidal", (1, 4, 4), "fp32", True), "backward for sinusoidal"),
    ],
)
def test_a_case_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Case(*arguments)


def test_the_quick_grid_holds_the_shapes_of_every_target():
    cases = rowwise_cases.quick_grid(CPU)
    for shape, dtype, backward in itertools.product(
        ((2048, 1024), (4096, 4096), (1, 65536)), ("fp32", "bf16"), (False, True)
    ):
        assert {Case(op, shape, dtype, backward) for op in rowwise_cases.WIDE} <= set(cases)
    assert {Case(op, (2048, 1024), "bf16", False, True) for op in rowwise_cases.NORMS} <= set(cases)
    assert Case("rotary", (1, 16, 1024, 64), "fp32", True) in cases
    assert any(case.op == "sinusoidal" for case in cases)
    assert len({case.label for case in cases}) == len(cases) == len(set(cases))
    assert [op for op, _ in itertools.groupby(case.op for case in cases)] == list(OPS)


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_the_full_grid_goes_over_widths_at_a_constant_number_of_bytes(device):
    cases = rowwise_cases.full_grid(device)
    assert len({case.label for case in cases}) == len(cases) == len(set(cases))
    for op, dtype, backward in itertools.product(
        rowwise_cases.WIDE, ("fp32", "bf16"), (False, True)
    ):
        sizes = {
            case.shape[1]: case.shape[0] * case.shape[1]
            for case in cases
            if (case.op, case.dtype, case.backward) == (op, dtype, backward)
            and not case.residual
            and case.shape[1] in [1024 * 2**n for n in range(7)]
            and (device is GPU or case.shape not in ((2048, 1024), (4096, 4096), (1, 65536)))
        }
        assert len(sizes) == 7
        assert len(set(sizes.values())) == 1
    assert Case("layer_norm", (1024, 12288), "bf16", True) in cases
    if device is CPU:
        assert set(rowwise_cases.quick_grid(CPU)) <= set(cases)


def test_inputs_are_random_and_follow_the_seed():
    case = tiny("rotary", backward=True)
    (first, grads), (second, _) = make_problem(case, CPU, seed=1).sets
    (again, _), _ = make_problem(case, CPU, seed=1).sets
    (other, _), _ = make_problem(case, CPU, seed=2).sets
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert len(grads) == 2
    for n in (0, 1):
        assert 0.7 < first[n].std() < 1.3
        assert not torch.equal(first[n], second[n])
        assert not torch.equal(first[n], other[n])
    assert torch.equal(first[2], second[2])
    assert torch.allclose(first[2] ** 2 + first[3] ** 2, torch.ones(12, 4))


def test_the_copy_moves_as_many_bytes_as_the_case():
    case = tiny("layer_norm", "bf16", backward=True)
    first, second = (copy_of(case, CPU).call(i)[0].clone() for i in (0, 1))
    assert 0 <= case.bytes - 2 * first.nbytes < 8
    assert not torch.equal(first, second)


# --- versions and their errors -------------------------------------------------------------------


def run(case, formula=None, version=None, budget=0.03):
    problem = make_problem(case, CPU, seed=3)
    if version is None:
        formula = formula or OPS[case.op].torch(problem.sets[0][0])
        version = rowwise_peers.version_of(formula, problem)
    versions = {OURS: version}
    row = run_case(ROWWISE, problem, budget=budget, seed=3, versions=versions)
    return row["versions"][OURS]


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_a_right_version_is_within_tolerance(kind, dtype):
    op, backward, residual = kind
    exact = {"rotary": OPS["rotary"].torch, "sinusoidal": OPS["sinusoidal"].torch}
    case = tiny(op, dtype, backward, residual)
    formula = None if op in exact else OPS[op].reference(torch.arange(24))
    figures = run(case, formula)
    assert figures["within_tolerance"], figures


class Stored:
    """Computes once and then hands back what it has."""

    def __init__(self, compute):
        self.compute, self.out = compute, None

    def __call__(self, *inputs):
        self.out = self.compute(*inputs) if self.out is None else self.out
        return self.out


def off_in_the_last_row(*outputs):
    wrong = tuple(x.clone() for x in outputs)
    wrong[0][..., -1, :] *= 1.01
    return wrong


WRONG = {
    "one percent off": lambda out: tuple(x * 1.01 for x in out),
    "the last row": lambda out: off_in_the_last_row(*out),
    "the second output": lambda out: (*out[:-1], out[-1] * 1.01),
    "nan": lambda out: tuple(x * float("nan") for x in out),
    "unwritten": lambda out: tuple(torch.zeros_like(x) for x in out),
}


@pytest.mark.parametrize("wrong", list(WRONG))
@pytest.mark.parametrize("kind", [k for k in KINDS if not k[1]], ids=named)
def test_a_wrong_output_is_caught(kind, wrong):
    op, _, residual = kind
    case = tiny(op, residual=residual)
    right = OPS[op].torch(make_problem(case, CPU, seed=3).sets[0][0])
    assert not run(case, lambda *inputs: WRONG[wrong](right(*inputs)))["within_tolerance"]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("op", [op for op in OPS if op != "sinusoidal"])
def test_a_stored_result_is_caught(op, backward):
    case = tiny(op, backward=backward)
    problem = make_problem(case, CPU, seed=3)
    right = rowwise_peers.plain(problem)
    version = Version(Stored(right.call), right.context)
    # Time enough for a second call, however slow the first was.
    assert not run(case, version=version, budget=0.3)["within_tolerance"]


@pytest.mark.parametrize("wrong", [0, 1, 2, 3], ids=["dx", "dweight", "dbias", "dresidual"])
def test_a_wrong_gradient_is_caught(wrong):
    case = tiny("layer_norm", backward=True, residual=True)

    def formula(*inputs):
        # The value is right, the gradient of one input is a percent too small.
        inputs = list(inputs)
        inputs[wrong] = inputs[wrong].detach() * 0.01 + inputs[wrong] * 0.99
        return OPS["layer_norm"].torch(())(*inputs)

    assert not run(case, formula)["within_tolerance"]


def test_sums_in_half_are_held_to_float32():
    rows, width = 4096, 8
    x = torch.randn(rows, width).bfloat16()
    exact, largest = x.double().sum(0), x.abs().max().item()
    good = x.float().sum(0).bfloat16()
    assert accuracy.error_of_sum(good, exact, rows, largest).within
    chained = torch.zeros(width, dtype=torch.bfloat16)
    for row in x:
        chained = chained + row
    assert not accuracy.error_of_sum(chained, exact, rows, largest).within
    assert not accuracy.error_of_sum(good * float("nan"), exact, rows, largest).within


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("op", rowwise_cases.NORMS)
def test_the_expected_gradients_of_weights_are_those_of_autograd(op, residual, monkeypatch):
    monkeypatch.setattr(accuracy, "CHUNK_ELEMENTS", 200)
    problem = make_problem(tiny(op, "fp32", True, residual), CPU, seed=5)
    inputs, douts = problem.sets[1]
    exact = [x.double().requires_grad_() for x in inputs]
    out = OPS[op].torch(())(*exact)
    weights = [x for x in exact if x.dim() == 1]
    grads = torch.autograd.grad(out[0], weights, douts[0].double())
    found = rowwise_peers.expected_of(problem, 1, seed=5)
    assert {0, 23} <= set(found.rows.tolist())
    for grad, (total, largest) in zip(grads, found.sums, strict=True):
        torch.testing.assert_close(total, grad, rtol=1e-5, atol=1e-5)
        assert largest > grad.abs().max() / 24
