"""The table, the plot and the lines of whole models."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from .model_run import ALLOWED, COMPILED, DEFAULT
from .report import Row, digits, fits, mebibytes, new_table, ratio_text
from .versions import OURS


def model_table(rows: Sequence[Row], wide: bool = True) -> Table:
    """One line per case: tokens per second, ratios, memory, distance and what is not ours."""
    columns = (
        "case", "tokens/s", f"x {DEFAULT}", "x compiled", f"MiB ({DEFAULT})", "apart", "not ours",
    )  # fmt: skip
    table = new_table(
        "models of transformers, as they come and patched",
        "tokens/s of the patched model, median \\[p20, p80]; 'x' = times as fast; memory is the "
        "peak beyond the model, with that of the model as it comes; 'apart': the largest relative "
        "distance of loss and gradients, or of scores; 'not ours': the share of the patched step's "
        "time outside fusedattn",
        wide,
        columns,
    )
    for before, row in zip([None, *rows], rows, strict=False):
        if before and _kind(before) != _kind(row):
            table.add_section()
        table.add_row(*_cells(row, wide))
    return table


def _kind(row: Row) -> tuple[str, str]:
    return row["case"]["task"], row["case"]["dtype"]


def _cells(row: Row, wide: bool) -> list[str]:
    then = " " if wide else "\n"
    label, apart = row["case"]["label"], f"{float(row['difference']):.0e}"
    if not row["within_tolerance"]:
        allowed = ALLOWED[row["case"]["dtype"]]
        return [label, "not timed", "", "", "", f"[bold red]{apart} > {allowed:.0e}[/]", ""]
    ours, plain = (row["versions"][name] for name in (OURS, DEFAULT))
    rate, low, high = (digits(ours[name]) for name in ("rate", "rate_p20", "rate_p80"))
    return [
        label,
        f"{rate}{then}[dim]\\[{low}, {high}][/]",
        *(ratio_text(row["speedup"].get(name)) for name in (DEFAULT, COMPILED)),
        f"{mebibytes(ours['peak_bytes'])}{then}[dim]({mebibytes(plain['peak_bytes'])})[/]",
        apart,
        "-" if row["not_ours"] is None else f"{row['not_ours']:.0%}",
    ]


def show_models(rows: Sequence[Row], left_out: dict[str, str], console: Console) -> None:
    """The table, what was left out and why, and what of a model `patch` left alone."""
    if rows:
        console.print()
        console.print(model_table(rows, fits(console)))
    skipped = [(name, why) for row in rows for name, why in row["skipped"].items()]
    for (name, why), cases in itertools.groupby(sorted(skipped)):
        count = len(list(cases))
        note = f"not run: {name} in {count} case{'s' if count > 1 else ''}: {why}"
        console.print(f"  [dim]{note}[/]", highlight=False)
    for what, why in left_out.items():
        console.print(f"  [dim]not run: {what}: {why}[/]", highlight=False)


def plot_models(rows: Sequence[Row], colours: dict[str, str]) -> Figure:
    """Times as fast as the model as it comes, a bar for each version; and how near to the possible:
    the mark is what a step would be of which nothing but the part that is not ours takes time.
    """
    shown = [row for row in rows if row["ours"]][::-1]
    figure, axis = plt.subplots(
        figsize=(8.2, 1.2 + 0.42 * max(3, len(shown))), layout="constrained"
    )
    for place, row in enumerate(shown):
        _bars(axis, place, row, colours)
    axis.axvline(1.0, color="#444444", linewidth=1)
    axis.set_yticks(range(len(shown)), [row["case"]["label"] for row in shown], fontsize=7.5)
    axis.set_ylim(-0.6, max(0.6, len(shown) - 0.4))
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("times as fast as the model as it comes; |: if what is ours took no time")
    axis.set_title("models of transformers, patched")
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    return figure


def _bars(axis: Any, place: int, row: Row, colours: dict[str, str]) -> None:
    plain = row["versions"][DEFAULT]["median_s"]
    shown = [name for name in (OURS, COMPILED) if name in row["versions"]]
    height = 0.68 / len(shown)
    for n, name in enumerate(shown):
        ratio = plain / row["versions"][name]["median_s"]
        y = place + (len(shown) - 1) * height / 2 - n * height
        axis.barh(y, ratio, height=height, color=colours[name], label=name)
        axis.text(ratio, y, f" {ratio:.2f}x", va="center", fontsize=7.5)
    if row["not_ours"]:
        most = row["speedup"][DEFAULT] / row["not_ours"]
        axis.scatter(most, place, marker="|", s=160, color="#444444", zorder=3)
