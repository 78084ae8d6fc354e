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
import collections
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fusedattn.benchmarks.host import Nothing
from machine_code import TOOL
from rich.console import Console
from rich.table import Table

# Multiply-adds of half precision that a processor's tensor cores do in a cycle. On sm_90 those of
# mma.sync, which old code uses, are half as fast.
RATE = {"sm_80": 1024, "sm_86": 512, "sm_89": 512, "sm_90": 2048, "sm_100": 4096, "sm_120": 512}
PRODUCTS = {"forward": 2, "dk, dv": 4, "dq": 3, "backward": 5}
TENSOR = re.compile(r"HMMA|HGMMA|UTCHMMA|UTCQMMA")
WAITS = re.compile(r"BAR\.|DEPBAR|WARPGROUP\.DEPBAR|SYNCS\.PHASECHK")


class Line(NamedTuple):
    address: int
    name: str
    operands: str


def lines_of(sass: str) -> list[Line]:
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);"
    return [Line(int(a, 16), name, rest) for a, name, rest in re.findall(pattern, sass)]


def hot_loop(lines: list[Line]) -> list[Line]:
    """The instructions of the loop that counts; empty without one."""
    loops = []
    for line in lines:
        target = re.search(r"0x([0-9a-f]+)", line.operands) if line.name.startswith("BRA") else None
        if target and (start := int(target[1], 16)) < line.address:
            body = [x for x in lines if start <= x.address <= line.address]
            if any(TENSOR.match(x.name) for x in body):
                loops.append(body)
    innermost = [
        x for x in loops if not any(y is not x and x[0] <= y[0] and y[-1] <= x[-1] for y in loops)
    ]
    return min(innermost, key=len, default=[])


def read(code: bytes) -> tuple[dict[str, int], list[Line]]:
    """What cuobjdump says of a cubin: its resources, and its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        sass, usage = (
            subprocess.run([TOOL, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-sass", "--dump-resource-usage")
        )
    uses = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    return uses, lines_of(sass.stdout)


def figures(target: str, kernel: Any, part: str, dim: int, tile: list[int]) -> dict[str, Any]:
    """A row of the table; tile: queries, keys, warps, stages."""
    uses, lines = read(kernel.asm["cubin"])
    loop = hot_loop(lines)
    counts = collections.Counter(x.name.split(".")[0] for x in loop)
    queries, keys, warps, _ = tile
    rate = RATE[target] / (2 if target == "sm_90" and counts["HMMA"] else 1)
    cycles = {
        "tensor": PRODUCTS[part] * queries * keys * dim / rate,
        "exp": sum(x.name.startswith("MUFU.EX2") for x in loop) * warps * 32 / 16,
        "issue": len(loop) * warps / 4,
    }
    return {
        "instructions": len(lines),
        "registers": uses["REG"],
        "spilled": uses["STACK"] + uses["LOCAL"],
        "shared": kernel.metadata.shared,
        "loop": {
            "instructions": len(loop),
            "tensor": sum(bool(TENSOR.match(x.name)) for x in loop),
            "waits": sum(bool(WAITS.match(x.name)) for x in loop),
            "shared stores": counts["STS"],
        },
        "cycles": {name: round(x) for name, x in cycles.items()},
        "of tensor peak": round(cycles["tensor"] / max(cycles.values()), 2),
    }


# --- in a process for each target ----------------------------------------------------------------

PARTS = {"forward_kernel": "forward", "dkdv_kernel": "dk, dv", "dq_kernel": "dq"}


def ours(target: str) -> list[dict[str, Any]]:
    """Every tile of the hot kernels in bfloat16, causal, at head dims 64 and 128."""
    import test_triton_compile as compiler

    compiler.CASES = compiler.SMALL_CASES = {"causal": compiler.CASES["causal"]}
    compiler.disassemble = lambda kernel: {"compiled": kernel}
    rows = []
    for record in compiler.compile_target(target):
        if (part := PARTS.get(record["kernel"])) is not None:
            found = figures(target, record["compiled"], part, record["dim"], record["tile"])
            rows.append(
                {"who": "fusedattn", "target": target, "kernel": part, "dim": record["dim"]}
                | {"tile": record["tile"]} | found
            )  # fmt: skip
    return rows


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

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        part = {"_attn_fwd": "forward", "_attn_bwd": "backward"}.get(self.__name__)
        if part is None:
            return
        names = ("BLOCK_M", "BLOCK_N") if part == "forward" else ("BLOCK_M1", "BLOCK_N1")
        tile = [options[x] for x in (*names, "num_warps", "num_stages")]
        dim = options["HEAD_DIM"]
        rows.append(
            {"who": "tutorial", "target": target, "kernel": part, "dim": dim, "tile": tile}
            | figures(target, kernel, part, dim, tile)
        )

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


def in_a_process(target: str, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", __file__, "--rows", target, *arguments]
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
            row["who"], row["target"], row["kernel"], row["dim"], ", ".join(map(str, row["tile"])),
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
        file = arguments.tutorial
        print(json.dumps(tutorial(arguments.rows, file) if file else ours(arguments.rows)))
        return
    rows = []
    if arguments.before:
        earlier = json.loads(arguments.before.read_text())["rows"]
        rows += [x | {"who": "before"} for x in earlier if x["who"] == "fusedattn"]
    for target in arguments.targets:
        rows += in_a_process(target)
        if arguments.tutorial:
            rows += in_a_process(target, "--tutorial", arguments.tutorial)
    Console(width=150).print(table_of(rows))
    if arguments.output:
        import triton

        about = {"triton": triton.__version__, "rows": rows}
        arguments.output.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
