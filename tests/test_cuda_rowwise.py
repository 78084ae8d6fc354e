"""Norms in CUDA C++: on the emulator in random thread orders, and on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import fusedattn
import pytest
import torch
from compare import check, check_sum
from fusedattn import _native
from fusedattn.reference import functional as reference
from torch import Tensor

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = (F16, BF16, F32)
# Less shared memory than wide rows need: they go to clusters or are read again.
LITTLE = 40 * 1024


@pytest.fixture(params=["cuda_emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    emulated = _native.cuda_emulated()
    if request.param == "cuda":
        yield request.param
    elif emulated is None:
        pytest.skip("needs python setup.py build_emulator")
    else:
        emulated.seed(0)
        yield request.param
        emulated.device()


def set_device(backend: str, **device: int) -> None:
    """What the emulated GPU has; a real one has what it has."""
    if backend == "cuda_emulated":
        _native.cuda_emulated().device(**device)


def normal(backend: str, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    made = torch.randn(shape, dtype=torch.float64)
    return made.to("cuda" if backend == "cuda" else "cpu", dtype)


# --- norms ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Norm:
    """One call; `weight`, `bias` and `residual` are their dtypes. The defaults are a plain one."""

    rows: int
    width: int
    x: torch.dtype = F32
    centre: bool = True
    weight: torch.dtype | None = F32
    bias: torch.dtype | None = F32
    residual: torch.dtype | None = None
    z: torch.dtype | None = None
    dropout_p: float = 0.0
    weight_offset: float = 0.0
    # Which outputs receive a gradient.
    grads: tuple[str, ...] = ("out", "z")

    def options(self) -> dict:
        made = {"dropout_p": self.dropout_p, "seed": -5 if self.dropout_p else None, "eps": 1e-5}
        return made if self.centre else made | {"weight_offset": self.weight_offset}

    def __str__(self) -> str:
        changed = (
            f"{field.name}={str(getattr(self, field.name)).removeprefix('torch.')}"
            for field in dataclasses.fields(self)
            if field.default is dataclasses.MISSING or getattr(self, field.name) != field.default
        )
        return " ".join(changed)

    def inputs(self, backend: str) -> dict[str, Tensor]:
        shapes = {"x": (self.rows, self.width), "residual": (self.rows, self.width)}
        shapes |= {"weight": (self.width,), "bias": (self.width,)}
        return {
            name: normal(backend, *shape, dtype=getattr(self, name))
            for name, shape in shapes.items()
            if getattr(self, name) is not None
        }


def coarsest(*dtypes: torch.dtype) -> torch.dtype:
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def norm_results(case: Norm, module, made: dict, douts: tuple, dtype=None, **more) -> dict:
    """Outputs and gradients of a norm of `module`, the inputs cast to `dtype`."""
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in made.items()}
    arguments = dict(leaves)
    x, weight = arguments.pop("x"), arguments.pop("weight", None)
    function = module.layer_norm if case.centre else module.rms_norm
    found = function(x, case.width, weight, **arguments, **case.options(), **more)
    outputs = found if isinstance(found, tuple) else (found,)
    wanted = [i for i, name in enumerate(("out", "z")[: len(outputs)]) if name in case.grads]
    grads = torch.autograd.grad(
        [outputs[i] for i in wanted],
        list(leaves.values()),
        [douts[i].to(outputs[i].dtype) for i in wanted],
        allow_unused=True,
        materialize_grads=True,
    )
    named = dict(zip(("out", "z"), outputs, strict=False))
    return named | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def check_norm(case: Norm, backend: str, made: dict | None = None) -> dict:
    """Hold all results of `backend` to the tolerance rule."""
    made = made or case.inputs(backend)
    douts = tuple(normal(backend, case.rows, case.width) for _ in range(2))
    douts = (douts[0].to(case.x), douts[1].to(case.z or case.residual or case.x))
    more = {"residual_dtype": case.z} if case.z else {}
    actual = norm_results(case, fusedattn, made, douts, backend=backend, **more)
    ref = norm_results(case, reference, made, douts, torch.float64)
    # Eager rounds z as the kernels do, which round it to what they return.
    rounded = coarsest(case.x, case.z or case.residual or case.x)
    eager = norm_results(case, reference, made, douts, rounded)
    # A dropped or kept element decides which rows these sums have; summands stay below 30.
    for name, value in actual.items():
        what = f"{backend} {name}"
        if name in ("dweight", "dbias") and value.dtype == rounded == F32:
            check_sum(value, ref[name], rows=case.rows, largest_summand=30.0, what=what, case=case)
        else:
            rows = case.rows if name in ("dweight", "dbias") else 1
            gradient = name.startswith("d")
            check(
                value, ref[name], eager[name], what=what, case=case, gradient=gradient,
                tested=coarsest(value.dtype, rounded), rows=rows,
            )  # fmt: skip
    return actual


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width"),
    [
        pytest.param(9, 8, id="one_thread"),
        pytest.param(37, 64, id="part_of_a_warp"),
        pytest.param(7, 512, id="a_warp"),
        pytest.param(5, 1504, id="several_warps"),
        pytest.param(1, 8192, id="a_block"),
        pytest.param(3, 1, id="width_1"),
        pytest.param(4, 33, id="single_elements"),
        pytest.param(2, 999, id="single_elements_several_warps"),
    ],
)
def test_norm_widths(backend: str, rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    if backend == "cuda_emulated":
        _native.cuda_emulated().seed(seed)
    check_norm(Norm(rows, width, dtype, weight=dtype, bias=dtype), backend)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("shared", [LITTLE, 227 * 1024], ids=["read_again", "kept"])
@pytest.mark.parametrize(
    ("width", "dtype"),
    [(8200, F32), (16400, BF16), (12299, F32), (16392, F16)],
    ids=["f32", "bf16", "single_elements", "f16"],
)
def test_norm_wide(
    backend: str, width: int, dtype: torch.dtype, shared: int, capability: int
) -> None:
    set_device(backend, capability=capability, max_shared_bytes=shared)
    check_norm(Norm(2, width, dtype, residual=F32 if dtype == F16 else None), backend)


@pytest.mark.parametrize(
    "case",
    [
        Norm(5, 64, centre=False, bias=None, weight_offset=1.0),
        Norm(5, 264, BF16, centre=False, weight=BF16, bias=None),
        Norm(3, 40, centre=False, weight=None, bias=None),
        Norm(3, 40, BF16, weight=None, bias=BF16),
        Norm(5, 264, BF16, weight=F32, bias=F16),
        Norm(5, 264, F16, weight=F32, bias=F32),
        Norm(5, 264, F32, weight=BF16, bias=BF16),
        Norm(5, 264, BF16, residual=BF16, dropout_p=0.3),
        Norm(5, 264, BF16, residual=BF16, z=F32),
        Norm(5, 264, F32, residual=BF16),
        Norm(5, 264, F16, residual=F32, dropout_p=0.5),
        Norm(5, 263, F16, residual=F32, dropout_p=0.5),
        Norm(5, 264, F32, residual=F32, grads=("out",)),
        Norm(5, 264, F32, residual=F32, grads=("z",)),
        Norm(5, 37, F32, residual=F32, grads=("z",)),
        Norm(5, 64, F32, dropout_p=0.5),
        Norm(5, 64, F32, residual=F32, dropout_p=1.0),
        Norm(2, 8200, F32, residual=F32, dropout_p=0.5),
        Norm(3, 8200, F32, centre=False, bias=None),
        # More rows than the threads of all blocks take at a time.
        Norm(400, 64, F32, residual=F32),
        Norm(131, 520, BF16, weight=BF16, bias=BF16),
    ],
    ids=str,
)
def test_norm_options(backend: str, case: Norm) -> None:
    check_norm(case, backend)


def test_norm_mixed_gradient_dtypes_are_read_in_chunks(backend: str) -> None:
    """z in another half format than x: no kernel keeps its rows, so they are read twice."""
    check_norm(Norm(5, 64, BF16, residual=F16, weight=BF16, bias=None, centre=False), backend)


def test_norm_layouts(backend: str) -> None:
    """Rows at a distance, at an odd address, and one row for all: the same bits."""
    case = Norm(6, 64)
    made = case.inputs(backend)
    plain = fusedattn.layer_norm(made["x"], 64, made["weight"], made["bias"], backend=backend)
    wide = torch.zeros(6, 80, device=plain.device)
    wide[:, :64] = made["x"]
    apart = fusedattn.layer_norm(wide[:, :64], 64, made["weight"], made["bias"], backend=backend)
    assert torch.equal(apart, plain)
    odd = torch.zeros(6 * 64 + 1, device=plain.device)[1:].view(6, 64).copy_(made["x"])
    found = fusedattn.layer_norm(odd, 64, made["weight"], made["bias"], backend=backend)
    torch.testing.assert_close(found, plain, rtol=2e-6, atol=2e-6)
    one = made["x"][:1].expand(6, 64)
    found = fusedattn.layer_norm(one, 64, made["weight"], made["bias"], backend=backend)
    assert torch.equal(found, plain[:1].expand(6, 64))


@pytest.mark.parametrize("width", [256, 8200])
def test_norm_far_from_zero(backend: str, width: int) -> None:
    """Rule 4: no cancellation where the mean is a thousand times the deviation."""
    x = normal(backend, 3, width) + 1000.0
    out = fusedattn.layer_norm(x, width, backend=backend)
    ref = reference.layer_norm(x.double(), width)
    assert (out - ref).abs().max() <= 4 * 2.0**-24 * 1100 + 2.0**-21


def test_norm_runs_repeat(backend: str) -> None:
    """Sums over rows are added in a fixed order."""
    case = Norm(300, 72, BF16)
    made = case.inputs(backend)
    dout = normal(backend, 300, 72, dtype=BF16)
    first, second = (
        norm_results(case, fusedattn, made, (dout,), backend=backend) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("width", [72, 12000])
def test_norm_without_a_gradient(backend: str, width: int) -> None:
    """Where no gradient will need them, the statistics are not kept."""
    set_device(backend, capability=90, max_shared_bytes=LITTLE)
    case = Norm(3, width)
    made = case.inputs(backend)
    expected = norm_results(case, fusedattn, made, (made["x"],), backend=backend)
    with torch.no_grad():
        out = fusedattn.layer_norm(
            made["x"], width, made["weight"], made["bias"], **case.options(), backend=backend
        )
    assert torch.equal(out, expected["out"])
