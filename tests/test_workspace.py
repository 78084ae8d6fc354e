"""The native CPU kernels' scratch memory: written before it is read, and no lock in its way."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import cases.norm
import fusedattn
import pytest
import torch
from cases.attention import AttentionCase, fused
from cases.norm import NormCase
from fusedattn import _native
from torch import Tensor

pytestmark = pytest.mark.skipif(_native.cpu is None, reason="fusedattn._cpu is not built")

F32, F16 = torch.float32, torch.float16

ATTENTION = [
    AttentionCase(seq_q=131, seq_k=197, dim=72, dim_v=40, causal=True, grads=("out", "lse")),
    AttentionCase(heads=4, kv_heads=2, seq_q=33, bias=(1, 4, 1, 33), mask=(2, 1, 33, 1)),
    AttentionCase(batch=3, seq_q=1, seq_k=900, dim=64, kv_lengths=(900, 0, 77), bias=(3, 2, 1, 1)),
]
NORMS = [
    NormCase(op, shape, residual=residual, grads=grads)
    for op in ("layer_norm", "rms_norm")
    for shape in ((9, 14), (9, 30), (9, 60), (9, 120), (5, 2100), (1, 30000))
    for residual, grads in ((None, ("out",)), (F16, ("out",)), (F16, ("z",)))
]


@pytest.fixture
def nan_in_scratch(
    request: pytest.FixtureRequest,
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Within it, kernels get their scratch memory full of NaN."""

    @contextlib.contextmanager
    def filled() -> Iterator[None]:
        _native.cpu.fill_workspace(True)
        try:
            yield
        finally:
            _native.cpu.fill_workspace(request.config.getoption("--deterministic"))

    return filled


def test_scratch_is_written_before_it_is_read(instruction_set, nan_in_scratch):
    """As after other calls, so with NaN in it: the same bits."""

    def everything() -> dict[str, Tensor]:
        found = {}
        for case in ATTENTION:
            found |= {f"{case}: {name}": x for name, x in fused(case.inputs(), case, "cpu").items()}
        for case in NORMS:
            made = cases.norm.results(case.inputs(), case, fusedattn, backend="cpu")
            found |= {f"{case}: {name}": x for name, x in made.items()}
        wide = torch.linspace(-3, 3, 60000).reshape(3, -1).requires_grad_()
        out = fusedattn.softmax(wide)
        found["softmax"], found["its gradient"] = out, torch.autograd.grad(out, wide, wide)[0]
        return found

    fused(ATTENTION[0].inputs(), ATTENTION[0], "cpu")  # so that scratch memory holds numbers
    want = everything()
    with nan_in_scratch():
        found = everything()
    different = [name for name, x in want.items() if not torch.equal(x, found[name])]
    assert not different


FORKS = """
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "workspace.h"

int main() {
  const auto take_and_leave = [] { (void)fusedattn::Workspace(64); };
  for (int i = 0; i < 4; ++i) std::thread([=] { for (;;) take_and_leave(); }).detach();
  for (int i = 0; i < 300; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(10);
      take_and_leave();
      _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (status != 0) _exit(1);
  }
  _exit(0);
}
"""


def test_fork_while_threads_take_memory(tmp_path):
    """Whatever other threads hold at that moment, the child finds free."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    source = Path(__file__).parents[1] / "csrc/cpu/workspace.cpp"
    (tmp_path / "forks.cpp").write_text(FORKS)
    program = str(tmp_path / "forks")
    includes = [f"-I{source.parent}", f"-I{source.parents[1] / 'include'}"]
    files = [str(tmp_path / "forks.cpp"), str(source)]
    command = [compiler, "-std=c++20", "-pthread", *includes, *files, "-o", program]
    subprocess.run(command, check=True)
    assert subprocess.run([program], timeout=60, check=False).returncode == 0
