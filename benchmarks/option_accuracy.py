"""How wrong a version of an option is: the tolerance rule on a sample; dropout by statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from fusedattn.reference import functional as reference
from torch import Tensor

from .accuracy import Error, error_of, error_of_sum, sample_of, worst_of
from .option_cases import Problem
from .option_rules import ROWS, Packed, on_grid
from .versions import Outputs

# The gradient of one of these is a sum over all pairs of a head, in an order of its own.
_OF_HEADS = ("slopes", "sinks")
STANDARD_ERRORS = 6.0


class Part(NamedTuple):
    """Some heads of some batch entries of one input set: their numbers and their tensors."""

    batches: Tensor
    heads: Tensor
    key_heads: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    learned: dict[str, Tensor]
    dout: Tensor


def part_of(problem: Problem, index: int, batches: Tensor, key_heads: Tensor) -> Part:
    """These heads of k and v, with the heads of q that belong to them."""
    case = problem.case
    group = case.heads // case.key_heads
    heads = (key_heads[:, None] * group + torch.arange(group, device=key_heads.device)).flatten()
    q, k, v, *learned, dout = (x.detach() for x in problem.sets[index])
    names = problem.rule.learned
    return Part(
        batches,
        heads,
        key_heads,
        q[batches][:, heads],
        k[batches][:, key_heads],
        v[batches][:, key_heads],
        {n: x.index_select(names[n], heads) for n, x in zip(names, learned, strict=True)},
        dout[batches][:, heads],
    )


@dataclass(frozen=True)
class ExpectedOption:
    """The reference on a sample of one input set, in fp64 and eager: out and the gradients."""

    problem: Problem
    part: Part
    rows: Tensor
    ref: dict[str, Tensor]
    eager: dict[str, Tensor]

    def error(self, output: Outputs) -> Error:
        """The error of a version's (out,) or (out, dq, dk, dv, gradients of what is learned …)."""
        part, learned = self.part, self.problem.rule.learned
        got = dict(zip(("out", "q", "k", "v", *learned), output, strict=False))
        for name in got:
            heads = part.key_heads if name in ("k", "v") else part.heads
            if name in learned:
                got[name] = got[name].index_select(learned[name], part.heads)
            else:
                got[name] = got[name][part.batches][:, heads]
        got["out"] = got["out"][:, :, self.rows]
        return worst_of(self._error(name, x) for name, x in got.items())

    def _error(self, name: str, x: Tensor) -> Error:
        ref, eager, tested = self.ref[name], self.eager[name], self.part.q.dtype
        if name in _OF_HEADS:
            pairs = self._summands(x)
            return error_of(x, ref, eager, gradient=True, tested=tested, rows=pairs, slack=2.0)
        if name not in self.problem.rule.learned:
            return error_of(x, ref, eager, gradient=name != "out")
        rows = self._summands(x)
        if rows > 1 and x.dtype == tested == torch.float32:
            return error_of_sum(x, ref, rows, self.ref["largest"].item())
        return error_of(x, ref, eager, gradient=True, rows=rows)

    def _summands(self, x: Tensor) -> int:
        """How many pairs an element of such a gradient is a sum over, on average."""
        case = self.problem.case
        return len(self.part.batches) * len(self.part.heads) * case.seq_q * case.seq_k // x.numel()


def expected_option(problem: Problem, index: int, seed: int) -> ExpectedOption:
    """The reference of one or two heads; of all batch entries where their gradients are summed."""
    case, device = problem.case, problem.device
    rng = torch.Generator().manual_seed(seed)
    batches, key_heads = {0, case.batch - 1}, {0, case.key_heads - 1}
    if case.backward:
        batches = {case.batch - 1}
        key_heads = {int(torch.randint(case.key_heads, (), generator=rng))}
    if problem.rule.packed or (case.backward and problem.rule.learned):
        batches = set(range(case.batch))
    numbers = (torch.tensor(sorted(x), device=device) for x in (batches, key_heads))
    part = part_of(problem, index, *numbers)
    rows = sample_of(case.seq_q, rng).to(device)
    both = [_results(problem, part, rows, exact) for exact in (True, False)]
    return ExpectedOption(problem, part, rows, *both)


def _results(problem: Problem, part: Part, rows: Tensor, exact: bool) -> dict[str, Tensor]:
    """out of these rows and, where the case has a backward pass, the gradients of all.

    In fp64, or in the dtype of the inputs, where dk and dv of some queries are added up in fp32.
    "largest" is the gradient of a score farthest from 0.
    """
    dtype, wide = part.q.dtype, torch.float32
    if exact:
        dtype = wide = torch.float64
    q, k, v, dout = (x.to(dtype) for x in (part.q, part.k, part.v, part.dout))
    learned = {n: x.double() if exact else x.clone() for n, x in part.learned.items()}
    for x in learned.values():
        x.requires_grad_()
    options, _ = _options(problem, part, learned, rows, dtype)
    out = reference.attention(q[:, :, rows], k, v, **options)[0]
    if isinstance(problem.rule, Packed):
        valid = problem.rule.valid(problem.fixed)[part.batches][:, None, rows, None]
        out = out.masked_fill(~valid, 0.0)
    results = {"out": out.detach()}
    if not problem.case.backward:
        return results
    sums = {n: torch.zeros_like(x, dtype=wide) for n, x in zip("qkv", (q, k, v), strict=True)}
    sums |= {name: torch.zeros_like(x, dtype=wide) for name, x in learned.items()}
    largest = torch.zeros((), dtype=wide, device=q.device)
    for some in torch.arange(q.shape[2], device=q.device).split(ROWS):
        options, bias = _options(problem, part, learned, some, dtype)
        dq, dk, dv, ds, dsinks = reference.attention_backward(
            dout[:, :, some], None, q[:, :, some], k, v, **options
        )
        sums["q"][:, :, some] = dq.to(wide)
        sums["k"] += dk
        sums["v"] += dv
        if dsinks is not None:
            sums["sinks"] += dsinks.to(wide).sum((0, 2, 3))
        if bias is not None:
            largest = torch.maximum(largest, ds.abs().max())
            summed = ds.to(bias.dtype).sum_to_size(bias.shape)
            grads = torch.autograd.grad(bias, list(learned.values()), summed)
            for name, x in zip(learned, grads, strict=True):
                sums[name] += x
    kept = dict.fromkeys("qkv", dtype) | {name: x.dtype for name, x in learned.items()}
    return results | {n: x.to(kept[n]) for n, x in sums.items()} | {"largest": largest}


def _options(
    problem: Problem,
    part: Part,
    learned: dict[str, Tensor],
    queries: Tensor,
    dtype: torch.dtype,
) -> tuple[dict[str, Any], Tensor | None]:
    """The options of the reference for some of the queries, and the bias among them with its graph.

    Heads are counted within the part, as those of `learned` are.
    """
    rule, given = problem.rule, {**problem.fixed, **learned}
    counts = (len(part.heads), part.k.shape[2])
    heads, keys = (torch.arange(n, device=queries.device) for n in counts)
    places = (part.batches, heads, queries, keys)
    bias = on_grid(rule.bias, given, *places) if rule.adds else None
    options = {
        "mask": on_grid(rule.sees, given, *places) if rule.hides else None,
        "bias": None if bias is None else bias.detach().to(dtype),
        "softcap": rule.softcap,
        "sinks": learned["sinks"].detach().to(dtype) if rule.sinks else None,
    }
    return options, bias


# --- dropout -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpectedDropout:
    """The reference without dropout of all heads of one batch entry, in fp64.

    Every result is linear in what the weights are multiplied by, whose mean is 1, so that its mean
    is the result without dropout. Held to that is each result along its reference, row by row; a
    weight that is not scaled by 1 / (1 − p) is far off. Held to what it should be is also the mean
    square distance of out, p / (1 − p) · Σ weight² · ‖v‖² in a row: without dropout there is none.
    """

    part: Part
    ref: list[Tensor]
    squares: Tensor

    def error(self, output: Outputs) -> Error:
        """The mean differences of (out,) or (out, dq, dk, dv), of 6 standard errors."""
        part, found = self.part, []
        for n, (x, ref) in enumerate(zip(output, self.ref, strict=True)):
            heads = part.key_heads if n > 1 else part.heads
            difference = x[part.batches][:, heads].double() - ref
            found.append(mean_error((difference * ref).sum(-1), ref.square().sum(-1)))
            if n == 0:
                found.append(mean_error(difference.square().sum(-1) - self.squares, self.squares))
        return worst_of(found)


def mean_error(samples: Tensor, unit: Tensor) -> Error:
    """How far the mean of the samples is from 0: of the mean of `unit`, and of what is allowed."""
    if not torch.isfinite(samples).all():
        return Error(math.inf, math.inf)
    mean, deviation = samples.mean().abs().item(), samples.std().item()
    allowed = STANDARD_ERRORS * deviation / math.sqrt(samples.numel())
    return Error(mean / unit.mean().item(), mean / max(allowed, 1e-12))


def expected_dropout(problem: Problem, index: int, seed: int) -> ExpectedDropout:
    """What the results with dropout are held to, of a batch entry drawn by the seed."""
    case, rng = problem.case, torch.Generator().manual_seed(seed)
    batches = torch.randint(case.batch, (1,), generator=rng).to(problem.device)
    part = part_of(problem, index, batches, torch.arange(case.key_heads, device=problem.device))
    q, k, v, dout = (x.double() for x in (part.q, part.k, part.v, part.dout))
    ref = [reference.attention(q, k, v)[0]]
    if case.backward:
        ref += reference.attention_backward(dout, None, q, k, v)[:3]
    k, v = (reference.expand_heads(x, q.shape[1]) for x in (k, v))
    weights = torch.softmax(reference.scores(q, k, q.shape[-1] ** -0.5, None, None), dim=-1)
    p = problem.rule.dropout_p
    squares = p / (1 - p) * (weights.square() @ v.square().sum(-1, keepdim=True)).squeeze(-1)
    return ExpectedDropout(part, ref, squares)
