"""The compilers that are found here, what they can do, and the flags that each gets."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools.errors import SetupError

# --- flags ---------------------------------------------------------------------------------------

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

# --- the C++ compiler ----------------------------------------------------------------------------

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
