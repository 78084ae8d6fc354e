"""How wrong a version is: the tolerance rule of the tests, on a sample of a large result."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from fusedattn.reference import functional as reference
from torch import Tensor

from .harness import Outputs

_CAPS = {torch.float32: (1e-5, 1e-4), torch.float16: (4e-3, 4e-3), torch.bfloat16: (2e-2, 2e-2)}


@dataclass(frozen=True)
class Error:
    """The largest error against fp64, and the worst ratio of error to what the rule allows."""

    max_abs: float
    of_allowed: float

    @property
    def within(self) -> bool:
        return self.of_allowed <= 1.0


def error_of(actual: Tensor, ref: Tensor, eager: Tensor, *, gradient: bool = False) -> Error:
    """Hold a result to the tolerance rule.

    max|o − ref| ≤ f·max|eager − ref| + floor, ‖o − ref‖₂ ≤ f·‖eager − ref‖₂ + floor·√n and
    max|o − ref| ≤ cap·max(1, max|ref|), with f = 2 (gradients 3) and floor = 2 ulp of max|ref|,
    in fp32 at least 1e-6·max(1, max|ref|). `ref` is fp64, `eager` the formula in `actual`'s dtype.
    """
    dtype = actual.dtype
    o, r, e = (x.detach().double().cpu() for x in (actual, ref, eager))
    error, slack = (o - r).abs(), (e - r).abs()
    if not torch.isfinite(error).all():
        return Error(math.inf, math.inf)
    largest = r.abs().max().item()
    exponent = math.floor(math.log2(max(largest, torch.finfo(dtype).tiny)))
    floor = 2 * torch.finfo(dtype).eps * 2.0**exponent
    if dtype == torch.float32:
        floor = max(floor, 1e-6 * max(1.0, largest))
    factor, cap = (3, _CAPS[dtype][1]) if gradient else (2, _CAPS[dtype][0])
    worst = error.max().item()
    allowed = min(factor * slack.max().item() + floor, cap * max(1.0, largest))
    norm_allowed = factor * slack.norm().item() + floor * math.sqrt(error.numel())
    return Error(worst, max(worst / allowed, error.norm().item() / norm_allowed))


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
        return Error(max(e.max_abs for e in found), max(e.of_allowed for e in found))


def expected_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, dout: Tensor | None, seed: int
) -> Expected:
    """The reference for one or two heads of (q, k, v), and gradients where `dout` is given.

    q (B, H, Sq, D), k, v (B, H, Sk, D), dout like the output. Without gradients 64 random rows of
    each head are compared, the first and last among them.
    """
    rng = torch.Generator().manual_seed(seed)
    batch, heads, seq, _ = q.shape
    rows = torch.randperm(seq, generator=rng)[:62]
    rows = torch.cat([rows, torch.tensor([0, seq - 1])]).unique()
    chosen = {(0, 0), (batch - 1, heads - 1)}
    if dout is not None:
        chosen = {(batch - 1, int(torch.randint(heads, (), generator=rng)))}
    both: dict[bool, list[Outputs]] = {True: [], False: []}
    for b, h in sorted(chosen):
        one = [x[b : b + 1, h : h + 1].detach().cpu() for x in (q, k, v)]
        grad = None if dout is None else dout[b : b + 1, h : h + 1].cpu()
        for exact in both:
            both[exact].append(_one_head(one, grad, rows, causal, exact))
    return Expected(sorted(chosen), rows, both[True], both[False])


def _one_head(
    qkv: list[Tensor], dout: Tensor | None, rows: Tensor, causal: bool, exact: bool
) -> Outputs:
    """(out rows,) or (out rows, dq, dk, dv) of one head, in fp64 or in the dtype of the inputs."""
    q, k, v = (x.double() if exact else x for x in qkv)
    seq_q, seq_k = q.shape[2], k.shape[2]

    def seen(queries: Tensor) -> Tensor | None:
        return torch.arange(seq_k) <= queries[:, None] + seq_k - seq_q if causal else None

    out = reference.attention(q[:, :, rows], k, v, mask=seen(rows))[0][0, 0]
    if dout is None:
        return (out,)
    dout = dout.to(q.dtype)
    wide = torch.float64 if exact else torch.float32
    dq, dk, dv = (torch.zeros(x.shape[2:], dtype=wide) for x in (q, k, v))
    for part in torch.arange(seq_q).split(1024):
        grads = reference.attention_backward(
            dout[:, :, part], None, q[:, :, part], k, v, mask=seen(part)
        )
        dq[part] = grads[0][0, 0].to(wide)
        dk += grads[1][0, 0]
        dv += grads[2][0, 0]
    return out, dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
