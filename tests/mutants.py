"""Wrong lines, planted in a copy of the library one at a time; the named tests have to catch each.

    python tests/mutants.py [word …]     those whose file or tests contain a word; else all

They stand in `planted`. A survivor is a hole in the tests. What the suite drops or merges may lose
none of these, so run it before and after; a new check comes with its mutant. Mutants of C++ take a
build each, of two instruction sets. It is no part of `make test`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import pytest
from planted import cpu, cuda, integrations, ops, triton
from processes import ROOT, SHIPPED

# Of attention in CUDA C++ the emulator gets one dtype and one head dim, "bf16" and "64".
VARIANTS = (('("f16", "bf16")', '("bf16",)'), ('("64", "96", "128", "192", "256")', '("64",)'))
FORK = multiprocessing.get_context("fork")  # of this process, which has imported what takes long
FAULTS = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)
PYTEST = ["-q", "-x", "--deterministic", "--durations=0", "-p", "no:cacheprovider"]
# A compiler that knows no set after avx2: fewer sources to compile.
OLD_COMPILER = '#!/bin/sh\ncase " $* " in *-mavx512f*) exit 1;; esac\nexec g++ "$@"\n'


class Mutant(NamedTuple):
    """`old`, which stands once in `file`, becomes `new`; one of `tests` has to fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def emulated(self) -> bool:
        return self.file.startswith("csrc/cuda")

    @property
    def native(self) -> bool:
        return self.file.startswith("csrc") and not self.emulated

    def __str__(self) -> str:
        return f"{self.file}: {self.old}  →  {self.new or '(nothing)'}"


PLACES = (ops, triton, cpu, cuda, integrations)
MUTANTS = [
    Mutant(file, old, new, tuple(f"tests/test_{test}" for test in tests))
    for place in PLACES
    for file, rows in place.MUTANTS.items()
    for old, new, *tests in rows
]


# --- running them --------------------------------------------------------------------------------


def package(tree: Path, site: Path) -> Path:
    """`site` as a folder from which Python imports the library of `tree`."""
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name, folder in SHIPPED.items():
        shutil.copytree(tree / folder, site / name, ignore=ignored, dirs_exist_ok=True)
    return site


def run(tests: tuple[str, ...], site: Path) -> str:
    """What comes of the tests: "passed", the first that failed, or why they could not run."""
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(site)
    sys.path.insert(0, str(site))
    sys.setdlopenflags(os.RTLD_LAZY)  # the emulator's module lacks the kernels of other head dims
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        status = pytest.main([*PYTEST, *tests])
    failed = re.search(r"^FAILED (.*?)(?: - .*)?$", text.getvalue(), re.MULTILINE)
    if status == 1 and failed:
        return failed[1]
    return "passed" if status == 0 else f"BROKEN: {text.getvalue()[-2000:]}"


def run_aside(tests: tuple[str, ...], site: Path) -> str:
    """`run` in a process of its own, which a wrong line of C++ may kill: then it is caught."""
    found = site.with_name("found")
    process = FORK.Process(target=lambda: found.write_text(run(tests, site)))
    process.start()
    process.join()
    if -process.exitcode in FAULTS:
        return f"{tests[0]} …: {signal.Signals(-process.exitcode).name}"
    return found.read_text() if process.exitcode == 0 else f"BROKEN: exit {process.exitcode}"


def build(tree: Path, emulator: bool) -> None:
    """The native CPU module of a tree, in place, or that of the emulator."""
    environment = {**os.environ, "FUSEDATTN_CUDA_ARCHS": "none"}
    what = ["build_emulator"] if emulator else ["build_ext", "--inplace"]
    command = [sys.executable, "setup.py", "-q", *what]
    subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, check=True)


def make_tree(folder: Path, native: bool, emulated: bool) -> Path:
    """The sources; what is to be built with the old compiler, so that little is left to build."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    for name in ("csrc", *SHIPPED.values()):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("results"))
    compiler = folder / "g++"
    compiler.write_text(OLD_COMPILER)
    compiler.chmod(0o755)
    os.environ["CXX"] = str(compiler)  # for copies, too: a command that differs is run again
    path = folder / "csrc/native_build.py"
    text = path.read_text()
    for old, new in VARIANTS:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    for emulator, wanted in ((False, native), (True, emulated)):
        if wanted:
            build(folder, emulator)
    return folder


def try_out(mutant: Mutant | None, tree: Path, tests: tuple[str, ...]) -> str:
    """The mutant, or None, in a copy of the sources in `tree`."""
    with tempfile.TemporaryDirectory() as name:
        changed = shutil.copytree(tree, Path(name, "tree"))
        if mutant:
            path = changed / mutant.file
            text = path.read_text()
            if text.count(mutant.old) != 1:
                return f"STALE: the old text stands there {text.count(mutant.old)} times"
            path.write_text(text.replace(mutant.old, mutant.new))
            if mutant.native or mutant.emulated:
                build(changed, mutant.emulated)
        return run_aside(tests, package(changed, Path(name, "site")))


def main(words: list[str]) -> int:
    """Returns 1 if one is not caught, or its tests fail without it."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in ("hypothesis", "torch._dynamo", "triton"):
        importlib.import_module(name)
    assert "fusedattn" not in sys.modules, "each process has one of its own"
    about = {x: f"{x.file} {' '.join(x.tests)}" for x in MUTANTS}
    chosen = [x for x in MUTANTS if not words or any(word in about[x] for word in words)]
    begun = time.time()
    with tempfile.TemporaryDirectory() as name, ThreadPool(2) as pool:
        tree = make_tree(Path(name), any(x.native for x in chosen), any(x.emulated for x in chosen))
        tests = tuple(dict.fromkeys(test for x in chosen for test in x.tests))
        sound = pool.apply_async(try_out, (None, tree, tests))
        found = [pool.apply_async(try_out, (x, tree, x.tests)) for x in chosen]
        caught = 0
        for mutant, outcome in zip(chosen, found, strict=True):
            text = outcome.get()
            caught += text.startswith("tests/")
            print(f"{mutant}\n    {text.replace('passed', 'SURVIVED')}", flush=True)
        print(f"without any: {sound.get()}")
    print(f"{caught} of {len(chosen)} caught, {time.time() - begun:.0f} s")
    return int(caught < len(chosen) or sound.get() != "passed")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
