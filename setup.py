"""Builds the native modules with ninja; all that is declared stands in pyproject.toml.

Torch is not needed here: native code sees a tensor as pointer, shape, strides and dtype. Without
a working C++ compiler the package still installs, with its Triton and reference backends.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

# --- what is compiled, and how -------------------------------------------------------------------

COMPILE_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",  # sqrt and friends become single instructions
    "-fno-trapping-math",  # lets selects vectorise; NaN and infinity keep their meaning
    "-ffp-contract=fast",  # a * b + c is one instruction where there is one
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",  # GCC 12's own AVX-512 headers
]
LINK_FLAGS = ["-shared", "-fopenmp"]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]

# csrc/cpu/isa_<name>.cpp gets the flags of its row; sources in csrc/cpu/rowwise are compiled for
# each row but those of TILES_ONLY, in the namespace that -DFUSEDATTN_ISA=<name> gives. A compiler
# that does not know the flags (an older one, or one for another processor) leaves the set out.
# Every other source learns what is there from -DFUSEDATTN_HAS_<NAME>=1.
ISA_FLAGS = {
    "generic": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx": AMX,
}
TILES_ONLY = {"amx"}

ROOT = Path(__file__).parent.resolve()

# --- the compiler --------------------------------------------------------------------------------

TOOLCHAIN_PROBE = """
#if defined(__clang__)
#error "Clang brings its own OpenMP runtime, a second one beside the libgomp of torch: use GCC"
#endif
#include <Python.h>
#include <omp.h>
int probe() { return omp_get_max_threads() + Py_IsInitialized(); }
"""


def find_compiler() -> list[str]:
    """The C++ compiler's command: $CXX if set, else the first one on PATH; [] without any."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["g++"], ["c++"]]
    return next((command for command in candidates if shutil.which(command[0])), [])


def compile_error(compiler: list[str], source: str, flags: list[str]) -> str:
    """What the compiler says against `source` under `flags`; empty when it accepts them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source)
        command = [*compiler, str(path), "-o", str(path.with_suffix(".out")), *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stderr.strip() or f"exit status {done.returncode}") if done.returncode else ""


def why_not_native(compiler: list[str]) -> str:
    """Why no native module can be built here; empty when one can."""
    if os.name != "posix":
        return f"native modules are built on POSIX systems only, this is {sys.platform}"
    if not compiler:
        return f"no C++ compiler found (looked for {os.environ.get('CXX') or 'g++, c++'})"
    flags = [*COMPILE_FLAGS, *LINK_FLAGS, f"-I{sysconfig.get_path('include')}"]
    error = compile_error(compiler, TOOLCHAIN_PROBE, flags)
    if error:
        return f"{shlex.join(compiler)} cannot build a Python module with OpenMP:\n{error}"
    return ""


def knows(compiler: list[str], flags: list[str]) -> bool:
    """Whether the compiler accepts `flags`."""
    return not compile_error(compiler, "int probe() { return 0; }", ["-c", *flags])


# --- the build -----------------------------------------------------------------------------------


class Unit(NamedTuple):
    """One source file on its way to an object file."""

    source: Path
    object: Path
    flags: list[str]


def plan(compiler: list[str], ext: Extension, folder: Path) -> list[Unit]:
    """The units of an extension, in the order in which they are linked.

    Raises:
        SetupError: a file isa_<name>.cpp has no row in ISA_FLAGS.
    """
    import pybind11

    isa_files: dict[str, Path] = {}
    rowwise: list[Path] = []
    other_files: list[Path] = []
    for source in map(Path, ext.sources):
        if source.parent.name == "rowwise":
            rowwise.append(source)
        elif not source.stem.startswith("isa_"):
            other_files.append(source)
        elif (isa := source.stem.removeprefix("isa_")) not in ISA_FLAGS:
            raise SetupError(f"{source}: setup.py has no row {isa!r} in ISA_FLAGS")
        elif knows(compiler, ISA_FLAGS[isa]):
            isa_files[isa] = source
        else:
            print(f"leaving out {source}: {compiler[0]} does not know {' '.join(ISA_FLAGS[isa])}")

    # Kernels see csrc alone; only the bindings see Python.
    common = [*COMPILE_FLAGS, *(f"-I{path}" for path in ext.include_dirs)]
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    present = [f"-DFUSEDATTN_HAS_{isa.upper()}=1" for isa in isa_files]
    units = [
        Unit(path, folder / f"{path.stem}.o", [*common, *present, *python]) for path in other_files
    ]
    # Of an inline function compiled several times the linker keeps the first copy, so the files
    # that every processor can run come first and the most demanding ones come last.
    for isa in (isa for isa in ISA_FLAGS if isa in isa_files):
        flags = [*common, *ISA_FLAGS[isa]]
        units.append(Unit(isa_files[isa], folder / f"isa_{isa}.o", flags))
        if isa not in TILES_ONLY:
            named = [*flags, f"-DFUSEDATTN_ISA={isa}"]
            units += (Unit(path, folder / f"{path.stem}_{isa}.o", named) for path in rowwise)
    return units


def write_ninja_file(path: Path, compiler: list[str], units: list[Unit], module: Path) -> None:
    """Write the build of `module`; all paths in it are relative to the repository."""
    from ninja import ninja_syntax

    def quoted(words: list[str]) -> str:
        return ninja_syntax.escape(shlex.join(words))

    with open(path, "w", encoding="utf-8") as file:
        ninja = ninja_syntax.Writer(file)
        ninja.variable("builddir", str(module.parent))
        ninja.rule(
            "compile",
            f"{quoted(compiler)} $flags -MD -MF $out.d -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="compiling $in",
        )
        ninja.rule(
            "link",
            f"{quoted(compiler)} $in -o $out {quoted(LINK_FLAGS)}",
            description="linking $out",
        )
        for unit in units:
            variables = {"flags": quoted(unit.flags)}
            ninja.build(str(unit.object), "compile", str(unit.source), variables=variables)
        ninja.build(str(module), "link", [str(unit.object) for unit in units])


def run_ninja(path: Path, compiler: list[str], units: list[Unit], jobs: int | None) -> None:
    """Build what `path` describes.

    Raises:
        CompileError: naming each file that failed and its flags.
    """
    import ninja

    command = [os.path.join(ninja.BIN_DIR, "ninja"), "-f", str(path), "-k", "0"]
    command += ["-j", str(jobs)] if jobs else []
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(done.stdout, end="", flush=True)
    if done.returncode == 0:
        return
    failed = set(re.findall(r"^FAILED: .*?(\S+) *$", done.stdout, re.MULTILINE))
    reports = [
        f"{unit.source} did not compile\n  compiler: {shlex.join(compiler)}\n"
        f"  flags: {shlex.join(unit.flags)}"
        for unit in units
        if str(unit.object) in failed
    ]
    raise CompileError("\n".join(reports) or f"{path} failed\n{done.stdout}")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time in `folder`; the system frees the lock of a build that was killed."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class NinjaBuild(build_ext):
    """Compiles an extension's sources in parallel, and the next time only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        # Not build_temp: every editable install gets a new one, and nothing would be reused.
        folder = Path("build", "native-" + sysconfig.get_config_var("SOABI"))
        module = folder / f"{ext.name}.so"
        target = Path(self.get_ext_fullpath(ext.name))
        compiler = find_compiler()
        with locked(ROOT / folder):
            units = plan(compiler, ext, folder)
            write_ninja_file(ROOT / folder / "build.ninja", compiler, units, module)
            run_ninja(folder / "build.ninja", compiler, units, self.parallel)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(ROOT / module), str(target))


def native_modules() -> list[Extension]:
    """The native modules that can be built here: _cpu. A CUDA module would join this list."""
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").rglob("*.cpp"))
    reason = why_not_native(find_compiler()) if sources else "csrc/cpu holds no sources"
    if reason:
        print(
            f"fusedattn installs WITHOUT native CPU kernels: {reason}\n"
            "The Triton and reference backends work. For the CPU kernels install GCC and Python's "
            "headers (Debian, Ubuntu: apt-get install g++ python3-dev), then repeat the "
            "installation with --no-cache-dir --force-reinstall --no-deps.",
            file=sys.stderr,
        )
        return []
    return [Extension("fusedattn._cpu", sources, include_dirs=["csrc", "csrc/include", "csrc/cpu"])]


FOLDERS = {"": "python", "fusedattn.kernels": "kernels", "fusedattn.benchmarks": "benchmarks"}

setup(
    packages=[*find_packages("python"), *filter(None, FOLDERS)],
    package_dir=FOLDERS,
    ext_modules=native_modules(),
    cmdclass={"build_ext": NinjaBuild},
)
