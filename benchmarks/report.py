"""What a run leaves behind: JSON and CSV with every figure, and tables in the terminal."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .versions import FLASH, OURS

Row = dict[str, Any]

RATE_KEYS = ("rate", "rate_p20", "rate_p80")
WIDE = 134  # columns that the tables take with a line for each case
ROWS = ("attention", "rowwise", "options")  # the parts of a result with a row for each case


# --- files ---------------------------------------------------------------------------------------


def write_json(results: dict[str, Any], folder: Path) -> Path:
    """Every figure of the run, as results.json; on a GPU under the GPU's name."""
    gpus = results["environment"]["gpu"]["devices"] if results["device"] == "cuda" else []
    name = re.sub(r"\W+", "-", gpus[0]["name"]).lower() if gpus else "results"
    path = folder / f"{name}.json"
    path.write_text(json.dumps(_plain(results), indent=1, allow_nan=False) + "\n")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote, for the tables: what a run of before did not have is empty.

    Raises:
        ValueError: it cannot be read, or is not the results of a run.
    """
    path = path / "results.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text(), object_hook=_numbers)
    except OSError as error:
        raise ValueError(f"got {path}, expected results of a run: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"got {path}, expected results of a run: not JSON ({error})") from error
    known = {"date", "device", "threads", "environment"}
    if not isinstance(found, dict) or not known <= found.keys():
        raise ValueError(f"got {path}, expected results of a run, the JSON that it writes")
    empty = {part: [] for part in (*ROWS, "training", "models")}
    alone = {"limits": None, "host": None, "models_left_out": {}}
    results: dict[str, Any] = {**empty, **alone, **found}
    for row in (row for part in ROWS for row in results[part]):
        row.setdefault("ours", OURS if OURS in row["versions"] else None)
        row.setdefault("times_flash", {})
    return results


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Figures for which JSON has no number, as they were before `_plain`."""
    kept = ("prompt", "text")  # which a model wrote
    lost = {"inf", "-inf", "nan"}
    return {
        key: float(x) if isinstance(x, str) and x in lost and key not in kept else x
        for key, x in found.items()
    }


def origin(results: dict[str, Any]) -> str:
    """Where figures come from: date; machine, threads, instruction set; versions."""
    environment = results["environment"]
    gpus = [gpu["name"] for gpu in environment["gpu"]["devices"]]
    where = gpus[0] if results["device"] == "cuda" and gpus else environment["cpu"]["model"]
    sets = environment["cpu"].get("instruction sets")
    versions = ", ".join(
        f"{package} {environment['versions'][package]}"
        for package in ("torch", "triton", "onnxruntime", "openvino")
        if environment["versions"].get(package)
    )
    set_ = f", {sets[-1]}" if sets else ""
    return f"{results['date'][:10]}; {where}, {results['threads']} threads{set_}; {versions}"


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def write_csv(rows: Iterable[Row], folder: Path, name: str) -> Path:
    """One line per case and version, as `<name>.csv`."""
    path = folder / f"{name}.csv"
    lines = [
        {
            "case": row["case"]["label"],
            "version": name,
            "unit": row["unit"],
            "limit": row.get("limit"),
            **figures,
        }
        for row in rows
        for name, figures in row["versions"].items()
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]) if lines else ["case"])
        writer.writeheader()
        writer.writerows(lines)
    return path


# --- tables --------------------------------------------------------------------------------------


def flop_unit(rows: Iterable[Row]) -> tuple[float, str]:
    """The unit that suits the machine: TFLOP/s where it reaches ten of them, else GFLOP/s."""
    fastest = max((row["limit"] for row in rows if row["unit"] == "FLOP/s"), default=0.0)
    return (1e12, "TFLOP/s") if fastest >= 1e13 else (1e9, "GFLOP/s")


def fits(console: Console) -> bool:
    """Whether the tables have room for a line for each case; else they take two, and 80 columns."""
    return console.width >= WIDE


def new_table(title: str, caption: str, wide: bool, columns: Sequence[str]) -> Table:
    """A table of a first column of names and others of figures.

    Where it is not wide, names, headings and what stands in a cell beside the figure have lines of
    their own.
    """
    look: dict[str, Any] = {} if wide else {"box": box.SIMPLE_HEAD, "padding": 0}
    table = Table(
        title=title, caption=caption or None, title_style="bold", caption_style="dim",
        show_edge=wide, **look,
    )  # fmt: skip
    name, *figures = columns
    table.add_column(name, no_wrap=wide, overflow="fold")
    for figure in figures:
        heading = figure if wide else figure.replace(" ", "\n")
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def attention_table(rows: Sequence[Row], wide: bool = True) -> Table:
    """One line per case: fusedattn's rate, share of the limit, ratios, memory and error."""
    unit, unit_name = flop_unit(rows)
    table = _attention_table(
        "attention, batch x heads x length x head dim",
        f"rates in {unit_name} (decode: GB/s), median \\[p20, p80]; 'x' = times as fast; "
        "memory is the peak beyond the inputs, with the best peer's; error is the largest against "
        "fp64, on a sample of heads and rows, with its share of what the tolerance rule allows",
        wide,
    )
    for row in rows:
        table.add_row(*_table_line(row, unit, wide))
    return table


def option_table(rows: Sequence[Row], wide: bool = True) -> Table:
    """One line per case of attention's options, as `attention_table` has them."""
    unit, unit_name = flop_unit(rows)
    table = _attention_table(
        "attention's options, batch x heads x length x head dim",
        f"rates in {unit_name} of the pairs that are seen, median \\[p20, p80]; SDPA has the mask "
        "or bias as a tensor, a learned bias made in the call; error as for attention, that of "
        "dropout is of the mean, relative, with its share of 6 standard errors",
        wide,
    )
    for before, row in zip([None, *rows], rows, strict=False):
        if before and before["case"]["option"] != row["case"]["option"]:
            table.add_section()
        table.add_row(*_table_line(row, unit, wide))
    return table


def _attention_table(title: str, caption: str, wide: bool) -> Table:
    memory = "MiB (best peer's)" if wide else "MiB (peer's)"
    columns = ("case", "fusedattn", "of limit", "x SDPA", "x best peer", memory, "error")
    return new_table(title, caption, wide, columns)


def _table_line(row: Row, unit: float, wide: bool) -> list[str]:
    name = row["ours"]
    if name is None:
        return _nothing_of_ours(row, wide)
    sdpa = [x for name, x in row["speedup"].items() if name.startswith("sdpa")]
    unit = 1e9 if row["unit"] == "byte/s" else unit
    return _cells(row, name, unit, min(sdpa, default=None), wide)


def _nothing_of_ours(row: Row, wide: bool) -> list[str]:
    reasons = [x for n, x in row["skipped"].items() if n.startswith(OURS)]
    reason, label = (reasons or ["not run"])[0], row["case"]["label"]
    return [label, reason, *[""] * 5] if wide else [f"{label}: {reason}", *[""] * 6]


def _cells(row: Row, name: str, unit: float, over_torch: float | None, wide: bool) -> list[str]:
    ours, then = row["versions"][name], " " if wide else "\n"
    rate, low, high = (digits(ours[key] / unit) for key in RATE_KEYS)
    best = row["best_peer"]
    peer_memory = row["versions"][best]["peak_bytes"] if best else None
    share = f"({ours['error_of_allowed']:.0%})"
    error = f"{ours['max_error']:.1e}{then}{share}"
    if not ours["within_tolerance"]:
        error = f"[bold red]{error}[/]"
    note = f"{then}[yellow](reference)[/]" if ours["detail"] == "reference" else ""
    backend = name.removeprefix(OURS).removeprefix("-")
    note += f"{then}[dim]{backend}[/]" if backend else ""
    spread = f"\\[{low}, {high}]" if wide else f"\\[{low},{high}]"
    return [
        row["case"]["label"],
        f"{rate}{then}[dim]{spread}[/]{note}",
        f"{ours['of_limit']:.0%}",
        ratio_text(over_torch),
        f"{ratio_text(row['speedup_over_best'])}{then}[dim]{best or ''}[/]",
        f"{mebibytes(ours['peak_bytes'])}{then}[dim]({mebibytes(peer_memory)})[/]",
        error,
    ]


def rowwise_table(rows: Sequence[Row], wide: bool = True) -> Table:
    """One line per case: fusedattn's rate, share of a copy, ratios, memory and error."""
    table = new_table(
        "row by row, rows x width (batch x heads x length x head dim)",
        "rates in GB/s, each tensor read and written once, median \\[p20, p80]; 'of copy' "
        "compares with a copy of as many bytes in the same turns; bwd is the backward pass alone; "
        "the other columns as for attention",
        wide,
        ("case", "fusedattn", "of copy", "x torch", "x best peer", "MiB (peer's)", "error"),
    )
    for before, row in zip([None, *rows], rows, strict=False):
        if before and before["case"]["op"] != row["case"]["op"]:
            table.add_section()
        name, over_torch = row["ours"], row["speedup"].get("torch")
        nothing = name is None
        table.add_row(
            *(_nothing_of_ours(row, wide) if nothing else _cells(row, name, 1e9, over_torch, wide))
        )
    return table


GPU_COLUMNS = ("fusedattn-cuda", "fusedattn-triton", FLASH, "sdpa-cudnn", "flex")
GOAL = 0.95


def flash_table(rows: Sequence[Row], wide: bool = True) -> Table:
    """One line per case: what every fused version reaches, and ours against FlashAttention-2."""
    unit, unit_name = flop_unit(rows)
    ours = [name for name in GPU_COLUMNS if name.startswith(OURS)]
    columns = (*GPU_COLUMNS, *(f"{name.removeprefix(f'{OURS}-')} x" for name in ours))
    table = new_table(
        "against FlashAttention-2",
        f"medians in {unit_name} (decode: GB/s); sdpa-flash is FlashAttention-2 as torch "
        "has it; 'x' = times as fast as that; bwd is the backward pass alone; red rates are "
        "outside the tolerance rule, '-' did not run",
        wide,
        ("case", *(columns if wide else (name.replace("-", " ") for name in columns))),
    )
    for row in sorted(rows, key=_by_kind):
        scale = 1e9 if row["unit"] == "byte/s" else unit
        rates = [_rate(row["versions"].get(name), scale) for name in GPU_COLUMNS]
        table.add_row(
            row["case"]["label"],
            *rates,
            *(ratio_text(row["times_flash"].get(name)) for name in ours),
        )
    return table


def _by_kind(row: Row) -> tuple:
    case = row["case"]
    return case["regime"], case["passes"], case["head_dim"], case["causal"], case["seq_q"]


def _rate(figures: Row | None, unit: float) -> str:
    if figures is None:
        return "-"
    text = digits(figures["rate"] / unit)
    return text if figures["within_tolerance"] else f"[bold red]{text}[/]"


def print_goal(rows: Sequence[Row], console: Console) -> None:
    """In how many cases each of ours reaches GOAL of FlashAttention-2, and which it does not."""
    for name in dict.fromkeys(name for row in rows for name in row["times_flash"]):
        found = {
            row["case"]["label"]: row["times_flash"][name]
            for row in sorted(rows, key=_by_kind)
            if name in row["times_flash"]
        }
        below = {label: ratio for label, ratio in found.items() if ratio < GOAL}
        console.print(
            f"  {name}: at least {GOAL}x of FlashAttention-2 in {len(found) - len(below)} of "
            f"{_cases(len(found))}",
            highlight=False,
        )
        for label, ratio in below.items():
            console.print(f"    [red]below: {label} {ratio:.2f}x[/]", highlight=False)


def digits(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio_text(value: float | None) -> str:
    if value is None:
        return "-"
    colour = "green" if value >= 1.05 else "red" if value < 0.95 else "default"
    return f"[{colour}]{value:.2f}x[/]"


def mebibytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f}"


def print_skipped(rows: Iterable[Row], console: Console) -> None:
    """Which versions did not run, why, and in how many cases; and which peers were wrong."""
    counts: dict[tuple[str, str], int] = {}
    wrong: dict[str, int] = {}
    for row in rows:
        for name, reason in row["skipped"].items():
            # Sizes in a reason differ from case to case; the version and the first words do not.
            key = (name, "its matrix of scores is too large" if "scores" in reason else reason)
            counts[key] = counts.get(key, 0) + 1
        for name in row["speedup"]:
            wrong[name] = wrong.get(name, 0) + (not row["versions"][name]["within_tolerance"])
    for (name, reason), count in counts.items():
        console.print(f"  [dim]not run: {name} in {_cases(count)}: {reason}[/]", highlight=False)
    for name, count in wrong.items():
        if count:
            note = f"outside the tolerance rule, so no best peer: {name} in {_cases(count)}"
            console.print(f"  [dim]{note}[/]", highlight=False)


def print_limits(limits: Row, console: Console) -> None:
    """What the rates of attention are shares of."""
    matmul = ", ".join(
        f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in limits["flops_per_second"].items()
    )
    copy = limits["bytes_per_second"] / 1e9
    console.print(f"  [dim]limits measured here: matmul {matmul}; copy {copy:.1f} GB/s[/]")


def _cases(count: int) -> str:
    return "1 case" if count == 1 else f"{count} cases"


def print_host(found: Row, console: Console) -> None:
    """Microseconds of Python before each launch, or why there are none."""
    if "skipped" in found:
        console.print(f"  [dim]host time of launches: {found['skipped']}[/]", highlight=False)
        return
    title = f"Triton {found['triton']}: host time of a call, the driver doing nothing"
    columns = ("call", "µs, planned", "µs, first of its kind")
    table = new_table(title, "", fits(console), columns)
    for row in found["rows"]:
        table.add_row(row["name"], f"{row['planned']:.1f}", f"{row['unplanned']:.1f}")
    console.print(table)


def training_table(models: Iterable[Row], wide: bool = True) -> Table:
    """One line per model and version: speed, memory, last loss and distance of the curves."""
    columns = ("model", "ops", "tokens/s", "speed", "peak MiB", "last loss", "max loss difference")
    table = new_table("training, same seed and same batches", "", wide, columns)
    for model in models:
        runs = model["runs"]
        slowest = runs["plain"]["tokens_per_second"]
        for name, run in runs.items():
            table.add_row(
                model["title"] if name == "plain" else "",
                name,
                f"{run['tokens_per_second']:,.0f}",
                f"{run['tokens_per_second'] / slowest:.2f}x",
                mebibytes(run["peak_bytes"]),
                f"{run['losses'][-1]:.4f}",
                "" if name == "plain" else f"{run['max_loss_difference']:.1e}",
            )
        table.add_section()
    return table
