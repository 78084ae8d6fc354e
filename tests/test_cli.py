"""The command line: `fusedattn env` and the messages of `fusedattn bench`."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from fusedattn import _native, cli, environment


@pytest.fixture
def without(monkeypatch):
    """Makes modules look as if they were not installed."""
    find_spec = importlib.util.find_spec

    def hide(*hidden: str) -> None:
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, package=None: None if name in hidden else find_spec(name, package),
        )

    return hide


def test_env_prints_every_section(capsys):
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    for line in ("versions", "system", "cpu", "gpu", "tools", "backends"):
        assert line in text.splitlines()
    assert torch.__version__ in text
    assert "reference" in text


def test_env_json_holds_the_same_findings(capsys):
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["threads of torch"] == torch.get_num_threads()
    assert found["cpu"]["cores"] >= 1
    assert set(found["backends"]) == {"cpu", "cuda", "triton", "reference"}
    assert found["backends"]["reference"]["usable"]
    for backend in found["backends"].values():
        assert backend["usable"] == (backend["remedy"] is None)


def test_env_into_a_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-W", "ignore", "-m", "fusedattn", "env"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_env_lists_instruction_sets_of_the_native_module(monkeypatch):
    class Native:
        instruction_sets = staticmethod(lambda: ["generic", "avx2"])
        openmp_threads = staticmethod(lambda: 3)

    monkeypatch.setattr(_native, "cpu", Native)
    found = environment.collect()
    assert found["cpu"]["instruction sets"] == ["generic", "avx2"]
    assert found["cpu"]["OpenMP threads"] == 3
    assert found["backends"]["cpu"]["usable"]
    assert "avx2" in environment.as_text(found)


def test_env_says_how_to_get_a_compiler(monkeypatch, without):
    without("fusedattn._cpu")
    monkeypatch.setattr(_native, "cpu", None)
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    text = environment.as_text(environment.collect())
    assert "no C++ compiler" in text
    assert "apt-get install g++ python3-dev" in text
    assert "nvcc" in text
    assert "not found" in text


def test_env_says_why_a_built_module_does_not_load(monkeypatch):
    monkeypatch.setattr(_native, "cpu", None)
    monkeypatch.setattr(_native, "cpu_error", "undefined symbol: forty_two")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    backend = environment.collect()["backends"]["cpu"]
    assert not backend["usable"]
    assert "undefined symbol: forty_two" in backend["detail"]


def test_env_without_the_cuda_module(monkeypatch, without):
    without("fusedattn._cuda")
    monkeypatch.setattr(_native, "cuda", None)
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    backend = environment.collect()["backends"]["cuda"]
    assert not backend["usable"]
    assert backend["detail"] == (
        "the native module fusedattn._cuda was not built; there is no nvcc on PATH"
    )
    assert 'FUSEDATTN_CUDA_ARCHS="80;90a"' in backend["remedy"]


def test_env_says_why_the_cuda_module_does_not_load(monkeypatch):
    monkeypatch.setattr(_native, "cuda", None)
    monkeypatch.setattr(_native, "cuda_error", "undefined symbol: forty_three")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    backend = environment.collect()["backends"]["cuda"]
    assert "undefined symbol: forty_three" in backend["detail"]


@pytest.mark.parametrize(
    ("capability", "usable", "detail"),
    [(None, False, "built for sm_80, sm_90, but torch finds no NVIDIA GPU"),
     ((8, 6), True, "native kernels for sm_80, sm_90, on A Card"),
     ((9, 0), False, "built by CUDA 13.0, the driver knows 12.8"),
     ((12, 0), False, "built for sm_80, sm_90, and A Card is sm_120")],
)  # fmt: skip
def test_env_holds_the_cuda_module_against_the_gpu(monkeypatch, capability, usable, detail):
    class Native:
        architectures = staticmethod(lambda: [80, 90])
        versions = staticmethod(lambda: (13000, 12080 if capability == (9, 0) else 13010))
        runs_on = staticmethod(lambda capability: capability // 10 in (8, 9))

    monkeypatch.setattr(_native, "cuda", Native)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A Card")
    backend = environment._cuda_backend()
    assert backend["usable"] == usable
    assert detail in backend["detail"]


def test_env_names_the_extra_when_triton_is_absent(without):
    without("triton")
    backend = environment.collect()["backends"]["triton"]
    assert not backend["usable"]
    assert backend["remedy"] == 'pip install "fusedattn[triton]"'


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_env_without_a_gpu(monkeypatch, without):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = environment.collect()
    assert found["gpu"]["devices"] == []
    assert not found["backends"]["triton"]["usable"]
    assert "GPU" in found["backends"]["triton"]["detail"]


@pytest.mark.parametrize("missing", ["rich", "matplotlib"])
def test_bench_names_the_extra_when_a_package_is_absent(capsys, without, missing):
    without(missing)
    assert cli.main(["bench"]) == 2
    message = capsys.readouterr().err
    assert missing in message
    assert 'pip install "fusedattn[bench]"' in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_refuses_a_gpu_that_is_not_there(capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err


def test_bench_names_a_folder_that_cannot_be(capsys, tmp_path):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    assert cli.main(["bench", "--quick", "--output", str(tmp_path / "file" / "folder")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["sing"], ["bench", "--quick", "--full"]])
def test_wrong_arguments_exit_with_usage(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: fusedattn" in capsys.readouterr().err


def test_importing_the_command_imports_nothing_heavy():
    code = (
        "import sys, fusedattn.cli; "
        "print([m for m in ('matplotlib', 'rich', 'onnx', 'onnxruntime', 'openvino') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
