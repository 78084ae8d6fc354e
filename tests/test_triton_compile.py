"""The machine code of attention's Triton kernels, compiled ahead of time: no GPU needed.

Run as a script with the name of a target, this file calls the launchers on CPU tensors with a
driver that only compiles, for every tile that the tuner would try, and prints what `cuobjdump`
finds as JSON. The tests start one such process per target, outside the interpreter, and read it.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_code import TENSOR_CORES, disassemble
from fusedattn.benchmarks.host import Nothing
from kept import KEPT, imported_sources, load, store, triton_and_its_tools
from processes import PATIENCE, in_a_new_process, wanted

# Which tiles spill depends on the compiler: attention_tile_lists.py was made with this one.
pytest.importorskip("triton", minversion="3.9")

# Compute capability and shared memory per block.
TARGETS = {
    "sm_80": (80, 166_912),
    "sm_86": (86, 101_376),
    "sm_89": (89, 101_376),
    "sm_90": (90, 232_448),
    "sm_100": (100, 232_448),
    "sm_120": (120, 101_376),
}
LITTLE_SHARED = {"sm_86", "sm_89", "sm_120"}

# name: dtype, head dim, causal, terms of the scores, whether every tile or only the first.
CASES = {
    "causal": ("bfloat16", (64, 128), 2, "", True),
    "full": ("bfloat16", (64, 128), 0, "", False),
    "rows of 144 bytes": ("bfloat16", (72,), 2, "", True),
    "mask": ("bfloat16", (64, 128), 0, "mask even", False),
    "mask and bias": ("bfloat16", (64, 128), 2, "mask bias", False),
    "window, slopes, sinks": ("bfloat16", (64, 128), 2, "window slopes sinks", False),
    "shared bias": ("bfloat16", (64, 128), 0, "shared", False),
    "shared bias, in order": ("bfloat16", (64, 128), 0, "shared, in order", False),
    "bias of keys": ("bfloat16", (64, 128), 0, "bias of keys", False),
    "dropout": ("bfloat16", (64, 128), 2, "dropout", False),
    "mask and dropout": ("bfloat16", (64, 128), 0, "mask dropout", False),
    "bias and dropout": ("bfloat16", (128,), 0, "bias dropout", False),
    "packed, slopes": ("bfloat16", (64, 128), 2, "packed slopes", False),
    "packed, prefix": ("bfloat16", (64,), 0, "packed prefix", False),
    "documents": ("bfloat16", (64, 128), 2, "documents", False),
    "prefix": ("bfloat16", (64, 128), 2, "prefix", False),
    "blocks": ("bfloat16", (64, 128), 2, "blocks", False),
    "distances": ("bfloat16", (64, 128), 2, "distances", False),
    "wide": ("bfloat16", (256, 512), 2, "", False),
    "fp16": ("float16", (64, 128), 2, "", False),
    "fp32": ("float32", (64, 128), 2, "", False),
}
# The least shared memory: only what must fit.
SMALL_CASES = {
    "causal": ("bfloat16", (64, 128), 2, "", True),
    "mask and bias": ("bfloat16", (64, 128), 2, "mask bias", False),
    "fp16": ("float16", (64, 128), 2, "", False),
    "wide": ("bfloat16", (256, 512), 2, "", False),
    "fp32": ("float32", (128, 512), 2, "", False),
}
PLAIN_CASES = ("causal", "full", "rows of 144 bytes")  # nothing is read for each pair
LISTS = {"shown_kernel", "list_kernel"}
MATRIX_KERNELS = {"forward_kernel", "dkdv_kernel", "dq_kernel"}
TENSOR_CORE = dict.fromkeys(TARGETS, TENSOR_CORES[0]) | {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}
# Of the first tile where every query sees every key: the most instructions in the hot loop,
# registers, and waits in the loop, with some room for other compilers. A branch between the
# products, warps along the columns of a result, or a copy waited for twice all take more.
MOST = {
    ("sm_80", "forward_kernel"): {64: (710, 255, 5), 128: (565, 248, 5)},
    ("sm_80", "dkdv_kernel"): {64: (300, 192, 7), 128: (255, 244, 7)},
    ("sm_80", "dq_kernel"): {64: (390, 204, 5), 128: (335, 204, 5)},
    ("sm_90", "forward_kernel"): {64: (580, 255, 7), 128: (415, 232, 7)},
    ("sm_90", "dkdv_kernel"): {64: (375, 255, 11), 128: (320, 255, 11)},
    ("sm_90", "dq_kernel"): {64: (490, 250, 9), 128: (375, 232, 9)},
}


# --- in the subprocess ---------------------------------------------------------------------------


def compile_case(dtype: torch.dtype, dim: int, causal: int, terms: str) -> None:
    """Both launchers on tensors of the case: the kernels are compiled as the JIT would."""
    from fusedattn.kernels.attention_bwd import attention_backward
    from fusedattn.kernels.attention_fwd import attention_forward
    from fusedattn.ops.attention_config import (
        AttentionBackwardCall,
        AttentionCall,
        AttentionConfig,
    )
    from fusedattn.ops.attention_rules import Rules

    seq = 256
    batch, offsets, lengths = 2, None, torch.empty(2, dtype=torch.int32)
    if "even" in terms:  # nothing but Sk, a multiple of 16, ends a row of the mask
        lengths = None
    if "packed" in terms:
        batch, offsets, lengths = 1, torch.empty(5, dtype=torch.int32), None
    q, dq, out, dout = (torch.empty(batch, 4, seq, dim, dtype=dtype) for _ in range(4))
    k, v, dk, dv = (torch.empty(batch, 2, seq, dim, dtype=dtype) for _ in range(4))
    lse, dlse = torch.empty(batch, 4, seq), torch.empty(batch, 4, seq)
    bias = mask = None
    if "mask" in terms:
        mask = torch.empty(2, 1, seq, seq, dtype=torch.bool)
    if "bias" in terms:
        bias = torch.empty(2, 4, seq, seq, dtype=dtype)
    if "shared" in terms:
        bias = torch.empty(1, 4, seq, seq, dtype=dtype)
    if "of keys" in terms:
        bias = torch.empty(2, 1, 1, seq, dtype=dtype)
    slopes, sinks = (torch.empty(1, 4, 1, 1) if x in terms else None for x in ("slopes", "sinks"))
    config = AttentionConfig(causal, 0.1, window_left=99 if "window" in terms else -1)
    if "in order" in terms:
        config = config._replace(deterministic=True)
    seed, rules = None, dict.fromkeys(Rules._fields)
    if "documents" in terms:
        rules["documents_q"] = rules["documents_k"] = torch.empty(2, seq, dtype=torch.int32)
    if "distances" in terms:
        rules["distance_bias"] = torch.empty(1, 4, 1, 2 * seq - 1)
    if "prefix" in terms:
        rules["prefix_lengths"] = torch.empty(2, dtype=torch.int32)
    if "blocks" in terms:
        rules["mask_blocks"] = torch.empty(1, 1, 2, 2, dtype=torch.bool)
        config = config._replace(block_size=128)
    if "dropout" in terms:
        seed, config = torch.empty(1, dtype=torch.int64), config._replace(dropout_p=0.1)
    call = AttentionCall(
        q, k, v, mask, bias, lengths, slopes, sinks, seed=seed, **rules, cu_seqlens_q=offsets,
        cu_seqlens_k=offsets, config=config,
    )  # fmt: skip
    attention_forward(call, out, lse)
    dbias = None if bias is None else torch.empty_like(bias)
    backward = AttentionBackwardCall(dout, dlse, out, lse, *call[:-1], config=config)
    dslopes = slopes if offsets is not None else None
    attention_backward(backward, dq, dk, dv, dbias, dslopes, rules["distance_bias"])


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
        assert options["enable_fp_fusion"], self.__name__
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        tile = [options.get(each) for each in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")]
        told = {"kernel": self.__name__, "tile": tile}
        told |= {x: options.get(y, False) for x, y in {"ahead": "AHEAD", "tma": "TMA"}.items()}
        records.append(about | told | disassemble(kernel))

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
            further = {
                "shared bias, in order": {"bias_grad_kernel"},
                "fp16": {"norms_kernel"},
                "packed, slopes": {"slopes_kernel"},
                "mask": LISTS,
                "mask and bias": LISTS,
                "mask and dropout": LISTS,
                "documents": LISTS,
                "prefix": LISTS,
                "blocks": LISTS,
                "distances": {"distance_grad_kernel", "distance_sum_kernel"},
            }
            assert found == expected | further.get(case, set())

    def test_tensor_cores_are_used(self, compiled: dict, target: str) -> None:
        for record in half(compiled[target]):
            without = ("delta", "norms", "slopes", "shown", "list", "distance_sum")
            if record["kernel"].removesuffix("_kernel") not in without:
                assert record[TENSOR_CORE[target]] > 0, record

    def test_no_registers_spill(self, compiled: dict, target: str) -> None:
        for record in half(compiled[target]):
            spilled = {name: record[name] for name in ("STACK", "LOCAL", "LDL", "STL")}
            # Three loops with all terms, or an outer loop: ten words, outside the loop that counts;
            # on sm_100 more.
            allowed = dict.fromkeys(("window, slopes, sinks", "packed, slopes"), 40)
            if target == "sm_100":
                allowed = {"window, slopes, sinks": 152, "packed, slopes": 176, "mask and bias": 48}
            assert max(spilled.values()) <= allowed.get(record["case"], 0), record
            full = [x for x in record["loops"] if x["exponentials"]] or record["loops"]
            loop = min(full, key=lambda loop: loop["instructions"], default={"LDL": 0})
            assert loop["LDL"] == 0, record

    def test_shared_memory_fits(self, compiled: dict, target: str) -> None:
        for record in compiled[target]:
            assert record["shared"] <= TARGETS[target][1], record

    def test_tiles_are_chosen_by_what_they_take(self, compiled: dict, target: str) -> None:
        """The bytes of shared memory, which on mma.sync are few enough to decide."""
        from fusedattn.kernels import attention_tiles as tiles
        from fusedattn.kernels.common import block_width

        operands = {
            "forward_kernel": tiles.forward_operands,
            "dkdv_kernel": tiles.dkdv_operands,
            "dq_kernel": tiles.dq_operands,
        }
        for record in half(compiled[target]):
            plain = record["case"] in (*PLAIN_CASES, "fp16")
            if TENSOR_CORE[target] == "HMMA" and plain and record["kernel"] in operands:
                width = block_width(record["dim"])
                assert record["shared"] == tiles.shared_bytes(
                    record["tile"], operands[record["kernel"]], TARGETS[target][0],
                    torch.float16, (width, width), 0,
                ), record  # fmt: skip

    def test_tiles_are_copied_in_16_bytes(self, compiled: dict, target: str) -> None:
        for record in half(compiled[target]):
            if record["case"] in PLAIN_CASES and record["kernel"] in MATRIX_KERNELS:
                rows = 0  # of lse and Δ: 4 bytes of each stage, and of one that sm_100 peels off
                if record["kernel"] == "dkdv_kernel":
                    stages = record["tile"][3] + (target == "sm_100")
                    rows = 2 * stages * len(record["loops"])
                assert record["narrow copies"] <= rows, record
                if (
                    record["tile"][3] > 1 and not record["tma"]
                ):  # with one stage rows come by plain loads
                    assert record["wide copies"] > 0, record

    def test_tiles_come_through_descriptors(self, compiled: dict, target: str) -> None:
        """Where they may: with registers to spare that addresses take, of two loops a quarter."""
        described = [x for x in compiled[target] if x["tma"]]
        kernels = {"sm_90": MATRIX_KERNELS, "sm_100": {"forward_kernel", "dq_kernel"}}
        assert {x["kernel"] for x in described} == kernels.get(target, set())
        for record in compiled[target]:
            assert (record["UTMALDG"] > 0) == record["tma"], record
        for record in described:
            about = ("kernel", "dim", "tile", "ahead")
            same = [x for x in half(compiled[target]) if all(x[y] == record[y] for y in about)]
            plain = [x["REG"] for x in same if x["case"] == record["case"] and not x["tma"]]
            if plain and record["kernel"] != "dkdv_kernel":
                assert record["REG"] <= min(plain) - 24, record

    def test_copies_are_under_way_during_the_products(self, compiled: dict, target: str) -> None:
        """The first guess has three stages: with two each copy is waited for at once."""
        for record in half(compiled[target]):
            if record["case"] == "fp16" and record["kernel"] in MATRIX_KERNELS:
                one = (target, record["kernel"], record["dim"]) == ("sm_100", "dkdv_kernel", 128)
                assert record["tile"][3] == (1 if one else 3), record

    def test_nothing_crosses_warps_in_the_hot_loops(self, compiled: dict, target: str) -> None:
        """On mma.sync, where a tile has as many rows as its result has columns."""
        for record in half(compiled[target]):
            kernel, plain = record["kernel"], record["case"] in PLAIN_CASES
            if TENSOR_CORE[target] != "HMMA" or not plain or kernel not in MATRIX_KERNELS:
                continue
            if record["tile"][kernel == "dkdv_kernel"] >= (64 if record["dim"] <= 64 else 128):
                masked = (record["case"], kernel) != ("full", "dkdv_kernel")
                assert len(record["loops"]) == 1 + masked, record
                for loop in record["loops"]:
                    assert loop["STS"] + loop["STSM"] == 0, record
                    assert loop["BAR"] <= 2, record

    def test_hot_loops_are_as_short_as_they_were_made(self, compiled: dict, target: str) -> None:
        for record in half(compiled[target]):
            most = MOST.get((target, record["kernel"]))
            if record["case"] == "full" and most is not None:
                loop = min(record["loops"], key=lambda loop: loop["instructions"])
                found = loop["instructions"], record["REG"], loop["waits"]
                bounds = most[record["dim"]]
                assert all(x <= y for x, y in zip(found, bounds, strict=True)), (bounds, record)

    def test_no_product_waits_for_its_neighbour(self, compiled: dict, target: str) -> None:
        """ptxas has each wgmma wait where it cannot prove that nothing else writes the sums."""
        chains = {"forward_kernel": 2, "dkdv_kernel": 4, "dq_kernel": 3}
        for record in half(compiled[target]):
            if target == "sm_90" and record["kernel"] in chains:
                for loop in record["loops"]:
                    assert loop["chains"] == chains[record["kernel"]], record

    def test_exponentials_run_beside_products(self, compiled: dict, target: str) -> None:
        for record in half(compiled[target]):
            backward = record["kernel"] in ("dkdv_kernel", "dq_kernel")
            if target == "sm_90" and record["case"] == "full" and backward:
                assert max(loop["hidden"] for loop in record["loops"]) > 8, record
            if record["ahead"]:
                assert all(loop["hidden"] > 20 for loop in record["loops"]), record

    def test_fp32_is_ieee(self, compiled: dict, target: str) -> None:
        for record in compiled[target]:
            if record["dtype"] == "float32":
                assert not any(record[name] for name in TENSOR_CORES), record


def test_one_process_compiles_for_two_targets() -> None:
    printed = in_a_new_process(f"""
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, {str(Path(__file__).parent)!r})
import re, torch
from fusedattn.benchmarks.host import Nothing
from fusedattn.kernels.attention_delta import delta_kernel
from fusedattn.kernels.common import view
from triton.runtime.driver import driver
x, row = view(torch.empty(1, 1, 32, 16)), torch.empty(1, 1, 32)
for arch in (80, 90, 80):
    driver.set_active(Nothing(arch=arch))
    kernel = delta_kernel.warmup(
        x, x, row, None, row, row, None, None, None, 1, 1, 32,
        False, 16, 16, True, 32, num_warps=4, grid=(1,),
    )
    print(*re.findall(r"[.]target (sm_[0-9]+)", kernel.asm["ptx"]))
""")
    assert printed.split() == ["sm_80", "sm_90", "sm_80"]


if __name__ == "__main__":
    tell(compile_target(sys.argv[1]))
