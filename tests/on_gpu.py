"""What `make gpu` runs after the build: tests, the benchmark and compute-sanitizer, in one time.

The stages follow each other, what proves most first; the parts of a stage run side by side. Only
the benchmark is alone, for it is the one that measures. A part ends when its own time is over, or
that of the whole. Then gpu.log has all that it printed, and gpu.jsonl a line: who ends the whole
loses what was still to come and no more.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

import deadline
import torch

HERE = Path(__file__).parent
PASSED = "passed"
LEAST = 15.0  # with fewer seconds a part is not begun


@dataclass(frozen=True)
class Part:
    """A command and the most seconds it gets.

    `grace` of them are for what it does when interrupted, `spare` for the test that is running
    when the others are skipped.
    """

    name: str
    command: list[str]
    seconds: float
    spare: float = 0.0
    grace: float = 3.0
    environment: dict[str, str] = field(default_factory=dict)
    required: bool = True  # its failure is one of the whole


@dataclass
class Outcome:
    part: Part
    status: str
    seconds: float = 0.0
    text: str = ""

    @property
    def last_line(self) -> str:
        """Of a sanitizer's output too the line in which pytest counts."""
        lines = self.text.splitlines() or [""]
        counts = [line for line in lines if re.search(r"\d (passed|skipped|failed)", line)]
        return (counts or lines)[-1].strip("= ")

    def figures(self) -> dict[str, str | float]:
        """Its line of gpu.jsonl."""
        named = {"part": self.part.name, "status": self.status}
        return {**named, "seconds": round(self.seconds, 1), "last_line": self.last_line}

    @property
    def failed(self) -> bool:
        return self.part.required and self.status != PASSED


# --- what is run ---------------------------------------------------------------------------------

# The tests of kernels in CUDA C++ have "cuda" in their names, by their file or by their backend.
# These are looked at by compute-sanitizer; those of `test_cuda_attention_large.py` are too large.
ATTENTION_TESTS = ["tests/test_cuda_attention.py", "tests/test_cuda_split.py"]
OTHER_TESTS = [f"tests/test_{op}_kernels.py" for op in ("rotary", "sinusoidal")]
OTHER_TESTS += [f"tests/test_cuda_{op}.py" for op in ("rowwise", "softmax", "swiglu")]
# Calls that torch makes and expects to fail are no errors. Our kernels alone are looked at: torch's
# have hazards of their own; but initcheck has to see who wrote what they read.
OPTIONS = ["--error-exitcode", "99", "--report-api-errors", "no"]
FILTER = ["--kernel-name", "kns=fusedattn"]
TOOLS = {"memcheck": FILTER, "racecheck": FILTER, "synccheck": FILTER, "initcheck": []}


def pytest_command(python: str, *arguments: str, workers: int = 0) -> list[str]:
    """pytest on the gpu-marked tests, in so many processes where pytest-xdist is there."""
    spread = ["-n", str(workers), "--dist", "worksteal"]
    there = workers > 1 and importlib.util.find_spec("xdist") is not None
    # A file that cannot be imported fails, and takes no other with it.
    command = [python, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors"]
    return [*command, *(spread if there else []), *arguments]


def sanitizer_parts(python: str, sanitizer: str | None, seconds: float) -> list[Part]:
    """memcheck and racecheck on all ops; synccheck and initcheck on attention.

    Every allocation is one of CUDA's own, so that what lies past a tensor is known to be foreign.
    """
    if sanitizer is None:
        missing = "import sys; print('compute-sanitizer is not on PATH'); sys.exit(1)"
        return [Part("compute-sanitizer", [python, "-c", missing], seconds)]
    parts = []
    for tool, shown in TOOLS.items():
        groups = {"attention": ATTENTION_TESTS}
        if tool in ("memcheck", "racecheck"):
            groups["other ops"] = OTHER_TESTS
        for name, files in groups.items():
            checked = [sanitizer, "--tool", tool, *OPTIONS, *shown]
            command = [*checked, *pytest_command(python, "-x", "-k", "cuda", *files)]
            alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            part = Part(f"{tool}, {name}", command, seconds, spare=60.0, environment=alone)
            parts.append(part)
    return parts


def stages(python: str, output: Path, cores: int, sanitizer: str | None = None) -> list[list[Part]]:
    """Right before fast, and last what the kernels have passed on the emulator as well."""
    ahead = [python, "-m", "fusedattn.benchmarks.ahead"]
    bench = [python, "-m", "fusedattn", "bench", "--device", "cuda", "--output", str(output)]
    ours = pytest_command(python, "-k", "cuda", "tests", workers=4)
    # The Triton kernels take their first tile instead of timing all: one to compile for each test.
    others = ("--deterministic", "-k", "not cuda", "tests")
    triton = pytest_command(python, *others, workers=cores // 2)
    return [
        [
            Part("CUDA C++ tests", ours, 100.0, spare=25.0),
            Part("Triton tests", triton, 150.0, spare=45.0),
            Part("compiling for the benchmark", ahead, 150.0, required=False),
        ],
        [Part("benchmark", bench, 250.0, grace=25.0)],
        sanitizer_parts(python, sanitizer, 130.0),
    ]


# --- running it ----------------------------------------------------------------------------------


running: set[subprocess.Popen] = set()


def stop(number: int, frame: FrameType | None) -> None:
    """At a signal: end what runs, which has sessions of its own, and this."""
    for process in tuple(running):
        _kill(process)
    raise SystemExit(128 + number)


def run_stage(
    parts: Sequence[Part], end: float, tell: Callable[[Outcome], object] = id
) -> list[Outcome]:
    """Run the parts side by side, until `end` (seconds of the epoch) at the latest.

    `tell` is called with each outcome as soon as it is there.
    """
    with ThreadPoolExecutor(len(parts)) as pool:
        begun = [pool.submit(run_part, part, end) for part in parts]
        for done in as_completed(begun):
            tell(done.result())
        return [done.result() for done in begun]


def run_part(part: Part, end: float) -> Outcome:
    """Run one part and wait for it; it is interrupted `grace` before its time is over."""
    start = time.time()
    seconds = min(part.seconds, end - start)
    if seconds < LEAST:
        return Outcome(part, "not run: no time left")
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                part.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=HERE.parent,
                env={**os.environ, **_environment(part, start + seconds)},
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(part, "failed: it cannot be begun", text=str(error))
        running.add(process)
        status = _finish(process, seconds, part.grace)
        running.discard(process)
        output.seek(0)
        text = output.read().decode(errors="replace").rstrip()
    outcome = Outcome(part, status, time.time() - start, text)
    if part.spare and status == PASSED and not re.search(r"\d passed", outcome.last_line):
        outcome.status = "failed: nothing was checked"
    return outcome


def _environment(part: Part, end: float) -> dict[str, str]:
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    more = {**part.environment, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if part.spare:
        # Where time is short the tests stop sooner, but never at once.
        last = max(end - part.spare, (end + time.time()) / 2)
        more |= {"PYTEST_PLUGINS": "deadline", deadline.END: str(last)}
    return more


def _finish(process: subprocess.Popen, seconds: float, grace: float) -> str:
    """Wait so long; then interrupt it, and end it and its children where that does not help."""
    try:
        code = process.wait(seconds - grace)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        _kill(process)
        process.wait()
        return "ended: its time was over"
    return PASSED if code == 0 else f"failed: exit status {code}"


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class Both:
    """Writes to the terminal and to a file."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, text: str) -> None:
        for each in (sys.stdout, self.file):
            each.write(text)

    def flush(self) -> None:
        for each in (sys.stdout, self.file):
            each.flush()


def summary(outcomes: Sequence[Outcome]) -> str:
    lines = [
        f"{x.part.name:28} {x.seconds:5.0f} s  {x.status:26} {x.last_line[:80]}" for x in outcomes
    ]
    return "\n".join(["", *lines, ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Run all stages; returns 1 where a part that must pass did not."""
    parser = argparse.ArgumentParser(description="what make gpu runs after the build")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--started", type=float, default=time.time(), help="epoch seconds")
    parser.add_argument("--seconds", type=float, default=575.0, help="for everything since then")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("make gpu: torch finds no GPU here (see `fusedattn env`)", file=sys.stderr)
        return 2
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    # Also where they were ignored, which the parts would inherit: a part is interrupted to write
    # what it has.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "/usr/local/cuda/bin/compute-sanitizer"
    )
    outcomes: list[Outcome] = []
    with (output / "gpu.log").open("w") as log, (output / "gpu.jsonl").open("w") as record:
        say = Both(log)
        say.write(f"built after {time.time() - arguments.started:.0f} s\n")

        def tell(outcome: Outcome) -> None:
            say.write(f"\n--- {outcome.part.name} ---\n{outcome.text}\n")
            say.flush()
            record.write(json.dumps(outcome.figures()) + "\n")
            record.flush()

        for stage in stages(sys.executable, output, os.cpu_count() or 1, sanitizer):
            outcomes += run_stage(stage, arguments.started + arguments.seconds, tell)
        say.write(summary(outcomes))
        say.write(f"{time.time() - arguments.started:.0f} s altogether; results in {output}\n")
        say.flush()
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
