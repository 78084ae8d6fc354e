"""The host time of a Triton launch: python -m fusedattn.benchmarks.host prints it as JSON.

The driver that Triton sees here compiles (for sm_90), loads nothing and launches nothing, so what
is left of a call is the time before a GPU hears of it. No GPU is needed, and none is used; tensors
are on the CPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

SHARED = 232_448  # bytes of a block on sm_90
ROUNDS, CALLS = 15, 200


class Nothing:
    """What Triton asks of a driver, on behalf of a GPU that is not there."""

    def __init__(self, launch: Callable[..., None] = lambda *args: None, arch: int = 90) -> None:
        self._launch, self._arch = launch, arch
        self.utils = SimpleNamespace(
            load_binary=lambda name, *rest: (name, 0, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": SHARED},
        )

    def get_current_device(self) -> int:
        return self._arch  # a JITFunction keeps the first target that a device had

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return self._launch


Launch = Callable[[], None]


def launches() -> Iterator[tuple[str, Any, Launch]]:
    """What is measured: the launcher, and a call of it."""
    yield from _attention()
    yield from _rowwise()


def _attention() -> Iterator[tuple[str, Any, Launch]]:
    from fusedattn.kernels.attention_bwd import attention_backward
    from fusedattn.kernels.attention_fwd import attention_forward
    from fusedattn.ops.attention_config import (
        AttentionBackwardCall,
        AttentionCall,
        AttentionConfig,
    )

    q, k, v, out, dout, dq, dk, dv = (_half(2, 8, 256, 64) for _ in range(8))
    lse = torch.zeros(2, 8, 256)
    config = AttentionConfig(2, 0.125)
    call = AttentionCall(q, k, v, config=config)
    yield "attention forward", attention_forward, lambda: attention_forward(call, out, lse)
    backward = AttentionBackwardCall(dout, None, out, lse, q, k, v, config=config)
    yield (
        "attention backward",
        attention_backward,
        lambda: attention_backward(backward, dq, dk, dv, None),
    )


def _rowwise() -> Iterator[tuple[str, Any, Launch]]:
    from fusedattn.kernels.norm_bwd import norm_backward
    from fusedattn.kernels.norm_fwd import norm_forward
    from fusedattn.kernels.softmax import softmax_backward, softmax_forward
    from fusedattn.ops.norm_config import NormBackwardCall, NormCall, NormConfig
    from fusedattn.ops.softmax_config import SoftmaxBackwardCall, SoftmaxCall, SoftmaxConfig

    x, dx = _half(2, 8, 256, 256), _half(2, 8, 256, 256)
    config = SoftmaxConfig(0, 1.0)
    call = SoftmaxCall(x, None, None, -1, config)
    yield "softmax forward", softmax_forward, lambda: softmax_forward(call, dx)
    backward = SoftmaxBackwardCall(x, x, -1, True, False, config)
    yield "softmax backward", softmax_backward, lambda: softmax_backward(backward, dx, None)

    z, dz, weight, rstd = _half(512, 1024), _half(512, 1024), _half(1024), torch.zeros(512)
    norm = NormConfig(False, 1e-5, 0.0, 0.0)
    forward_call = NormCall(z, None, weight, None, None, 1, None, True, norm)
    yield "RMS norm forward", norm_forward, lambda: norm_forward(forward_call, dz, None, None, rstd)
    dtypes = z.dtype, None, z.dtype, None
    back = NormBackwardCall(z, None, z, weight, None, rstd, None, 1, *dtypes, norm)
    dw = _half(1024)
    yield "RMS norm backward", norm_backward, lambda: norm_backward(back, dz, None, dw, None)


def _half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def microseconds(call: Callable[[], Any]) -> float:
    """Of one call: the median over rounds of their means."""
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(found)


def measure() -> list[dict[str, Any]]:
    """A row for each launcher: microseconds of a call as its plan repeats it, and of one without.

    Changes Triton's driver for the whole process.
    """
    from triton.runtime.driver import driver

    driver.set_active(Nothing())
    rows = []
    for name, launcher, call in launches():

        def unplanned(launcher: Any = launcher, call: Launch = call) -> None:
            launcher.plans.clear()
            call()

        call()
        rows.append(
            {"name": name, "planned": microseconds(call), "unplanned": microseconds(unplanned)}
        )
    return rows


def measure_in_a_process() -> dict[str, Any]:
    """What `main` prints, or {"skipped": why}."""
    if importlib.util.find_spec("triton") is None:
        return {"skipped": "Triton is not installed"}
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        return {"skipped": (done.stderr.strip() or "it failed").splitlines()[-1]}
    return json.loads(done.stdout)


def main() -> int:
    import triton

    if triton.knobs.runtime.interpret:
        print("under Triton's interpreter nothing is launched", file=sys.stderr)
        return 2
    print(json.dumps({"triton": triton.__version__, "rows": measure()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
