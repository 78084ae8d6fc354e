"""The machine code in a native module, read with the `cuobjdump` of the triton package."""

from __future__ import annotations

import collections
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import kept
import triton

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Kernel(NamedTuple):
    """One kernel for one target."""

    target: str  # sm_80
    name: str  # demangled, without arguments
    registers: int
    stack: int  # bytes of a thread; what does not fit in registers or is indexed at run time
    shared: int  # static; 1024 of it are the system's from sm_90 on
    instructions: collections.Counter[str]  # with their suffixes: "LDG.E.128"

    def count(self, pattern: str) -> int:
        """How many instructions match."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))


def _cuobjdump(path: Path, *flags: str) -> str:
    command = [str(TOOL), *flags, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _demangled(names: list[str]) -> list[str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    # What is in parentheses but no arguments: (fusedattn::cuda::Memory)0.
    not_arguments = r"\(anonymous namespace\)::|\(fusedattn::cuda::\w+\)(?=\d)"
    plain = [re.sub(not_arguments, "", line) for line in done.stdout.splitlines()]
    return [re.sub(r"^void |fusedattn::cuda::|\(.*", "", line) for line in plain]


def _sections(text: str, mark: str) -> dict[tuple[str, str], str]:
    """The text after each "Function : name", by target and name."""
    found = {}
    for part in re.split(r"(?=^arch = sm_)", text, flags=re.MULTILINE):
        if target := re.match(r"arch = (sm_\w+)", part):
            for section in part.split(mark)[1:]:
                name, _, body = section.lstrip(" :").partition("\n")
                found[target[1], name.strip(" :")] = body
    return found


def kernels_of(path: Path) -> list[Kernel]:
    """Every kernel in a module or object file, for every target in it."""
    code = _sections(_cuobjdump(path, "-sass"), "Function :")
    usage = _sections(_cuobjdump(path, "--dump-resource-usage"), "Function ")
    names = _demangled([name for _, name in code])
    kernels = []
    for (key, sass), name in zip(code.items(), names, strict=True):
        uses = {what: int(n) for what, n in re.findall(r"(\w+):(\d+)", usage[key])}
        found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
        kernels.append(
            Kernel(key[0], name, uses["REG"], uses["STACK"] + uses["LOCAL"], uses["SHARED"],
                   collections.Counter(found))
        )  # fmt: skip
    return kernels


class Built(NamedTuple):
    """A native module of CUDA kernels."""

    module: Path
    log: str
    kernels: list[Kernel]


def build_once(
    build: Callable[[], tuple[Path, str]], tools: Iterable[str], sources: dict[str, str]
) -> Built:
    """What `build` makes, a module and its log; or what an earlier run made of the same."""
    begun, module = time.time(), kept.KEPT / "_cuda.so"
    key = kept.digest(*tools, kept.triton_and_its_tools(), Path(__file__))
    found = kept.load("cuda", key, sources)
    if found is None or not module.exists() or kept.digest(module) != found["module"]:
        fresh, log = build()
        found = {"module": kept.digest(fresh), "log": log, "kernels": kernels_of(fresh)}
        kept.KEPT.mkdir(parents=True, exist_ok=True)
        shutil.copy(fresh, module)
        kept.store("cuda", key, sources, found, begun)
    kernels = [Kernel(*rest, collections.Counter(code)) for *rest, code in found["kernels"]]
    return Built(module, found["log"], kernels)


class AttentionRow(NamedTuple):
    """A row of csrc/cuda/sm80/attention_config.h."""

    threads: int
    blocks: int
    shared_bytes: int


def attention_table(module: Path) -> dict[tuple[str, int, int], AttentionRow]:
    """The tiles of attention as they were compiled, by kernel, head dim and variant."""
    code = (
        "import torch, json, importlib.util as u; s = u.spec_from_file_location('_cuda', "
        f"{str(module)!r}); m = u.module_from_spec(s); s.loader.exec_module(m); "
        "print(json.dumps(m.attention_tiles()))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    return {(kernel, d, memory): AttentionRow(*rest) for kernel, d, memory, *rest in rows}
