"""The wheels: what is in them, and that they work where there is no compiler."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from processes import ROOT, SHIPPED
from test_install import CALL, make_tree, needs_compiler, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that a wheel is made from, with the objects of this build, which save minutes."""
    tree = make_tree(tmp_path_factory.mktemp("sources"))
    shutil.rmtree(tree / "csrc")
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    shutil.copy(ROOT / "Makefile", tree)
    for built in (ROOT / "build").glob("native-*/_cpu"):
        shutil.copytree(built, tree / built.relative_to(ROOT))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (tree / f"python/fusedattn/_cuda_emulated{suffix}").touch()  # for the tests alone
    return tree


def compiler() -> dict[str, str]:
    """The one that has made those objects."""
    for built in (ROOT / "build").glob("native-*/_cpu/build.ninja"):
        if named := re.search(r"compiler = (.+)", built.read_text()):
            return {"CXX": named[1]}
    return {}


def wheel(tree: Path, **environment: str) -> tuple[Path, str]:
    """Build the wheel of a tree; its path and the log."""
    target = tree / "wheels"
    pip = (sys.executable, "-m", "pip", "wheel", "-v", ".", "--no-deps", "--no-build-isolation")
    log = run(*pip, "-w", target, cwd=tree, **environment)
    (found,) = target.glob("*.whl")
    return found, log


def installed(archive: Path) -> tuple[Path, Path]:
    """A fresh environment with the wheel beside this one's packages: its Python and its folder."""
    folder = archive.parent / "environment"
    venv.create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    python = folder / "bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, archive, cwd=archive.parent)
    # Packages are found through this file, but no .pth file among them is read: an editable
    # fusedattn stays out.
    (site / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    return python, site


def names_in(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as file:
        return {name for name in file.namelist() if ".dist-info/" not in name}


def test_without_a_compiler_the_reference_serves(tmp_path: Path) -> None:
    archive, log = wheel(make_tree(tmp_path), CXX="/nonexistent")
    assert "WITHOUT native CPU kernels: no C++ compiler found" in log
    assert archive.name.endswith("-py3-none-any.whl")
    python, site = installed(archive)
    code = (
        "import torch, fusedattn; q = torch.ones(1, 1, 3, 4); print(fusedattn.__file__);"
        "print(fusedattn.explain(fusedattn.attention, q, q, q));"
        "print(fusedattn.attention(q, q, q).shape)"
    )
    log = run(python, "-c", code, cwd=tmp_path.parent, TRITON_INTERPRET="0")
    assert str(site) in log
    assert "attention: reference" in log
    assert "torch.Size([1, 1, 3, 4])" in log


@needs_compiler
def test_wheel_holds_the_package_and_works(sources: Path) -> None:
    archive, _ = wheel(sources, FUSEDATTN_CUDA_ARCHS="none", **compiler())
    with zipfile.ZipFile(archive) as file:
        metadata = next(n for n in file.namelist() if n.endswith("/METADATA"))
        assert "Requires-Dist: torch>=2.11" in file.read(metadata).decode().splitlines()
    names = names_in(archive)
    native = {name for name in names if name.startswith("fusedattn/_cpu.")}
    modules = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for package, folder in SHIPPED.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert len(native) == 1
    assert names - native == modules | {"fusedattn/py.typed"}

    python, site = installed(archive)
    code = (
        "import torch, fusedattn, fusedattn.kernels, fusedattn.benchmarks; print(fusedattn._cpu);"
        "q = torch.ones(1, 1, 3, 4); print(fusedattn.attention(q, q, q, backend='cpu'))"
    )
    log = run(python, "-c", code, cwd=sources.parent)
    assert f"from '{site}/fusedattn/_cpu." in log


TRAIN = """
import shutil, torch, fusedattn
from cases.attention import AttentionCase, check_attention
print([name for name in ("cc", "c++", "g++", "gcc", "ninja", "nvcc") if shutil.which(name)])
print(fusedattn._cpu.__file__)
check_attention(AttentionCase(seq_q=40, kv_heads=1, causal=True), "cpu")
q = torch.randn(1, 2, 64, 32, dtype=torch.bfloat16)
print(fusedattn.explain(fusedattn.attention, q, q, q).splitlines()[0])
"""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="manylinux")
def test_manylinux_wheel_trains_without_a_compiler(sources: Path) -> None:
    """`make wheel`, and what it made in an environment with nothing but itself on PATH."""
    if not shutil.which("make") or importlib.util.find_spec("auditwheel") is None:
        pytest.skip("needs make and auditwheel")
    stale = sources / "build/lib/fusedattn/of_before.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    options = {"FUSEDATTN_CUDA_ARCHS": "none", **compiler()}
    run("make", "wheel", f"PYTHON={sys.executable}", cwd=sources, **options)
    (archive,) = (sources / "dist").glob("*.whl")
    assert re.search(rf"-manylinux_2_\d+_{platform.machine()}\.whl$", archive.name)
    assert not {name for name in names_in(archive) if "gomp" in name or "of_before" in name}

    python, site = installed(archive)
    alone = {"PATH": str(python.parent), "HOME": str(site), "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [python, "-c", TRAIN + CALL], cwd=sources.parent, env=alone, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tools, module, served, openmp = done.stdout.splitlines()
    assert tools == "[]"
    assert Path(module).is_relative_to(site)
    assert served == "attention: cpu"
    assert re.fullmatch(r"\['\S+/torch\S*/libgomp\S*'\]", openmp)
