"""What `fusedattn bench` measures where the user names ops, shapes, dtypes or peers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from . import attention_cases, rowwise_cases
from .report import ROWS
from .rowwise_cases import INPUT_SETS
from .run import ATTENTION, OPTIONS, ROWWISE
from .suite import Plan
from .versions import DTYPES

KINDS = {"attention": ATTENTION, "rowwise": ROWWISE, "options": OPTIONS}
CASES = {"attention": "cases", "rowwise": "rowwise_cases", "options": "option_cases"}
SECONDS = 6.0  # for a case of the user's own
# What the numbers of a shape are.
SHAPES = {
    "attention": "BATCHxHEADSxLENGTHxHEAD_DIM, the length also as QUERIESvKEYS",
    **dict.fromkeys(("layer_norm", "rms_norm", "softmax", "swiglu"), "ROWSxWIDTH"),
    "rotary": "BATCHxHEADSxLENGTHxHEAD_DIM", "sinusoidal": "BATCHxLENGTHxWIDTH",
}  # fmt: skip
Shape = tuple[tuple[int, ...], ...]  # of each dimension the size, or those of queries and of keys


def narrowed(
    plan: Plan,
    *,
    only: str | None = None,
    shapes: Sequence[Shape] = (),
    dtypes: Sequence[str] = (),
    peers: Sequence[str] = (),
) -> Plan:
    """The plan with these cases and peers alone; parts without cases do not run.

    only: an op, a part of the suite or None for all. shapes: of that op, forward and backward.
    peers: names, or what families of them begin with: "sdpa" is "sdpa-flash" too.

    Raises:
        ValueError: the option does not fit; it is named, with what is expected.
    """
    if not (shapes or dtypes or peers or only in SHAPES):
        return plan
    if only in rowwise_cases.DIMENSIONS:
        of_op = [case for case in plan.rowwise_cases if case.op == only]
        plan = replace(plan, parts=("rowwise",), rowwise_cases=of_op)
    if shapes:
        plan = _with_shapes(plan, only, shapes, dtypes)
    elif dtypes:
        plan = _with_dtypes(plan, dtypes)
    parts = tuple(part for part in plan.parts if part in ROWS)
    if not parts:
        option = "--dtype" if dtypes else "--peers"
        expected = ", ".join((*ROWS, *rowwise_cases.DIMENSIONS))
        raise ValueError(f"{option}: got it with --only {only}, expected one of {expected}")
    return replace(plan, parts=parts, peers=_peers(plan, parts, peers) if peers else None)


# --- cases ---------------------------------------------------------------------------------------


def text_of(shape: Shape) -> str:
    """The shape as it is given: 2x12x1024x64, 1x8x1v4096x128."""
    return "x".join("v".join(map(str, sizes)) for sizes in shape)


def _with_shapes(
    plan: Plan, only: str | None, shapes: Sequence[Shape], dtypes: Sequence[str]
) -> Plan:
    if only not in SHAPES:
        given = f"--only {only}" if only else "no --only"
        raise ValueError(
            f"--shape: got {text_of(shapes[0])} with {given}, expected --only with one of "
            f"{', '.join(SHAPES)}"
        )
    make = _attention if only == "attention" else _rowwise
    cases = [
        case
        for shape, dtype in itertools.product(shapes, dtypes or ("fp32", "bf16"))
        for case in make(only, shape, dtype, plan.device)
    ]
    for case in cases:
        _check_memory(case, plan.device)
    seconds = SECONDS * len(cases)
    if only == "attention":
        return replace(plan, parts=("attention",), cases=cases, seconds=seconds)
    return replace(plan, parts=("rowwise",), rowwise_cases=cases, rowwise_seconds=seconds)


def _attention(op: str, shape: Shape, dtype: str, device: torch.device) -> Iterable[Any]:
    """Full and causal, forward and with the backward pass, which on a GPU is by itself."""
    pairs = len(shape) == 4 and [len(sizes) for sizes in shape] in ([1] * 4, [1, 1, 2, 1])
    if not pairs:
        raise ValueError(f"--shape: got {text_of(shape)} for {op}, expected {SHAPES[op]}")
    (batch,), (heads,), lengths, (head_dim,) = shape
    queries, keys = lengths[0], lengths[-1]
    for causal, backward in itertools.product((False, True), (False, True)):
        if not causal or queries == keys:
            yield attention_cases.Case(
                batch, heads, queries, keys, head_dim, causal, dtype, backward,
                regime="self-attention" if queries == keys else "cross",
                alone=backward and device.type == "cuda",
            )  # fmt: skip


def _rowwise(op: str, shape: Shape, dtype: str, device: torch.device) -> Iterable[Any]:
    """Forward and the backward pass by itself; the gradient of sinusoidal positions is dout."""
    flat = tuple(sizes[0] for sizes in shape if len(sizes) == 1)
    if not len(flat) == len(shape) == rowwise_cases.DIMENSIONS[op]:
        raise ValueError(f"--shape: got {text_of(shape)} for {op}, expected {SHAPES[op]}")
    if op == "rotary" and flat[-1] % 2:
        raise ValueError(f"--shape: got {text_of(shape)} for rotary, expected an even head dim")
    for backward in (False, True) if op != "sinusoidal" else (False,):
        yield rowwise_cases.Case(op, flat, dtype, backward)


def _check_memory(case: Any, device: torch.device) -> None:
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (needed := INPUT_SETS * case.bytes) > room:
        raise ValueError(
            f"--shape: got {case.label}, whose {INPUT_SETS} sets of tensors take "
            f"{needed / 2**30:,.0f} GiB, expected what fits into {room / 2**30:,.0f} GiB"
        )


def _with_dtypes(plan: Plan, dtypes: Sequence[str]) -> Plan:
    kept = {
        part: [case for case in getattr(plan, CASES[part]) if case.dtype in dtypes]
        for part in plan.parts
        if part in CASES
    }
    if kept and not any(kept.values()):
        known = {case.dtype for part in kept for case in getattr(plan, CASES[part])}
        raise ValueError(
            f"--dtype: got {', '.join(dtypes)}, of which the grid has no case, expected some of "
            f"{', '.join(name for name in DTYPES if name in known)}, or --shape with any"
        )
    parts = tuple(part for part in plan.parts if kept.get(part, True))
    return replace(plan, parts=parts, **{CASES[part]: cases for part, cases in kept.items()})


# --- peers ---------------------------------------------------------------------------------------


def _peers(plan: Plan, parts: Sequence[str], asked: Sequence[str]) -> tuple[str, ...]:
    """The names that are asked for, as the parts that run have them."""
    known = dict.fromkeys(
        name
        for part in parts
        for case in getattr(plan, CASES[part])
        for name in KINDS[part].peers(case, plan.device)
    )
    chosen: dict[str, None] = {}
    for name in asked:
        found = [each for each in known if each == name or each.startswith(f"{name}-")]
        if not found:
            raise ValueError(
                f"--peers: got {name!r}, expected some of {', '.join(map(repr, known))}"
            )
        chosen.update(dict.fromkeys(found))
    return tuple(chosen)
