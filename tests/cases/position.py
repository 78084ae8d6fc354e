"""Calls of rotary embeddings and sinusoidal positions, and how they are held to the rule."""

from __future__ import annotations

import dataclasses
from typing import Any

import fusedattn
import torch
from compare import check, device_for
from fusedattn.ops import rotary, sinusoidal
from fusedattn.ops.rotary_config import RotaryCall, RotaryConfig
from fusedattn.ops.sinusoidal import SinusoidalCall, SinusoidalConfig
from fusedattn.reference import functional as reference
from torch import Tensor

from cases import BF16, F16, F32, F64, Case, Source, graded, on


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
class RotaryCase(Case):
    """One call; `heads2` is None for one tensor, `positions` "", "shared" or "own"."""

    batch: int = 2
    heads: int = 3
    heads2: int | None = None
    seq: int = 9
    dim: int = 32
    rotated: int | None = None
    rows: int = 24
    dtype: torch.dtype = F32
    tables: torch.dtype = F32
    batched: bool = False
    interleaved: bool = False
    positions: str = ""
    indices: torch.dtype = torch.int64
    offset: int = 0
    offset_tensor: bool = False

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        """x, x2, their cotangents, cos, sin, positions and offset."""
        source = Source(device)
        made: dict[str, Any] = dict.fromkeys(("x2", "dx2", "positions"))
        for name, heads in (("x", self.heads), ("x2", self.heads2)):
            if heads is not None:
                shape = (self.batch, heads, self.seq, self.dim)
                made[name], made[f"d{name}"] = (
                    source.normal(*shape, dtype=self.dtype) for _ in range(2)
                )
        half = (self.rotated or self.dim) // 2
        shape = (self.batch, self.rows, half) if self.batched else (self.rows, half)
        angles = 6.3 * source.normal(*shape, dtype=F64)
        # Representable in the dtype of x, so that eager, which casts them there, loses nothing.
        made["cos"], made["sin"] = (
            t.to(self.dtype).to(self.tables) for t in (angles.cos(), angles.sin())
        )
        return made | _places(self, source, self.rows - self.offset)

    def check(self, backend: str) -> dict[str, Tensor]:
        """`check_rotary` of this call."""
        return check_rotary(backend=backend, interleaved=self.interleaved, **self.inputs())


def _places(case: RotaryCase | SinusoidalCase, source: Source, below: int) -> dict[str, Any]:
    """positions and offset."""
    made: dict[str, Any] = {"positions": None, "offset": case.offset}
    if case.positions:
        shape = (case.seq,) if case.positions == "shared" else (case.batch, case.seq)
        made["positions"] = source.integers(below, *shape, dtype=case.indices)
    if case.offset_tensor:
        made["offset"] = torch.tensor(case.offset, dtype=case.indices, device=source.device)
    return made


def _rotate(made: dict[str, Any], interleaved: bool, dtype: torch.dtype, backend: str) -> dict:
    """Outputs and gradients: of the reference in `dtype`, or of a backend on x as it is."""
    options = {name: made[name] for name in ("positions", "offset") if name in made}
    options["interleaved"] = interleaved
    cos, sin = (made[name] if backend else made[name].to(dtype) for name in ("cos", "sin"))

    def run(**given: Tensor) -> dict[str, Tensor]:
        if not backend:
            outs = [reference.apply_rotary(x, cos, sin, **options) for x in given.values()]
        elif len(given) == 2:
            outs = fusedattn.apply_rotary_qk(*given.values(), cos, sin, backend=backend, **options)
        else:
            outs = [fusedattn.apply_rotary(given["x"], cos, sin, backend=backend, **options)]
        return dict(zip(given, outs, strict=True))

    inputs = {name: made[name] for name in ("x", "x2") if made.get(name) is not None}
    return graded(run, inputs, {name: made[f"d{name}"] for name in inputs}, dtype)


def check_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, backend: str, *, interleaved: bool = False, **more: Any
) -> dict[str, Tensor]:
    """Hold outputs and gradients to the rule, and what is copied to equality; returns them.

    `more` are positions, offset, x2, and dx and dx2, the cotangents.
    """
    made = {"x": x, "cos": cos, "sin": sin, "dx": torch.randn_like(x), **more}
    actual = on("cpu", _rotate(on(device_for(backend), made), interleaved, x.dtype, backend))
    made = on("cpu", made)
    ref, eager = (_rotate(made, interleaved, dtype, "") for dtype in (F64, x.dtype))
    for name, got in actual.items():
        what = {"what": name, "case": f"{backend} {tuple(x.shape)} interleaved={interleaved}"}
        check(got, ref[name], eager[name], gradient=name.startswith("d"), **what)
        copied = slice(2 * cos.shape[-1], None)
        assert torch.equal(got[..., copied], made[name][..., copied]), f"{name}: copied features"
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
class SinusoidalCase(Case):
    """One call; `positions` "", "shared" or "own", in [0, highest)."""

    batch: int = 2
    seq: int = 9
    width: int = 32
    dtype: torch.dtype = F32
    positions: str = ""
    indices: torch.dtype = torch.int64
    highest: int = 4000
    offset: int = 0
    offset_tensor: bool = False
    base: float = 10000.0
    scale: float = 1.0

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        """x and the options of a call."""
        source = Source(device)
        x = source.normal(self.batch, self.seq, self.width, dtype=self.dtype)
        places = _places(self, source, self.highest)
        return {"x": x, "base": self.base, "scale": self.scale, **places}


def check_sinusoidal(x: Tensor, backend: str, **options: Any) -> Tensor:
    """Hold the output to the rule; returns it."""
    moved = on(device_for(backend), {"x": x, **options})
    actual = fusedattn.add_sinusoidal(**moved, backend=backend).cpu()
    x, options = x.cpu(), on("cpu", options)
    ref, eager = (reference.add_sinusoidal(y, **options) for y in (x.double(), x))
    check(actual, ref, eager, what="out", case=f"{backend} {tuple(x.shape)} {options}")
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
    "not a power of two": RotaryCase(dim=80, dtype=F16, heads2=1),
    "wide": RotaryCase(batch=1, heads=1, seq=2, dim=1300, rotated=1200),
    "positions, own": RotaryCase(positions="own", offset=3),
    "positions, shared, int32": RotaryCase(positions="shared", indices=torch.int32, heads2=3),
    "offset": RotaryCase(offset=15),
    "offset in memory": RotaryCase(offset=4, offset_tensor=True, positions="own"),
    "offset in memory, int32": RotaryCase(offset=4, offset_tensor=True, indices=torch.int32),
    "a table of each batch": RotaryCase(batched=True, positions="own", interleaved=True),
    "bf16": RotaryCase(dtype=BF16, dim=64, heads2=1, seq=37, rows=40),
    "bf16, interleaved": RotaryCase(dtype=BF16, dim=64, heads2=1, interleaved=True),
    "fp16, tables in fp16": RotaryCase(dtype=F16, tables=F16),
    "bf16, tables in bf16": RotaryCase(dtype=BF16, tables=BF16, interleaved=True),
    "tables in fp64": RotaryCase(tables=F64),
}

SINUSOIDAL = {
    "fp32": SinusoidalCase(),
    "bf16": SinusoidalCase(dtype=BF16, scale=5.5),
    "fp16": SinusoidalCase(dtype=F16, width=64),
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
