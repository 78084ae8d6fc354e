"""The machine code of forward mode's Triton kernel, compiled ahead of time.

Run as a script with the name of a target, this file prints what `cuobjdump` finds as JSON, as
`test_triton_compile.py` does for the other kernels of attention.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from compiled_code import disassemble
from fusedattn.benchmarks.host import Nothing
from processes import wanted
from test_triton_compile import TARGETS as ALL_TARGETS
from test_triton_compile import TENSOR_CORE, compile_in_a_process, tell

TARGETS = {name: ALL_TARGETS[name] for name in ("sm_80", "sm_90", "sm_100")}
# name: dtype, head dim, causal, which have a tangent
CASES = {
    "causal": ("bfloat16", 64, 2, "q k v"),
    "bias": ("bfloat16", 64, 2, "q k v bias"),
    "fp16": ("float16", 64, 2, "q k v"),
    "128": ("bfloat16", 128, 2, "q k v"),
}


# --- in the subprocess ---------------------------------------------------------------------------


def launch_case(dtype: torch.dtype, dim: int, causal: int, moved: str) -> None:
    """The launcher on tensors of the case."""
    from fusedattn.kernels.attention_jvp import attention_jvp
    from fusedattn.ops.attention_config import AttentionConfig, AttentionJvpCall

    heads = {"q": 4, "k": 2, "v": 2}
    made = {name: torch.empty(2, n, 256, dim, dtype=dtype) for name, n in heads.items()}
    if "bias" in moved:
        made["bias"] = torch.empty(1, 4, 256, 256, dtype=dtype)
    tangents = {f"t_{name}": made[name].clone() for name in moved.split()}
    call = AttentionJvpCall(**made, **tangents, config=AttentionConfig(causal, 0.1))
    out, t_out = (torch.empty_like(made["q"]) for _ in range(2))
    attention_jvp(call, out, torch.empty(2, 4, 256), t_out, torch.empty(2, 4, 256))


def compile_target(name: str) -> list[dict[str, Any]]:
    """A record for each case and tile that the tuner would try."""
    import triton
    from fusedattn.kernels import attention_jvp, common, tuning
    from triton.runtime.driver import driver

    arch, shared = TARGETS[name]
    driver.set_active(Nothing(arch=arch))
    run = triton.JITFunction.run
    records, about = [], {}

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        tile = [options.get(each) for each in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")]
        records.append(about | {"tile": tile} | disassemble(kernel))

    def pick(self: Any, candidates: Any, launch: Any, **_: Any) -> Any:
        for each in candidates[1:]:
            launch(each)
        return candidates[0]

    triton.JITFunction.run = only_compile
    tuning.Tuner.pick = pick
    device = common.Device(arch, shared, l2=50 << 20, processors=132)
    attention_jvp.device_of = lambda x: device
    for case, (dtype, *rest) in CASES.items():
        about.update({"case": case, "dtype": dtype})
        launch_case(getattr(torch, dtype), *rest)
    return records


# --- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=wanted(TARGETS))
def compiled(request: pytest.FixtureRequest) -> tuple[str, list[dict[str, Any]]]:
    return request.param, compile_in_a_process(__file__, request.param)


@pytest.mark.slow
def test_machine_code(compiled: tuple[str, list[dict[str, Any]]]) -> None:
    """Tensor cores, shared memory that is there, and no spills."""
    target, records = compiled
    assert {x["case"] for x in records} == set(CASES)
    for record in records:
        assert record["shared"] <= TARGETS[target][1], record
        assert record[TENSOR_CORE[target]] > 0, record
        assert not any(record[name] for name in ("STACK", "LOCAL", "LDL", "STL")), record


if __name__ == "__main__":
    tell(compile_target(sys.argv[1]))
