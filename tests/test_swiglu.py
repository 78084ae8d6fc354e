"""swiglu against the oracle: widths, layouts, numbers without limit, gradients, compile, module."""

from __future__ import annotations

import fusedattn
import pytest
import torch
from cases.swiglu import ACTIVATIONS, WIDTHS, check_extremes, check_swiglu, inputs, results
from compare import device_for, ulp
from fusedattn.reference import functional as reference
from torch.autograd import gradcheck

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
of_each = pytest.mark.parametrize("activation", ACTIVATIONS)


@of_each
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths(dtype, activation, instruction_set):
    for width in WIDTHS:
        for joined in (False, True):
            check_swiglu("cpu", inputs(3, width, dtype=dtype, joined=joined), activation)


@of_each
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_backends(dtype, activation, any_backend):
    for joined in (False, True):
        check_swiglu(any_backend, inputs(2, 3, 70, dtype=dtype, joined=joined), activation)


@of_each
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_numbers_without_limit(activation, any_backend):
    for dtype in DTYPES[:3] if any_backend == "triton" else DTYPES:
        check_extremes(any_backend, dtype, activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_below(dtype, fast_backend):
    """silu(-1e4) is −0: exp(1e4) must not be infinite times 0."""
    gate = torch.full((9,), -1e4, dtype=dtype)
    out = fusedattn.swiglu(gate, torch.ones_like(gate), backend=fast_backend)
    assert torch.equal(out, torch.zeros_like(out))
    assert out.signbit().all()


def test_the_normal_distribution_is_exact_to_an_ulp(instruction_set):
    """But for the roundings of 1/gate and of two products."""
    gate = torch.linspace(-9, 9, 40_001)
    found = fusedattn.swiglu(gate, 1 / gate.where(gate != 0, 1), activation="gelu", backend="cpu")
    want = 0.5 * torch.erfc(gate.double() * -(0.5**0.5))
    want[gate == 0] = 0.0
    assert (found - want).abs().max() <= 2.5 * ulp(0.5, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("joined", [False, True])
def test_beyond_the_caches_and_on_threads(joined, dtype, small_caches, instruction_set):
    """Streamed past the caches, in pieces: the same numbers. Odd rows have no place to stream."""
    for shape in ((3, 8200), (6, 4099)):
        made = inputs(*shape, dtype=dtype, joined=joined)
        want = check_swiglu("cpu", made, "silu")
        with small_caches():
            found = results(fusedattn.swiglu, made, dtype, backend="cpu")
        for name, x in want.items():
            assert torch.equal(found[name], x)


LAYOUTS = {
    "rows apart": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "at an odd address": lambda x: torch.cat((x[..., :1], x), -1)[..., 1:],
    "batches inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns apart": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "columns outside": lambda x: x.mT.contiguous().mT,
    "one row": lambda x: x[:1, :1].expand_as(x),
    "five dimensions": lambda x: x[None, :, None],
    "five that do not merge": lambda x: torch.stack([x, x], 1)[None].transpose(1, 3)[:, ::2, :2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_layouts(joined, layout, any_backend):
    device = device_for(any_backend)
    made = {n: x.to(device) for n, x in inputs(3, 4, 24, joined=joined).items()}
    moved = {name: LAYOUTS[layout](x) for name, x in made.items()}
    dense = {name: x.contiguous() for name, x in moved.items()}
    found, want = (
        results(fusedattn.swiglu, x, torch.float32, backend=any_backend) for x in (moved, dense)
    )
    for name, x in want.items():
        assert torch.equal(found[name], x), name
        assert found[name].is_contiguous()


def test_halves_of_one_projection(fast_backend):
    """Both forms give the same numbers, and one projection's gradient is one tensor."""
    made = inputs(2, 5, 33, joined=True)
    joined = results(fusedattn.swiglu, made, torch.float32, backend=fast_backend)
    gate, up = made["gate"].chunk(2, -1)
    apart = {"gate": gate, "up": up, "dout": made["dout"]}
    split = results(fusedattn.swiglu, apart, torch.float32, backend=fast_backend)
    assert torch.equal(joined["out"], split["out"])
    assert torch.equal(joined["dgate"], torch.cat((split["dgate"], split["dup"]), -1))


def test_no_dimension(backend):
    x = torch.tensor(1.5)
    torch.testing.assert_close(
        fusedattn.swiglu(x, x, backend=backend), reference.swiglu(x, x), rtol=1e-6, atol=0
    )


# --- gradients and transforms --------------------------------------------------------------------


def test_one_tensor_in_both_places(backend):
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: fusedattn.swiglu(x, x, backend=backend), x)


def test_autocast_changes_nothing(fast_backend):
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = fusedattn.swiglu(x, x, backend=fast_backend)
    assert torch.equal(found, fusedattn.swiglu(x, x, backend=fast_backend))


BAD = {
    "integer": ({"gate": torch.zeros(2, 4).long()}, TypeError, "gate of dtype"),
    "shape": ({"up": torch.zeros(2, 3)}, ValueError, r"up \(2, 3\)"),
    "dtype": ({"up": torch.zeros(2, 4).half()}, ValueError, "float16, expected one"),
    "device": ({"up": torch.zeros(2, 4, device="meta")}, ValueError, "up on meta"),
    "odd": ({"gate": torch.zeros(2, 5), "up": None}, ValueError, r"\(2, 5\) without up"),
    "no dimension": ({"gate": torch.zeros(()), "up": None}, ValueError, r"shape \(\) without up"),
    "activation": ({"activation": "tanh"}, ValueError, "activation='tanh', expected one of"),
    "activation type": ({"activation": 1}, TypeError, "activation of type int"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changed, error, message = BAD[name]
    with pytest.raises(error, match=f"^swiglu: got .*{message}"):
        fusedattn.swiglu(**{"gate": torch.zeros(2, 4), "up": torch.zeros(2, 4), **changed})


# --- the module ----------------------------------------------------------------------------------


@of_each
@pytest.mark.parametrize("bias", [False, True])
def test_module(bias, activation):
    module = fusedattn.nn.SwiGLU(12, 30, bias, activation, dtype=torch.float64)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    hidden = reference.swiglu(module.gate_proj(x), module.up_proj(x), activation=activation)
    want = module.down_proj(hidden)
    leaves = [x, *module.parameters()]
    torch.testing.assert_close(module(x), want)
    for found in zip(
        *(torch.autograd.grad(y.square().sum(), leaves) for y in (module(x), want)), strict=True
    ):
        torch.testing.assert_close(*found)
    names = [f"{name}_proj.{x}" for name in ("gate", "up", "down") for x in ("weight", "bias")]
    assert list(module.state_dict()) == [x for x in names if bias or x.endswith("weight")]
