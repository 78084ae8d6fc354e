"""The tolerance rule that every op is held to.

The oracle is `fusedattn.reference.functional` in fp64; "eager" is the same formula in the tested
dtype, whose own error says how exact a result in that dtype can be.

1.  max|o − ref| ≤ 2·max|eager − ref| + floor and ‖o − ref‖₂ ≤ 2·‖eager − ref‖₂ + floor·√n, where
    floor is 2 ulp of max|ref| and 1e-6·max(1, max|ref|), which half results that are summed in
    fp32 need as well: where one key is visible, ds is a difference that is 0. Gradients: factor 3.
2.  Caps, times max(1, max|ref|), so that a bad eager cannot hide a bug.
3.  Sums over M rows, accumulated in fp32: 5e-6·√M·max|summand|.
4.  Layer norm: 4·2⁻²⁴·(1 + |mean|/deviation)·|gain| and one ulp of the output, times what comes
    out before the gain where that is above 1, for its rounding is relative (`check_normalised`).
6.  Finite wherever the reference is finite; the same NaN and the same infinities elsewhere.

(Rules 5, 7 and 8 are for other kinds of test: `torch.equal`, gradcheck and opcheck,
`--deterministic`.) Five things are ruled apart:

fp64          The oracle's rounding is of the same size, so no eager stands beside it: a cap alone.
lse           A statistic in fp32 whatever the inputs are: held to eager in fp32, with a floor for
              half inputs (`LSE_FLOORS`).
bias          Its gradient may have another dtype than q. Which eager, factor and cap it is held to
              is decided by the dtype of q. Where it is a sum, rule 3 holds if both are fp32; else
              rules 1 and 2, the cap growing with √M.
eager fails   Where eager overflows, rule 1 says nothing, and the cap alone holds.
slack         A test may multiply what rule 1 allows, and says why.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import math
import mmap
from collections.abc import Callable, Hashable
from typing import NamedTuple

import fusedattn
import pytest
import torch
from fusedattn.reference import functional as reference
from torch import Tensor

CAPS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
GRADIENT_CAPS = {**CAPS, torch.float32: 1e-4}
# The log-sum-exp of half inputs is all but that of fp32: bf16 takes a shorter exponential, and
# where fp16 numbers are multiplied as pairs of bf16 numbers the smallest product is dropped.
LSE_FLOORS = {torch.bfloat16: 4e-6, torch.float16: 2.0**-14}


def ulp(largest: float, dtype: torch.dtype) -> float:
    """The distance from |largest| to the next number of `dtype`."""
    info = torch.finfo(dtype)
    exponent = math.frexp(max(abs(largest), info.tiny))[1] - 1
    return info.eps * 2.0**exponent


def check(
    actual: Tensor,
    ref: Tensor,
    eager: Tensor,
    *,
    what: str,
    case: object = "",
    gradient: bool = False,
    tested: torch.dtype | None = None,
    floor: float = 0.0,
    rows: int = 1,
    slack: float = 1.0,
) -> None:
    """Hold `actual` to rules 1, 2 and 6, against `ref` in fp64 and `eager` in the tested dtype.

    The tested dtype is that of `actual`, if not given; `floor` raises that of rule 1; the cap of a
    sum over `rows` rows grows with √rows; `slack` multiplies what rule 1 allows.

    Raises:
        AssertionError: with the worst index, both values, error / allowed, and the case.
    """
    got, want, plain, finite = _finite_parts(actual, ref, eager, what, case)
    if not want.numel():
        return
    dtype = tested or actual.dtype
    largest = want.abs().max().item()
    unit = max(1.0, largest)
    cap = unit * max(floor, (GRADIENT_CAPS if gradient else CAPS)[dtype] * math.sqrt(rows))
    if dtype == torch.float64:
        _within(got, want, cap, cap, finite, f"{what} (cap)", case)
        return
    floor = max(floor * unit, 1e-6 * unit, 2 * ulp(largest, actual.dtype))
    factor = 3 if gradient else 2
    # Where eager itself overflows it says nothing about the error; the cap still holds.
    error = (plain - want).abs() if plain.isfinite().all() else torch.full_like(want, math.inf)
    most = slack * (factor * error.max().item() + floor)
    rms = slack * (factor * error.square().mean().sqrt().item() + floor)
    _within(got, want, most, rms, finite, what, case)
    _within(got, want, cap, cap, finite, f"{what} (cap)", case)


def check_sum(
    actual: Tensor, ref: Tensor, *, rows: int, largest_summand: float, what: str, case: object = ""
) -> None:
    """Hold a sum over `rows` rows, accumulated in fp32, to rules 3 and 6."""
    got, want, _, finite = _finite_parts(actual, ref, ref, what, case)
    if want.numel():
        allowed = 5e-6 * math.sqrt(rows) * largest_summand
        _within(got, want, allowed, allowed, finite, f"{what} (sum)", case)


def _finite_parts(
    actual: Tensor, ref: Tensor, eager: Tensor, what: str, case: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rule 6; then actual, ref and eager as fp64, 0 where ref is not finite, and where it is."""
    assert actual.shape == ref.shape, (
        f"{what}: got shape {tuple(actual.shape)}, expected {tuple(ref.shape)}  [{case}]"
    )
    got, want, plain = (x.detach().to("cpu", torch.float64) for x in (actual, ref, eager))
    finite = want.isfinite()
    wrong = torch.where(want.isnan(), ~got.isnan(), got != want) & ~finite
    wrong |= finite & ~got.isfinite()
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are finite, infinite or NaN "
            f"where the reference is not; at {index} got {got[index].item()}, expected "
            f"{want[index].item()}  [{case}]"
        )
    got, want, plain = (x.masked_fill(~finite, 0.0) for x in (got, want, plain))
    return got, want, plain, finite


def _within(
    got: Tensor, want: Tensor, most: float, rms: float, finite: Tensor, what: str, case: object
) -> None:
    error = (got - want).abs()
    index = tuple(torch.unravel_index(error.argmax(), error.shape))
    index = tuple(int(i) for i in index)
    worst = error[index].item()
    mean = math.sqrt(error.square().sum().item() / max(1, error.numel()))
    if worst <= most and mean <= rms:
        return
    raise AssertionError(
        f"{what}: error over allowed {_ratio(worst, most)} (max), {_ratio(mean, rms)} (rms); "
        f"worst at {index}: got {got[index].item():.9g}, expected {want[index].item():.9g}, "
        f"error {worst:.3g}, allowed {most:.3g}; {int((error > most).sum())} of "
        f"{int(finite.sum())} over  [{case}]"
    )


def _ratio(error: float, allowed: float) -> str:
    return f"{error / allowed:.2f}" if allowed else f"{error:.3g}/0"


# --- oracles, once a session ---------------------------------------------------------------------

MOST_KEPT = 1 << 28  # bytes; of more the longest unused go


class Kept(NamedTuple):
    results: dict[str, Tensor]
    versions: list[int]
    nbytes: int


_kept: collections.OrderedDict[Hashable, Kept] = collections.OrderedDict()


def once(
    about: Hashable, made: dict[str, Tensor | None], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """`compute()`, or what it gave for these very tensors before: another backend, say.

    It follows from `about` and from the values and strides in `made`. Nobody may change it.
    """
    key = (about, *((name, _identity(x)) for name, x in made.items()))
    if found := _kept.get(key):
        _kept.move_to_end(key)
        unchanged = found.versions == [x._version for x in found.results.values()]
        assert unchanged, "a test has changed an oracle"
        return found.results
    results = compute()
    tensors = results.values()
    _kept[key] = Kept(results, [x._version for x in tensors], sum(x.nbytes for x in tensors))
    total = sum(each.nbytes for each in _kept.values())
    while total > MOST_KEPT:
        total -= _kept.popitem(last=False)[1].nbytes
    return results


def _identity(x: Tensor | None) -> Hashable:
    if x is None:
        return None
    flat = x.detach().cpu().resolve_neg().reshape(-1).contiguous()
    digest = hashlib.blake2b(flat.view(torch.uint8).numpy()).digest()
    return x.dtype, x.shape, x.stride(), digest


# --- attention -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One call of attention; `mask` and `bias` are the shapes they are given in.

    `grads` are the outputs that receive a gradient: "out", "lse" or both. `large`: v and the
    gradients are such that ds exceeds what fp16 holds.
    """

    batch: int = 2
    heads: int = 2
    kv_heads: int | None = None
    seq_q: int = 32
    seq_k: int | None = None
    dim: int = 32
    dim_v: int | None = None
    dtype: torch.dtype = torch.float32
    causal: bool | str = False
    scale: float | None = None
    softcap: float | None = None
    mask: tuple[int, ...] | None = None
    bias: tuple[int, ...] | None = None
    bias_dtype: torch.dtype | None = None
    kv_lengths: tuple[int, ...] | None = None
    grads: tuple[str, ...] = ("out",)
    large: bool = False

    def inputs(self, device: str = "cpu") -> dict[str, Tensor | None]:
        """Random q, k, v, mask, bias, kv_lengths, dout and dlse; the same for the same case."""
        source = torch.Generator().manual_seed(1)

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, generator=source, dtype=torch.float64).to(device, dtype)

        seq_k = self.seq_q if self.seq_k is None else self.seq_k
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        dim_v = self.dim if self.dim_v is None else self.dim_v
        made: dict[str, Tensor | None] = {
            "q": normal(self.batch, self.heads, self.seq_q, self.dim),
            "k": normal(self.batch, kv_heads, seq_k, self.dim),
            "v": normal(self.batch, kv_heads, seq_k, dim_v),
            "dout": normal(self.batch, self.heads, self.seq_q, dim_v),
            "mask": None,
            "bias": None,
            "kv_lengths": None,
        }
        made["dlse"] = normal(self.batch, self.heads, self.seq_q, dtype=lse_dtype(self.dtype))
        for name, factor in {"v": 1e3, "dout": 1e3, "dlse": 1e6}.items() if self.large else ():
            made[name] = made[name] * factor
        if self.mask is not None:
            made["mask"] = (torch.rand(self.mask, generator=source) < 0.7).to(device)
        if self.bias is not None:
            # Representable in q's dtype, so that eager, which casts it there, loses nothing.
            made["bias"] = normal(*self.bias).to(self.bias_dtype or self.dtype)
        if self.kv_lengths is not None:
            made["kv_lengths"] = torch.tensor(self.kv_lengths, dtype=torch.int32, device=device)
        return made

    def options(self) -> dict[str, object]:
        """What is no tensor, as attention and the oracle take it."""
        return {"causal": self.causal, "scale": self.scale, "softcap": self.softcap}

    def __str__(self) -> str:
        """Only what differs from the defaults."""
        changed = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                changed.append(f"{field.name}={str(value).removeprefix('torch.')}")
        return " ".join(changed).replace("(", "").replace(")", "")


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The log-sum-exp is fp64 for fp64 inputs and fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def device_for(backend: str) -> str:
    """CUDA C++ runs on the GPU, Triton where there is one; everything else here on the CPU."""
    on_gpu = backend == "cuda" or (backend == "triton" and torch.cuda.is_available())
    return "cuda" if on_gpu else "cpu"


def far_apart(x: Tensor, stride: int, dim: int = -2) -> Tensor:
    """x with `stride` elements from one to the next along `dim`: address space, not memory.

    Dimensions before `dim` have stride 0. The memory between is mapped and never touched, so that
    it isn't torch's to fill.
    """
    dim %= x.dim()
    size = (x.shape[dim] - 1) * stride + x.shape[dim:].numel()
    if x.is_cuda:
        space = torch.empty(size, dtype=x.dtype, device=x.device)
    else:
        space = torch.frombuffer(mmap.mmap(-1, size * x.element_size()), dtype=x.dtype)
    inner = x[(0,) * (dim + 1)].contiguous().stride()
    strides = (*[0] * dim, stride, *inner)
    return space.as_strided(x.shape, strides).copy_(x)


def results(
    made: dict, case: AttentionCase, forward: Callable, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """out, lse and the gradients of `forward(q, k, v, mask=…, …)`, inputs cast to `dtype`."""
    leaves = {
        name: made[name].detach().to(dtype or made[name].dtype).requires_grad_()
        for name in ("q", "k", "v", "bias")
        if made[name] is not None
    }
    options = {name: made[name] for name in ("mask", "kv_lengths")}
    options.update(bias=leaves.get("bias"), **case.options())
    out, lse = forward(leaves["q"], leaves["k"], leaves["v"], **options)
    cotangents = {"out": made["dout"], "lse": made["dlse"]}
    outputs = {"out": out, "lse": lse}
    grads = torch.autograd.grad(
        [outputs[name] for name in case.grads],
        list(leaves.values()),
        [cotangents[name].to(outputs[name].dtype) for name in case.grads],
        allow_unused=True,
        materialize_grads=True,
    )
    found = {"out": out.detach(), "lse": lse.detach()}
    return found | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def fused(made: dict, case: AttentionCase, backend: str) -> dict[str, Tensor]:
    """out, lse and gradients of `fusedattn.attention` on `backend`, inputs as they were made.

    Skips the running test where the emulated GPU would take seconds.
    """
    batch, heads, seq_q, dim = made["q"].shape
    products = batch * heads * (seq_q + 127) // 128 * 128 * made["k"].shape[2] * dim
    if backend == "cuda_emulated" and products > 1 << 24:
        pytest.skip("too much for the emulated GPU")
    # What a user gets by default, also under the flag that fills fresh memory.
    forward = functools.partial(
        fusedattn.attention, return_lse=True, backend=backend, deterministic=False
    )
    return results(made, case, forward)


def check_attention(
    case: AttentionCase, backend: str, made: dict | None = None, slack: float = 1.0
) -> dict[str, Tensor]:
    """Hold out, lse, dq, dk, dv and dbias of `backend` to the rule; returns what it computed.

    The inputs are those of the case, or `made` where a test has changed them.
    """
    made = made or case.inputs(device_for(backend))
    actual = fused(made, case, backend)
    check_results(actual, made, case, label=f"{backend} {case}", slack=slack)
    return actual


def oracle(made: dict, case: AttentionCase) -> dict[str, Tensor]:
    """The results in fp64; dbias for each score, not yet summed."""

    def compute() -> dict[str, Tensor]:
        full = dict(made)
        if made["bias"] is not None:
            scores = (*made["q"].shape[:3], made["k"].shape[2])
            full["bias"] = made["bias"].expand(scores)
        return results(full, case, reference.attention, torch.float64)

    return once(("oracle", case), made, compute)


def eager_results(made: dict, case: AttentionCase) -> dict[str, Tensor]:
    """The results of plain PyTorch in the dtype of the case."""

    def compute() -> dict[str, Tensor]:
        found = results(made, case, reference.attention, case.dtype)
        # The log-sum-exp is a statistic in fp32, so it is held to eager in fp32, not in half.
        if case.dtype != lse_dtype(case.dtype):
            exact = results(made, case, reference.attention, lse_dtype(case.dtype))
            found["lse"] = exact["lse"]
        return found

    return once(("eager", case), made, compute)


def check_results(
    actual: dict, made: dict, case: AttentionCase, *, label: str, slack: float = 1.0
) -> None:
    """Hold results, however computed, to the rule for `case` on the inputs `made`."""
    made = {name: None if x is None else x.cpu() for name, x in made.items()}
    ref, eager = oracle(made, case), eager_results(made, case)
    rule = {"case": label, "slack": slack}
    for name in ("out", "lse", "dq", "dk", "dv"):
        floor = LSE_FLOORS.get(case.dtype, 0.0) if name == "lse" else 0.0
        x = (actual[name], ref[name], eager[name])
        check(*x, what=name, gradient=name.startswith("d"), floor=floor, **rule)
    if made["bias"] is None:
        return
    summand = ref["dbias"]
    total = summand.sum_to_size(made["bias"].shape)
    rows = summand.numel() // max(1, total.numel())
    x = (actual["dbias"], total)
    if rows > 1 and actual["dbias"].dtype == torch.float32 == case.dtype:
        largest = summand.abs().max().item()
        check_sum(*x, rows=rows, largest_summand=largest, what="dbias", case=label)
    else:
        # In the dtype of q: a float32 bias of half queries gets its gradient through half results.
        rule |= {"gradient": True, "tested": case.dtype, "rows": rows}
        check(*x, eager["dbias"], what="dbias", **rule)


# --- layer norm and RMS norm ----------------------------------------------------------------------


def check_normalised(
    actual: Tensor, ref: Tensor, z: Tensor, weight: Tensor | None, *, what: str, case: object = ""
) -> None:
    """Rule 4 for a layer norm over the last dimension.

    z is what was normalised, in fp64; `actual` is fp16, bf16 or fp32.
    """
    got, want, _, _ = _finite_parts(actual, ref, ref, what, case)
    if not want.numel():
        return
    sigma, mean = (x[..., None] for x in torch.std_mean(z.cpu().double(), -1, correction=0))
    n = torch.where(sigma > 0, (z.cpu() - mean).abs() / sigma, 0.0).clamp_min(1.0)
    gain = n if weight is None else n * weight.detach().cpu().double().abs()
    ill = torch.where(sigma > 0, mean.abs() / sigma, 0.0)
    info = torch.finfo(actual.dtype)
    _, exponent = torch.frexp(want.abs().clamp_min(info.tiny))
    unit = info.eps * torch.ldexp(torch.ones_like(want), exponent - 1)
    allowed = 4 * 2.0**-24 * (1 + ill) * gain + unit
    over = (got - want).abs() / allowed
    index = tuple(int(i) for i in torch.unravel_index(over.argmax(), over.shape))
    assert over[index] <= 1, (
        f"{what}: error over allowed {over[index].item():.2f} at {index}: got "
        f"{got[index].item():.9g}, expected {want[index].item():.9g}  [{case}]"
    )
