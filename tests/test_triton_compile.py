"""The machine code of attention's Triton kernels, compiled ahead of time: no GPU needed.

Run as a script with the name of a target, this file calls the launchers on CPU tensors with a
driver that only compiles, for every tile that the tuner would try, and prints what `cuobjdump`
finds as JSON. The tests start one such process per target, outside the interpreter, and read it.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fusedattn.benchmarks.host import Nothing
from kept import KEPT, digest, imported_sources, load, store, triton_and_its_tools
from processes import PATIENCE, wanted

# Which tiles spill depends on the compiler: attention_tiles.py was made with this one.
pytest.importorskip("triton", minversion="3.9")

# Compute capability and shared memory per block.
TARGETS = {
    "sm_80": (80, 166_912),
    "sm_86": (86, 101_376),
    "sm_89": (89, 101_376),
    "sm_90": (90, 232_448),
    "sm_100": (100, 232_448),
}
LITTLE_SHARED = {"sm_86", "sm_89"}

# name: dtype, head dim, causal, terms of the scores, whether every tile or only the first.
CASES = {
    "causal": ("bfloat16", (64, 128), 2, "", True),
    "full": ("bfloat16", (64, 128), 0, "", False),
    "rows of 144 bytes": ("bfloat16", (72,), 2, "", False),
    "mask and bias": ("bfloat16", (64, 128), 2, "mask bias", False),
    "shared bias": ("bfloat16", (64, 128), 0, "shared", False),
    "wide": ("bfloat16", (256, 512), 2, "", False),
    "fp16": ("float16", (64, 128), 2, "", False),
    "fp32": ("float32", (64, 128), 2, "", False),
}
# The least shared memory: only what must fit.
SMALL_CASES = {
    "causal": ("bfloat16", (64, 128), 2, "", True),
    "wide": ("bfloat16", (256, 512), 2, "", False),
    "fp32": ("float32", (128, 512), 2, "", False),
}
PLAIN_CASES = ("causal", "full", "rows of 144 bytes")  # nothing is read for each pair
MATRIX_KERNELS = {"forward_kernel", "dkdv_kernel", "dq_kernel"}
WIDE = ("LDG", "STG")  # loads and stores of global memory; counted where they move 16 bytes
TENSOR_CORE = dict.fromkeys(TARGETS, "HMMA") | {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}


# --- in the subprocess ---------------------------------------------------------------------------


def disassemble(kernel: Any) -> dict[str, Any]:
    """What a compiled kernel uses, and how often each instruction stands in it."""
    code = kernel.asm["cubin"]
    path = KEPT / "sass" / digest(code.hex(), triton_and_its_tools(), Path(__file__))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(f".{os.getpid()}").write_text(json.dumps(_read(code)))
        path.with_suffix(f".{os.getpid()}").replace(path)
    return {"shared": kernel.metadata.shared, **json.loads(path.read_text())}


def _read(code: bytes) -> dict[str, Any]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        sass, usage = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-sass", "--dump-resource-usage")
        )
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass.stdout)
    counts = collections.Counter(each.split(".")[0] for each in found)
    copies = [each for each in found if each.startswith("LDGSTS")]
    uses = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
    return {
        "narrow copies": sum(".128" not in each for each in copies),
        "wide copies": sum(".128" in each for each in copies),
        **{name: sum(x.startswith(name) and ".128" in x for x in found) for name in WIDE},
        "narrow": sum(x.startswith(("LDG", "STG")) and ".128" not in x for x in found),
        **{name: int(value) for name, value in uses.items()},
        **{name: counts[name] for name in ("LDL", "STL", *TENSOR_CORE.values())},
    }


def compile_case(dtype: torch.dtype, dim: int, causal: int, terms: str) -> None:
    """Both launchers on tensors of the case: the kernels are compiled as the JIT would."""
    from fusedattn.kernels.attention_bwd import attention_backward
    from fusedattn.kernels.attention_fwd import attention_forward
    from fusedattn.ops.attention_config import (
        AttentionBackwardCall,
        AttentionCall,
        AttentionConfig,
    )

    seq = 256
    q, dq, out, dout = (torch.empty(2, 4, seq, dim, dtype=dtype) for _ in range(4))
    k, v, dk, dv = (torch.empty(2, 2, seq, dim, dtype=dtype) for _ in range(4))
    lse, dlse = torch.empty(2, 4, seq), torch.empty(2, 4, seq)
    bias = mask = None
    if "mask" in terms:
        mask = torch.empty(2, 1, seq, seq, dtype=torch.bool)
    if "bias" in terms:
        bias = torch.empty(2, 4, seq, seq, dtype=dtype)
    if "shared" in terms:
        bias = torch.empty(1, 4, seq, seq, dtype=dtype)
    lengths = torch.empty(2, dtype=torch.int32)
    config = AttentionConfig(causal, 0.1)
    call = AttentionCall(q, k, v, mask, bias, lengths, config=config)
    attention_forward(call, out, lse)
    dbias = None if bias is None else bias.float()
    backward = AttentionBackwardCall(dout, dlse, out, lse, *call[:-1], config=config)
    attention_backward(backward, dq, dk, dv, dbias)


def compile_target(name: str) -> list[dict[str, Any]]:
    """Every case for one target: a record for each compiled kernel."""
    import triton
    from fusedattn.kernels import attention_bwd, attention_fwd, common, tuning
    from triton.runtime.driver import driver

    arch, shared = TARGETS[name]
    driver.set_active(Nothing(arch=arch))
    run = triton.JITFunction.run
    records = []
    about = {}

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        tile = [options.get(each) for each in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")]
        records.append(about | {"kernel": self.__name__, "tile": tile} | disassemble(kernel))

    def pick(self: Any, candidates: Any, launch: Any, **about_the_call: Any) -> Any:
        for each in candidates[1:] if about["every tile"] else ():
            launch(each)
        return candidates[0]

    triton.JITFunction.run = only_compile
    tuning.Tuner.pick = pick
    device = common.Device(arch, shared, l2=50 << 20, processors=132)
    attention_fwd.device_of = attention_bwd.device_of = lambda x: device
    torch.sum = lambda *args, **options: None  # nothing was computed that could be summed
    for case, (dtype, dims, causal, terms, every) in (
        SMALL_CASES if name in LITTLE_SHARED else CASES
    ).items():
        for dim in dims:
            about.update({"target": name, "case": case, "dtype": dtype, "dim": dim})
            about["every tile"] = every
            compile_case(getattr(torch, dtype), dim, causal, terms)
    return records


def tell(records: list[dict[str, Any]]) -> None:
    """Print the records of a target, and from which sources they are."""
    print(json.dumps({"records": records, "sources": imported_sources()}))


def compile_in_a_process(file: str, target: str) -> list[dict[str, Any]]:
    """The records that this script, or one like it, prints for a target.

    Where nothing has changed that it read, those of an earlier run.
    """
    name, tools, begun = f"{Path(file).stem}-{target}", triton_and_its_tools(), time.time()
    if (records := load(name, tools)) is not None:
        return records
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["TRITON_CACHE_DIR"] = str(KEPT / "triton")
    done = subprocess.run(
        [sys.executable, file, target],
        env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    store(name, tools, found["sources"], found["records"], begun)
    return found["records"]


# --- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[dict[str, Any]]]:
    """The records of every target, two compiling at a time."""
    names = wanted(TARGETS)
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(functools.partial(compile_in_a_process, __file__), names)
        return dict(zip(names, found, strict=True))


def half(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The hot kernels: half precision at head dims up to 128."""
    return [x for x in records if x["dtype"] != "float32" and x["dim"] <= 128]


@pytest.mark.slow
@pytest.mark.parametrize("target", wanted(TARGETS))
class TestMachineCode:
    def test_every_kernel_is_there(self, compiled: dict, target: str) -> None:
        expected = MATRIX_KERNELS | {"delta_kernel"}
        for case in {x["case"] for x in compiled[target]}:
            found = {x["kernel"] for x in compiled[target] if x["case"] == case}
            further = {"shared bias": {"bias_grad_kernel"}, "fp16": {"norms_kernel"}}
            assert found == expected | further.get(case, set())

    def test_tensor_cores_are_used(self, compiled: dict, target: str) -> None:
        for record in half(compiled[target]):
            if record["kernel"] not in ("delta_kernel", "norms_kernel"):
                assert record[TENSOR_CORE[target]] > 0, record

    def test_no_registers_spill(self, compiled: dict, target: str) -> None:
        for record in half(compiled[target]):
            spilled = {name: record[name] for name in ("STACK", "LOCAL", "LDL", "STL")}
            assert not any(spilled.values()), record

    def test_shared_memory_fits(self, compiled: dict, target: str) -> None:
        for record in compiled[target]:
            assert record["shared"] <= TARGETS[target][1], record

    def test_tiles_are_copied_in_16_bytes(self, compiled: dict, target: str) -> None:
        for record in half(compiled[target]):
            if record["case"] in PLAIN_CASES and record["kernel"] in MATRIX_KERNELS:
                rows = 6 if record["kernel"] == "dkdv_kernel" else 0  # of lse and Δ: 4 bytes each
                assert record["narrow copies"] <= rows, record
                assert record["wide copies"] > 0, record

    def test_fp32_is_ieee(self, compiled: dict, target: str) -> None:
        for record in compiled[target]:
            if record["dtype"] == "float32":
                assert not any(record[name] for name in TENSOR_CORE.values()), record


if __name__ == "__main__":
    tell(compile_target(sys.argv[1]))
