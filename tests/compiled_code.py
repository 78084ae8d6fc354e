"""The machine code of a kernel that Triton compiled, read with the `cuobjdump` of its package."""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from kept import KEPT, digest, triton_and_its_tools

WIDE = ("LDG", "STG")  # loads and stores of global memory; counted where they move 16 bytes
WAITS = re.compile(r"BAR\.|\w*DEPBAR|WARPGROUP\.DEPBAR|SYNCS\.PHASECHK")
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")


def disassemble(kernel: Any) -> dict[str, Any]:
    """What a compiled kernel uses, and how often each instruction stands in it."""
    code = kernel.asm["cubin"]
    path = KEPT / "sass" / digest(code.hex(), triton_and_its_tools(), Path(__file__))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(f".{os.getpid()}").write_text(json.dumps(_read(code)))
        path.with_suffix(f".{os.getpid()}").replace(path)
    return {"shared": kernel.metadata.shared, **json.loads(path.read_text())}


def _loops(sass: str) -> list[list[str]]:
    """The instructions of each innermost loop with products of matrices, in their order.

    A wait that has to be repeated is repeated after the kernel's end: no loop has that in it.
    """
    code = [
        (int(at, 16), name, rest)
        for at, name, rest in re.findall(
            r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)", sass
        )
    ]
    jumps = [
        (int(to[1], 16), at)
        for at, name, rest in code
        if name.startswith("BRA") and (to := re.search(r"0x([0-9a-f]+)", rest))
    ]
    bodies = {
        (first, last): [name for at, name, _ in code if first <= at <= last]
        for first, last in jumps
        if first < last
    }
    bodies = {
        span: x
        for span, x in bodies.items()
        if any("MMA" in name for name in x) and "EXIT" not in x
    }
    return [
        x
        for (first, last), x in bodies.items()
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in bodies)
    ]


def _about_a_loop(body: list[str]) -> dict[str, int]:
    """`chains`: products of sm_90 that begin together.

    `hidden`: exponentials between two products that are not waited for in between.
    """
    counts = collections.Counter(name.split(".")[0] for name in body)
    told = {"HGMMA": "p", "WARPGROUP.DEPBAR": "w", "MUFU.EX2": "e"}
    order = "".join(next((x for name, x in told.items() if y.startswith(name)), "") for y in body)
    return {
        "instructions": len(body),
        "products": sum("MMA" in name for name in body),
        "chains": sum(name == "WARPGROUP.ARRIVE" for name in body),
        "exponentials": order.count("e"),
        "waits": sum(bool(WAITS.match(name)) for name in body),
        "hidden": sum(len(each) for each in re.findall(r"(?<=p)e+(?=p)", order)),
        **{name: counts[name] for name in ("BAR", "STS", "STSM", "LDL", "STL")},
    }


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
    inner = _loops(sass.stdout)
    copies = [each for each in found if each.startswith("LDGSTS")]
    uses = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
    return {
        "loops": [_about_a_loop(each) for each in inner],
        "narrow copies": sum(".128" not in each for each in copies),
        "wide copies": sum(".128" in each for each in copies),
        **{name: sum(x.startswith(name) and ".128" in x for x in found) for name in WIDE},
        "narrow": sum(x.startswith(("LDG", "STG")) and ".128" not in x for x in found),
        **{name: int(value) for name, value in uses.items()},
        **{name: counts[name] for name in ("LDL", "STL", "UTMALDG", *TENSOR_CORES)},
        "instructions": len(found),
    }
