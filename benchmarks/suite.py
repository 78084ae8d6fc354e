"""The whole run: environment, each part's measurements; then tables, files and plots."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from fusedattn import environment
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from . import (
    attention_cases,
    host,
    model_cases,
    model_report,
    model_run,
    option_cases,
    plots,
    report,
    rowwise_cases,
    summary,
    transformer,
)
from .harness import Limits, measure_limits
from .report import Row
from .run import ATTENTION, OPTIONS, ROWWISE, run_cases

PARTS = ("attention", "rowwise", "options", "transformer", "models", "host")
ON_A_CPU = PARTS[:5]  # launches of Triton are not on a CPU user's way
# Triton tunes a kernel of each option when it is first called, for which there is no time; nor is
# there any for models whose layers are as large as on a CPU.
ON_A_GPU = tuple(part for part in PARTS if part not in ("options", "models"))
# On a GPU: so much that all of it, with four models, fits into four minutes.
MINUTE = 60.0  # between lines of a log
GPU_SECONDS, GPU_ROWWISE_SECONDS, GPU_MODEL_SECONDS = 130.0, 35.0, 6.0


@dataclass(frozen=True)
class Plan:
    """What to run, where and for how long, beside which peers (None: all of them).

    `limit_scale` shrinks the limits' matmul and copy.
    """

    device: torch.device
    thorough: bool
    cases: Sequence[attention_cases.Case]
    size: transformer.Size
    rowwise_cases: Sequence[rowwise_cases.Case] = ()
    option_cases: Sequence[option_cases.Case] = ()
    model_cases: Sequence[model_cases.Case] = ()
    parts: tuple[str, ...] = ON_A_CPU
    peers: tuple[str, ...] | None = None
    seed: int = 0
    seconds: float = 100.0
    rowwise_seconds: float = 40.0
    option_seconds: float = 40.0
    model_seconds: float = 40.0
    compile_seconds: float = 0.0  # for all models that are compiled
    limit_seconds: float = 4.0
    limit_scale: float = 1.0


def make_plan(
    device: str = "auto",
    *,
    quick: bool = False,
    full: bool = False,
    seed: int = 0,
    only: str | None = None,
) -> Plan:
    """On a CPU the quick grid, on a GPU its own; `full` is every case, compiled for every shape.

    Raises:
        ValueError: `device` is "cuda" where torch finds no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ValueError("--device: got 'cuda', but torch finds no GPU here (see `fusedattn env`)")
    where = torch.device("cuda" if has_gpu and device != "cpu" else "cpu")
    on_gpu = where.type == "cuda"
    own = on_gpu and not quick
    grid = attention_cases.gpu_grid if own and not full else attention_cases.quick_grid
    rows = rowwise_cases.full_grid if full or own else rowwise_cases.quick_grid
    options = option_cases.full_grid if full else option_cases.quick_grid
    size = transformer.GPU if on_gpu else transformer.FULL if full else transformer.QUICK
    return Plan(
        device=where,
        thorough=full,
        cases=(attention_cases.full_grid if full else grid)(where),
        rowwise_cases=rows(where),
        option_cases=options(where),
        model_cases=_models(full),
        size=size if full or not on_gpu else replace(size, seconds=GPU_MODEL_SECONDS),
        parts=(only,) if only else PARTS if full else ON_A_GPU if on_gpu else ON_A_CPU,
        seed=seed,
        seconds=3600.0 if full else GPU_SECONDS if on_gpu else 100.0,
        rowwise_seconds=1200.0 if full else GPU_ROWWISE_SECONDS if on_gpu else 40.0,
        option_seconds=1200.0 if full else 40.0,
        model_seconds=1200.0 if full else 40.0,
        compile_seconds=900.0 if full else 0.0,
    )


def _models(full: bool) -> list[model_cases.Case]:
    if full:
        return model_cases.grid(model_cases.FULL, generation=("fp32", "bf16"))
    return model_cases.grid(model_cases.QUICK)


def run(plan: Plan, folder: Path, console: Console | None = None) -> dict[str, Any]:
    """Run the plan and write the JSON, a CSV of each kind of case and the plots into `folder`.

    Returns what the JSON holds: results.json, or <name of the GPU>.json. It is written after every
    case; a run that is interrupted, or that an error ends, still shows and plots what it has.
    """
    console = console or new_console()
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    found = environment.collect()
    console.print(environment.as_text(found), highlight=False, markup=False, soft_wrap=True)
    results: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "full": plan.thorough,
        "seed": plan.seed,
        "device": plan.device.type,
        "threads": torch.get_num_threads(),
        "cudnn": torch.backends.cudnn.version() if plan.device.type == "cuda" else None,
        "environment": found,
        "limits": None,
        "attention": [],
        "rowwise": [],
        "options": [],
        "training": [],
        "models": [],
        "models_left_out": {},
        "host": None,
    }
    try:
        with _progress(console) as progress:
            for part in plan.parts:
                _MEASURE[part](plan, results, folder, progress)
    finally:
        results["seconds"] = time.perf_counter() - start
        show(results, console)
        _write(results, folder, console)
    return results


def new_console() -> Console:
    """Where nobody says how wide the terminal is (a pipe, a log), the tables get enough."""
    known = sys.stdout.isatty() or os.environ.get("COLUMNS")
    return Console(width=None if known else 144)


def _write(results: dict[str, Any], folder: Path, console: Console) -> None:
    files = [report.write_json(results, folder)]
    for name in ("attention", "rowwise", "options", "models"):
        if results[name]:
            files.append(report.write_csv(results[name], folder, name))
    files += plots.plot_all(results, folder)
    console.print(f"\n{results['seconds']:.0f} s; written:")
    for path in files:
        console.print(f"  {path}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        # A thread that redraws would take a core from what is being timed.
        auto_refresh=False,
    )
    over = threading.Event()
    teller = threading.Thread(target=_tell, args=(progress, over), daemon=True)
    with progress:
        if not console.is_terminal:
            teller.start()
        try:
            yield progress
        finally:
            over.set()
            if teller.is_alive():
                teller.join()


def _tell(progress: Progress, over: threading.Event) -> None:
    """In a log, where no bar moves: a line a minute, which disturbs nothing that is timed."""
    start = time.perf_counter()
    while not over.wait(MINUTE):
        if running := [task for task in progress.tasks if not task.finished]:
            task = running[-1]
            progress.console.print(
                f"{time.perf_counter() - start:.0f} s: {task.description}, "
                f"{task.completed:.0f} of {task.total:.0f} done",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip


def _measure_attention(
    plan: Plan, results: dict[str, Any], folder: Path, progress: Progress
) -> None:
    bar = progress.add_task("the machine's limits", total=len(plan.cases))
    progress.refresh()
    limits = _limits(plan, results)

    def update(done: int, label: str) -> None:
        progress.update(bar, completed=done, description=f"attention {label}", refresh=True)

    rows = run_cases(
        ATTENTION,
        plan.cases,
        plan.device,
        limits=limits,
        seconds=plan.seconds,
        seed=plan.seed,
        thorough=plan.thorough,
        peers=plan.peers,
        progress=update,
    )
    _keep(rows, "attention", results, folder)


def _measure_rowwise(plan: Plan, results: dict[str, Any], folder: Path, progress: Progress) -> None:
    bar = progress.add_task("norms, softmax, positions, SwiGLU", total=len(plan.rowwise_cases))

    def update(done: int, label: str) -> None:
        progress.update(bar, completed=done, description=label, refresh=True)

    rows = run_cases(
        ROWWISE,
        plan.rowwise_cases,
        plan.device,
        seconds=plan.rowwise_seconds,
        seed=plan.seed,
        thorough=plan.thorough,
        peers=plan.peers,
        progress=update,
    )
    _keep(rows, "rowwise", results, folder)


def _measure_options(plan: Plan, results: dict[str, Any], folder: Path, progress: Progress) -> None:
    bar = progress.add_task("attention's options", total=len(plan.option_cases))
    progress.refresh()
    limits = _limits(plan, results)

    def update(done: int, label: str) -> None:
        progress.update(bar, completed=done, description=label, refresh=True)

    rows = run_cases(
        OPTIONS,
        plan.option_cases,
        plan.device,
        limits=limits,
        seconds=plan.option_seconds,
        seed=plan.seed,
        thorough=plan.thorough,
        peers=plan.peers,
        progress=update,
    )
    _keep(rows, "options", results, folder)


def _limits(plan: Plan, results: dict[str, Any]) -> Limits:
    """What the machine reaches: measured once in a run."""
    if results["limits"] is None:
        limits = measure_limits(plan.device, plan.limit_seconds, plan.limit_scale)
        results["limits"] = asdict(limits)
    return Limits(**results["limits"])


def _keep(rows: Iterable[Row], part: str, results: dict[str, Any], folder: Path) -> None:
    for row in rows:
        results[part].append(row)
        report.write_json(results, folder)


def _train(plan: Plan, results: dict[str, Any], folder: Path, progress: Progress) -> None:
    for model in transformer.MODELS.values():
        bar = progress.add_task(model.title, total=plan.size.steps)

        def update(done: int, label: str, bar: Any = bar) -> None:
            progress.update(bar, completed=done, description=label, refresh=True)

        results["training"].append(
            transformer.train(model, plan.size, plan.device, plan.seed, update)
        )
        progress.update(bar, total=results["training"][-1]["steps"], refresh=True)
        report.write_json(results, folder)


def _measure_models(plan: Plan, results: dict[str, Any], folder: Path, progress: Progress) -> None:
    left_out = results["models_left_out"]
    if importlib.util.find_spec("transformers") is None:
        remedy = 'transformers is not installed: pip install "fusedattn[bench]"'
        left_out["models of transformers"] = remedy
        return
    cases = list(plan.model_cases)
    if not plan.thorough and any(x.dtype == "bf16" for x in cases) and not model_run.bf16_pays():
        cases = [x for x in cases if x.dtype != "bf16"]
        left_out["models in bf16"] = "slower than in fp32 on this processor; with --full all"
    bar = progress.add_task("models", total=len(cases))
    end, compiling = time.perf_counter() + plan.model_seconds, plan.compile_seconds
    for n, case in enumerate(cases):
        progress.update(bar, completed=n, description=case.label, refresh=True)
        left = max(0.0, end - time.perf_counter()) / (len(cases) - n)
        row = model_run.run_case(
            case, plan.device, seconds=left, seed=plan.seed + n, compile_seconds=compiling
        )
        compiling -= row["compile_s"]
        _keep([row], "models", results, folder)
    progress.update(bar, completed=len(cases), refresh=True)


def _time_launches(plan: Plan, results: dict[str, Any], folder: Path, progress: Progress) -> None:
    bar = progress.add_task("host time of launches", total=1)
    progress.refresh()
    results["host"] = host.measure_in_a_process()
    progress.update(bar, completed=1, refresh=True)
    report.write_json(results, folder)


_MEASURE = {
    "attention": _measure_attention,
    "rowwise": _measure_rowwise,
    "options": _measure_options,
    "transformer": _train,
    "models": _measure_models,
    "host": _time_launches,
}


def show(results: dict[str, Any], console: Console) -> None:
    """Every table of a run, and what it comes to in words."""
    wide = report.fits(console)
    rows = results["attention"]
    if rows:
        console.print()
        console.print(report.attention_table(rows, wide))
        if results["device"] == "cuda":
            console.print(report.flash_table(rows, wide))
            report.print_goal(rows, console)
        report.print_skipped(rows, console)
    for name, table in (("rowwise", report.rowwise_table), ("options", report.option_table)):
        if results[name]:
            console.print()
            console.print(table(results[name], wide))
            report.print_skipped(results[name], console)
    if results["limits"]:
        report.print_limits(results["limits"], console)
    if results["host"]:
        console.print()
        report.print_host(results["host"], console)
    if results["training"]:
        console.print()
        console.print(report.training_table(results["training"], wide))
        for model in results["training"]:
            sample = model["sample"]
            console.print(f"\n[bold]{model['title']}[/]: {model['task']}; {model['steps']} steps")
            for name in ("prompt", "text"):
                console.print(f"  {name}: {sample[name]!r}", highlight=False, markup=False)
    model_report.show_models(results["models"], results["models_left_out"], console)
    _print_lines(summary.in_words(results), console)


def compare(old: dict[str, Any], new: dict[str, Any], console: Console) -> None:
    """What an older run has in common with a new one: a table, and the difference in words."""
    table = summary.comparison_table(old, new)
    if table.row_count:
        console.print()
        console.print(table)
    _print_lines(summary.difference_in_words(old, new), console)


def _print_lines(lines: Iterable[str], console: Console) -> None:
    console.print()
    for line in lines:
        console.print(line, highlight=False, markup=False)
