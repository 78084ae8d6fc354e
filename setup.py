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
    "-Wno-maybe-uninitialized",  # GCC 12: vectors that are filled lane by lane
]
LINK_FLAGS = ["-shared", "-fopenmp"]

# Kernels for NVIDIA GPUs: C++ as above for the host, whose compiler nvcc calls, and machine code
# for each target. The runtime is linked in and its symbols are hidden: torch brings its own.
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",  # std::min and its like in kernels
    "-lineinfo",  # lets profilers and compute-sanitizer name lines
    "-Xptxas=-warn-spills",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
]
NVCC_LINK_FLAGS = ["-shared", "-cudart=static", "-nodlink", "-Xlinker=--exclude-libs=ALL"]

# The same sources on the host emulator, for the tests.
EMULATOR_FLAGS = [
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",  # unroll
    "-Wno-uninitialized",  # where a planted flaw leaves out what gives a value
    "-Wno-maybe-uninitialized",
    "-DFUSEDATTN_EMULATED=1",
]

# A source in csrc/cuda/sm80 is compiled once for each row, which -D passes on: an object file has
# one instantiation of its kernels, so that they compile side by side and none takes long.
VARIANTS = [
    {"FUSEDATTN_ELEMENT": element, "FUSEDATTN_HEAD_DIM": head_dim}
    for element in ("f16", "bf16")
    for head_dim in ("64", "96", "128", "192", "256")
]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512.append("-Wno-uninitialized")  # GCC 12's own headers
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


# --- nvcc and its targets ------------------------------------------------------------------------


def find_nvcc() -> str | None:
    """$CUDACXX, else the nvcc of $CUDA_HOME, on PATH or where CUDA is installed by default."""
    home = os.environ.get("CUDA_HOME")
    candidates = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc"]
    candidates.append("/usr/local/cuda/bin/nvcc")
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def gpus() -> list[str]:
    """The targets of the GPUs in this machine: ["90a"]."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = re.findall(r"^(\d+)\.(\d)\s*$", done.stdout, re.MULTILINE)
    # For these GPUs alone, so with what only they have; before 9.0 there is no such thing.
    return [f"{major}{minor}{'a' if int(major) >= 9 else ''}" for major, minor in found]


def capability(target: str) -> int:
    """90 of "90a"."""
    return int(re.match(r"\d*", target).group() or 0)


def cuda_targets(nvcc: str | None) -> list[str]:
    """What to compile CUDA kernels for, oldest first; [] for no CUDA module.

    Raises:
        SetupError: $FUSEDATTN_CUDA_ARCHS asks for what cannot be built.
    """
    asked = os.environ.get("FUSEDATTN_CUDA_ARCHS", "").strip()
    if asked.lower() == "none":
        return []
    named = {each.strip() for each in asked.split(";") if each.strip()}
    wanted = sorted(named or set(gpus()), key=lambda each: (capability(each), each))
    if not wanted:
        return []
    problem = why_not_cuda(nvcc, wanted)
    if problem and asked:
        raise SetupError(
            f"FUSEDATTN_CUDA_ARCHS={asked!r}: {problem}. Give compute capabilities that nvcc "
            "knows, 8.0 or later, as in FUSEDATTN_CUDA_ARCHS='80;90a', or 'none'"
        )
    if problem:
        print(
            f"fusedattn installs WITHOUT CUDA C++ kernels for this GPU: {problem}\n"
            "Install the CUDA toolkit (nvcc on PATH or CUDA_HOME set), then repeat the "
            "installation with --no-cache-dir --force-reinstall --no-deps; or silence this with "
            "FUSEDATTN_CUDA_ARCHS=none.",
            file=sys.stderr,
        )
        return []
    return wanted


def why_not_cuda(nvcc: str | None, wanted: list[str]) -> str:
    """Why kernels for these targets cannot be built here; empty when they can."""
    if nvcc is None:
        return "nvcc is not found (looked at $CUDACXX, $CUDA_HOME, PATH and /usr/local/cuda)"
    done = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    known = set(re.findall(r"sm_(\w+)", done.stdout))
    for each in wanted:
        if not re.fullmatch(r"\d{2,3}[af]?", each):
            return f"{each!r} is not a target"
        if capability(each) < 80:
            return f"the kernels need compute capability 8.0 or later, not {each}"
        if each.rstrip("af") not in known:
            return f"{nvcc} does not know sm_{each}"
    return ""


def target_flags(targets: list[str]) -> list[str]:
    """Machine code for each target; the last comes as PTX too, for GPUs that are later still."""
    flags = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in targets]
    if targets[-1].isdigit():  # the PTX of an "a" or "f" target is bound to its GPUs
        flags.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
    return flags


# --- the build -----------------------------------------------------------------------------------


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
            raise SetupError(f"{source}: setup.py has no row {isa!r} in ISA_FLAGS")
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


class NinjaBuild(build_ext):
    """Compiles an extension's sources in parallel, and the next time only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        # Not build_temp: every editable install gets a new one, and nothing would be reused.
        folder = Path("build", "native-" + sysconfig.get_config_var("SOABI"), name)
        result = folder / f"{ext.name}.so"
        target = Path(self.get_ext_fullpath(ext.name))
        with locked(ROOT / folder):
            module = PLANS[name](find_compiler(), ext, folder)
            write_ninja_file(ROOT / folder / "build.ninja", module, result)
            run_ninja(folder / "build.ninja", module.units, self.parallel)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(ROOT / result), str(target))

    def run(self) -> None:
        super().run()
        # What an earlier build left, and this one does not make, must not be used or shipped.
        if not any(ext.name == "fusedattn._cuda" for ext in self.extensions):
            Path(self.get_ext_fullpath("fusedattn._cuda")).unlink(missing_ok=True)


class EmulatorBuild(NinjaBuild):
    """python setup.py build_emulator: the CUDA kernels on the host, for the tests alone."""

    def finalize_options(self) -> None:
        sources = native_sources("csrc/cuda", ".cpp", ".cu")
        sources.remove("csrc/cuda/module.cpp")
        self.distribution.ext_modules = [
            Extension("fusedattn._cuda_emulated", sources, include_dirs=INCLUDE_DIRS)
        ]
        super().finalize_options()
        self.inplace = True

    def run(self) -> None:
        reason = why_not_native(find_compiler())
        if reason:
            print(f"the emulator is not built: {reason}", file=sys.stderr)
        else:
            build_ext.run(self)


def native_sources(folder: str, *suffixes: str) -> list[str]:
    """The sources under a folder, relative to the repository."""
    found = (path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    return sorted(str(path.relative_to(ROOT)) for path in found)


INCLUDE_DIRS = ["csrc", "csrc/include"]


def native_modules() -> list[Extension]:
    """The native modules that can be built here: _cpu, and _cuda where there are targets for it."""
    sources = native_sources("csrc/cpu", ".cpp")
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
    modules = [Extension("fusedattn._cpu", sources, include_dirs=[*INCLUDE_DIRS, "csrc/cpu"])]
    if (ROOT / "csrc/cuda/module.cpp").exists() and cuda_targets(find_nvcc()):
        kernels = [each for each in native_sources("csrc/cuda", ".cu") if "emulator" not in each]
        sources = ["csrc/cuda/module.cpp", *kernels]
        modules.append(Extension("fusedattn._cuda", sources, include_dirs=INCLUDE_DIRS))
    return modules


FOLDERS = {"": "python", "fusedattn.kernels": "kernels", "fusedattn.benchmarks": "benchmarks"}

setup(
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[*find_packages("python"), *filter(None, FOLDERS)],
    package_dir=FOLDERS,
    ext_modules=native_modules(),
    cmdclass={"build_ext": NinjaBuild, "build_emulator": EmulatorBuild},
)
