"""The whole benchmark run on tiny sizes: its files, and the transformers trained side by side."""

from __future__ import annotations

import ast
import csv
import graphlib
import io
import json
import math

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from fusedattn.benchmarks import markdown, report, rowwise_cases, suite, transformer
from fusedattn.benchmarks.attention_cases import Case
from fusedattn.reference.transformer import BEGIN, END, MASK, PAD
from processes import ROOT
from rich.console import Console

CPU = torch.device("cpu")
TINY = transformer.Size(width=16, heads=2, layers=1, length=48, batch=2, steps=3, seconds=60.0)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The results, the folder and the printed text of one tiny run."""
    folder = tmp_path_factory.mktemp("bench") / "out"
    cases = [Case(1, 2, n, n, 16, True, "fp32") for n in (16, 32, 64)]
    cases += [Case(1, 2, 32, 32, 16, False, "bf16", True), Case(1, 2, 1, 64, 16, False, "fp32")]
    plan = suite.Plan(
        device=CPU,
        thorough=False,
        cases=cases,
        size=TINY,
        rowwise_cases=[
            rowwise_cases.Case("layer_norm", (8, 32), "fp32", residual=True),
            rowwise_cases.Case("layer_norm", (8, 32), "bf16", True),
            rowwise_cases.Case("softmax", (8, 32), "fp32"),
        ],
        seconds=0.5,
        rowwise_seconds=0.3,
        limit_seconds=0.1,
        limit_scale=0.01,
    )
    printed = io.StringIO()
    results = suite.run(plan, folder, Console(file=printed, width=200))
    return results, folder, printed.getvalue()


KEPT = [x for x in (ROOT / "benchmarks/results").glob("*.json") if x.stem != "machine-code"]


@pytest.mark.parametrize("path", sorted(KEPT), ids=lambda p: p.stem)
def test_tables_of_a_kept_run_say_what_its_json_says(path):
    page = path.with_suffix(".md").read_text()
    assert page == markdown.page(path.stem, json.loads(path.read_text()))
    assert f"({path.with_suffix('.md').name})" in (path.parent / "README.md").read_text()


@pytest.mark.slow
def test_tables_leave_out_a_peer_that_is_wrong(finished):
    _, folder, _ = finished
    stored = json.loads((folder / "results.json").read_text())
    page = markdown.page("results", stored)
    assert all(f"## {part}\n" in page for part in suite.PARTS[:2])
    assert "| encoder (BERT) | all fused |" in page
    row = stored["attention"][0]
    for wrong in (False, True):
        for name, figures in row["versions"].items():
            figures["within_tolerance"] = not (wrong and name.startswith("sdpa"))
        cells = markdown.attention([row]).splitlines()[-1].split(" | ")
        assert (cells[3] == "") == wrong


@pytest.mark.slow
def test_the_json_holds_every_figure(finished):
    results, folder, _ = finished
    stored = json.loads((folder / "results.json").read_text())
    assert stored["environment"]["versions"]["torch"] == torch.__version__
    assert stored["date"][:2] == "20"
    assert stored["seed"] == 0
    assert stored["threads"] == torch.get_num_threads()
    assert set(stored["limits"]["flops_per_second"]) == {"fp32", "bf16", "fp16"}
    assert len(stored["attention"]) == 5
    assert len(stored["rowwise"]) == 3
    assert len(stored["training"]) == len(transformer.MODELS)
    assert stored["attention"][0]["versions"].keys() == results["attention"][0]["versions"].keys()
    for row in stored["attention"]:
        assert row["versions"]["fusedattn"]["within_tolerance"]
        assert row["best_peer"] in row["versions"]
        assert row["unit"] == ("byte/s" if row["case"]["seq_q"] == 1 else "FLOP/s")
    for row in stored["rowwise"]:
        assert row["versions"]["fusedattn"]["within_tolerance"]
        assert row["copy"]["median_s"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("part", ["attention", "rowwise"])
def test_the_csv_has_a_line_per_case_and_version(finished, part):
    results, folder, _ = finished
    with (folder / f"{part}.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(row["versions"]) for row in results[part])
    assert float(lines[0]["median_s"]) > 0
    assert float(lines[0]["limit"]) > 0


@pytest.mark.slow
def test_the_plots_are_png_files(finished):
    _, folder, _ = finished
    assert {path.name for path in folder.glob("*.png")} == {
        "attention_d16_causal_forward.png",
        "attention_ratios.png",
        "rowwise_of_copy.png",
        "training_losses.png",
    }
    for path in folder.glob("*.png"):
        content = path.read_bytes()
        assert content.startswith(PNG)
        assert len(content) > 10_000


@pytest.mark.slow
def test_the_terminal_shows_cases_models_and_files(finished):
    results, _, text = finished
    for row in results["attention"] + results["rowwise"]:
        assert row["case"]["label"] in text
    for model in results["training"]:
        assert model["title"] in text
    assert "results.json" in text
    assert "not run: onnxruntime" in text


@pytest.mark.slow
def test_training_plain_and_fused_gives_the_same_losses(finished):
    results, _, _ = finished
    for model in results["training"]:
        runs = model["runs"]
        assert set(runs) == {"plain", "sdpa", "fused attention", "all fused"}
        assert len(runs["plain"]["losses"]) == model["steps"] == 3
        assert runs["all fused"]["max_loss_difference"] < 1e-4
        assert runs["plain"]["losses"][0] == pytest.approx(runs["all fused"]["losses"][0], abs=1e-5)
        assert runs["plain"]["losses"][0] != runs["plain"]["losses"][1]
        assert all(run["tokens_per_second"] > 0 for run in runs.values())
        assert model["sample"]["text"]


def test_the_loss_difference_shows_a_wrong_attention(monkeypatch):
    def flat(q, k, v, *, causal=False, kv_lengths=None):
        return v[:, :, :1].expand_as(q)

    wrong = {**transformer.VERSIONS, "all fused": lambda: transformer.Ops(attention=flat)}
    monkeypatch.setattr(transformer, "VERSIONS", wrong)
    result = transformer.train(transformer.MODELS["gpt"], TINY, CPU, seed=0)
    assert result["runs"]["all fused"]["max_loss_difference"] > 1e-3
    assert result["runs"]["sdpa"]["max_loss_difference"] < 1e-4


@pytest.mark.parametrize("draw", ["next_bytes", "masked_pairs", "hidden_vowels"])
def test_batches_follow_the_seed(draw):
    first, again, other = (getattr(transformer.Text(TINY, s), draw) for s in (1, 1, 2))
    batch, same, different = first(), again(), other()
    assert all(torch.equal(batch[name], same[name]) for name in batch)
    assert any(
        batch[n].shape != different[n].shape or not torch.equal(batch[n], different[n])
        for n in batch
    )
    following = first()
    name = next(iter(batch))
    assert batch[name].shape != following[name].shape or not torch.equal(
        batch[name], following[name]
    )


def test_masked_pairs_hide_a_seventh_of_the_bytes():
    size = transformer.Size(length=1024, batch=8)
    batch = transformer.Text(size, 0).masked_pairs()
    tokens, targets = batch["tokens"], batch["targets"]
    assert 0.12 < (targets != PAD).sum() / (tokens != PAD).sum() < 0.18
    assert 0.7 < (tokens[targets != PAD] == MASK).float().mean() < 0.9
    assert (targets[tokens == MASK] < 256).all()
    for row, segments, length in zip(tokens, batch["segments"], batch["lengths"], strict=True):
        assert (row[length:] == PAD).all()
        assert row[0] == BEGIN
        assert row[length - 1] == END
        assert (row == END).sum() == 2
        border = int((row == END).nonzero()[0])
        assert segments[: border + 1].sum() == 0
        assert segments[border + 1 : length].all()


def test_hidden_vowels_line_up_with_their_text():
    batch = transformer.Text(TINY, 0).hidden_vowels()
    rows = (batch[name] for name in ("source", "target", "lengths"))
    for source, target, length in zip(*rows, strict=True):
        assert target[0] == BEGIN
        assert target[length + 1] == END
        assert torch.equal(transformer.hide_vowels(target[1 : length + 1]), source[:length])
    assert transformer.readable(transformer.hide_vowels(torch.tensor(list(b"Aim up")))) == "__m _p"


def test_readable_shows_masks_and_drops_other_special_tokens():
    tokens = torch.tensor([BEGIN, *b"a", MASK, *"é".encode(), END, PAD])
    assert transformer.readable(tokens) == "a▒é"


def test_json_writes_what_json_has_no_number_for(tmp_path):
    path = report.write_json({"device": "cpu", "environment": {"gpu": {}}, "x": math.inf}, tmp_path)
    assert json.loads(path.read_text())["x"] == "inf"


# --- the modules ---------------------------------------------------------------------------------


def imported_by(path):
    """The modules beside it that one imports, anywhere in its source."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = {0: node.module, 1: f"fusedattn.benchmarks.{node.module or ''}"}[node.level]
            names = [package, *(f"{package.rstrip('.')}.{name.name}" for name in node.names)]
        else:
            continue
        for name in names:
            if name.startswith("fusedattn.benchmarks."):
                yield name.split(".")[2]


def test_no_module_imports_one_that_imports_it():
    """Not for types and not inside a function either."""
    paths = {path.stem: path for path in (ROOT / "benchmarks").glob("*.py")}
    graph = {name: paths.keys() & {*imported_by(path)} for name, path in paths.items()}
    assert {"versions", "harness"} <= graph["run"]
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle
