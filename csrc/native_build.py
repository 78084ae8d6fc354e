"""How native code is compiled: the units of each module, and the ninja file that builds them."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension
from setuptools.errors import CompileError, SetupError
from toolchain import (
    COMPILE_FLAGS,
    EMULATOR_FLAGS,
    ISA_FLAGS,
    LINK_FLAGS,
    NVCC_FLAGS,
    NVCC_LINK_FLAGS,
    TILES_ONLY,
    cuda_targets,
    find_nvcc,
    knows,
    target_flags,
)

ROOT = Path(__file__).parents[1].resolve()

# A source in csrc/cuda/sm80 is compiled once for each row, which -D passes on: an object file has
# one instantiation of its kernels, so that they compile side by side and none takes long.
VARIANTS = [
    {"FUSEDATTN_ELEMENT": element, "FUSEDATTN_HEAD_DIM": head_dim}
    for element in ("f16", "bf16")
    for head_dim in ("64", "96", "128", "192", "256")
]

# --- the units of each module --------------------------------------------------------------------


class Unit(NamedTuple):
    """One source file on its way to an object file."""

    source: Path
    object: Path
    compiler: list[str]
    flags: list[str]


class Module(NamedTuple):
    """What one native module is made of: units in the order in which they are linked."""

    units: list[Unit]
    linker: list[str]
    link_flags: list[str]


def python_flags() -> list[str]:
    """What the bindings need beside the flags of kernels, which see csrc alone."""
    import pybind11

    return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]


def plan_cpu(compiler: list[str], ext: Extension, folder: Path) -> Module:
    """The units of _cpu.

    Raises:
        SetupError: a file isa_<name>.cpp has no row in ISA_FLAGS.
    """
    isa_files: dict[str, Path] = {}
    rowwise: list[Path] = []
    other_files: list[Path] = []
    for source in map(Path, ext.sources):
        if source.parent.name == "rowwise":
            rowwise.append(source)
        elif not source.stem.startswith("isa_"):
            other_files.append(source)
        elif (isa := source.stem.removeprefix("isa_")) not in ISA_FLAGS:
            raise SetupError(f"{source}: csrc/toolchain.py has no row {isa!r} in ISA_FLAGS")
        elif knows(compiler, ISA_FLAGS[isa]):
            isa_files[isa] = source
        else:
            print(f"leaving out {source}: {compiler[0]} does not know {' '.join(ISA_FLAGS[isa])}")

    common = [*COMPILE_FLAGS, *(f"-I{path}" for path in ext.include_dirs)]
    present = [f"-DFUSEDATTN_HAS_{isa.upper()}=1" for isa in isa_files]
    # Outside the kernels nothing is worth the time of -O3.
    host = [*common, "-O2", *present, *python_flags()]
    units = [Unit(path, folder / f"{path.stem}.o", compiler, host) for path in other_files]
    # Of an inline function compiled several times the linker keeps the first copy, so the files
    # that every processor can run come first and the most demanding ones come last.
    for isa in (isa for isa in ISA_FLAGS if isa in isa_files):
        flags = [*common, *ISA_FLAGS[isa]]
        units.append(Unit(isa_files[isa], folder / f"isa_{isa}.o", compiler, flags))
        if isa not in TILES_ONLY:
            # Written in vectors and unrolled as they are: -O3 takes longer and gains nothing.
            named = [*flags, "-O2", f"-DFUSEDATTN_ISA={isa}"]
            units += (
                Unit(path, folder / f"{path.stem}_{isa}.o", compiler, named) for path in rowwise
            )
    return Module(units, compiler, LINK_FLAGS)


def variants_of(source: Path, compiler: list[str], flags: list[str], folder: Path) -> list[Unit]:
    """A kernel source of csrc/cuda as one unit, or as one for each row of VARIANTS."""
    if source.parent.name != "sm80":
        return [Unit(source, folder / f"{source.stem}.o", compiler, flags)]
    return [
        Unit(
            source,
            folder / f"{'_'.join((source.stem, *row.values()))}.o",
            compiler,
            [*flags, *(f"-D{name}={value}" for name, value in row.items())],
        )
        for row in VARIANTS
    ]


def plan_cuda(compiler: list[str], ext: Extension, folder: Path) -> Module:
    """The units of _cuda: kernels by nvcc, the bindings by the C++ compiler."""
    nvcc = find_nvcc() or "nvcc"
    targets = cuda_targets(nvcc)
    include = [f"-I{path}" for path in ext.include_dirs]
    named = f'-DFUSEDATTN_CUDA_TARGETS="{",".join(targets)}"'
    host = [flag for flag in COMPILE_FLAGS if flag != "-fopenmp"]
    device = [nvcc, f"-ccbin={next(word for word in compiler if 'ccache' not in word)}"]
    units = []
    for source in map(Path, ext.sources):
        if source.suffix == ".cu":
            flags = [*NVCC_FLAGS, *target_flags(targets), *include]
            units += variants_of(source, device, flags, folder)
        else:
            flags = [*host, *include, named, *python_flags()]
            units.append(Unit(source, folder / f"{source.stem}.o", compiler, flags))
    return Module(units, device, NVCC_LINK_FLAGS)


def plan_emulator(compiler: list[str], ext: Extension, folder: Path) -> Module:
    """The units of _cuda_emulated: every source by the C++ compiler."""
    flags = [*EMULATOR_FLAGS, *(f"-I{path}" for path in ext.include_dirs), *python_flags()]
    units = []
    for source in map(Path, ext.sources):
        units += variants_of(source, compiler, [*flags, "-x", "c++"], folder)
    return Module(units, compiler, ["-shared"])


PLANS = {"_cpu": plan_cpu, "_cuda": plan_cuda, "_cuda_emulated": plan_emulator}


# --- ninja ---------------------------------------------------------------------------------------


def write_ninja_file(path: Path, module: Module, result: Path) -> None:
    """Write the build of a module; all paths in it are relative to the repository."""
    from ninja import ninja_syntax

    def quoted(words: list[str]) -> str:
        return ninja_syntax.escape(shlex.join(words))

    with open(path, "w", encoding="utf-8") as file:
        ninja = ninja_syntax.Writer(file)
        ninja.variable("builddir", str(result.parent))
        ninja.rule(
            "compile",
            "$compiler $flags -MD -MF $out.d -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="compiling $in",
        )
        ninja.rule(
            "link",
            f"{quoted(module.linker)} $in -o $out {quoted(module.link_flags)}",
            description="linking $out",
        )
        # Attention's first: they take longest, and the last to be begun should be short.
        for unit in sorted(module.units, key=lambda unit: not unit.source.stem.startswith("isa_")):
            variables = {"compiler": quoted(unit.compiler), "flags": quoted(unit.flags)}
            ninja.build(str(unit.object), "compile", str(unit.source), variables=variables)
        ninja.build(str(result), "link", [str(unit.object) for unit in module.units])


def run_ninja(path: Path, units: list[Unit], jobs: int | None) -> None:
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
        f"{unit.source} did not compile\n  compiler: {shlex.join(unit.compiler)}\n"
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
