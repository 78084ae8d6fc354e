"""A run's figures as Markdown: python -m fusedattn.benchmarks.markdown FILE.json writes FILE.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import Row, digits, flop_unit, origin
from .versions import OURS

PEERS = {"sdpa": "SDPA", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO",
         "torch.compile": "compiled", "flex": "FlexAttention"}  # fmt: skip
MODELS = ("as it comes", "torch.compile")
PASSES = {"fwd": "forward", "bwd": "backward"}


def page(name: str, results: dict[str, Any]) -> str:
    """All tables of a run."""
    parts = [
        f"# {name}",
        f"From [{name}.json]({name}.json) by `python -m fusedattn.benchmarks.markdown`.",
        f"{origin(results)}.",
        "× = times as fast as that peer, in turns with it; empty where it did not run or is outside"
        " the tolerance rule. Error: the largest share of what that rule allows.",
    ]
    tables = {"attention": attention, "rowwise": rowwise, "options": options, "training": training,
              "models": models}  # fmt: skip
    for title, table in tables.items():
        if results.get(title):
            parts += [f"## {title}", table(results[title])]
    return "\n\n".join(parts) + "\n"


def options(rows: Sequence[Row]) -> str:
    """One line per case; eager is a peer here, for some options have no other."""
    return attention(rows, {"eager": "eager", **PEERS})


def attention(rows: Sequence[Row], known: Mapping[str, str] = PEERS) -> str:
    """One line per case."""
    unit, unit_name = flop_unit(rows)
    peers = {
        key: title
        for key, title in known.items()
        if any(_is(name, key) for row in rows for name in row["speedup"])
    }
    lines = []
    for row in rows:
        if (ours := _ours(row)) is None:
            continue
        by_bytes = row["unit"] == "byte/s"
        rate = digits(ours["rate"] / (1e9 if by_bytes else unit))
        lines.append([
            row["case"]["label"],
            f"{rate} {'GB/s' if by_bytes else unit_name}",
            f"{ours['of_limit']:.0%}",
            *(_ratio(row, key) for key in peers),
            f"{float(ours['error_of_allowed']):.0%}",
        ])  # fmt: skip
    return _table(["case", "rate", "of limit", *(f"× {x}" for x in peers.values()), "error"], lines)


def rowwise(rows: Sequence[Row]) -> str:
    """One line per op and shape: times as fast as PyTorch, in each dtype and pass."""
    columns: dict[str, None] = {}
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if (ours := _ours(row)) is None:
            continue
        op, dtype, shape, passes = row["case"]["label"].split()
        column = f"{PASSES[passes]} {dtype}"
        columns[column] = None
        line = found.setdefault(f"{op} {shape}", {})
        line[column] = f"{_ratio(row, 'torch')} ({ours['of_limit']:.0%})".lstrip()
    lines = [[case, *(line.get(name, "") for name in columns)] for case, line in found.items()]
    return (
        "× PyTorch's own function, or the formula where it has none; in brackets the rate as a "
        "share of a copy of as many bytes.\n\n" + _table(["case", *columns], lines)
    )


def training(models: Iterable[Row]) -> str:
    """One line per model and kind of ops."""
    lines = [
        [
            model["title"],
            name,
            f"{run['tokens_per_second']:,.0f}",
            f"{run['peak_bytes'] / 2**20:.0f}" if run["peak_bytes"] else "",
            "" if name == "plain" else f"{run['max_loss_difference']:.1e}",
        ]
        for model in models
        for name, run in model["runs"].items()
    ]
    return _table(["model", "ops", "tokens/s", "peak MiB", "largest loss difference"], lines)


def models(rows: Iterable[Row]) -> str:
    """One line per model and task."""
    lines = [
        [
            row["case"]["label"],
            digits(ours["rate"]),
            *(f"{row['speedup'][x]:.2f}" if x in row["speedup"] else "" for x in MODELS),
            f"{float(row['difference']):.0e}",
            f"{row['not_ours']:.0%}" if row["not_ours"] else "",
        ]
        for row in rows
        if (ours := _ours(row)) is not None
    ]
    head = ["case", "tokens/s", *(f"× {x}" for x in MODELS), "apart", "not ours"]
    return _table(head, lines)


def _is(name: str, peer: str) -> bool:
    """Whether a version is of this peer: "sdpa-flash" is of "sdpa"."""
    return name == peer or name.startswith(f"{peer}-")


def _ours(row: Row) -> Row | None:
    """The figures of the best of ours; the first runs had one alone and did not name it."""
    return row["versions"].get(row.get("ours", OURS))


def _ratio(row: Row, peer: str) -> str:
    """Times as fast as the fastest of a peer's versions that are within the rule; "" for none."""
    right = [
        ratio
        for name, ratio in row["speedup"].items()
        if _is(name, peer) and row["versions"][name]["within_tolerance"]
    ]
    return f"{min(right):.2f}" if right else ""


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def main(paths: Sequence[str]) -> None:
    """Write <name>.md beside each <name>.json."""
    for path in map(Path, paths):
        results = json.loads(path.read_text())
        path.with_suffix(".md").write_text(page(path.stem, results))


if __name__ == "__main__":
    main(sys.argv[1:])
