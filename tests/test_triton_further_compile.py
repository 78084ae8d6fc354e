"""The machine code of the Triton kernels of forward mode and of caches, compiled ahead of time.

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

TARGETS = {name: each for name, each in ALL_TARGETS.items() if name != "sm_86"}  # as sm_89
# name: dtype, head dim, causal, which have a tangent
FORWARD_MODE = {
    "causal": ("bfloat16", 64, 2, "q k v"),
    "bias": ("bfloat16", 64, 2, "q k v bias"),
    "fp16": ("float16", 64, 2, "q k v"),
    "128": ("bfloat16", 128, 2, "q k v"),
}
# name: dtype, head dim, rows of a page
CACHES = {
    f"cache of {dim}{', paged' * bool(page)}": ("bfloat16", dim, page)
    for dim in (64, 128)
    for page in (0, 16)
}


# --- in the subprocess ---------------------------------------------------------------------------


def launch_cache(dtype: torch.dtype, dim: int, page: int) -> None:
    """A token of 8 sequences, whose query heads share keys by four."""
    from fusedattn.kernels.attention_decode import attention_decode
    from fusedattn.ops.attention_config import AttentionCall, AttentionConfig

    q, lengths = torch.empty(8, 32, 1, dim, dtype=dtype), torch.empty(8, dtype=torch.int32)
    cache = torch.empty(2048 if page else 8, page or 4096, 8, dim, dtype=dtype).transpose(1, 2)
    table = torch.empty(8, 256, dtype=torch.int32) if page else None
    config = AttentionConfig(2, 0.1, cached=True)
    call = AttentionCall(q, cache, cache, kv_lengths=lengths, block_table=table, config=config)
    attention_decode(call, torch.empty_like(q), torch.empty(8, 32, 1))


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
    from fusedattn.kernels import attention_decode, attention_jvp, common, tuning
    from triton.runtime.driver import driver

    arch, shared = TARGETS[name]
    driver.set_active(Nothing(arch=arch))
    run = triton.JITFunction.run
    records, about = [], {}

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        tile = [options.get(each) for each in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")]
        found = {"kernel": self.__name__, "tile": tile} | disassemble(kernel)
        records.append(about | found)

    def pick(self: Any, candidates: Any, launch: Any, **_: Any) -> Any:
        for each in candidates[1:]:
            launch(each)
        return candidates[0]

    triton.JITFunction.run = only_compile
    tuning.Tuner.pick = pick
    device = common.Device(arch, shared, l2=50 << 20, processors=132)
    attention_jvp.device_of = attention_decode.device_of = lambda x: device
    for launch, cases in ((launch_case, FORWARD_MODE), (launch_cache, CACHES)):
        for case, (dtype, *rest) in cases.items():
            about.update({"case": case, "dtype": dtype})
            launch(getattr(torch, dtype), *rest)
    return records


# --- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=wanted(TARGETS))
def compiled(request: pytest.FixtureRequest) -> tuple[str, list[dict[str, Any]]]:
    return request.param, compile_in_a_process(__file__, request.param)


@pytest.mark.slow
def test_machine_code(compiled: tuple[str, list[dict[str, Any]]]) -> None:
    """Tensor cores, shared memory that is there, and no spills."""
    target, records = compiled
    assert {x["case"] for x in records} == {*FORWARD_MODE, *CACHES}
    for record in records:
        assert record["shared"] <= TARGETS[target][1], record
        assert not any(record[name] for name in ("STACK", "LOCAL", "LDL", "STL")), record
        if record["case"] in FORWARD_MODE:
            assert record[TENSOR_CORE[target]] > 0, record


@pytest.mark.slow
def test_a_cache_is_copied_in_16_bytes_and_ahead(
    compiled: tuple[str, list[dict[str, Any]]],
) -> None:
    """Of few queries mma.sync is enough everywhere; of a table 4 bytes are fetched beforehand."""
    records = [x for x in compiled[1] if x["kernel"] == "decode_kernel"]
    assert {x["case"] for x in records} == set(CACHES)
    for record in records:
        assert record["HMMA"] > 0, record
        assert record["wide copies"] > 0, record
        assert record["narrow copies"] <= (3 if CACHES[record["case"]][2] else 0), record


if __name__ == "__main__":
    tell(compile_target(sys.argv[1]))
