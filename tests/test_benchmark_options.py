"""The benchmark of attention's options: every version does the same, and what is wrong shows."""

from __future__ import annotations

import functools

import fusedattn
import pytest
import torch
import torch.nn.functional as F
from fusedattn.benchmarks import attention_peers, option_cases, option_peers
from fusedattn.benchmarks.harness import Limits
from fusedattn.benchmarks.option_cases import Case, make_problem
from fusedattn.benchmarks.option_rules import RULES, on_grid
from fusedattn.benchmarks.versions import DTYPES, Unavailable, build_versions

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LIMITS = Limits(dict.fromkeys(DTYPES, 1e11), 1e10)
SIZES = {"window": 9, "documents": 11, "prefix": 7, "dense-mask": 13}
WITHOUT_SDPA = ("softcap", "sinks")
WITHOUT_FLEX = ("sinks", "dropout")


def tiny(option, dtype="fp32", backward=False):
    # Statistics need many rows, of one batch entry.
    batch, length = (1, 256) if option == "dropout" else (3, 48)
    keys = 17 if option == "cross" else length
    size, kv_heads = SIZES.get(option, 0), 2 if option == "grouped" else 0
    return Case(option, batch, 4, length, keys, 16, dtype, backward, size, kv_heads)


def error_of(version, problem):
    with version.context():
        return option_peers.expected_of(problem, 1, seed=5).error(version.call(1))


def errors_of(problem, names):
    """The error of ours and of the named peers, and why some did not run."""
    skipped = {}
    versions, _ = build_versions(problem, option_peers.builders(CPU, names), skipped)
    return {name: error_of(version, problem) for name, version in versions.items()}, skipped


# --- cases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tilt", 1, 1, 4, 4, 8, "fp32"), "option='tilt'"),
        (("alibi", 1, 1, 4, 4, 8, "fp8"), "dtype='fp8'"),
        (("window", 1, 1, 4, 4, 8, "fp32"), "size=0 for window, expected at least 1"),
        (("alibi", 1, 1, 4, 4, 8, "fp32", False, 3), "size=3 for alibi, expected 0"),
        (("alibi", 1, 1, 4, 8, 8, "fp32"), "seq_q=4 and seq_k=8 for alibi"),
        (("grouped", 1, 4, 4, 4, 8, "fp32", False, 0, 3), "kv_heads=3, expected a divisor"),
    ],
)
def test_a_case_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Case(*arguments)


def test_the_grids_hold_every_option():
    full, quick = option_cases.full_grid(CPU), option_cases.quick_grid(CPU)
    assert len({case.label for case in full}) == len(full) == len(set(full))
    assert set(quick) < set(full)
    assert list(dict.fromkeys(case.option for case in quick)) == list(RULES)
    assert {case.dtype for case in quick} == {"fp32", "bf16"}
    assert {case.seq_q for case in full if case.option == "t5"} == {1024, 4096}
    on_gpu = option_cases.quick_grid(GPU)
    assert {case.option for case in on_gpu} == set(RULES)
    assert {case.dtype for case in on_gpu} == {"bf16"}


@pytest.mark.parametrize("option", list(RULES))
def test_flops_count_the_pairs_that_are_seen(option):
    case, problem = tiny(option), make_problem(tiny(option), CPU, seed=0)
    seen = torch.ones((), dtype=torch.bool) if problem.mask is None else problem.mask
    seen = seen.expand(case.batch, case.heads, case.seq_q, case.seq_k)
    if option == "packed":
        seen = seen & (torch.arange(48) < problem.fixed["lengths"][:, None])[:, None, :, None]
    assert case.flops == 4 * seen.sum().item() * case.head_dim
    assert tiny(option, backward=True).flops == 3.5 * case.flops
    assert case.limit(LIMITS) == LIMITS.flops_per_second["fp32"]


def test_a_window_and_documents_are_counted_in_parts(monkeypatch):
    from fusedattn.benchmarks import option_rules

    monkeypatch.setattr(option_rules, "ROWS", 7)
    assert tiny("window").rule.pairs() == 12 * (48 * 9 - 9 * 8 // 2)
    assert tiny("documents").rule.pairs() == 12 * (4 * 11**2 + 4**2)


@pytest.mark.parametrize("option", ["alibi", "bias", "t5"])
def test_a_bias_written_out_is_its_rule_at_every_pair(option):
    problem = make_problem(tiny(option), CPU, seed=0)
    rule, given = problem.rule, problem.given(problem.sets[0][3:-1])
    at_pairs = on_grid(rule.bias, given, *rule.places())
    assert torch.equal(rule.written_out(given), at_pairs)
    assert at_pairs.shape == (1, 4, 48, 48)


def test_inputs_are_random_and_follow_the_seed():
    case = tiny("t5", backward=True)
    first, again, other = (make_problem(case, CPU, seed=seed).sets for seed in (1, 1, 2))
    assert len(first[0]) == 5
    for n, x in enumerate(first[0]):
        assert torch.equal(x, again[0][n])
        assert not torch.equal(x, first[1][n])
        assert not torch.equal(x, other[0][n])


def test_packed_sequences_come_back_from_the_padding():
    problem = make_problem(tiny("packed", backward=True), CPU, seed=0)
    q, dout = problem.sets[0][0], problem.sets[0][-1]
    assert problem.packed(q).shape == (int(problem.fixed["lengths"].sum()), 4, 16)
    assert torch.equal(problem.padded(problem.packed(dout)), dout)
    assert torch.equal(problem.padded(q), problem.padded(problem.packed(q)))
    with pytest.raises(TypeError, match="expected packed"):
        make_problem(tiny("alibi"), CPU, seed=0).packed(q)


# --- versions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "backward"), [("fp32", False), ("fp32", True), ("bf16", True)])
@pytest.mark.parametrize("option", list(RULES))
def test_every_version_agrees_with_the_reference(option, dtype, backward):
    problem = make_problem(tiny(option, dtype, backward), CPU, seed=1)
    errors, skipped = errors_of(problem, ["eager", "sdpa"])
    wanted = {"fusedattn", "eager", *(() if option in WITHOUT_SDPA else ("sdpa",))}
    assert errors.keys() == wanted
    for name, error in errors.items():
        assert error.within, name
        assert error.max_abs > 0, name
    if option in WITHOUT_SDPA:
        assert skipped["sdpa"] == f"scaled_dot_product_attention has no {option}"


@pytest.fixture(autouse=True)
def traced_alone(monkeypatch):
    """What is compiled is traced, and not made into machine code, which takes long."""
    traced = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend="eager")
    monkeypatch.setattr(option_peers, "_compile", traced)


# Tracing takes a second each.
FLEX = [
    pytest.param(option, marks=() if option in ("packed", "alibi") else pytest.mark.slow)
    for option in RULES
    if option not in WITHOUT_FLEX
]


@pytest.mark.parametrize("option", FLEX)
def test_flex_attention_agrees_with_the_reference(option):
    problem = make_problem(tiny(option), CPU, seed=1)
    assert error_of(option_peers.flex(problem), problem).within


@pytest.mark.parametrize("option", WITHOUT_FLEX)
def test_flex_attention_says_what_it_has_not(option):
    with pytest.raises(Unavailable, match=f"FlexAttention has no {option}"):
        option_peers.flex(make_problem(tiny(option), CPU, seed=1))
    with pytest.raises(Unavailable, match="no backward on a CPU"):
        option_peers.flex(make_problem(tiny("window", backward=True), CPU, seed=1))


@pytest.mark.parametrize("option", ["packed", "sinks", "t5"])
def test_eager_compiles_without_a_break(option):
    problem = make_problem(tiny(option, backward=True), CPU, seed=1)
    assert error_of(option_peers.compiled(problem), problem).within


def test_versions_that_store_all_scores_stop_at_a_limit():
    problem = make_problem(tiny("t5"), CPU, seed=0, score_bytes=1000)
    for build in (option_peers.eager, option_peers.compiled, option_peers.sdpa):
        with pytest.raises(Unavailable, match="matrix of scores"):
            build(problem)
    assert error_of(option_peers.ours("cpu")(problem), problem).within
    option_peers.sdpa(make_problem(tiny("window"), CPU, seed=0, score_bytes=1000))


def test_a_backend_that_refuses_says_why():
    problem = make_problem(tiny("alibi"), CPU, seed=0)
    with pytest.raises(Unavailable, match=r"^cuda: .*on cpu"):
        option_peers.ours("cuda")(problem)


def test_the_interpreter_is_never_timed(monkeypatch):
    monkeypatch.setattr(option_peers.fusedattn, "explain", lambda *a, **k: "attention: triton\n")
    with pytest.raises(Unavailable, match="interpreter"):
        option_peers.ours("cpu")(make_problem(tiny("window"), CPU, seed=0))


def test_compiled_versions_stand_beside_a_few_cases():
    grid = option_cases.quick_grid(CPU)
    chosen = [
        (name, case.label)
        for case in grid
        for name in option_peers.COMPILED
        if option_peers.worth_compiling(name, case, CPU)
    ]
    assert 2 <= len(chosen) <= 4
    assert {name for name, _ in chosen} == set(option_peers.COMPILED)
    case = option_cases.quick_grid(GPU)[0]
    assert option_peers.worth_compiling("flex", case, GPU)
    assert not option_peers.worth_compiling("torch.compile", case, GPU)


# --- what is wrong shows -------------------------------------------------------------------------


def halfway(x):
    """The same value, with half of the gradient."""
    return x * 0.5 + x.detach() * 0.5


def changed(**changes):
    """Ours with other inputs: name → what is made of it."""
    return lambda ours, x: ours(
        {**x, **{name: change(x[name]) for name, change in changes.items()}}
    )


def decoder(ours, x):
    return {"bias": fusedattn.biases.t5(x["table"], bidirectional=False)}


WRONG = [
    ("a key too many", "window", False, lambda ours, x: {"causal": True, "window": (9, 0)}),
    ("border off by one", "documents", False, changed(ids=lambda x: x.roll(1))),
    ("a key too many", "prefix", False, changed(lengths=lambda x: x + 1)),
    ("no padding", "dense-mask", False, lambda ours, x: {"causal": True}),
    ("a key too few", "padding", False, changed(lengths=lambda x: x - 1)),
    ("border off by one", "packed", False, changed(offsets=lambda x: (x - 1).clamp(min=0))),
    ("too high", "softcap", False, lambda ours, x: {"causal": True, "softcap": 5.1}),
    ("a percent off", "alibi", False, changed(slopes=lambda x: 1.01 * x)),
    ("left out", "sinks", False, lambda ours, x: {"causal": True}),
    ("of a decoder", "t5", False, decoder),
    ("transposed", "bias", False, changed(bias=lambda x: x.mT)),
    ("half a gradient", "alibi", True, changed(slopes=halfway)),
    ("half a gradient", "sinks", True, changed(sinks=halfway)),
    ("half a gradient", "t5", True, changed(table=halfway)),
    ("half a gradient", "bias", True, changed(bias=halfway)),
    ("none", "dropout", False, lambda ours, x: {}),
    ("too much", "dropout", False, lambda ours, x: {"dropout_p": 0.2}),
]


@pytest.mark.parametrize(
    ("option", "backward", "wrong"),
    [pytest.param(*rest, id=f"{rest[0]}-{what}".replace(" ", "_")) for what, *rest in WRONG],
)
def test_a_wrong_version_is_flagged(monkeypatch, option, backward, wrong):
    right = RULES[option].ours
    monkeypatch.setattr(
        RULES[option], "ours", lambda self, x: wrong(functools.partial(right, self), x)
    )
    problem = make_problem(tiny(option, backward=backward), CPU, seed=1)
    errors, _ = errors_of(problem, ["eager"])
    assert errors["eager"].within
    assert not errors["fusedattn"].within


def dropped(q, k, v, scaled=True, part=lambda x: x):
    weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
    weights = F.dropout(weights, 0.1) * (1.0 if scaled else 0.9)
    return weights @ part(v)


@pytest.mark.parametrize(
    ("options", "right"),
    [({}, True), ({"scaled": False}, False), ({"part": halfway}, False)],
    ids=["right", "not scaled", "wrong gradient"],
)
def test_dropout_is_held_to_the_result_without(options, right):
    problem = make_problem(tiny("dropout", backward=True), CPU, seed=1)
    version = attention_peers.version_of(functools.partial(dropped, **options), problem)
    expected = option_peers.expected_of(problem, 1, seed=5)
    assert [expected.error(version.call(1)).within for _ in range(8)] == [right] * 8


def test_a_result_that_is_not_finite_is_flagged():
    for option in ("dropout", "window"):
        problem = make_problem(tiny(option), CPU, seed=1)
        version = attention_peers.version_of(lambda q, k, v: q * float("nan"), problem)
        assert not error_of(version, problem).within
