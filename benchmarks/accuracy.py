"""How wrong a version is: the tolerance rule of the tests, on a sample of a large result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from fusedattn.reference import functional as reference
from torch import Tensor

from .versions import Outputs

_CAPS = {torch.float32: (1e-5, 1e-4), torch.float16: (4e-3, 4e-3), torch.bfloat16: (2e-2, 2e-2)}


@dataclass(frozen=True)
class Error:
    """The largest error against fp64, and the worst ratio of error to what the rule allows."""

    max_abs: float
    of_allowed: float

    @property
    def within(self) -> bool:
        return self.of_allowed <= 1.0


def error_of(
    actual: Tensor,
    ref: Tensor,
    eager: Tensor,
    *,
    gradient: bool = False,
    tested: torch.dtype | None = None,
    rows: int = 1,
    slack: float = 1.0,
) -> Error:
    """Hold a result to the tolerance rule.

    max|o − ref| ≤ f·max|eager − ref| + floor, ‖o − ref‖₂ ≤ f·‖eager − ref‖₂ + floor·√n and
    max|o − ref| ≤ cap·max(1, max|ref|), with f = 2 (gradients 3) and floor = 2 ulp of max|ref|,
    in fp32 at least 1e-6·max(1, max|ref|). `ref` is fp64, `eager` the formula in the tested dtype,
    that of `actual` if not given. The cap of a sum over `rows` rows grows with √rows; `slack`
    multiplies what eager allows.
    """
    dtype = tested or actual.dtype
    o, r, e = (x.detach().double().cpu() for x in (actual, ref, eager))
    error, plain = (o - r).abs(), (e - r).abs()
    if not torch.isfinite(error).all():
        return Error(math.inf, math.inf)
    largest = r.abs().max().item()
    floor = 2 * _ulp(largest, actual.dtype)
    if actual.dtype == torch.float32:
        floor = max(floor, 1e-6 * max(1.0, largest))
    factor, cap = (3, _CAPS[dtype][1]) if gradient else (2, _CAPS[dtype][0])
    worst = error.max().item()
    allowed = slack * (factor * plain.max().item() + floor)
    allowed = min(allowed, cap * math.sqrt(rows) * max(1.0, largest))
    norm_allowed = slack * (factor * plain.norm().item() + floor * math.sqrt(error.numel()))
    return Error(worst, max(worst / allowed, error.norm().item() / norm_allowed))


def _ulp(largest: float, dtype: torch.dtype) -> float:
    exponent = math.floor(math.log2(max(largest, torch.finfo(dtype).tiny)))
    return torch.finfo(dtype).eps * 2.0**exponent


def error_of_sum(actual: Tensor, ref: Tensor, rows: int, largest_summand: float) -> Error:
    """Hold a sum over `rows` rows, accumulated in fp32, to its rule.

    max|o − ref| ≤ 5e-6·√rows·max|summand| + 2 ulp of max|ref| in the dtype of the result.
    """
    error = (actual.detach().double() - ref).abs()
    if not torch.isfinite(error).all():
        return Error(math.inf, math.inf)
    allowed = 5e-6 * math.sqrt(rows) * largest_summand
    allowed += 2 * _ulp(ref.abs().max().item(), actual.dtype)
    worst = error.max().item()
    return Error(worst, worst / allowed)


def worst_of(errors: Iterable[Error]) -> Error:
    """The largest error and the largest share, of whichever."""
    found = list(errors)
    return Error(max(e.max_abs for e in found), max(e.of_allowed for e in found))


def sample_of(count: int, rng: torch.Generator) -> Tensor:
    """At most 64 of `count` rows, in order, the first and the last among them."""
    rows = torch.randperm(count, generator=rng)[:62]
    return torch.cat([rows, torch.tensor([0, count - 1])]).unique()


# --- attention -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """The reference on a sample of one input set: some rows of some heads, in fp64 and eager.

    The gradients of a head need all of its rows; the output needs only those sampled.
    """

    heads: list[tuple[int, int]]
    rows: Tensor
    ref: list[Outputs]
    eager: list[Outputs]

    def error(self, output: Outputs) -> Error:
        """The error of a version's (out,) or (out, dq, dk, dv)."""
        found = []
        for (b, h), refs, eagers in zip(self.heads, self.ref, self.eager, strict=True):
            parts = [output[0][b, h, self.rows], *(x[b, h] for x in output[1:])]
            for n, (got, ref, eager) in enumerate(zip(parts, refs, eagers, strict=True)):
                found.append(error_of(got, ref, eager, gradient=n > 0))
        return worst_of(found)


def expected_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, dout: Tensor | None, seed: int
) -> Expected:
    """The reference for one or two heads of (q, k, v), and gradients where `dout` is given.

    q (B, H, Sq, D), k, v (B, H, Sk, D), dout like the output. Without gradients 64 random rows of
    each head are compared, the first and last among them.
    """
    rng = torch.Generator().manual_seed(seed)
    batch, heads, seq, _ = q.shape
    rows = sample_of(seq, rng).to(q.device)
    chosen = {(0, 0), (batch - 1, heads - 1)}
    if dout is not None:
        chosen = {(batch - 1, int(torch.randint(heads, (), generator=rng)))}
    both: dict[bool, list[Outputs]] = {True: [], False: []}
    for b, h in sorted(chosen):
        one = [x[b : b + 1, h : h + 1].detach() for x in (q, k, v)]
        grad = None if dout is None else dout[b : b + 1, h : h + 1]
        for exact in both:
            both[exact].append(_one_head(one, grad, rows, causal, exact))
    return Expected(sorted(chosen), rows, both[True], both[False])


def _one_head(
    qkv: list[Tensor], dout: Tensor | None, rows: Tensor, causal: bool, exact: bool
) -> Outputs:
    """(out rows,) or (out rows, dq, dk, dv) of one head, in fp64 or in the dtype of the inputs."""
    q, k, v = (x.double() if exact else x for x in qkv)
    seq_q, seq_k = q.shape[2], k.shape[2]
    keys = torch.arange(seq_k, device=q.device)

    def seen(queries: Tensor) -> Tensor | None:
        return keys <= queries[:, None] + seq_k - seq_q if causal else None

    out = reference.attention(q[:, :, rows], k, v, mask=seen(rows))[0][0, 0]
    if dout is None:
        return (out,)
    dout = dout.to(q.dtype)
    wide = torch.float64 if exact else torch.float32
    dq, dk, dv = (torch.zeros(x.shape[2:], dtype=wide, device=x.device) for x in (q, k, v))
    for part in torch.arange(seq_q, device=q.device).split(1024):
        grads = reference.attention_backward(
            dout[:, :, part], None, q[:, :, part], k, v, mask=seen(part)
        )
        dq[part] = grads[0][0, 0].to(wide)
        dk += grads[1][0, 0]
        dv += grads[2][0, 0]
    return out, dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


# --- ops that work on rows -----------------------------------------------------------------------

Formula = Callable[..., Outputs]
CHUNK_ELEMENTS = 2**20


@dataclass(frozen=True)
class ExpectedRows:
    """The reference on a sample of the rows, and the sums over all of them.

    `rows` counts the second to last dimension. `ref` and `eager` hold what has rows, in order;
    `sums` what has none, the gradients of weights: (fp64, largest summand).
    """

    rows: Tensor
    count: int
    ref: Outputs
    eager: Outputs
    sums: list[tuple[Tensor, float]]
    gradient: bool

    def error(self, output: Outputs) -> Error:
        """The error of a version's outputs, or of its gradients."""
        pairs, sums = iter(zip(self.ref, self.eager, strict=True)), iter(self.sums)
        found = []
        for x in output:
            if x.dim() == 1:
                found.append(error_of_sum(x, *self._summed(next(sums))))
            else:
                got = x.index_select(-2, self.rows)
                found.append(error_of(got, *next(pairs), gradient=self.gradient))
        return worst_of(found)

    def _summed(self, one: tuple[Tensor, float]) -> tuple[Tensor, int, float]:
        return one[0], self.count, one[1]


def expected_rows(
    reference: Callable[[Tensor], Formula],
    inputs: Outputs,
    *,
    leaves: int,
    douts: Outputs | None,
    summands: Callable[..., Outputs],
    seed: int,
) -> ExpectedRows:
    """What an op that works on rows should give: its outputs, or its gradients for `douts`.

    Args:
        reference: the oracle for the rows of these numbers.
        inputs: of the op; what has two dimensions or more has its rows in the second to last.
        leaves: how many of the inputs, from the first, get a gradient.
        douts: the gradients of the outputs; None compares the outputs.
        summands: (inputs, douts) of some rows → the summands of each weight's gradient, in fp64.
        seed: of the sample.
    """
    count = inputs[0].shape[-2]
    rows = sample_of(count, torch.Generator().manual_seed(seed)).to(inputs[0].device)
    formula = reference(rows)
    both = []
    for exact in (True, False):
        chosen = [_rows_of(x, rows, exact) for x in inputs]
        if douts is None:
            both.append(formula(*chosen))
            continue
        wanted = [x.requires_grad_() for x in chosen[:leaves] if x.dim() > 1]
        grads = [_rows_of(x, rows, exact) for x in douts]
        both.append(torch.autograd.grad(formula(*chosen), wanted, grads))
    sums = [] if douts is None else _sums(summands, inputs, douts, count)
    return ExpectedRows(rows, count, both[0], both[1], sums, douts is not None)


def _rows_of(x: Tensor, rows: Tensor, exact: bool) -> Tensor:
    x = x.detach()
    x = x.index_select(-2, rows) if x.dim() > 1 else x.clone()
    return x.double() if exact else x


def _sums(
    summands: Callable[..., Outputs], inputs: Outputs, douts: Outputs, count: int
) -> list[tuple[Tensor, float]]:
    totals: list[Tensor] = []
    largest: list[float] = []
    step = max(1, CHUNK_ELEMENTS // inputs[0].shape[-1])
    for part in torch.arange(count, device=inputs[0].device).split(step):
        # Not yet in fp64: what an op rounds on its way (a sum with a residual) is rounded there.
        some = (
            [x.index_select(-2, part) if x.dim() > 1 else x for x in t] for t in (inputs, douts)
        )
        parts = [x.double() for x in summands(*some)]
        totals = totals or [torch.zeros_like(x[0]) for x in parts]
        largest = largest or [0.0] * len(parts)
        for n, x in enumerate(parts):
            totals[n] += x.sum(0)
            largest[n] = max(largest[n], x.abs().max().item())
    return list(zip(totals, largest, strict=True))
