"""The versions that stand beside each other in one case of an op that works on rows.

An `Op` says what it is in plain PyTorch, in fusedattn and in Liger, and what the oracle says; a
builder makes a `Version` of one of these. What can be prepared once (tables in another layout,
compilation) is prepared by the builder.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import fusedattn
import torch
import torch.nn.functional as F
from fusedattn.reference import functional as reference
from torch import Tensor

from .accuracy import ExpectedRows, Formula, expected_rows
from .rowwise_cases import WIDE, Case, Problem
from .versions import Builder, Outputs, Unavailable, Version, ours_on, refusal

COMPILED = "torch.compile"
TWO_CALLS = "two calls"
LAYER_NORM_EPS, RMS_NORM_EPS = 1e-5, 1e-6


# --- the ops -------------------------------------------------------------------------------------


class Op:
    """One op, whose last `tables` inputs get no gradient."""

    tables = 0

    def ours(self, backend: str) -> Formula:
        """fusedattn on `backend`."""
        raise NotImplementedError

    def torch(self, inputs: Outputs) -> Formula:
        """Plain PyTorch; `inputs` for what it prepares, which is the same in every set."""
        raise NotImplementedError

    def liger(self, inputs: Outputs) -> Formula:
        """Liger's Triton kernels; `inputs` as for `torch`."""
        raise NotImplementedError

    def reference(self, rows: Tensor) -> Formula:
        """The oracle, on inputs of which only these rows are given."""
        raise NotImplementedError

    def summands(self, inputs: Sequence[Tensor], douts: Sequence[Tensor]) -> Outputs:
        """What the gradient of each weight is the sum of over the rows, in fp64."""
        return ()


def two_calls(norm: Callable[..., Tensor], weights: int) -> Formula:
    """The norm of x, or of x + residual where one follows the weights; the sum is returned too."""

    def formula(x: Tensor, *rest: Tensor) -> Outputs:
        if len(rest) == weights:
            return (norm(x, *rest),)
        z = x + rest[-1]
        return norm(z, *rest[:-1]), z

    return formula


class LayerNorm(Op):
    """(x, weight, bias) or (x, weight, bias, residual)."""

    def ours(self, backend: str) -> Formula:
        def formula(x: Tensor, w: Tensor, b: Tensor, residual: Tensor | None = None) -> Outputs:
            return as_tuple(
                fusedattn.layer_norm(
                    x, w.shape, w, b, LAYER_NORM_EPS, residual=residual, backend=backend
                )
            )

        return formula

    def torch(self, inputs: Outputs) -> Formula:
        return two_calls(lambda x, w, b: F.layer_norm(x, w.shape, w, b, LAYER_NORM_EPS), 2)

    def liger(self, inputs: Outputs) -> Formula:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction as Function

        return two_calls(lambda x, w, b: Function.apply(x, w, b, LAYER_NORM_EPS), 2)

    def reference(self, rows: Tensor) -> Formula:
        def formula(x: Tensor, w: Tensor, b: Tensor, residual: Tensor | None = None) -> Outputs:
            out = reference.layer_norm(x, x.shape[-1:], w, b, LAYER_NORM_EPS, residual=residual)
            return as_tuple(out)

        return formula

    def summands(self, inputs: Sequence[Tensor], douts: Sequence[Tensor]) -> Outputs:
        z = (inputs[0] + inputs[3] if len(inputs) > 3 else inputs[0]).double()
        dout = douts[0].double()
        return dout * reference.layer_norm(z, z.shape[-1:], eps=LAYER_NORM_EPS), dout


class RmsNorm(Op):
    """(x, weight) or (x, weight, residual)."""

    def ours(self, backend: str) -> Formula:
        def formula(x: Tensor, w: Tensor, residual: Tensor | None = None) -> Outputs:
            return as_tuple(
                fusedattn.rms_norm(x, w.shape, w, RMS_NORM_EPS, residual=residual, backend=backend)
            )

        return formula

    def torch(self, inputs: Outputs) -> Formula:
        return two_calls(lambda x, w: F.rms_norm(x, w.shape, w, RMS_NORM_EPS), 1)

    def liger(self, inputs: Outputs) -> Formula:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as Fused
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction as Function

        def formula(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Outputs:
            # In place, dx would overwrite the dout of the next call.
            options = (RMS_NORM_EPS, 0.0, "llama", False)
            if residual is None:
                return (Function.apply(x, weight, *options),)
            return Fused.apply(x, residual, weight, *options)

        return formula

    def reference(self, rows: Tensor) -> Formula:
        def formula(x: Tensor, w: Tensor, residual: Tensor | None = None) -> Outputs:
            out = reference.rms_norm(x, x.shape[-1:], w, RMS_NORM_EPS, residual=residual)
            return as_tuple(out)

        return formula

    def summands(self, inputs: Sequence[Tensor], douts: Sequence[Tensor]) -> Outputs:
        z = (inputs[0] + inputs[2] if len(inputs) > 2 else inputs[0]).double()
        return (douts[0].double() * reference.rms_norm(z, z.shape[-1:], eps=RMS_NORM_EPS),)


class Softmax(Op):
    """(x,), over the last dimension."""

    def ours(self, backend: str) -> Formula:
        return lambda x: (fusedattn.softmax(x, -1, backend=backend),)

    def torch(self, inputs: Outputs) -> Formula:
        return lambda x: (torch.softmax(x, -1),)

    def liger(self, inputs: Outputs) -> Formula:
        from liger_kernel.ops.softmax import LigerSoftmaxFunction as Function

        return lambda x: (Function.apply(x),)

    def reference(self, rows: Tensor) -> Formula:
        return lambda x: (reference.softmax(x, -1),)


class Rotary(Op):
    """(q, k, cos, sin): q, k (B, H, S, D), tables (S, D/2) of the positions 0 to S − 1."""

    tables = 2

    def ours(self, backend: str) -> Formula:
        return lambda q, k, cos, sin: fusedattn.apply_rotary_qk(q, k, cos, sin, backend=backend)

    def torch(self, inputs: Outputs) -> Formula:
        """x·cos + rotate_half(x)·sin, as the models of Hugging Face have it, with their tables."""
        wide_cos, wide_sin = (torch.cat((table, table), dim=-1) for table in inputs[2:])

        def rotate_half(x: Tensor) -> Tensor:
            half = x.shape[-1] // 2
            return torch.cat((-x[..., half:], x[..., :half]), dim=-1)

        def formula(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Outputs:
            return tuple(x * wide_cos + rotate_half(x) * wide_sin for x in (q, k))

        return formula

    def liger(self, inputs: Outputs) -> Formula:
        """It works in place on (B, S, H, D): in this layout it makes a copy first."""
        from liger_kernel.ops.rope import LigerRopeFunction as Function

        wide = [torch.cat((table, table), dim=-1)[None] for table in inputs[2:]]
        return lambda q, k, cos, sin: Function.apply(q, k, *wide)

    def reference(self, rows: Tensor) -> Formula:
        return lambda q, k, cos, sin: tuple(reference.apply_rotary(x, cos, sin) for x in (q, k))


class Sinusoidal(Op):
    """(x,) of (B, S, W), to which the encodings of the positions 0 to S − 1 are added."""

    def ours(self, backend: str) -> Formula:
        return lambda x: (fusedattn.add_sinusoidal(x, backend=backend),)

    def torch(self, inputs: Outputs) -> Formula:
        """A table that stands ready is added: one more tensor to read, and to keep."""
        x = inputs[0]
        table = reference.add_sinusoidal(torch.zeros_like(x[0], dtype=torch.float64)).to(x.dtype)
        return lambda x: (x + table,)

    def liger(self, inputs: Outputs) -> Formula:
        raise Unavailable("Liger has no sinusoidal positions")

    def reference(self, rows: Tensor) -> Formula:
        return lambda x: (reference.add_sinusoidal(x, positions=rows),)


class Swiglu(Op):
    """(gate, up), of rows."""

    def ours(self, backend: str) -> Formula:
        return lambda gate, up: (fusedattn.swiglu(gate, up, backend=backend),)

    def torch(self, inputs: Outputs) -> Formula:
        return lambda gate, up: (F.silu(gate) * up,)

    def liger(self, inputs: Outputs) -> Formula:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction as Function

        def formula(gate: Tensor, up: Tensor) -> Outputs:
            if gate.requires_grad:
                raise Unavailable("its backward writes over gate and up: it runs but once")
            return (Function.apply(gate, up),)

        return formula

    def reference(self, rows: Tensor) -> Formula:
        return lambda gate, up: (reference.swiglu(gate, up),)


OPS: dict[str, Op] = {
    "layer_norm": LayerNorm(),
    "rms_norm": RmsNorm(),
    "softmax": Softmax(),
    "rotary": Rotary(),
    "sinusoidal": Sinusoidal(),
    "swiglu": Swiglu(),
}


def as_tuple(x: Any) -> Outputs:
    return x if isinstance(x, tuple) else (x,)


# --- the versions --------------------------------------------------------------------------------


def version_of(formula: Formula, problem: Problem, *, detail: str = "") -> Version:
    """A `Version` of a formula: forward without a graph, or backward on graphs recorded here."""
    sets = problem.sets
    if not problem.case.backward:
        return Version(lambda i: formula(*sets[i % len(sets)][0]), torch.no_grad, detail=detail)
    tables = OPS[problem.case.op].tables
    graphs = []
    for inputs, douts in sets:
        count = len(inputs) - tables
        leaves = [x.detach().requires_grad_() for x in inputs[:count]]
        graphs.append((formula(*leaves, *inputs[count:]), leaves, douts))

    def call(i: int) -> Outputs:
        outputs, leaves, douts = graphs[i % len(graphs)]
        return torch.autograd.grad(outputs, leaves, douts, retain_graph=True)

    return Version(call, detail=detail)


def ours(backend: str) -> Builder:
    """fusedattn on one backend; "cpu" stands for what a CPU tensor gets by default."""

    def build(problem: Problem) -> Version:
        requested, served = _served(problem, backend)
        return version_of(OPS[problem.case.op].ours(requested), problem, detail=served)

    return build


def in_two_calls(problem: Problem) -> Version:
    """The residual added by PyTorch, then fusedattn's norm: what one call saves."""
    requested, served = ("auto", "")
    if problem.device.type == "cpu":
        requested, served = _served(problem, "cpu")
    norm, weights = OPS[problem.case.op].ours(requested), len(problem.sets[0][0]) - 2
    formula = two_calls(lambda *inputs: norm(*inputs)[0], weights)
    return version_of(formula, problem, detail=served)


def _served(problem: Problem, backend: str) -> tuple[str, str]:
    """The backend to ask for and the one that serves; `Unavailable` where it refuses the case."""
    try:
        OPS[problem.case.op].ours(backend)(*problem.sets[0][0])
    except fusedattn.UnsupportedError as error:
        if backend == "cpu":
            # Never "auto": without native kernels it might pick Triton's interpreter.
            return "reference", "reference"
        raise Unavailable(refusal(error, backend)) from error
    return ("auto" if backend == "cpu" else backend), backend


def plain(problem: Problem) -> Version:
    """PyTorch's own function, or the formula where it has none."""
    return version_of(OPS[problem.case.op].torch(problem.sets[0][0]), problem)


def compiled(problem: Problem) -> Version:
    """`torch.compile` of plain, for these static shapes; compiled before the clock starts."""
    import torch._functorch.config as functorch

    torch.compiler.reset()
    formula = OPS[problem.case.op].torch(problem.sets[0][0])
    # A backward that donates the buffers it was given can run only once.
    with functorch.patch(donated_buffer=False):
        version = version_of(torch.compile(formula, fullgraph=True, dynamic=False), problem)
        with version.context():
            version.call(0)
    return version


def liger(problem: Problem) -> Version:
    """Liger's kernel; before its layer norm a residual is added by PyTorch."""
    if problem.device.type != "cuda":
        raise Unavailable("its Triton kernels need a GPU")
    if importlib.util.find_spec("liger_kernel") is None:
        raise Unavailable("liger-kernel is not installed: pip install liger-kernel")
    try:
        formula = OPS[problem.case.op].liger(problem.sets[0][0])
    except ImportError as error:
        raise Unavailable(f"this liger-kernel lacks it: {error}") from error
    return version_of(formula, problem)


PEERS: dict[str, Builder] = {
    "torch": plain,
    COMPILED: compiled,
    TWO_CALLS: in_two_calls,
    "liger": liger,
}


def peers_of(case: Case) -> list[str]:
    """The names of the peers that a case can have."""
    return [name for name in PEERS if case.residual or name != TWO_CALLS]


def builders(device: torch.device, names: Iterable[str]) -> dict[str, Builder]:
    """Our versions on a device, and the named peers."""
    mine = {name: ours(backend) for name, backend in ours_on(device).items()}
    return {**mine, **{name: PEERS[name] for name in names}}


def worth_compiling(case: Case, device: torch.device) -> bool:
    """Whether `torch.compile` stands beside this case without `thorough`."""
    if device.type != "cuda":
        return case in (
            Case("rms_norm", (2048, 1024), "fp32"),
            Case("rotary", (1, 16, 1024, 64), "fp32"),
            Case("swiglu", (2048, 5632), "fp32"),
        )
    wide = case.op in WIDE and case.shape[-1] in (4096, 12288, 32768)
    return case.dtype == "bf16" and (wide or case.op not in WIDE)


def expected_of(problem: Problem, index: int, seed: int) -> ExpectedRows:
    """What every version should give on the input set of this index."""
    case, op = problem.case, OPS[problem.case.op]
    inputs, douts = problem.sets[index]
    return expected_rows(
        op.reference,
        inputs,
        leaves=len(inputs) - op.tables,
        douts=douts if case.backward else None,
        summands=op.summands,
        seed=seed,
    )
