"""`fusedattn bench` as a user steers it: own cases, peers, saved runs, terminals and logs."""

from __future__ import annotations

import copy
import io
import json
import re

import pytest
import torch
from fusedattn import cli

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from fusedattn.benchmarks import choice, plots, report, rowwise_cases, suite, summary
from fusedattn.benchmarks.versions import DTYPES
from processes import ROOT
from rich.console import Console
from rich.text import Text

KEPT = sorted(
    x for x in (ROOT / "benchmarks/results").glob("*.json") if x.stem != "machine-code"
)  # fmt: skip
RUN = ROOT / "benchmarks/results/zen5-2-threads.json"


def plan(*arguments):
    """The plan of a command line."""
    given = cli._parser().parse_args(["bench", "--device", "cpu", *arguments])
    made = suite.make_plan("cpu", only=given.only)
    return choice.narrowed(
        made, only=given.only, shapes=given.shape, dtypes=given.dtype, peers=given.peers
    )


def labels(cases):
    return [case.label for case in cases]


# --- what is run ---------------------------------------------------------------------------------


def test_the_command_knows_the_ops_and_dtypes_of_the_benchmarks():
    assert set(cli.OPS) == set(rowwise_cases.DIMENSIONS)
    assert tuple(DTYPES) == cli.DTYPES


def test_a_shape_of_ones_own():
    made = plan("--only", "softmax", "--shape", "4096x32000", "--dtype", "bf16", "--peers", "torch")
    assert made.parts == ("rowwise",)
    assert made.peers == ("torch",)
    assert labels(made.rowwise_cases) == [
        "softmax bf16 4096x32000 fwd", "softmax bf16 4096x32000 bwd"
    ]  # fmt: skip
    made = plan("--only", "attention", "--shape", "2x12x1024x64", "1x8x1v4096x128")
    assert made.parts == ("attention",)
    assert labels(made.cases)[:4] == [
        f"fp32 2x12x1024x64 {kind}" for kind in ("full fwd", "full fwd+bwd", "causal fwd",
                                                 "causal fwd+bwd")
    ]  # fmt: skip
    assert labels(made.cases)[-2:] == [f"bf16 1x8x1v4096x128 full {x}" for x in ("fwd", "fwd+bwd")]
    assert labels(plan("--only", "sinusoidal", "--shape", "2x8x16").rowwise_cases) == [
        f"sinusoidal {dtype} 2x8x16 fwd" for dtype in ("fp32", "bf16")
    ]


def test_a_part_of_the_grid():
    made = plan("--dtype", "bf16")
    assert made.parts == ("attention", "rowwise", "options")
    every = (*made.cases, *made.rowwise_cases, *made.option_cases)
    assert {case.dtype for case in every} == {"bf16"}
    made = plan("--only", "rms_norm")
    assert made.parts == ("rowwise",)
    assert {case.op for case in made.rowwise_cases} == {"rms_norm"}
    assert plan("--only", "attention", "--peers", "sdpa").peers == ("sdpa-flash", "sdpa-math")
    assert plan("--only", "transformer").parts == ("transformer",)


BAD = {
    "no number": (["--shape", "4x-2"], "argument --shape: got '4x-2', expected whole numbers"),
    "zero": (["--shape", "4x0"], "argument --shape: got '4x0', expected sizes of at least 1"),
    "no op": (["--shape", "4x4"], "--shape: got 4x4 with no --only, expected --only with one of"),
    "a part": (["--only", "options", "--shape", "4x4"], "--shape: got 4x4 with --only options"),
    "three": (["--only", "softmax", "--shape", "4x4x4"], "4x4x4 for softmax, expected ROWSxWIDTH"),
    "two": (["--only", "attention", "--shape", "4x4"], "4x4 for attention, expected BATCHxHEADS"),
    "v": (["--only", "softmax", "--shape", "4v4x4"], "--shape: got 4v4x4 for softmax, expected"),
    "odd": (["--only", "rotary", "--shape", "1x1x4x3"], "for rotary, expected an even head dim"),
    "huge": (["--only", "softmax", "--shape", "9999999x9999999"], "GiB, expected what fits into"),
    "dtype": (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
    "no case": (["--only", "softmax", "--dtype", "fp16"], "--dtype: got fp16, of which the grid"),
    "no cases": (["--only", "transformer", "--dtype", "fp32"], "--dtype: got it with --only tra"),
    "peer": (["--only", "softmax", "--peers", "numpy"], "--peers: got 'numpy', expected some of"),
    "op": (["--only", "sofmax"], "argument --only: invalid choice: 'sofmax'"),
    "seed": (["--seed", "-1"], "argument --seed: got '-1', expected a whole number"),
    "no file": (["--show", "nowhere.json"], "--show: got nowhere.json, expected results of a run"),
    "no JSON": (["--show", str(ROOT / "README.md")], "expected results of a run: not JSON"),
    "other JSON": (
        ["--compare", str(ROOT / "benchmarks/results/machine-code.json")],
        "--compare: got ", "machine-code.json, expected results of a run, the JSON that it writes",
    ),
    "shown and run": (["--show", str(RUN), "--only", "host"], "--show: got it with --only"),
    "compared and run": (["--compare", str(RUN), str(RUN), "--full"], "--compare: got two files"),
    "three files": (["--compare", "a", "b", "c"], "--compare: got 3 files, expected one, or an"),
    "shown, two": (["--show", str(RUN), "--compare", "a", "b"], "got 2 files, expected one beside"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), [(x[0], x[1:]) for x in BAD.values()], ids=BAD)
def test_bad_options_are_answered(arguments, said, capsys, tmp_path):
    """Before anything is run, with exit status 2."""
    try:
        status = cli.main(["bench", "--output", str(tmp_path / "out"), *arguments])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    error = " ".join(capsys.readouterr().err.split())
    assert all(part in error for part in said)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of one op and the text of its log, compared with itself as it began."""
    folder = tmp_path_factory.mktemp("own")
    arguments = ["--only", "softmax", "--shape", "8x32", "--dtype", "bf16", "--peers", "torch"]
    log = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "SECONDS", 0.2)
        patch.setattr(suite, "MINUTE", 0.05)
        patch.setattr(suite, "new_console", lambda: Console(file=log, width=80))
        assert cli.main(["bench", *arguments, "--output", str(folder)]) == 0
    return folder, log.getvalue()


def test_a_run_of_ones_own_shape(finished):
    folder, text = finished
    rows = report.read_json(folder)["rowwise"]
    assert [row["case"]["label"] for row in rows] == [
        "softmax bf16 8x32 fwd",
        "softmax bf16 8x32 bwd",
    ]
    assert {*rows[0]["versions"], *rows[1]["versions"]} == {"fusedattn", "torch"}
    assert rows[0]["skipped"] == {}
    assert "softmax: " in text
    assert "(geometric mean of 2), at worst" in text


def test_a_log_shows_progress(finished):
    lines = [line for line in finished[1].splitlines() if re.match(r"\d+ s: softmax bf16", line)]
    assert lines
    assert re.fullmatch(r"\d+ s: softmax bf16 8x32 (fwd|bwd), [01] of 2 done", lines[0])


def test_plots_say_where_they_are_from(finished):
    folder, _ = finished
    results = report.read_json(folder)
    where = report.origin(results)
    assert where.startswith(results["date"][:10])
    assert f"{torch.get_num_threads()} threads" in where
    assert f"torch {torch.__version__}" in where
    image = plots.plt.imread  # what is drawn is in the picture's text too
    assert image(folder / "rowwise_of_copy.png").shape[0] > 100
    assert where.encode("latin-1") in (folder / "rowwise_of_copy.png").read_bytes()


# --- saved runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 144])
@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_runs_are_shown_whole(path, width):
    """No table is wider than the terminal, and nothing in it is cut short."""
    results = report.read_json(path)
    console = Console(file=io.StringIO(), width=width)
    suite.show(results, console)
    text = console.file.getvalue()
    assert "…" not in text
    assert max(Text(line).cell_len for line in text.splitlines()) <= width
    words = set(text.split())
    for row in (row for part in report.ROWS for row in results[part]):
        assert set(row["case"]["label"].split()) <= words
        assert f"{row['versions'][row['ours']]['max_error']:.1e}" in text


def test_wide_figures_fit_into_80_columns():
    """The longest that there are, of any part, and reasons why nothing ran."""
    found = report.read_json(RUN)
    row = copy.deepcopy(found["attention"][0])
    ours = row["versions"]["fusedattn"]
    row["case"] |= {"label": "dense-mask 300 bf16 64x32/16x16384v16384x128 fwd+bwd", "option": "x"}
    ours |= {"rate": 1234567e9, "rate_p20": 1234567e9, "rate_p80": 1234567e9, "of_limit": 22.0,
             "peak_bytes": 123456 * 2**20, "max_error": float("inf"), "detail": "reference",
             "error_of_allowed": 123.0, "within_tolerance": False}  # fmt: skip
    row["speedup"] = dict.fromkeys(row["speedup"], 1234.5)
    row |= {"speedup_over_best": 1234.5, "best_peer": "sdpa-flash"}
    nothing = {**row, "ours": None, "skipped": {"fusedattn-cuda": "built for another GPU " * 8}}
    gpu = {**row, "times_flash": dict.fromkeys(report.GPU_COLUMNS[:2], 12.34)}
    gpu["versions"] = {**row["versions"], **dict.fromkeys(report.GPU_COLUMNS, ours)}
    models = copy.deepcopy(found["training"])
    models[0]["runs"]["all fused"] |= {"tokens_per_second": 1e7, "peak_bytes": 1e12}
    for table in (
        report.attention_table([row, nothing], False), report.option_table([row, nothing], False),
        report.flash_table([gpu], False), report.training_table(models, False),
        summary.comparison_table({**found, "attention": [row]}, {**found, "attention": [row]}),
    ):  # fmt: skip
        console = Console(file=io.StringIO(), width=80)
        console.print(table)
        text = console.file.getvalue()
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= 80


def test_host_times_fit_into_80_columns():
    console = Console(file=io.StringIO(), width=80)
    rows = [{"name": "attention backward", "planned": 12.3, "unplanned": 1234.5}]
    report.print_host({"triton": "3.9.0", "rows": rows}, console)
    text = console.file.getvalue()
    assert re.search(r"attention backward +12.3 +1234.5", text)
    assert max(map(len, text.splitlines())) <= 80


def test_infinity_is_read_again(tmp_path):
    results = report.read_json(RUN)
    results["attention"][0]["versions"]["fusedattn"]["max_error"] = float("inf")
    results["training"][0]["sample"]["text"] = "nan"
    read = report.read_json(report.write_json(results, tmp_path))
    assert read["attention"][0]["versions"]["fusedattn"]["max_error"] == float("inf")
    assert read["training"][0]["sample"]["text"] == "nan"


def test_words_name_what_was_slower():
    results = {**report.read_json(RUN), "rowwise": [], "options": [], "training": []}
    rows = results["attention"][:3]
    ratios = (2.0, 0.5, 0.996)
    rows = [{**row, "speedup_over_best": x} for row, x in zip(rows, ratios, strict=True)]
    label, peer = rows[1]["case"]["label"], rows[1]["best_peer"]
    assert summary.in_words({**results, "attention": rows}) == [
        "attention: 1.00 times as fast as the best peer (geometric mean of 3), at worst 0.50. "
        f"Slower than a peer in 1: {label} (0.50, {peer})."
    ]
    worst = rows[2]["case"]["label"]
    assert summary.in_words({**results, "attention": rows[::2]})[0].endswith(
        f"at worst in {worst} (1.00, {rows[2]['best_peer']}). Slower than a peer in none."
    )
    slow = [{**row, "speedup_over_best": 0.5} for row in results["attention"][:6]]
    assert summary.in_words({**results, "attention": slow})[0].endswith("; and 2 more.")
    alone = [{**rows[0], "speedup_over_best": None}]
    alone[0]["versions"] = copy.deepcopy(alone[0]["versions"])
    alone[0]["versions"]["fusedattn"]["within_tolerance"] = False
    (told,) = summary.in_words({**results, "attention": alone})
    assert "no peer ran" in told
    assert f"Outside the tolerance rule: {alone[0]['case']['label']}." in told


def test_two_runs_are_compared(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    results = json.loads(RUN.read_text())
    first = results["attention"][0]
    for figures in first["versions"].values():
        for name in ("median_s", "p20_s", "p80_s"):
            figures[name] /= 4
    del results["attention"][1]
    report.write_json(results, tmp_path)
    assert cli.main(["bench", "--compare", str(RUN), str(tmp_path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(re.escape(first["case"]["label"]) + r" \S+ \S+ 4.00x faster", text)
    assert "; 1 faster and 0 slower than their spread." in text
    assert "In one alone, or not run: 1 of the older, 0 of this." in text
    assert "encoder (BERT) 1.00" in text
    assert "differ: ratios" not in text
    assert cli.main(["bench", "--show", str(RUN), "--compare", str(KEPT[1])]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Machine, threads or versions differ" in text
    assert "attention, batch x heads x length x head dim" in text
