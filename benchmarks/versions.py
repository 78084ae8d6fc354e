"""The versions of a case: what one is, which of them are ours, and how they are built.

A builder makes a `Version` of a problem, or raises `Unavailable` with the reason. A problem is a
case with its input sets, all on its `device`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
Call = Callable[[int], Outputs]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OURS = "fusedattn"
FLASH = "sdpa-flash"


class Unavailable(RuntimeError):
    """A version cannot run this case here; the message says why."""


@dataclass(frozen=True)
class Version:
    """One implementation of a case.

    `context` is entered around each turn, outside the clock: a grad mode, a forced SDPA backend.
    `owns_arena` says that it keeps its working memory from call to call. `detail` is for the
    reader: which backend served, say.
    """

    call: Call
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    owns_arena: bool = False
    detail: str = ""


Builder = Callable[[Any], Version]


def refusal(error: Exception, backend: str) -> str:
    """Of what an `UnsupportedError` says, why this backend does not take the call."""
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line for line in lines if line.startswith(f"{backend}:")]
    return (reasons or lines)[0]


def ours_on(device: torch.device) -> dict[str, str]:
    """The names of our versions on a device → their backends."""
    if device.type != "cuda":
        return {OURS: "cpu"}
    return {f"{OURS}-{backend}": backend for backend in ("cuda", "triton")}


def build_versions(
    problem: Any, known: Mapping[str, Builder], skipped: dict[str, str]
) -> tuple[dict[str, Version], dict[str, float]]:
    """What the builders make of the problem, and the seconds that preparing each took.

    `skipped` receives name → reason for those that cannot run. On a GPU each is called once here:
    whatever a compiler or a driver raises at the first call, the others run.
    """
    versions, seconds = {}, {}
    for name, build in known.items():
        start = time.perf_counter()
        try:
            version = build(problem)
            if problem.device.type == "cuda":
                called_once(version)
                torch.cuda.synchronize()
        except Exception as reason:
            skipped[name] = (str(reason).strip() or type(reason).__name__).splitlines()[0][:160]
        else:
            versions[name] = version
        seconds[name] = time.perf_counter() - start
    return versions, seconds


def called_once(version: Version) -> Version:
    """The version, after a call: what is built lazily is built."""
    with version.context():
        version.call(0)
    return version
