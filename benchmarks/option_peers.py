"""The versions that stand beside each other in one case of an option.

Dense masks, block masks and offsets stand ready before the clock starts; a bias that is learned is
made in the call, and its gradient taken back to what is learned.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import fusedattn
import torch
import torch.nn.functional as F
from torch import Tensor

from .accuracy import Error
from .attention_peers import Formula, compiled_now, version_of
from .option_accuracy import expected_dropout, expected_option
from .option_cases import Case, Problem
from .versions import Builder, Unavailable, Version, ours_on, refusal

SDPA = "sdpa"
COMPILED = ("torch.compile", "flex")
_compile = functools.partial(torch.compile, fullgraph=True, dynamic=False)


# --- fusedattn -----------------------------------------------------------------------------------


def ours(backend: str) -> Builder:
    """fusedattn on one backend; "cpu" stands for what a CPU tensor gets by default."""

    def build(problem: Problem) -> Version:
        own = _packed(problem) if problem.rule.packed else problem
        inputs = own.sets[0][:-1]
        served = backend
        if backend == "cpu":
            served = _served(own)
        else:
            try:
                _fused(own, backend)(*inputs)
            except fusedattn.UnsupportedError as error:
                raise Unavailable(refusal(error, backend)) from error
        requested = "auto" if backend == "cpu" else backend
        return version_of(_fused(own, requested), own, detail=served)

    return build


def _fused(problem: Problem, backend: str) -> Formula:
    op, rule = _op(problem), problem.rule
    given = {} if problem.mask is None or rule.packed else {"mask": problem.mask}

    def formula(q: Tensor, k: Tensor, v: Tensor, *learned: Tensor) -> Tensor:
        return op(q, k, v, **rule.ours(problem.given(learned) | given), backend=backend)

    return formula


def _op(problem: Problem) -> Any:
    return fusedattn.attention_varlen if problem.rule.packed else fusedattn.attention


def _served(problem: Problem) -> str:
    """The backend that a CPU tensor gets."""
    q, k, v, *learned, _ = problem.sets[0]
    given = problem.given(learned)
    if problem.mask is not None:
        given["mask"] = problem.mask
    told = fusedattn.explain(_op(problem), q, k, v, **problem.rule.ours(given))
    backend = told.splitlines()[0].split(": ")[-1]
    if backend == "triton":
        raise Unavailable("Triton's interpreter is for checking, its time says nothing")
    if backend == "reference":
        problem.refuse_huge_scores()
    return backend


def _packed(problem: Problem) -> Problem:
    """The same sequences one after the other."""
    sets = [tuple(problem.packed(x) for x in one) for one in problem.sets]
    return dataclasses.replace(problem, sets=sets)


# --- PyTorch -------------------------------------------------------------------------------------


def _bias(problem: Problem, learned: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    return problem.rule.written_out(problem.given(learned)).to(dtype)


def _eager_formula(problem: Problem) -> Formula:
    case, rule = problem.case, problem.rule
    hidden = None if problem.mask is None else ~problem.mask
    group, scale = case.heads // case.key_heads, case.head_dim**-0.5

    def formula(q: Tensor, k: Tensor, v: Tensor, *learned: Tensor) -> Tensor:
        if group > 1:
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * scale
        if rule.softcap is not None:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        if rule.adds:
            scores = scores + _bias(problem, learned, q.dtype)
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        if rule.sinks:
            sink = learned[0][:, None, None].expand(*scores.shape[:-1], 1)
            weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
        else:
            weights = torch.softmax(scores, dim=-1)
        if rule.dropout_p:
            weights = F.dropout(weights, rule.dropout_p)
        return weights @ v

    return formula


def eager(problem: Problem) -> Version:
    """The formula in plain PyTorch."""
    problem.refuse_huge_scores()
    return version_of(_eager_formula(problem), problem)


def compiled(problem: Problem) -> Version:
    """`torch.compile` of eager, for these static shapes; compiled before the clock starts."""
    problem.refuse_huge_scores()
    return compiled_now(_compile(_eager_formula(problem)), problem)


def sdpa(problem: Problem) -> Version:
    """`F.scaled_dot_product_attention` with a dense mask or bias, on the backend that it picks."""
    case, rule = problem.case, problem.rule
    for name in ("softcap", "sinks"):
        if getattr(rule, name):
            raise Unavailable(f"scaled_dot_product_attention has no {name}")
    if rule.adds or rule.dropout_p:  # a bias of all pairs; on a CPU all scores as well
        problem.refuse_huge_scores()
    seen = problem.mask
    hidden = None if seen is None else ~seen

    def formula(q: Tensor, k: Tensor, v: Tensor, *learned: Tensor) -> Tensor:
        mask = seen
        if rule.adds:
            mask = _bias(problem, learned, q.dtype)
            mask = mask if hidden is None else mask.masked_fill(hidden, float("-inf"))
        return F.scaled_dot_product_attention(
            q, k, v, mask, rule.dropout_p, enable_gqa=case.key_heads != case.heads
        )

    return version_of(formula, problem)


def flex(problem: Problem) -> Version:
    """FlexAttention, compiled; its block mask is made before the clock starts."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case, rule = problem.case, problem.rule
    for name in ("sinks", "dropout_p"):
        if getattr(rule, name):
            raise Unavailable(f"FlexAttention has no {name.removesuffix('_p')}")
    if case.backward and problem.device.type == "cpu":
        raise Unavailable("FlexAttention has no backward on a CPU")
    blocks = None
    if problem.mask is not None:
        batch = case.batch if problem.mask.shape[0] > 1 else None
        seen = functools.partial(rule.sees, problem.fixed)
        blocks = create_block_mask(
            lambda b, h, i, j: seen(b, h, i, j), batch, None, case.seq_q, case.seq_k,
            device=problem.device,
        )  # fmt: skip
    cap, adds = rule.softcap, rule.adds

    def attention(q: Tensor, k: Tensor, v: Tensor, *learned: Tensor) -> Tensor:
        given = problem.given(learned)

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if cap is not None:
                s = cap * torch.tanh(s / cap)
            return s + rule.bias(given, b, h, i, j) if adds else s

        return flex_attention(
            q, k, v, score_mod=score if adds or cap else None, block_mask=blocks,
            enable_gqa=case.key_heads != case.heads,
        )  # fmt: skip

    return compiled_now(_compile(attention), problem)


PEERS: dict[str, Builder] = {
    "eager": eager,
    "torch.compile": compiled,
    SDPA: sdpa,
    "flex": flex,
}


def builders(device: torch.device, names: Iterable[str]) -> dict[str, Builder]:
    """Our versions on a device, and the named peers."""
    mine = {name: ours(backend) for name, backend in ours_on(device).items()}
    return {**mine, **{name: PEERS[name] for name in names}}


def worth_compiling(name: str, case: Case, device: torch.device) -> bool:
    """Whether a version that is compiled stands beside this case without `thorough`."""
    if device.type == "cuda":
        return name == "flex"
    options = {"flex": ("window", "softcap"), "torch.compile": ("softcap",)}[name]
    return case.option in options and case.dtype == "fp32" and not case.backward


class Expected:
    """What every version should give on one input set, in the padding zeros."""

    def __init__(self, problem: Problem, index: int, seed: int) -> None:
        self._problem = problem
        make = expected_dropout if problem.rule.dropout_p else expected_option
        self._expected = make(problem, index, seed)

    def error(self, output: tuple[Tensor, ...]) -> Error:
        """The error of a version's (out,) or (out, dq, dk, dv, gradients of what is learned …)."""
        if self._problem.rule.packed:
            output = tuple(self._problem.padded(x) for x in output)
        return self._expected.error(output)


def expected_of(problem: Problem, index: int, seed: int) -> Expected:
    """What every version should give on the input set of this index."""
    return Expected(problem, index, seed)
