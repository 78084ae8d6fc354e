"""Cases of rotary embeddings and sinusoidal positions for the GPU backends, and their check.

A case makes its inputs, the same each time; `check_rotary` and `check_sinusoidal` hold the outputs
and the gradients of a backend to the rule of `compare.py`, against the fp64 oracle and the same
formula in the tested dtype.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import compare
import fusedattn
import torch
from fusedattn.ops import rotary, sinusoidal
from fusedattn.ops.rotary_config import RotaryCall, RotaryConfig
from fusedattn.ops.sinusoidal import SinusoidalCall, SinusoidalConfig
from fusedattn.reference import functional as reference
from torch import Tensor

BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64


def device_for(backend: str) -> str:
    """Where tensors for `backend` are."""
    return "cuda" if backend == "cuda" else compare.device_for(backend)


def relayout(x: Tensor, layout: str) -> Tensor:
    """The same values of x (…, S, D), in another memory order."""
    if layout == "rows outside":  # (B, S, H, D): as a projection leaves it
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "features outside":
        return x.mT.contiguous().mT
    if layout == "every second feature":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "off by one":
        wide = x.new_full((x.numel() + 1,), torch.nan)
        return wide[1:].view(x.shape).copy_(x)
    return x.contiguous()


LAYOUTS = ("rows outside", "features outside", "every second feature", "off by one")


@dataclasses.dataclass(frozen=True)
class RotaryCase:
    """One call; `heads2` is None for one tensor, `positions` "", "shared" or "own"."""

    batch: int = 2
    heads: int = 3
    heads2: int | None = None
    seq: int = 9
    dim: int = 32
    rotated: int | None = None
    rows: int = 24
    dtype: torch.dtype = torch.float32
    tables: torch.dtype = torch.float32
    batched: bool = False
    interleaved: bool = False
    positions: str = ""
    indices: torch.dtype = torch.int64
    offset: int = 0
    offset_tensor: bool = False

    def inputs(self, device: str) -> dict[str, Any]:
        """x, x2, their cotangents, cos, sin, positions and offset."""
        source = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source, dtype=FP64).to(device, self.dtype)

        made: dict[str, Any] = dict.fromkeys(("x2", "dx2", "positions"))
        made["x"], made["dx"] = (
            normal(self.batch, self.heads, self.seq, self.dim) for _ in range(2)
        )
        if self.heads2 is not None:
            made["x2"], made["dx2"] = (
                normal(self.batch, self.heads2, self.seq, self.dim) for _ in range(2)
            )
        half = (self.rotated or self.dim) // 2
        shape = (self.batch, self.rows, half) if self.batched else (self.rows, half)
        angles = torch.rand(shape, generator=source, dtype=FP64) * 6.3
        # Representable in the dtype of x, so that eager, which casts them there, loses nothing.
        made["cos"], made["sin"] = (
            t.to(self.dtype).to(device, self.tables) for t in (angles.cos(), angles.sin())
        )
        if self.positions:
            shape = (self.seq,) if self.positions == "shared" else (self.batch, self.seq)
            made["positions"] = torch.randint(
                self.rows - self.offset, shape, generator=source, dtype=self.indices
            ).to(device)
        made["offset"] = self.offset
        if self.offset_tensor:
            made["offset"] = torch.tensor(self.offset, dtype=self.indices, device=device)
        return made


def _rotate(made: dict[str, Any], case: RotaryCase, dtype: torch.dtype | None, backend: str):
    """Outputs and gradients: of the reference in `dtype`, or of a backend on x as it is."""
    options = {name: made[name] for name in ("positions", "offset")}
    options["interleaved"] = case.interleaved
    found = {}
    pairs = [pair for pair in (("x", "dx"), ("x2", "dx2")) if made[pair[0]] is not None]
    leaves = [made[name].detach().to(dtype).requires_grad_() for name, _ in pairs]
    cos, sin = made["cos"], made["sin"]
    if not backend:
        tables = cos.to(dtype), sin.to(dtype)
        outs = [reference.apply_rotary(leaf, *tables, **options) for leaf in leaves]
    elif len(leaves) == 2:
        outs = fusedattn.apply_rotary_qk(*leaves, cos, sin, backend=backend, **options)
    else:
        outs = [fusedattn.apply_rotary(*leaves, cos, sin, backend=backend, **options)]
    grads = torch.autograd.grad(outs, leaves, [made[name].to(dtype) for _, name in pairs])
    for (name, _), out, grad in zip(pairs, outs, grads, strict=True):
        found[name], found[f"gradient of {name}"] = out.detach(), grad
    return found


def check_rotary(case: RotaryCase, backend: str, made: dict[str, Any] | None = None) -> dict:
    """Hold outputs and gradients to the rule, and what is copied to equality; returns them."""
    made = made or case.inputs(device_for(backend))
    actual = _rotate(made, case, case.dtype, backend)
    ref, eager = (_rotate(made, case, dtype, "") for dtype in (FP64, case.dtype))
    for name, got in actual.items():
        gradient = name.startswith("gradient")
        check = {"what": name, "gradient": gradient, "case": f"{backend} {case}"}
        compare.check(got, ref[name], eager[name], **check)
        source = made[f"d{name.split()[-1]}" if gradient else name]
        rotated = case.rotated or case.dim
        assert torch.equal(got[..., rotated:], source[..., rotated:]), f"{name}: copied features"
    return actual


def launch_rotary(made: dict[str, Any], backend: str, config: RotaryConfig, **outputs: Tensor):
    """The kernel on contract arguments; NaN in every output that is not given. (out, out2)."""
    x, x2, positions, offset = (made[name] for name in ("x", "x2", "positions", "offset"))
    out = outputs.get("out", torch.full_like(x, torch.nan))
    out2 = outputs.get("out2", None if x2 is None else torch.full_like(x2, torch.nan))
    cos, sin = (t if t.dim() == 3 else t[None] for t in (made["cos"], made["sin"]))
    if positions is not None and positions.dim() == 1:
        positions = positions[None]
    start = offset.reshape(1) if isinstance(offset, Tensor) else None
    call = RotaryCall(x, x2, cos, sin, positions, start, config)
    rotary.op.kernels(backend).forward(call, out, out2)
    return out, out2


# --- sinusoidal ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SinusoidalCase:
    """One call; `positions` "", "shared" or "own", in [0, highest)."""

    batch: int = 2
    seq: int = 9
    width: int = 32
    dtype: torch.dtype = torch.float32
    positions: str = ""
    indices: torch.dtype = torch.int64
    highest: int = 4000
    offset: int = 0
    offset_tensor: bool = False
    base: float = 10000.0
    scale: float = 1.0

    def inputs(self, device: str) -> dict[str, Any]:
        """x and the options of a call."""
        source = torch.Generator().manual_seed(1)
        shape = (self.batch, self.seq, self.width)
        made: dict[str, Any] = {"positions": None, "base": self.base, "scale": self.scale}
        made["x"] = torch.randn(shape, generator=source, dtype=FP64).to(device, self.dtype)
        if self.positions:
            shape = (self.seq,) if self.positions == "shared" else (self.batch, self.seq)
            made["positions"] = torch.randint(
                self.highest, shape, generator=source, dtype=self.indices
            ).to(device)
        made["offset"] = self.offset
        if self.offset_tensor:
            made["offset"] = torch.tensor(self.offset, dtype=self.indices, device=device)
        return made


def check_sinusoidal(case: SinusoidalCase, backend: str) -> Tensor:
    """Hold the output to the rule; returns it."""
    made = case.inputs(device_for(backend))
    x = made.pop("x")
    actual = fusedattn.add_sinusoidal(x, backend=backend, **made)
    ref, eager = (reference.add_sinusoidal(x.to(t), **made) for t in (FP64, case.dtype))
    compare.check(actual, ref, eager, what="out", case=f"{backend} {case}")
    return actual


def ulps_of_encoding(width: int, backend: str, **options: Any) -> Tensor:
    """The error of the encoding alone, in ulp of each fp32 number."""
    x = torch.zeros(1, 64, width, device=device_for(backend))
    actual = fusedattn.add_sinusoidal(x, backend=backend, **options).double().cpu()
    want = reference.add_sinusoidal(x.cpu().double(), **options)
    _, exponent = torch.frexp(want.abs().clamp_min(2.0**-60))
    return (actual - want).abs() / torch.ldexp(torch.ones_like(want), exponent - 24)


def launch_sinusoidal(x: Tensor, out: Tensor, backend: str, config: SinusoidalConfig) -> Tensor:
    """The kernel on contract arguments."""
    call = SinusoidalCall(x, None, None, config)
    sinusoidal.op.kernels(backend).forward(call, out)
    return out


# --- regimes -------------------------------------------------------------------------------------

ROTARY = {
    "halves": RotaryCase(),
    "interleaved": RotaryCase(interleaved=True),
    "q and k": RotaryCase(heads=6, heads2=2),
    "more heads of k": RotaryCase(heads=1, heads2=5, interleaved=True),
    "one row": RotaryCase(seq=1, heads=9, dim=64),
    "one pair": RotaryCase(dim=2),
    "partial": RotaryCase(dim=64, rotated=32),
    "partial, interleaved": RotaryCase(dim=64, rotated=32, interleaved=True, heads2=2),
    "partial, no size divides": RotaryCase(dim=25, rotated=6),
    "partial, interleaved, no size divides": RotaryCase(dim=25, rotated=6, interleaved=True),
    "not a power of two": RotaryCase(dim=80, dtype=FP16, heads2=1),
    "wide": RotaryCase(batch=1, heads=1, seq=2, dim=1300, rotated=1200),
    "positions, own": RotaryCase(positions="own", offset=3),
    "positions, shared, int32": RotaryCase(positions="shared", indices=torch.int32, heads2=3),
    "offset": RotaryCase(offset=15),
    "offset in memory": RotaryCase(offset=4, offset_tensor=True, positions="own"),
    "offset in memory, int32": RotaryCase(offset=4, offset_tensor=True, indices=torch.int32),
    "a table of each batch": RotaryCase(batched=True, positions="own", interleaved=True),
    "bf16": RotaryCase(dtype=BF16, dim=64, heads2=1, seq=37, rows=40),
    "bf16, interleaved": RotaryCase(dtype=BF16, dim=64, heads2=1, interleaved=True),
    "fp16, tables in fp16": RotaryCase(dtype=FP16, tables=FP16),
    "bf16, tables in bf16": RotaryCase(dtype=BF16, tables=BF16, interleaved=True),
    "tables in fp64": RotaryCase(tables=FP64),
}

SINUSOIDAL = {
    "fp32": SinusoidalCase(),
    "bf16": SinusoidalCase(dtype=BF16, scale=5.5),
    "fp16": SinusoidalCase(dtype=FP16, width=64),
    "odd width": SinusoidalCase(width=33),
    "width 1": SinusoidalCase(width=1),
    "width 2": SinusoidalCase(width=2, dtype=BF16),
    "not a power of two": SinusoidalCase(width=1200, seq=3),
    "more batches than share an encoding": SinusoidalCase(batch=19, seq=3),
    "one row": SinusoidalCase(seq=1, width=512),
    "positions, own": SinusoidalCase(positions="own", batch=5),
    "positions, shared, int32": SinusoidalCase(positions="shared", indices=torch.int32),
    "positions to a million": SinusoidalCase(positions="own", highest=10**6),
    "offset": SinusoidalCase(offset=999_991),
    "offset past 2³²": SinusoidalCase(offset=2**32 + 5, base=1e9, width=8),
    "offset in memory": SinusoidalCase(offset=77, offset_tensor=True, positions="shared"),
    "negative positions": SinusoidalCase(offset=-5),
    "another base": SinusoidalCase(base=100.0),
    "a base below 1": SinusoidalCase(base=0.01),
}
