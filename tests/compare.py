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
`--deterministic`.) Six things are ruled apart:

fp64          The oracle's rounding is of the same size, so no eager stands beside it: a cap alone.
lse           A statistic in fp32 whatever the inputs are: held to eager in fp32, with a floor for
              half inputs (`LSE_FLOORS`).
bias          Its gradient may have another dtype than q. Which eager, factor and cap it is held to
              is decided by the dtype of q. Where it is a sum, rule 3 holds if both are fp32; else
              rules 1 and 2, the cap growing with √M.
eager fails   Where eager overflows, rule 1 says nothing, and the cap alone holds.
out rounded   Gradients of half attention that come through Δ = Σ dout ∘ out get a floor for the
              rounding of `out` (`cases.attention.rounding_of_out`).
slack         A test may multiply what rule 1 allows, and says why.
"""

from __future__ import annotations

import collections
import hashlib
import math
import mmap
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
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
