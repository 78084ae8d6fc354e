"""The package as a user builds it: what it needs and links, and how it is compiled."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from fusedattn import _native
from processes import PATIENCE, ROOT, SHIPPED

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
needs_native = pytest.mark.skipif(_native.cpu is None, reason="needs fusedattn._cpu")


def run(
    *command: object, cwd: Path, check: bool = True, timeout: int = PATIENCE, **environment: str
) -> str:
    """Both outputs of a command; with `check` it has to succeed, without it has to fail."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert (done.returncode == 0) == check, done.stdout
    return done.stdout


# --- what is here --------------------------------------------------------------------------------


def test_torch_is_the_only_requirement() -> None:
    requirements = importlib.metadata.requires("fusedattn") or []
    assert [line for line in requirements if "extra ==" not in line] == ["torch>=2.11"]


def test_native_code_includes_no_torch_header() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    includes = {
        (str(path.relative_to(ROOT)), name)
        for path in sources
        for name in re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
    }
    assert includes
    assert not {pair for pair in includes if re.match(r"torch|ATen|c10", pair[1])}


@needs_compiler
def test_native_module_is_built_where_there_is_a_compiler() -> None:
    assert _native.cpu is not None, _native.cpu_error


@needs_native
def test_native_module_needs_libgomp_and_no_other_openmp() -> None:
    if not shutil.which("readelf"):
        pytest.skip("needs readelf")
    dynamic = run("readelf", "-d", _native.cpu.__file__, cwd=ROOT)
    needed = re.findall(r"NEEDED.*\[(.+?)\]", dynamic)
    assert [name for name in needed if re.search(r"omp", name)] == ["libgomp.so.1"]


CALL = """
import re, torch, fusedattn
q = torch.randn(2, 2, 64, 16)
fusedattn.attention(q, q, q, backend="cpu")
maps = open("/proc/self/maps").read()
print(sorted(set(re.findall(r"/\\S*lib(?:gomp|omp|iomp)\\S*", maps))))
"""


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("first", ["numpy", "fusedattn"])  # which begins with torch
def test_process_holds_one_openmp_runtime(first: str) -> None:
    libraries = run(sys.executable, "-c", f"import {first}, numpy\n{CALL}", cwd=ROOT)
    assert re.fullmatch(r"\['\S+/torch\S*/libgomp\S*'\]", libraries.strip())


def test_import_loads_nothing_optional() -> None:
    code = "import sys, fusedattn; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(run(sys.executable, "-c", code, cwd=ROOT).split())
    assert not loaded & {"triton", "transformers", "rich", "matplotlib", "onnxruntime", "openvino"}


# --- how it is built: setup.py on small sources --------------------------------------------------


def make_tree(folder: Path) -> Path:
    """A source tree whose native module is three files of a few lines."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "csrc").mkdir()
    for module in (ROOT / "csrc").glob("*.py"):
        shutil.copy(module, folder / "csrc")
    for package in SHIPPED.values():
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    sources = {
        "csrc/include/seven.h": "#pragma once\nint seven();\n",
        "csrc/cpu/isa_generic.cpp": '#include "seven.h"\nint seven() { return 7; }\n',
        "csrc/cpu/isa_avx2.cpp": '#include "seven.h"\nint fast_seven() { return 7; }\n',
        "csrc/cpu/module.cpp": '#include <Python.h>\n#include "seven.h"\n'
        'static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr};\n'
        "PyMODINIT_FUNC PyInit__cpu() { seven(); return PyModule_Create(&module); }\n",
    }
    for name, text in sources.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path)


def build(tree: Path, check: bool = True, **environment: str) -> str:
    return run(sys.executable, "setup.py", "-q", "build_ext", cwd=tree, check=check, **environment)


@needs_compiler
def test_rebuild_compiles_what_has_changed(tree: Path) -> None:
    assert {"module.cpp", "isa_generic.cpp"} <= set(re.findall(r"\w+\.cpp", build(tree)))
    assert "compiling" not in build(tree)
    (tree / "csrc/include/seven.h").write_text("#pragma once\nint seven(void);\n")
    assert "compiling csrc/cpu/isa_generic.cpp" in build(tree)


@needs_compiler
def test_build_error_names_file_and_flags(tree: Path) -> None:
    (tree / "csrc/cpu/isa_generic.cpp").write_text("int seven() { return eight; }\n")
    log = build(tree, check=False, LC_ALL="C")
    assert "error: csrc/cpu/isa_generic.cpp did not compile\n  compiler: " in log
    assert "  flags: -std=" in log
    assert "'eight' was not declared" in log


@needs_compiler
def test_simultaneous_builds_compile_once(tree: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    builds = [
        subprocess.Popen(command, cwd=tree, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    logs = [process.communicate(timeout=120)[0] for process in builds]
    assert [process.returncode for process in builds] == [0, 0, 0]
    assert "".join(logs).count("compiling csrc/cpu/module.cpp") == 1


def compiler_that(tree: Path, on: str, does: str) -> str:
    """g++, but for command lines that match a shell pattern."""
    compiler = tree / "peculiar-g++"
    compiler.write_text(f'#!/bin/sh\ncase " $* " in {on}) {does};; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    return str(compiler)


@needs_compiler
def test_build_after_a_killed_one(tree: Path) -> None:
    slow = compiler_that(tree, on="*isa_generic.cpp*", does="touch compiling; sleep 5; exit 1")
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    killed = subprocess.Popen(
        command, cwd=tree, env={**os.environ, "CXX": slow}, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (tree / "compiling").exists():
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert "compiling csrc/cpu/isa_generic.cpp" in build(tree)


@needs_compiler
def test_unknown_flag_leaves_the_file_out(tree: Path) -> None:
    old = compiler_that(tree, on='*" -mavx2 "*', does='echo "unknown -mavx2" >&2; exit 1')
    log = build(tree, CXX=old)
    assert "leaving out csrc/cpu/isa_avx2.cpp" in log
    assert "compiling csrc/cpu/isa_generic.cpp" in log
    assert "HAS_AVX2" not in next((tree / "build").rglob("build.ninja")).read_text()


@needs_compiler
def test_source_distribution_builds(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run(sys.executable, "setup.py", "-q", "sdist", cwd=tree)
    (archive,) = (tree / "dist").iterdir()
    unpacked = tmp_path_factory.mktemp("sdist")
    shutil.unpack_archive(archive, unpacked)
    (source,) = unpacked.iterdir()
    assert "compiling csrc/cpu/module.cpp" in build(source)


def test_editable_install_shows_type_checkers_its_sources(tree: Path) -> None:
    """They run no import hooks, on which the other packages depend."""
    options = ("--dist-dir", tree / "dist")
    run(sys.executable, "setup.py", "-q", "editable_wheel", *options, cwd=tree, CXX="/nonexistent")
    (archive,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(archive) as file:
        paths = {name: file.read(name).decode() for name in file.namelist() if ".pth" in name}
    assert paths.pop("fusedattn.pth") == f"{tree / 'python'}\n"
    assert "import" in "".join(paths.values())
