"""What attention's Triton kernels are in machine code, tile by tile: benchmarks/results.

    python tests/machine_code_table.py --output benchmarks/results/machine-code.json \
        [--before FILE] [--tutorial 06-fused-attention.py] [--targets sm_80 sm_90]

Each kernel is compiled ahead of time, and its hot loop found: the innermost with products of
matrices in it, and of several the one with the fewest instructions, which masks nothing. Cycles are
those of one tile on one processor (SM), by unit, were it never waited for: products at the rate of
the tensor cores, 16 exponentials a cycle, 4 instructions a cycle of all warps. With --tutorial the
same for the kernels of Triton's tutorial on fused attention, fetched by hand.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import test_triton_compile as compiler
import torch
from compiled_code import disassemble
from fusedattn.benchmarks.host import Nothing
from rich.console import Console
from rich.table import Table

# Multiply-adds of half precision that a processor's tensor cores do in a cycle. On sm_90 those of
# mma.sync, which old code uses, are half as fast.
RATE = {"sm_80": 1024, "sm_86": 512, "sm_89": 512, "sm_90": 2048, "sm_100": 4096, "sm_120": 512}
PARTS = {"forward_kernel": "forward", "dkdv_kernel": "dk, dv", "dq_kernel": "dq"}
CONSTANTS = {"TMA": "tma", "scores ahead": "ahead"}  # that tell tiles of ours apart
PRODUCTS = {"forward": 2, "dk, dv": 4, "dq": 3}


def figures(record: dict[str, Any], target: str, part: str, dim: int, tile: list) -> dict[str, Any]:
    """A row of the table, from what `disassemble` says; tile: queries, keys, warps, stages."""
    loop = min(record["loops"], key=lambda loop: loop["instructions"])
    queries, keys, warps, _ = tile
    rate = RATE[target] / (2 if target == "sm_90" and record["HMMA"] else 1)
    cycles = {
        "tensor": PRODUCTS[part] * queries * keys * dim / rate,
        "exp": loop["exponentials"] * warps * 32 / 16,
        "issue": loop["instructions"] * warps / 4,
    }
    return {
        "target": target,
        "kernel": part,
        "dim": dim,
        "tile": tile,
        "instructions": record["instructions"],
        "registers": record["REG"],
        "spilled": record["STACK"] + record["LOCAL"],
        "shared": record["shared"],
        "loop": loop,
        "cycles": {name: round(x) for name, x in cycles.items()},
        "of tensor peak": round(cycles["tensor"] / max(cycles.values()), 2),
    }


def ours(target: str) -> list[dict[str, Any]]:
    """Every tile of the hot kernels in bfloat16, causal, at head dims 64 and 128."""
    found = compiler.compile_in_a_process(compiler.__file__, target)
    return [
        {"who": "fusedattn"}
        | figures(x, target, PARTS[x["kernel"]], x["dim"], x["tile"])
        | {name: x[of] for name, of in CONSTANTS.items()}
        for x in found
        if x["case"] == "causal" and x["kernel"] in PARTS
    ]


# --- in a process of its own ---------------------------------------------------------------------


def tutorial(target: str, path: str) -> list[dict[str, Any]]:
    """The tutorial's forward at each of its tiles, and its backward; causal, in fp16."""
    import triton
    from triton.runtime.driver import driver

    arch = int(target.removeprefix("sm_"))
    nothing = Nothing(arch=arch)
    nothing.get_active_torch_device = lambda: torch.device("cpu")  # type: ignore[attr-defined]
    driver.set_active(nothing)
    torch.cuda.get_device_capability = lambda *args: divmod(arch, 10)
    spec = importlib.util.spec_from_file_location("tutorial", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    rows: list[dict[str, Any]] = []
    run = triton.JITFunction.run
    parts = {
        "_attn_fwd": {"forward": ("BLOCK_M", "BLOCK_N")},
        "_attn_bwd": {"dk, dv": ("BLOCK_M1", "BLOCK_N1"), "dq": ("BLOCK_M2", "BLOCK_N2")},
    }

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        for part, names in parts.get(self.__name__, {}).items():
            tile = [options[x] for x in (*names, "num_warps", "num_stages")]
            record = disassemble(kernel)
            if part != "forward":  # in one kernel; dk and dv take more products
                counts = {x["products"] for x in record["loops"]}
                count = max(counts) if part == "dk, dv" else min(counts)
                record["loops"] = [x for x in record["loops"] if x["products"] == count]
            found = figures(record, target, part, options["HEAD_DIM"], tile)
            rows.append({"who": "tutorial"} | found)

    triton.JITFunction.run = only_compile
    configs = module._attn_fwd.configs
    for dim in (64, 128):
        q, k, v = (torch.empty(2, 4, 256, dim, dtype=torch.float16) for _ in range(3))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        for config in configs:
            if config.kwargs["BLOCK_N"] > dim or config.num_stages > 3:
                continue
            module._attn_fwd.configs = [config]
            out = module.attention(*inputs, True, 0.5, False)
        out.backward(torch.empty_like(out))
    return rows


# --- the table -----------------------------------------------------------------------------------


def tutorial_in_a_process(target: str, path: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", __file__, "--tutorial", path, "--rows", target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"{target}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return []
    return json.loads(done.stdout)


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="attention's Triton kernels in machine code, causal", title_style="bold")
    columns = ("", "target", "kernel", "D", "tile", "registers", "spilled", "shared", "loop",
               "waits", "tensor", "exp", "issue", "of peak")  # fmt: skip
    for name in columns:
        table.add_column(name, justify="left" if name in ("", "target", "kernel") else "right")
    for row in rows:
        loop, cycles = row["loop"], row["cycles"]
        values = (
            row["who"], row["target"], row["kernel"], row["dim"],
            ", ".join([*map(str, row["tile"]), *(x for x in CONSTANTS if row.get(x))]),
            row["registers"], row["spilled"], row["shared"], loop["instructions"], loop["waits"],
            cycles["tensor"], cycles["exp"], cycles["issue"], row["of tensor peak"],
        )  # fmt: skip
        table.add_row(*map(str, values))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    parser.add_argument("--tutorial", help="the tutorial's file")
    parser.add_argument("--targets", nargs="+", default=["sm_80", "sm_90"])
    parser.add_argument("--before", type=Path, help="an earlier output, to stand beside this one")
    parser.add_argument("--output", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    if arguments.rows:
        print(json.dumps(tutorial(arguments.rows, arguments.tutorial)))
        return
    rows = []
    if arguments.before:
        earlier = json.loads(arguments.before.read_text())["rows"]
        rows += [x | {"who": "before"} for x in earlier if x["who"] == "fusedattn"]
    for target in arguments.targets:
        rows += ours(target)
        if arguments.tutorial:
            rows += tutorial_in_a_process(target, arguments.tutorial)
    Console(width=150).print(table_of(rows))
    if arguments.output:
        import triton

        lines = ",\n".join(json.dumps(x) for x in rows)
        arguments.output.write_text(
            f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n'
        )


if __name__ == "__main__":
    main()
