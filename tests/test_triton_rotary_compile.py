"""The machine code of rotary's and sinusoidal positions' Triton kernels, compiled ahead of time.

Run as a script with the name of a target, this file prints what `cuobjdump` finds as JSON, as
`test_triton_compile.py` does for attention.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from fusedattn.benchmarks.host import Nothing
from processes import wanted
from test_triton_compile import TARGETS as ALL_TARGETS
from test_triton_compile import compile_in_a_process, disassemble, tell

TARGETS = {name: arch for name, (arch, _) in ALL_TARGETS.items() if name != "sm_86"}  # as sm_89
CASES = ("halves", "interleaved", "sinusoidal")
DTYPES = ("bfloat16", "float32")


# --- in the subprocess ---------------------------------------------------------------------------


def launch_case(case: str, dtype: torch.dtype) -> None:
    """A launcher on tensors of a common model."""
    from fusedattn.kernels.rotary import rotary_forward
    from fusedattn.kernels.sinusoidal import sinusoidal_forward
    from fusedattn.ops.rotary_config import RotaryCall, RotaryConfig
    from fusedattn.ops.sinusoidal import SinusoidalCall, SinusoidalConfig

    if case == "sinusoidal":
        x = torch.empty(8, 512, 768, dtype=dtype)
        sinusoidal_forward(SinusoidalCall(x, None, None, SinusoidalConfig()), torch.empty_like(x))
        return
    q, k = (torch.empty(2, 512, heads, 128, dtype=dtype).transpose(1, 2) for heads in (32, 8))
    table = torch.empty(1, 512, 64)
    config = RotaryConfig(case == "interleaved")
    rotary_forward(RotaryCall(q, k, table, table, None, None, config), q, k)


def compile_target(name: str) -> list[dict[str, Any]]:
    """A record for each case and dtype."""
    import triton
    from triton.runtime.driver import driver

    driver.set_active(Nothing(arch=TARGETS[name]))
    run = triton.JITFunction.run
    records, about = [], {}

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert options["enable_fp_fusion"], self.__name__
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        records.append(about | {"kernel": self.__name__} | disassemble(kernel))

    triton.JITFunction.run = only_compile
    for case in CASES:
        for dtype in DTYPES:
            about.update({"case": case, "dtype": dtype})
            launch_case(case, getattr(torch, dtype))
    return records


# --- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=wanted(TARGETS))
def compiled(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return compile_in_a_process(__file__, request.param)


@pytest.mark.slow
def test_machine_code(compiled: list[dict[str, Any]]) -> None:
    """No spills; every access moves 16 bytes, each element of x is loaded and stored once."""
    assert [(x["case"], x["dtype"]) for x in compiled] == [(c, d) for c in CASES for d in DTYPES]
    for record in compiled:
        assert not any(record[name] for name in ("STACK", "LOCAL", "LDL", "STL")), record
        assert record["narrow"] == 0, record
        # 65 536 registers hold at least three blocks of 128 threads: 24 to 48 KiB on their way.
        assert record["REG"] <= 168, record
        if record["case"] == "sinusoidal":
            assert (record["LDG"], record["STG"]) == (8, 4), record
        else:
            # Code for x and for x2; 2 loads of cos and sin in fp32 and 8 of x, or 4 tables of
            # 16 bytes for packs of 8.
            tables = 2 if record["dtype"] == "float32" else 4
            assert (record["LDG"], record["STG"]) == (16 + tables, 16), record


if __name__ == "__main__":
    tell(compile_target(sys.argv[1]))
