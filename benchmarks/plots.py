"""The plots of a run: speed against length, ratios to the best peer, losses."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .model_report import plot_models
from .report import RATE_KEYS, Row, digits, flop_unit, origin
from .versions import OURS

_COLOURS = {
    OURS: "#d1495b",
    f"{OURS}-cuda": "#d1495b",
    f"{OURS}-triton": "#e98a94",
    "torch": "#2e6f95",
    "two calls": "#e09f3e",
    "liger": "#3a7d44",
    "eager": "#9a9a9a",
    "torch.compile": "#7f5aa2",
    "sdpa": "#2e6f95",
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
_PASSES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward + backward"}
Plot = tuple[Figure, str]  # and the name of its file


def plot_all(results: dict[str, Any], folder: Path) -> list[Path]:
    """Every plot that the results have figures for."""
    plots: list[Plot] = []
    with plt.rc_context(_STYLE):
        rows = results["attention"]
        if results.get("device") == "cuda":
            for dtype in dict.fromkeys(row["case"]["dtype"] for row in rows):
                series = _series([row for row in rows if row["case"]["dtype"] == dtype])
                plots += [_plot_grid(series, f"attention_{dtype}.png")] if series else []
        else:
            for key, series in _series(rows).items():
                plots.append(_plot_series(key, series))
        if any(row["speedup_over_best"] is not None for row in rows):
            plots.append(_plot_ratios(rows))
        if results["rowwise"]:
            plots.append(_plot_rowwise(results["rowwise"]))
        if results["options"]:
            plots.append(_plot_options(results["options"]))
        if results["training"]:
            plots.append(_plot_losses(results["training"]))
        if any(row["ours"] for row in results["models"]):
            plots.append((plot_models(results["models"], _COLOURS), "models.png"))
        return [_save(figure, folder / name, origin(results)) for figure, name in plots]


def _series(rows: list[Row]) -> dict[tuple, list[Row]]:
    """The rows that differ in length and dtype alone, where there are three lengths or more.

    By (head dim, causal, passes), the rows in the order of their lengths.
    """

    def key(row: Row) -> tuple:
        case = row["case"]
        return case["head_dim"], case["causal"], case["passes"]

    square = [row for row in rows if row["case"]["regime"] == "self-attention"]
    square.sort(key=lambda row: row["case"]["seq_q"])
    groups = {k: list(g) for k, g in itertools.groupby(sorted(square, key=key), key)}
    return {k: g for k, g in groups.items() if len({r["case"]["seq_q"] for r in g}) >= 3}


def _plot_series(key: tuple, rows: list[Row]) -> Plot:
    """Speed against length: one panel per dtype, one line per version, the limit dashed."""
    head_dim, causal, passes = key
    unit, unit_name = flop_unit(rows)
    dtypes = list(dict.fromkeys(row["case"]["dtype"] for row in rows))
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(4.1 * len(dtypes), 3.7), squeeze=False, layout="constrained"
    )
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        _speed_panel(axis, [r for r in rows if r["case"]["dtype"] == dtype], unit)
        axis.set_title(dtype)
    axes[0][0].set_ylabel(unit_name)
    _shared_legend(figure, axes.flat)
    kind = "causal" if causal else "full"
    what = _PASSES[passes]
    figure.suptitle(f"attention {what}, {kind}, head dim {head_dim}", fontweight="bold")
    name = f"attention_d{head_dim}_{kind}_{'forward' if passes == 'fwd' else 'training'}.png"
    return figure, name


def _plot_grid(series: dict[tuple, list[Row]], name: str) -> Plot:
    """Speed against length in one dtype: a row of panels for each pass, a panel for each kind."""
    kinds = sorted({key[:2] for key in series})
    passes = [each for each in _PASSES if any(key[2] == each for key in series)]
    size = (3.6 * len(kinds), 3.1 * len(passes) + 0.5)
    figure, axes = plt.subplots(
        len(passes), len(kinds), figsize=size, squeeze=False, layout="constrained"
    )
    for line, each in zip(axes, passes, strict=True):
        for axis, kind in zip(line, kinds, strict=True):
            rows = series.get((*kind, each))
            if rows is None:
                axis.set_visible(False)
                continue
            unit, unit_name = flop_unit(rows)
            _speed_panel(axis, rows, unit)
            axis.set_title(f"{_PASSES[each]}, {'causal' if kind[1] else 'full'}, D {kind[0]}")
            axis.set_ylabel(unit_name)
    _shared_legend(figure, axes.flat)
    return figure, name


def _shared_legend(figure: Any, axes: Iterable[Axes]) -> None:
    handles: dict[str, Any] = {}
    for axis in axes:
        handles.update(dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=8)


def _speed_panel(axis: Axes, rows: list[Row], unit: float) -> None:
    for name in _COLOURS:
        points = [
            (r["case"]["seq_q"], *(r["versions"][name][k] / unit for k in RATE_KEYS))
            for r in rows
            if name in r["versions"]
        ]
        if not points:
            continue
        lengths, rate, low, high = zip(*points, strict=True)
        ours = name.startswith(OURS)
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
        note = f"measured matmul: {digits(limit)}"
        axis.text(0.02, 0.98, note, transform=axis.transAxes, va="top", color="#444444")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(sorted({r["case"]["seq_q"] for r in rows}))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("sequence length")


def _plot_ratios(rows: list[Row]) -> Plot:
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
    return figure, "attention_ratios.png"


def _plot_rowwise(rows: list[Row]) -> Plot:
    """Share of a copy's speed, one panel per op: ours as a bar, each peer as a mark.

    At the right how many times as fast as the best peer.
    """
    shares = [{n: v["of_limit"] for n, v in row["versions"].items()} for row in rows]
    figure, last = _plot_shares(rows, shares, "op")
    # A copy of a single row is all overhead of the call: a share can be large.
    last.set_xlim(0, min(last.get_xlim()[1], 2.0))
    last.set_xlabel("share of the speed of a copy of as many bytes")
    last.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
    return figure, "rowwise_of_copy.png"


def _plot_options(rows: list[Row]) -> Plot:
    """Times as fast as the best peer, one panel per option: ours as a bar from 1, peers as marks.

    A case without a peer that is right has no bar.
    """
    shares = []
    for row in rows:
        best = row["versions"].get(row["best_peer"])
        seconds = {name: figures["median_s"] for name, figures in row["versions"].items()}
        shares.append({n: best["median_s"] / s for n, s in seconds.items()} if best else {})
    figure, last = _plot_shares(rows, shares, "option", start=1.0)
    known = [share for row in shares for share in row.values()] + [0.5, 2.0]
    last.set_xscale("log")
    last.set_xlim(min(known) / 1.15, max(known) * 1.15)
    last.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    last.xaxis.set_minor_locator(NullLocator())
    last.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    last.set_xlabel("times as fast as the best peer (named at the right)")
    return figure, "options_ratios.png"


def _plot_shares(
    rows: list[Row], shares: list[dict[str, float]], key: str, start: float = 0.0
) -> tuple[Any, Axes]:
    """A panel for each group of rows, by `key` of their cases; the figure and the last panel.

    Bars go from `start` to our share.
    """
    pairs = list(zip(rows, shares, strict=True))
    groups = {k: list(g) for k, g in itertools.groupby(pairs, lambda pair: pair[0]["case"][key])}
    figure, axes = plt.subplots(
        len(groups),
        1,
        figsize=(8.2, 1.0 + 0.21 * len(rows) + 0.45 * len(groups)),
        squeeze=False,
        sharex=True,
        layout="constrained",
        gridspec_kw={"height_ratios": [len(g) + 1 for g in groups.values()]},
    )
    handles: dict[str, Any] = {}
    for axis, (name, group) in zip(axes[:, 0], groups.items(), strict=True):
        _share_panel(axis, group[::-1], name, start, handles)
        axis.set_title(name.replace("_", " "), loc="left")
    top = max((share for row in shares for share in row.values()), default=1.0)
    last = axes[-1][0]
    last.set_xlim(0, max(1.05, 1.05 * top))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=8)
    return figure, last


def _share_panel(
    axis: Axes,
    pairs: list[tuple[Row, dict[str, float]]],
    title: str,
    start: float,
    handles: dict[str, Any],
) -> None:
    for place, (row, shares) in enumerate(pairs):
        for name, share in shares.items():
            colour = _COLOURS[name]
            if name == row["ours"]:
                look = {"left": start, "color": colour, "height": 0.68}
                handles[name] = axis.barh(place, share - start, **look)
            else:
                look = {"marker": "|", "s": 90, "linewidths": 2.2, "zorder": 3}
                handles[name] = axis.scatter(share, place, color=colour, **look)
        if row["best_peer"]:
            note = f" {row['speedup_over_best']:.2f}x {row['best_peer']}"
            axis.text(1, place, note, transform=axis.get_yaxis_transform(), va="center", size=7)
    axis.axvline(1.0, color="#444444", linestyle="--", linewidth=1)
    labels = [row["case"]["label"].removeprefix(title).lstrip(" ") for row, _ in pairs]
    axis.set_yticks(range(len(pairs)), labels, fontsize=7.5)
    axis.set_ylim(-0.6, len(pairs) - 0.4)
    axis.grid(axis="y", visible=False)


def _plot_losses(models: list[Row]) -> Plot:
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
    return figure, "training_losses.png"


def _save(figure: Figure, path: Path, where: str) -> Path:
    """The figure, and below it the line that says where its figures come from."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # all is in its place, and stays there
    for legend in figure.legends:
        place = legend.get_window_extent().transformed(figure.transFigure.inverted())
        legend.set_bbox_to_anchor(place, figure.transFigure)
    note = textwrap.fill(where, int(23 * figure.get_figwidth()))  # so many characters of its size
    below = -0.05 / figure.get_figheight()
    figure.text(0.008, below, note, va="top", size=6, color="#777777")
    figure.savefig(path, bbox_inches="tight", pad_inches=0.06, metadata={"Description": where})
    plt.close(figure)
    return path
