"""What a run leaves behind: JSON and CSV with every figure, plots, and tables in the terminal."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from .peers import OURS

Row = dict[str, Any]

_COLOURS = {
    OURS: "#d1495b",
    f"{OURS}-cuda": "#d1495b",
    f"{OURS}-triton": "#e98a94",
    "torch": "#2e6f95",
    "two calls": "#e09f3e",
    "liger": "#3a7d44",
    "eager": "#9a9a9a",
    "torch.compile": "#7f5aa2",
    "sdpa-flash": "#2e6f95",
    "sdpa-efficient": "#4fa3c7",
    "sdpa-cudnn": "#1b4965",
    "sdpa-math": "#b9c6cf",
    "flex": "#e09f3e",
    "onnxruntime": "#3a7d44",
    "openvino": "#8a6d3b",
}
_STYLE = {
    "figure.dpi": 130,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "legend.frameon": False,
}
_RATE_KEYS = ("rate", "rate_p20", "rate_p80")


# --- files ---------------------------------------------------------------------------------------


def write_json(results: dict[str, Any], folder: Path) -> Path:
    """Every figure of the run, as results.json; on a GPU under the GPU's name."""
    gpus = results["environment"]["gpu"]["devices"] if results["device"] == "cuda" else []
    name = re.sub(r"\W+", "-", gpus[0]["name"]).lower() if gpus else "results"
    path = folder / f"{name}.json"
    path.write_text(json.dumps(_plain(results), indent=1, allow_nan=False) + "\n")
    return path


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
            "limit": row["limit"],
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


def attention_table(rows: Sequence[Row]) -> Table:
    """One line per case: fusedattn's rate, share of the limit, ratios, memory and error."""
    unit, unit_name = flop_unit(rows)
    table = Table(
        title="attention, batch x heads x length x head dim",
        caption=f"rates in {unit_name} (decode: GB/s), median \\[p20, p80]; 'x' = times as fast; "
        "memory is the peak beyond the inputs, with the best peer's; error is the largest against "
        "fp64, on a sample of heads and rows, with its share of what the tolerance rule allows",
        title_style="bold",
        caption_style="dim",
    )
    table.add_column("case", no_wrap=True)
    names = ("fusedattn", "of limit", "x SDPA", "x best peer", "MiB (best peer's)", "error")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_table_line(row, unit))
    return table


def _table_line(row: Row, unit: float) -> list[str]:
    label = row["case"]["label"]
    ours = row["versions"].get(OURS)
    if ours is None:
        return [label, row["skipped"].get(OURS, "not run"), *[""] * 5]
    sdpa = [x for name, x in row["speedup"].items() if name.startswith("sdpa")]
    unit = 1e9 if row["unit"] == "byte/s" else unit
    return _cells(row, ours, unit, min(sdpa, default=None))


def _cells(row: Row, ours: Row, unit: float, over_torch: float | None) -> list[str]:
    rate, low, high = (_digits(ours[key] / unit) for key in _RATE_KEYS)
    best = row["best_peer"]
    peer_memory = row["versions"][best]["peak_bytes"] if best else None
    error = f"{ours['max_error']:.1e} ({ours['error_of_allowed']:.0%})"
    if not ours["within_tolerance"]:
        error = f"[bold red]{error}[/]"
    note = " [yellow](reference)[/]" if ours["detail"] == "reference" else ""
    return [
        row["case"]["label"],
        f"{rate} [dim]\\[{low}, {high}][/]{note}",
        f"{ours['of_limit']:.0%}",
        _ratio(over_torch),
        f"{_ratio(row['speedup_over_best'])} [dim]{best or ''}[/]",
        f"{_mebibytes(ours['peak_bytes'])} [dim]({_mebibytes(peer_memory)})[/]",
        error,
    ]


def rowwise_table(rows: Sequence[Row]) -> Table:
    """One line per case: fusedattn's rate, share of a copy, ratios, memory and error."""
    table = Table(
        title="norms, softmax and positions, rows x width (batch x heads x length x head dim)",
        caption="rates in GB/s, each tensor read and written once, median \\[p20, p80]; 'of copy' "
        "compares with a copy of as many bytes in the same turns; bwd is the backward pass alone; "
        "the other columns as for attention",
        title_style="bold",
        caption_style="dim",
    )
    table.add_column("case", no_wrap=True)
    for name in ("fusedattn", "of copy", "x torch", "x best peer", "MiB (peer's)", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        if before and before["case"]["op"] != row["case"]["op"]:
            table.add_section()
        name = row["ours"]
        if name is None:
            reasons = [x for n, x in row["skipped"].items() if n.startswith(OURS)]
            table.add_row(row["case"]["label"], (reasons or ["not run"])[0], *[""] * 5)
            continue
        cells = _cells(row, row["versions"][name], 1e9, row["speedup"].get("torch"))
        backend = name.removeprefix(OURS).removeprefix("-")
        cells[1] += f" [dim]{backend}[/]" if backend else ""
        table.add_row(*cells)
    return table


def _digits(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    colour = "green" if value >= 1.05 else "red" if value < 0.95 else "default"
    return f"[{colour}]{value:.2f}x[/]"


def _mebibytes(count: float | None) -> str:
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


def _cases(count: int) -> str:
    return "1 case" if count == 1 else f"{count} cases"


def training_table(models: Iterable[Row]) -> Table:
    """One line per model and version: speed, memory, last loss and distance of the curves."""
    table = Table(title="training, same seed and same batches", title_style="bold")
    table.add_column("model", no_wrap=True)
    columns = ("ops", "tokens/s", "speed", "peak MiB", "last loss", "max loss difference")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for model in models:
        runs = model["runs"]
        slowest = runs["plain"]["tokens_per_second"]
        for name, run in runs.items():
            table.add_row(
                model["title"] if name == "plain" else "",
                name,
                f"{run['tokens_per_second']:,.0f}",
                f"{run['tokens_per_second'] / slowest:.2f}x",
                _mebibytes(run["peak_bytes"]),
                f"{run['losses'][-1]:.4f}",
                "" if name == "plain" else f"{run['max_loss_difference']:.1e}",
            )
        table.add_section()
    return table


# --- plots ---------------------------------------------------------------------------------------


def plot_all(results: dict[str, Any], folder: Path) -> list[Path]:
    """Every plot that the results have figures for."""
    paths = []
    with plt.rc_context(_STYLE):
        rows = results["attention"]
        for key, series in _series(rows).items():
            paths.append(_plot_series(key, series, folder))
        if rows:
            paths.append(_plot_ratios(rows, folder))
        if results["rowwise"]:
            paths.append(_plot_rowwise(results["rowwise"], folder))
        if results["training"]:
            paths.append(_plot_losses(results["training"], folder))
    return paths


def _series(rows: list[Row]) -> dict[tuple, list[Row]]:
    """The rows that differ in length and dtype alone, where there are three lengths or more."""

    def key(row: Row) -> tuple:
        case = row["case"]
        return case["head_dim"], case["causal"], case["backward"]

    square = [row for row in rows if row["case"]["regime"] == "self-attention"]
    groups = {k: list(g) for k, g in itertools.groupby(sorted(square, key=key), key)}
    return {k: g for k, g in groups.items() if len({r["case"]["seq_q"] for r in g}) >= 3}


def _plot_series(key: tuple, rows: list[Row], folder: Path) -> Path:
    """Speed against length: one panel per dtype, one line per version, the limit dashed."""
    head_dim, causal, backward = key
    kind = "causal" if causal else "full"
    what = "forward + backward" if backward else "forward"
    unit, unit_name = flop_unit(rows)
    dtypes = list(dict.fromkeys(row["case"]["dtype"] for row in rows))
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(4.1 * len(dtypes), 3.7), squeeze=False, layout="constrained"
    )
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        one = sorted(
            (r for r in rows if r["case"]["dtype"] == dtype), key=lambda r: r["case"]["seq_q"]
        )
        _speed_panel(axis, one, unit)
        axis.set_title(dtype)
    axes[0][0].set_ylabel(unit_name)
    handles = {}
    for axis in axes[0]:
        handles.update(dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=8)
    figure.suptitle(f"attention {what}, {kind}, head dim {head_dim}", fontweight="bold")
    name = f"attention_d{head_dim}_{kind}_{'training' if backward else 'forward'}.png"
    return _save(figure, folder / name)


def _speed_panel(axis: Axes, rows: list[Row], unit: float) -> None:
    for name in _COLOURS:
        points = [
            (r["case"]["seq_q"], *(r["versions"][name][k] / unit for k in _RATE_KEYS))
            for r in rows
            if name in r["versions"]
        ]
        if not points:
            continue
        lengths, rate, low, high = zip(*points, strict=True)
        ours = name == OURS
        axis.plot(
            lengths,
            rate,
            color=_COLOURS[name],
            marker="o",
            markersize=5 if ours else 3.5,
            linewidth=2.4 if ours else 1.4,
            label=name,
            zorder=3 if ours else 2,
        )
        axis.fill_between(lengths, low, high, color=_COLOURS[name], alpha=0.15, linewidth=0)
    top = max(v["rate"] for r in rows for v in r["versions"].values()) / unit
    limit = rows[0]["limit"] / unit
    if limit < 3 * top:
        axis.axhline(limit, color="#444444", linestyle="--", linewidth=1, label="measured matmul")
    else:
        note = f"measured matmul: {_digits(limit)}"
        axis.text(0.02, 0.98, note, transform=axis.transAxes, va="top", color="#444444")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(sorted({r["case"]["seq_q"] for r in rows}))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("sequence length")


def _plot_ratios(rows: list[Row], folder: Path) -> Path:
    """How many times as fast as the best peer, case by case, the best peer named on the bar."""
    shown = [row for row in rows if row["speedup_over_best"] is not None][::-1]
    height = 0.6 + 0.22 * max(4, len(shown))
    figure, axis = plt.subplots(figsize=(8.2, height), layout="constrained")
    values = [row["speedup_over_best"] for row in shown]
    colours = [_COLOURS[OURS] if v >= 1 else "#b8b8b8" for v in values]
    places = range(len(shown))
    axis.barh(places, values, color=colours, height=0.68)
    for place, row, value in zip(places, shown, values, strict=True):
        axis.text(value, place, f" {value:.2f}x  {row['best_peer']}", va="center", fontsize=7.5)
    axis.axvline(1.0, color="#444444", linewidth=1)
    axis.set_yticks(places, [row["case"]["label"] for row in shown], fontsize=7.5)
    axis.set_ylim(-0.6, len(shown) - 0.4)
    axis.set_xlim(0, 1.25 * max(values, default=1.0))
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("times as fast as the best peer (named on the bar)")
    axis.set_title("fusedattn against the best peer of each case")
    return _save(figure, folder / "attention_ratios.png")


def _plot_rowwise(rows: list[Row], folder: Path) -> Path:
    """Share of a copy's speed, one panel per op: ours as a bar, each peer as a mark.

    At the right how many times as fast as the best peer.
    """
    groups = {op: list(g) for op, g in itertools.groupby(rows, lambda row: row["case"]["op"])}
    figure, axes = plt.subplots(
        len(groups),
        1,
        figsize=(8.2, 1.0 + 0.21 * len(rows) + 0.45 * len(groups)),
        squeeze=False,
        sharex=True,
        layout="constrained",
        gridspec_kw={"height_ratios": [len(g) + 1 for g in groups.values()]},
    )
    top = max(v["of_limit"] for row in rows for v in row["versions"].values())
    handles: dict[str, Any] = {}
    for axis, (op, group) in zip(axes[:, 0], groups.items(), strict=True):
        _share_panel(axis, group[::-1], handles)
        axis.set_title(op.replace("_", " "), loc="left")
        # A copy of a single row is all overhead of the call: a share can be large.
        axis.set_xlim(0, min(max(1.05, 1.05 * top), 2.0))
    axes[-1][0].set_xlabel("share of the speed of a copy of as many bytes")
    axes[-1][0].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=8)
    return _save(figure, folder / "rowwise_of_copy.png")


def _share_panel(axis: Axes, rows: list[Row], handles: dict[str, Any]) -> None:
    for place, row in enumerate(rows):
        for name, figures in row["versions"].items():
            share, colour = figures["of_limit"], _COLOURS[name]
            if name == row["ours"]:
                handles[name] = axis.barh(place, share, color=colour, height=0.68)
            else:
                look = {"marker": "|", "s": 90, "linewidths": 2.2, "zorder": 3}
                handles[name] = axis.scatter(share, place, color=colour, **look)
        if row["best_peer"]:
            note = f" {row['speedup_over_best']:.2f}x {row['best_peer']}"
            axis.text(1, place, note, transform=axis.get_yaxis_transform(), va="center", size=7)
    axis.axvline(1.0, color="#444444", linestyle="--", linewidth=1)
    labels = [row["case"]["label"].removeprefix(row["case"]["op"]).lstrip(" ") for row in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=7.5)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.grid(axis="y", visible=False)


def _plot_losses(models: list[Row], folder: Path) -> Path:
    """The loss curves of each model, plain under fused, and the distance between them."""
    figure, axes = plt.subplots(
        1, len(models), figsize=(4.1 * len(models), 3.5), squeeze=False, layout="constrained"
    )
    looks = {
        "plain": {"color": "#b8b8b8", "linewidth": 4.5},
        "sdpa": {"color": _COLOURS["sdpa-flash"], "linewidth": 2.2, "linestyle": (0, (4, 2))},
        "fused attention": {"color": "#e09f3e", "linewidth": 1.6, "linestyle": (4, (4, 2))},
        "all fused": {"color": _COLOURS[OURS], "linewidth": 1.2},
    }
    for axis, model in zip(axes[0], models, strict=True):
        for name, run in model["runs"].items():
            speed = f"{run['tokens_per_second']:,.0f} tokens/s"
            axis.plot(run["losses"], label=f"{name}: {speed}", **looks[name])
        gap = model["runs"]["all fused"]["max_loss_difference"]
        axis.set_title(f"{model['title']}\nlargest difference {gap:.1e}")
        axis.set_xlabel("step")
        axis.legend(loc="upper right", fontsize=7.5)
    axes[0][0].set_ylabel("training loss")
    return _save(figure, folder / "training_losses.png")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path)
    plt.close(figure)
    return path
