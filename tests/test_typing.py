"""What a type checker makes of a user's file: the overloads by which results have their types."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

# Of torch what the file needs, for all of it takes mypy half a minute; of ours likewise.
TORCH = """
from typing import Any
class Tensor: ...
class dtype: ...
def randn(*size: int) -> Tensor: ...
def __getattr__(name: str) -> Any: ...
"""
OURS = (
    "__init__", "ops/attention", "ops/attention_varlen", "ops/attention_decode", "ops/layer_norm",
    "ops/rms_norm",
)  # fmt: skip
HEAD = """
import torch, fusedattn as f
from typing_extensions import assert_type
x, w, flag = torch.randn(2, 4, 8, 16), torch.randn(2), bool(input())
"""
ONE, TWO = "torch.Tensor", "tuple[torch.Tensor, torch.Tensor]"
TYPES = {
    "f.attention(x, x, x, causal=True, window=(4, None))": ONE,
    "f.attention(x, x, x, return_lse=True, dropout_p=0.1)": TWO,
    "f.attention(x, x, x, return_lse=flag)": f"{ONE} | {TWO}",
    "f.attention_varlen(x, x, x, cu_seqlens_q=w, cu_seqlens_k=w, max_seqlen_q=4)": ONE,
    "f.attention_varlen(x, x, x, cu_seqlens_q=w, cu_seqlens_k=w, return_lse=True)": TWO,
    "f.attention_decode(x, x, x, w, k=x, v=x, block_table=w, causal=flag)": ONE,
    "f.attention_decode(x, x, x, w, return_lse=True, window=(63, None))": TWO,
    "f.layer_norm(x, 16, w, w, 1e-5)": ONE,
    "f.layer_norm(x, 16, residual=x, dropout_p=0.1)": TWO,
    "f.layer_norm(x, 16, residual=x if flag else None)": f"{ONE} | {TWO}",
    "f.rms_norm(x, (8, 16), w, weight_offset=1.0)": ONE,
    "f.rms_norm(x, 16, residual=x if flag else None)": f"{ONE} | {TWO}",
}
WRONG = (
    "f.attention(x, x, x, is_causal=True)",
    "f.attention_varlen(x, x, x, cu_seqlens_q=w)",
    "f.attention_decode(x, x, x, w, dropout_p=0.1)",
    "f.layer_norm(x, 16, weight_offset=1.0)",
    "f.rms_norm(x, 16, residual=1.0)",
)


def test_results_have_their_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.pyi").write_text(TORCH)
    calls = [f"assert_type({call}, {kind})" for call, kind in TYPES.items()]
    lines = [*HEAD.strip().splitlines(), *calls, *WRONG]
    (tmp_path / "user.py").write_text("\n".join(lines))
    package = ROOT / "python/fusedattn"
    files = [str(package / f"{name}.py") for name in (*OURS, "ops/_typing")]
    command = [sys.executable, "-m", "mypy", "--follow-imports=skip", "--config-file=", "user.py"]
    done = subprocess.run(
        [*command, "torch/__init__.pyi", *files], capture_output=True, text=True, timeout=300,
        cwd=tmp_path, env={**os.environ, "MYPYPATH": f"{tmp_path}:{package.parent}"}, check=False,
    )  # fmt: skip
    said = re.findall(r"^user\.py:(\d+): error:", done.stdout, re.MULTILINE)
    found = {lines[int(line) - 1] for line in said}
    assert found == set(WRONG), done.stdout + done.stderr
