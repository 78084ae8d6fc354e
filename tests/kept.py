"""What compilers have made of sources, kept in build/tests until one of them changes.

Everything that goes in is part of the key: the files by their contents, the tools by their
versions or hashes, the environment that they read. `make clean` removes it all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from processes import ROOT

KEPT = ROOT / "build/tests"


def digest(*contents: Path | str) -> str:
    """Of files and of texts."""
    found = hashlib.sha256()
    for each in contents:
        data = each.read_bytes() if isinstance(each, Path) else each.encode()
        found.update(len(data).to_bytes(8, "big") + data)
    return found.hexdigest()


def digests(paths: Iterable[Path]) -> dict[str, str]:
    """Of files, and of all that folders hold, by their names in the repository."""
    files = (p for path in paths for p in (path.rglob("*") if path.is_dir() else [path]))
    return {str(p.relative_to(ROOT)): digest(p) for p in sorted(files) if p.is_file()}


def imported_sources() -> dict[str, str]:
    """The Python files of the repository that this process has read, with their digests."""
    names = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    paths = {Path(name) for name in names if name and name.endswith(".py")}
    ours = (p for p in paths if p.is_relative_to(ROOT) and "site-packages" not in p.parts)
    return digests(ours)


def triton_and_its_tools() -> str:
    """Triton and the ptxas and cuobjdump in its package, whose RECORD has a hash of every file."""
    record = importlib.metadata.distribution("triton").read_text("RECORD") or ""
    told = sorted(f"{name}={x}" for name, x in os.environ.items() if name.startswith("TRITON_"))
    return digest(record, sys.version, importlib.metadata.version("torch"), *told)


def load(name: str, tools: str, sources: dict[str, str] | None = None) -> Any:
    """What `store` was given, if by these tools and from these sources; else None.

    Without `sources`: if those that it was made from are now what they were.
    """
    path = KEPT / f"{name}.json"
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    now = digests(ROOT / each for each in kept["sources"]) if sources is None else sources
    return kept["made"] if (kept["tools"], kept["sources"]) == (tools, now) else None


def store(name: str, tools: str, sources: dict[str, str], made: Any, begun: float) -> None:
    """Keep `made`, which JSON can hold and was begun at that time, unless a source is newer."""
    if any((ROOT / each).stat().st_mtime >= begun for each in sources):
        return
    KEPT.mkdir(parents=True, exist_ok=True)
    fresh = KEPT / f"{name}.{os.getpid()}"
    fresh.write_text(json.dumps({"tools": tools, "sources": sources, "made": made}))
    fresh.replace(KEPT / f"{name}.json")
