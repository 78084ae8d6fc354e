"""A run in a few words, and how it differs from another one."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.table import Table

from .model_run import DEFAULT
from .report import ROWS, Row, digits, flop_unit, new_table, origin, ratio_text

NAMED = 4  # of the cases that are slower than a peer, the others are counted
Results = dict[str, Any]


# --- one run -------------------------------------------------------------------------------------


def in_words(results: Results) -> list[str]:
    """Of each part: how much faster than the best peer, at worst, and what was slower."""
    ops = dict.fromkeys(row["case"]["op"].replace("_", " ") for row in results["rowwise"])
    titles = {
        "attention": "attention", "rowwise": ", ".join(ops), "options": "attention's options"
    }  # fmt: skip
    lines = [_of_rows(titles[part], results[part]) for part in ROWS if results[part]]
    if models := results["training"]:
        lines.append(_of_models(models))
    if ratios := _patched(results):
        worst = min(ratios, key=ratios.__getitem__)
        lines.append(
            f"models of transformers: {statistics.geometric_mean(ratios.values()):.2f} times as "
            f"fast patched as they come (geometric mean of {len(ratios)}), at worst "
            f"{ratios[worst]:.2f} ({worst})."
        )
    return lines


def _patched(results: Results) -> dict[str, float]:
    """Each case of a model of transformers: times as fast as the model as it comes."""
    return {
        row["case"]["label"]: row["speedup"][DEFAULT] for row in results["models"] if row["ours"]
    }


def _of_rows(title: str, rows: Sequence[Row]) -> str:
    compared = {row["case"]["label"]: row for row in rows if row["speedup_over_best"] is not None}
    if not compared:
        return f"{title}: no peer ran, so there is nothing to compare with." + _wrong(rows)
    ratios = {label: row["speedup_over_best"] for label, row in compared.items()}
    ordered = sorted(ratios, key=ratios.__getitem__)
    slower = [label for label in ordered if round(ratios[label], 2) < 1.0]

    def named(label: str) -> str:
        return f"{label} ({ratios[label]:.2f}, {compared[label]['best_peer']})"

    mean = statistics.geometric_mean(ratios.values())
    text = f"{title}: {mean:.2f} times as fast as the best peer (geometric mean of {len(ratios)})"
    if slower:
        more = f"; and {len(slower) - NAMED} more" if len(slower) > NAMED else ""
        text += (
            f", at worst {ratios[ordered[0]]:.2f}. Slower than a peer in {len(slower)}: "
            f"{'; '.join(map(named, slower[:NAMED]))}{more}."
        )
    else:
        text += f", at worst in {named(ordered[0])}. Slower than a peer in none."
    alone = len(rows) - len(compared)
    return text + (f" Without a peer: {alone}." if alone else "") + _wrong(rows)


def _wrong(rows: Iterable[Row]) -> str:
    """Ours that are outside the tolerance rule; "" where there are none."""
    wrong = [
        row["case"]["label"]
        for row in rows
        if row["ours"] and not row["versions"][row["ours"]]["within_tolerance"]
    ]
    return f" Outside the tolerance rule: {'; '.join(wrong)}." if wrong else ""


def _of_models(models: Sequence[Row]) -> str:
    """Each model with all of ours against plain ops."""
    found = {m["title"]: _speed(m) / m["runs"]["plain"]["tokens_per_second"] for m in models}
    worst, best = (pick(found, key=found.__getitem__) for pick in (min, max))
    gap = max(_with_ours(model)["max_loss_difference"] for model in models)
    return (
        f"training: {found[worst]:.2f} ({worst}) to {found[best]:.2f} ({best}) times as fast as "
        f"plain; losses differ by at most {gap:.1e}."
    )


def _with_ours(model: Row) -> Row:
    """The last of a model's runs, in which all ops are ours."""
    return list(model["runs"].values())[-1]


def _speed(model: Row) -> float:
    return _with_ours(model)["tokens_per_second"]


# --- two runs ------------------------------------------------------------------------------------


def _pairs(old: Results, new: Results) -> Iterator[tuple[Row, Row]]:
    """The rows of cases that both have, with something of ours in both."""
    for part in ROWS:
        before = {row["case"]["label"]: row for row in old[part] if row["ours"]}
        for row in new[part]:
            if row["ours"] and row["case"]["label"] in before:
                yield before[row["case"]["label"]], row


def _ours(row: Row) -> Row:
    return row["versions"][row["ours"]]


def _verdict(old: Row, new: Row) -> str:
    """ "faster" and "slower" where the middle 60 % of the times lie apart, else nothing."""
    return (
        "faster" if new["p80_s"] < old["p20_s"] else "slower" if new["p20_s"] > old["p80_s"] else ""
    )


def comparison_table(old: Results, new: Results) -> Table:
    """One line per case that both have: rates, times as fast, and as fast as the best peer."""
    rows = [row for pair in _pairs(old, new) for row in pair]
    unit, unit_name = flop_unit(rows)
    table = new_table(
        "this run and an older one",
        f"rates in {unit_name} (row by row and decode: GB/s), medians; new/old: times as fast as "
        "the older run; faster, slower: the ranges p20 to p80 lie apart; x peer: times as fast as "
        "the best peer of the same run",
        False,
        ("case", "old", "new", "new/old", "apart", "x peer, old", "x peer, new"),
    )
    for before, after in _pairs(old, new):
        first, second = _ours(before), _ours(after)
        scale = 1e9 if after["unit"] == "byte/s" else unit
        verdict = _verdict(first, second)
        colour = {"faster": "green", "slower": "red"}.get(verdict, "default")
        table.add_row(
            after["case"]["label"],
            digits(first["rate"] / scale),
            digits(second["rate"] / scale),
            f"{first['median_s'] / second['median_s']:.2f}x",
            f"[{colour}]{verdict}[/]",
            ratio_text(before["speedup_over_best"]),
            ratio_text(after["speedup_over_best"]),
        )
    return table


def difference_in_words(old: Results, new: Results) -> list[str]:
    """Where both are from, how much faster the new one is, and what only one of them has."""
    lines = [f"older run: {origin(old)}", f"this run:  {origin(new)}"]
    pairs = list(_pairs(old, new))
    if pairs:
        ratios = [_ours(a)["median_s"] / _ours(b)["median_s"] for a, b in pairs]
        verdicts = [_verdict(_ours(a), _ours(b)) for a, b in pairs]
        worst, case = min(zip(ratios, (b["case"]["label"] for _, b in pairs), strict=True))
        lines.append(
            f"{len(pairs)} cases in both: {statistics.geometric_mean(ratios):.2f} times as fast "
            f"as the older run (geometric mean), at worst {worst:.2f} ({case}); "
            f"{verdicts.count('faster')} faster and {verdicts.count('slower')} slower than their "
            "spread."
        )
    else:
        lines.append("No case is in both.")
    counts = [sum(len(run[part]) for part in ROWS) - len(pairs) for run in (old, new)]
    if any(counts):
        lines.append(f"In one alone, or not run: {counts[0]} of the older, {counts[1]} of this.")
    lines += _models_in_words(old, new)
    if origin(old).partition("; ")[2] != origin(new).partition("; ")[2]:
        lines.append("Machine, threads or versions differ: ratios to peers compare, times do not.")
    return lines


def _models_in_words(old: Results, new: Results) -> list[str]:
    before = {model["title"]: _speed(model) for model in old["training"]}
    ratios = {
        m["title"]: _speed(m) / before[m["title"]] for m in new["training"] if m["title"] in before
    }
    told = ", ".join(f"{title} {ratio:.2f}" for title, ratio in ratios.items())
    return [f"training, times as fast as the older run: {told}."] if told else []
