"""The CUDA module: what setup.py builds where, and the machine code that nvcc makes of it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kept import digests
from processes import ARCHITECTURES
from test_install import ROOT, build, make_tree, needs_compiler, run, tree  # noqa: F401

if TYPE_CHECKING:
    from machine_code import Built

NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

# --- what is built where: with an nvcc and an nvidia-smi that only pretend ----------------------

PRETENDED_NVCC = """#!/bin/sh
echo "$@" >>nvcc.log
for word; do
  case "$before" in -o) : >"$word";; -MF) : >"$word";; esac
  case "$word" in
    --list-gpu-code) echo sm_75 sm_80 sm_90 sm_100;;
    *bad.cu) echo "bad line" >&2; exit 1;;
  esac
  before=$word
done
"""


@pytest.fixture
def cuda_tree(tree: Path) -> Path:  # noqa: F811
    """A small source tree with CUDA sources and an nvcc of its own, on a machine without a GPU."""
    sources = {
        "csrc/cuda/one.cu": "",
        "csrc/cuda/two.cu": "",
        "csrc/cuda/module.cpp": "const char* targets() { return FUSEDATTN_CUDA_TARGETS; }",
        "csrc/cuda/emulator/tests/planted.cu": "#error only for the emulator",
        "bin/nvcc": PRETENDED_NVCC,
        "bin/nvidia-smi": "#!/bin/sh\nexit 9\n",
    }
    for name, text in sources.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return tree


def build_cuda(tree: Path, archs: str = "", gpu: str = "", check: bool = True) -> str:  # noqa: F811
    """Build in place, on a machine with that GPU; the log."""
    if gpu:
        (tree / "bin/nvidia-smi").write_text(f"#!/bin/sh\necho {gpu}\n")
    environment = {
        "PATH": f"{tree}/bin:{os.environ['PATH']}",
        "CUDACXX": str(tree / "bin/nvcc"),
        "FUSEDATTN_CUDA_ARCHS": archs,
        "LC_ALL": "C",
    }
    command = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    return run(*command, cwd=tree, check=check, **environment)


def module_of(tree: Path) -> Path:  # noqa: F811
    return tree / f"python/fusedattn/_cuda{SUFFIX}"


def generated(tree: Path) -> set[str]:  # noqa: F811
    """The -gencode flags that nvcc was called with."""
    log = tree / "nvcc.log"
    return set(re.findall(r"-gencode=(\S+)", log.read_text())) if log.exists() else set()


@needs_compiler
def test_without_gpu_or_named_targets_nothing_is_built(cuda_tree: Path) -> None:
    log = build_cuda(cuda_tree)
    assert "cuda" not in log.lower()
    assert not module_of(cuda_tree).exists()
    assert not (cuda_tree / "nvcc.log").exists()


@needs_compiler
def test_for_the_gpu_that_is_there_alone(cuda_tree: Path) -> None:
    log = build_cuda(cuda_tree, gpu="9.0")
    assert {"compiling csrc/cuda/one.cu", "compiling csrc/cuda/two.cu"} <= set(
        re.findall(r"compiling \S+", log)
    )
    assert module_of(cuda_tree).exists()
    assert generated(cuda_tree) == {"arch=compute_90a,code=sm_90a"}


@needs_compiler
def test_named_targets_come_oldest_first_with_ptx_for_the_last(cuda_tree: Path) -> None:
    build_cuda(cuda_tree, archs="100; 80;90a", gpu="9.0")
    assert generated(cuda_tree) == {
        "arch=compute_80,code=sm_80",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_100,code=sm_100",
        "arch=compute_100,code=compute_100",
    }


@needs_compiler
def test_none_builds_none_and_leaves_nothing_stale(cuda_tree: Path) -> None:
    build_cuda(cuda_tree, archs="80")
    assert module_of(cuda_tree).exists()
    build_cuda(cuda_tree, archs="none", gpu="9.0")
    assert not module_of(cuda_tree).exists()


@needs_compiler
def test_rebuild_compiles_only_what_has_changed(cuda_tree: Path) -> None:
    build_cuda(cuda_tree, archs="80")
    assert "compiling" not in build_cuda(cuda_tree, archs="80")
    (cuda_tree / "csrc/cuda/two.cu").write_text("// changed")
    assert re.findall(r"compiling \S+", build_cuda(cuda_tree, archs="80")) == [
        "compiling csrc/cuda/two.cu"
    ]


@needs_compiler
def test_build_error_names_kernel_file_and_flags(cuda_tree: Path) -> None:
    (cuda_tree / "csrc/cuda/bad.cu").write_text("")
    log = build_cuda(cuda_tree, archs="80", check=False)
    assert "error: csrc/cuda/bad.cu did not compile\n  compiler: " in log
    assert "arch=compute_80,code=sm_80" in log
    assert "bad line" in log


@needs_compiler
@pytest.mark.parametrize(
    ("archs", "message"),
    [("75", "compute capability 8.0 or later, not 75"), ("80;banana", "'banana' is not a target"),
     ("80;130", "does not know sm_130")],
)  # fmt: skip
def test_wrong_targets_are_named(cuda_tree: Path, archs: str, message: str) -> None:
    log = build_cuda(cuda_tree, archs=archs, check=False)
    assert f"FUSEDATTN_CUDA_ARCHS='{archs}': " in log
    assert message in log
    assert "as in FUSEDATTN_CUDA_ARCHS='80;90a', or 'none'" in log


@needs_compiler
def test_gpu_that_nvcc_does_not_know_leaves_the_module_out(cuda_tree: Path) -> None:
    log = build_cuda(cuda_tree, gpu="13.0")
    assert "WITHOUT CUDA C++ kernels for this GPU: " in log
    assert "does not know sm_130" in log
    assert "Install the CUDA toolkit" in log
    assert not module_of(cuda_tree).exists()


# --- what nvcc makes of the kernels ---------------------------------------------------------------

TARGETS = [f"sm_{x}" for x in ARCHITECTURES]

# Kernels that move whole rows, by what their demangled names match: every instantiation loads and
# stores 16 bytes at a time.
HOT_KERNELS: dict[str, tuple[str, ...]] = {
    "norm": (
        r"norm_forward_rows<(f16|bf16|float), [48], \d, \w+>",
        r"norm_forward_wide<(f16|bf16|float), [48], \w+>",
        r"norm_backward_rows<.*>",
    ),
    "softmax": (
        r"softmax_forward_rows<(f16|bf16|float), [48], \d, \w+>",
        r"softmax_backward_rows<(f16|bf16|float), [48], \d>",
    ),
    "rotary": (r"rotary_kernel<\w+, [48], \w+>",),
    "sinusoidal": (r"sinusoidal_kernel<\w+, [48], true>",),
    "swiglu": (r"swiglu_(forward|backward)<\w+, [48]>",),
}


ATTENTION = r"(attention_(?:forward|backward_(?:keys|queries|bias)))<(f16|bf16), (\d+)(?:, (\d))?>"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The real kernels, compiled by the real nvcc for TARGETS; once for what has not changed."""
    if NVCC is None or not TARGETS:
        pytest.skip("needs nvcc and a target")
    pytest.importorskip("triton")
    from machine_code import build_once

    folders = [ROOT / "csrc" / name for name in ("cuda", "include", "bindings")]

    def build_real() -> tuple[Path, str]:
        folder = make_tree(tmp_path_factory.mktemp("cuda"))
        for each in folders:
            shutil.copytree(each, folder / "csrc" / each.name, dirs_exist_ok=True)
        command = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
        log = run(*command, cwd=folder, timeout=3000, FUSEDATTN_CUDA_ARCHS=";".join(ARCHITECTURES))
        return module_of(folder), log

    compilers = (NVCC, *shlex.split(os.environ.get("CXX", "g++")))
    told = ("CXX", "CUDACXX", "CUDA_HOME", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
    tools = [run(each, "--version", cwd=ROOT) for each in compilers if shutil.which(each)]
    tools += [version("pybind11"), *ARCHITECTURES, *(str(os.environ.get(name)) for name in told)]
    files = ("setup.py", "pyproject.toml", "tests/test_install.py", "tests/test_cuda_build.py")
    read = [*folders, *(ROOT / "csrc").glob("*.py"), *(ROOT / name for name in files)]
    return build_once(build_real, tools, digests(read))


@pytest.mark.slow
@needs_compiler
class TestMachineCode:
    def test_compiles_without_warnings(self, built: Built) -> None:
        assert "compiling csrc/cuda/norm.cu" in built.log
        kernels = built.log[built.log.index("compiling csrc/cuda") :]  # before it is a small _cpu
        assert "warning" not in kernels, kernels

    def test_loads_without_gpu_and_driver(self, built: Built) -> None:
        code = (
            "import torch, importlib.util as u; s = u.spec_from_file_location('_cuda', "
            f"{str(built.module)!r}); m = u.module_from_spec(s); s.loader.exec_module(m); "
            "print(m.architectures(), [m.runs_on(x) for x in (75, *m.architectures())])"
        )
        named = [int(re.sub(r"\D", "", each)) for each in TARGETS]
        assert run(sys.executable, "-c", code, cwd=ROOT).splitlines()[-1] == (
            f"{named} {[False, *(True for _ in named)]}"
        )
        if shutil.which("readelf"):
            assert "libcu" not in run("readelf", "-d", built.module, cwd=ROOT)
            symbols = run("readelf", "-W", "--dyn-syms", built.module, cwd=ROOT)
            assert not re.findall(r"\bcuda\w+|\bcu[A-Z]\w+", symbols)

    @pytest.mark.parametrize("target", TARGETS)
    def test_no_local_memory(self, built: Built, target: str) -> None:
        for kernel in built.kernels:
            if kernel.target == target:
                assert not kernel.count(r"(LDL|STL)\b.*"), kernel
                assert kernel.stack == 0, kernel

    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("name", HOT_KERNELS)
    def test_rows_move_in_16_bytes(self, built: Built, name: str, target: str) -> None:
        for pattern in HOT_KERNELS[name]:
            hot = [x for x in built.kernels
                   if x.target == target and re.fullmatch(pattern, x.name)]  # fmt: skip
            assert hot, f"no kernel is named {pattern}"
            for kernel in hot:
                assert kernel.count(r"LDG\.E\..*128.*") > 0, kernel
                assert kernel.count(r"STG\.E\..*128.*") > 0, kernel

    @pytest.mark.parametrize("target", TARGETS)
    def test_attention_takes_what_its_table_says(self, built: Built, target: str) -> None:
        """A block has no shared memory but what the launcher asks for, the table's, to which the
        kernels' layouts are held when compiling. Registers are few enough for its blocks."""
        from machine_code import attention_table

        tiles = attention_table(built.module)
        reserved = 1024 if target in ("sm_90a", "sm_100", "sm_120") else 0
        found = 0
        for kernel in built.kernels:
            named = re.fullmatch(ATTENTION, kernel.name)
            if kernel.target != target or not named:
                continue
            found += 1
            row = tiles[named[1], int(named[3]), int(named[4] or 2)]
            assert kernel.shared == reserved, kernel
            enough = min(65536 // (row.threads * row.blocks) // 8 * 8, 255)
            assert kernel.registers <= enough, kernel
        assert found == 2 * len(tiles), "one of each row for each dtype"

    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize(
        "name", ["forward", "backward_keys", "backward_queries", "backward_bias"]
    )
    def test_attention_uses_tensor_cores(self, built: Built, name: str, target: str) -> None:
        """Tiles arrive by asynchronous copies and leave shared memory as fragments."""
        ours = (x for x in built.kernels if x.name.startswith(f"attention_{name}<"))
        found = [x for x in ours if x.target == target]
        assert len(found) >= 10, "one for each dtype and head dim"
        for kernel in found:
            assert all(kernel.count(x + r"\..*") for x in ("HMMA", "LDGSTS", "LDSM")), kernel
            if name == "backward_keys":  # adds to dQ, 16 bytes at a time from sm_90 on
                added, packs = (kernel.count(rf"REDG?\..*{x}\..*") for x in ("ADD", "F32x4"))
                assert added > 0, kernel
                if target in ("sm_80", "sm_86", "sm_89"):
                    assert packs == 0, kernel
                elif kernel.name.endswith(", 2>"):  # to a bias, too, elements
                    assert 0 < packs < added, kernel
                else:
                    assert packs == added, kernel
