"""What `make gpu` runs after the build: its order, its time, and that a failure is one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import deadline
import on_gpu
import pytest
from on_gpu import Part
from ops import OPS

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


def python(name: str, code: str, seconds: float = 60.0, **options) -> Part:
    return Part(name, [sys.executable, "-c", textwrap.dedent(code)], seconds, **options)


def run(*parts: Part, seconds: float = 60.0) -> list[on_gpu.Outcome]:
    return on_gpu.run_stage(parts, time.time() + seconds)


# --- what is run ---------------------------------------------------------------------------------


def test_the_benchmark_is_alone_and_all_fits_into_ten_minutes(tmp_path):
    found = on_gpu.stages("python", tmp_path, 16, "compute-sanitizer")
    names = [[part.name for part in stage] for stage in found]
    assert names[0][:2] == ["CUDA C++ tests", "Triton tests"]
    assert names[1] == ["benchmark"]
    assert {"memcheck, attention", "racecheck, attention", "racecheck, other ops"} <= set(names[2])
    # The build has the rest.
    assert sum(max(part.seconds for part in stage) for stage in found) <= 575 - 45
    for part in (part for stage in found for part in stage):
        assert part.spare + part.grace < part.seconds
    assert str(tmp_path) in found[1][0].command


def test_every_gpu_test_and_every_op_is_asked_for(tmp_path):
    found = on_gpu.stages(sys.executable, tmp_path, 16, "compute-sanitizer")
    parts = {part.name: part.command for stage in found for part in stage}
    for name, words in (("CUDA C++ tests", "cuda"), ("Triton tests", "not cuda")):
        assert parts[name][-3:] == ["-k", words, "tests"]
    files = {*on_gpu.ATTENTION_TESTS, *on_gpu.OTHER_TESTS}
    assert all((HERE.parent / name).is_file() for name in files)
    covered = {op for op in OPS for name in files if op.split("_")[-1] in name}
    assert set(OPS) - covered == {"layer_norm", "rms_norm"}  # in test_cuda_rowwise.py
    for tool in ("memcheck", "racecheck"):
        checked = [command for name, command in parts.items() if name.startswith(tool)]
        assert {word for command in checked for word in command if word in files} == files
        for command in checked:
            assert command[command.index("--error-exitcode") + 1] != "0"
            assert command.index("--error-exitcode") < command.index(sys.executable)


def test_without_compute_sanitizer_the_whole_fails_and_says_so(tmp_path):
    missing = on_gpu.sanitizer_parts(sys.executable, None, 60.0)
    (outcome,) = run(*missing)
    assert outcome.failed
    assert "compute-sanitizer is not on PATH" in on_gpu.summary([outcome])


# --- running it ----------------------------------------------------------------------------------


def test_parts_of_a_stage_run_side_by_side_and_tell_what_they_printed(tmp_path):
    meet = """
        import pathlib, sys, time
        mine, other = (pathlib.Path(sys.prefix and p) for p in {paths})
        mine.touch()
        while not other.exists(): time.sleep(0.01)
        print("met")
    """
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    parts = [python(n, meet.format(paths=p)) for n, p in (("a", paths), ("b", paths[::-1]))]
    outcomes = run(*parts, python("wrong", "print('so'); raise SystemExit(3)"))
    assert [x.status for x in outcomes] == ["passed", "passed", "failed: exit status 3"]
    assert [x.last_line for x in outcomes] == ["met", "met", "so"]
    assert [x.failed for x in outcomes] == [False, False, True]


def test_a_part_whose_failure_is_none_of_the_whole():
    (outcome,) = run(python("ahead", "raise SystemExit(1)", required=False))
    assert outcome.status.startswith("failed")
    assert not outcome.failed


@pytest.fixture
def no_least(monkeypatch):
    """Parts of a few seconds are begun."""
    monkeypatch.setattr(on_gpu, "LEAST", 0.0)


@pytest.mark.usefixtures("no_least")
def test_a_part_is_interrupted_with_time_to_write_what_it_has(tmp_path):
    code = f"""
        import pathlib, time
        try:
            print("begun", flush=True)
            time.sleep(600)
        finally:
            pathlib.Path({str(tmp_path / "kept")!r}).touch()
    """
    # As on_gpu.py does: jobs in a shell's background ignore the signal, and hand that on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        (outcome,) = run(python("long", code, 8.0, grace=5.0))
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.status == "ended: its time was over"
    assert outcome.failed
    assert outcome.text.startswith("begun")
    assert (tmp_path / "kept").exists()
    assert outcome.seconds < 8


@pytest.mark.usefixtures("no_least")
def test_a_part_that_does_not_listen_is_ended_with_its_children():
    code = """
        import signal, subprocess, sys, time
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, flush=True)
        time.sleep(600)
    """
    (outcome,) = run(python("deaf", code, 5.0, grace=1.0))
    assert outcome.status == "ended: its time was over"
    child = Path(f"/proc/{outcome.text}/status")
    end = time.time() + 10
    while child.exists() and "zombie" not in child.read_text():
        assert time.time() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("counts", "status"),
    [
        ("=== 3 passed, 9 skipped in 2s ===", "passed"),
        ("9 skipped in 2s", "failed: nothing was checked"),
    ],
)
def test_tests_that_are_all_skipped_have_checked_nothing(counts, status):
    code = f"print({counts!r}); print('===== ERROR SUMMARY: 0 errors')"
    (outcome,) = run(python("memcheck", code, spare=10.0))
    assert outcome.status == status
    assert outcome.last_line == counts.strip("= ")


def test_nothing_is_begun_in_the_last_seconds():
    (outcome,) = run(python("late", "print('ran')"), seconds=5.0)
    assert outcome.status == "not run: no time left"
    assert outcome.failed


def test_a_part_that_cannot_be_begun_takes_no_other_with_it():
    missing = Part("missing", ["/nowhere/python"], 60.0)
    outcomes = run(missing, python("other", "print('ran')"))
    assert [x.status for x in outcomes] == ["failed: it cannot be begun", "passed"]
    assert "/nowhere/python" in outcomes[0].text


def test_what_a_part_says_is_told_before_the_others_end():
    told = []
    slow = python("slow", "import time; time.sleep(1)")
    on_gpu.run_stage([slow, python("fast", "print(7)")], time.time() + 60, told.append)
    assert [x.part.name for x in told] == ["fast", "slow"]


IGNORING = """
import signal, sys
import on_gpu
signal.signal(signal.SIGINT, signal.SIG_IGN)
on_gpu.LEAST = 0.0
on_gpu.torch.cuda.is_available = lambda: True
part = on_gpu.Part("one", [sys.executable, "-c", {code}], {seconds}, grace=1.0)
on_gpu.stages = lambda *_: [[part]]
sys.exit(on_gpu.main(["--output", {output}]))
"""


def on_gpu_alone(tmp_path: Path, code: str, seconds: float) -> subprocess.Popen:
    """on_gpu's main with one part, where interrupts are ignored, as in a shell's background."""
    text = IGNORING.format(code=repr(code), seconds=seconds, output=repr(str(tmp_path)))
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    return subprocess.Popen([sys.executable, "-c", text], env=environment)


def test_a_part_is_interrupted_where_interrupts_were_ignored(tmp_path):
    code = f"""
import pathlib, time
try: time.sleep(600)
finally: pathlib.Path({str(tmp_path / "kept")!r}).touch()
"""
    assert on_gpu_alone(tmp_path, code, 3.0).wait(60) == 1
    assert (tmp_path / "kept").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_ended_ends_its_parts(tmp_path, number):
    file = tmp_path / "pid"
    code = f"""
import os, pathlib, time
pathlib.Path({str(file)!r}).write_text(str(os.getpid()))
time.sleep(600)
"""
    whole = on_gpu_alone(tmp_path, code, 600.0)
    end = time.time() + 60
    while not (file.exists() and file.read_text()):
        assert time.time() < end
        time.sleep(0.05)
    child = Path(f"/proc/{file.read_text()}/status")
    whole.send_signal(number)
    assert whole.wait(30) == 128 + number
    assert not child.exists() or "zombie" in child.read_text()


def test_what_has_ended_is_on_disk_before_the_rest(monkeypatch, tmp_path):
    """The second part finds what became of the first in both files, written by then."""
    look = f"""
        import json, pathlib
        folder = pathlib.Path({str(tmp_path)!r})
        found = json.loads((folder / "gpu.jsonl").read_text())
        assert found["part"] == "first"
        assert found["status"] == "failed: exit status 3"
        assert found["last_line"] == "three"
        assert "--- first ---\\nthree" in (folder / "gpu.log").read_text()
        """
    first = python("first", "print('three'); raise SystemExit(3)", required=False)
    monkeypatch.setattr(on_gpu, "stages", lambda *arguments: [[first], [python("second", look)]])
    monkeypatch.setattr(on_gpu.torch.cuda, "is_available", lambda: True)
    assert on_gpu.main(["--output", str(tmp_path)]) == 0


def test_main_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(on_gpu.torch.cuda, "is_available", lambda: False)
    assert on_gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 4])
def test_main_writes_a_log_and_fails_where_a_part_does(monkeypatch, capsys, tmp_path, code):
    stages = [[python("first", f"print('one'); raise SystemExit({code})")], [python("second", "")]]
    monkeypatch.setattr(on_gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(on_gpu, "stages", lambda *arguments: stages)
    assert on_gpu.main(["--output", str(tmp_path / "out")]) == int(code != 0)
    printed = capsys.readouterr().out
    assert (tmp_path / "out/gpu.log").read_text() == printed
    lines = (tmp_path / "out/gpu.jsonl").read_text().splitlines()
    assert [json.loads(line)["part"] for line in lines] == ["first", "second"]
    assert json.loads(lines[1])["status"] == "passed"
    assert "--- first ---\none\n" in printed
    assert "second" in printed.partition("--- second ---")[2]


# --- the tests' deadline -------------------------------------------------------------------------

SUITE = """
import pytest
@pytest.mark.parametrize("n", range(4))
def test_some(n): pass
"""


@pytest.mark.parametrize(
    ("left", "says", "workers"),
    [(-1.0, "4 skipped", 2), (600.0, "4 passed", 0)],
)
def test_after_the_deadline_tests_are_skipped(tmp_path, left, says, workers):
    (tmp_path / "test_some.py").write_text(SUITE)
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTEST_PLUGINS": "deadline"}
    environment[deadline.END] = str(time.time() + left)
    command = on_gpu.pytest_command(sys.executable, workers=workers)
    command[command.index("-m", 3) : command.index("gpu") + 1] = []
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert says in done.stdout


def test_a_file_that_cannot_be_imported_takes_no_other_with_it(tmp_path):
    (tmp_path / "test_broken.py").write_text("import a_module_that_is_not_there")
    (tmp_path / "test_some.py").write_text(SUITE)
    command = on_gpu.pytest_command(sys.executable)
    command[command.index("-m", 3) : command.index("gpu") + 1] = []
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "4 passed, 1 error" in done.stdout
