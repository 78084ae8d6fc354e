"""Builds the native modules with ninja; all that is declared stands in pyproject.toml.

Torch is not needed here: native code sees a tensor as pointer, shape, strides and dtype. Without
a working C++ compiler the package still installs, with its Triton and reference backends.
csrc/toolchain.py finds the compilers, csrc/native_build.py says what they compile.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent.resolve() / "csrc"))
from native_build import PLANS, ROOT, locked, run_ninja, write_ninja_file
from toolchain import cuda_targets, find_compiler, find_nvcc, why_not_native


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


class VisibleSources(build_py):
    """In an editable install type checkers and editors, which run no import hooks, find them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            wheel = Path(self.get_finalized_command("install").install_lib)
            wheel.mkdir(parents=True, exist_ok=True)
            (wheel / "fusedattn.pth").write_text(f"{ROOT / 'python'}\n")


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
    cmdclass={
        "build_ext": NinjaBuild,
        "build_emulator": EmulatorBuild,
        "build_py": VisibleSources,
    },
)
