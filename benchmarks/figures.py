"""What a row of the result says about its versions: rates, share of the limit, ratios."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .accuracy import Error
from .harness import Measured
from .versions import Version


def figures_of(
    measured: Measured, version: Version, error: Error, work: float, limit: float
) -> dict[str, Any]:
    """Time, rate, memory and error of one version; `limit` counts units of `work` in a second."""
    timing = measured.timing
    rate = work / timing.median
    return {
        "median_s": timing.median,
        "p20_s": timing.p20,
        "p80_s": timing.p80,
        "samples": timing.samples,
        "rate": rate,
        "rate_p20": work / timing.p80,
        "rate_p80": work / timing.p20,
        "of_limit": rate / limit,
        "peak_bytes": measured.peak_bytes,
        "max_error": error.max_abs,
        "error_of_allowed": error.of_allowed,
        "within_tolerance": error.within,
        "detail": version.detail,
    }


def ratios(rows: dict[str, dict[str, Any]], ours: Iterable[str]) -> dict[str, Any]:
    """How many times as fast as each peer the best of ours is.

    A wrong result is nobody's: a peer with one is no best peer, and ours with one is chosen only
    where there is no other.
    """
    present = [name for name in ours if name in rows]
    best_of_ours = min(
        present,
        key=lambda name: (not rows[name]["within_tolerance"], rows[name]["median_s"]),
        default=None,
    )
    if best_of_ours is None:
        return {"ours": None, "speedup": {}, "best_peer": None, "speedup_over_best": None}
    seconds = rows[best_of_ours]["median_s"]
    speedup = {name: row["median_s"] / seconds for name, row in rows.items() if name not in present}
    right = [name for name in speedup if rows[name]["within_tolerance"]]
    best = min(right, key=speedup.__getitem__, default=None)
    return {
        "ours": best_of_ours,
        "speedup": speedup,
        "best_peer": best,
        "speedup_over_best": None if best is None else speedup[best],
    }


def times_as_fast(
    rows: dict[str, dict[str, Any]], ours: Iterable[str], peer: str
) -> dict[str, float]:
    """How many times as fast as one peer each of ours is; nothing where either did not run."""
    if peer not in rows:
        return {}
    seconds = rows[peer]["median_s"]
    return {name: seconds / rows[name]["median_s"] for name in ours if name in rows}
