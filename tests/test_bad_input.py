"""Every argument of every public function against values that it was not made for.

What comes is a TypeError, a ValueError or an UnsupportedError that names the function and the
argument, or the right result; the tables below say which values are taken.
"""

from __future__ import annotations

import contextlib
import inspect
from decimal import Decimal

import fusedattn
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_upper_left

F32, BOOL = torch.float32, torch.bool
Q, TABLE, POSITIONS = torch.randn(2, 2, 4, 8), torch.randn(9, 3), torch.arange(4)
X = torch.randn(3, 8)


class Subclass(Tensor):
    pass


NORM = {
    "x": X,
    "normalized_shape": 8,
    "seed": 7,
    "weight": torch.randn(8),
    "residual": torch.randn(3, 8),
}
TURN = {"cos": TABLE, "sin": TABLE * 2, "positions": POSITIONS}
CALLS = {
    "attention": {
        "q": Q, "k": Q + 1, "v": Q - 1, "mask": torch.rand(4, 4) < 0.9, "bias": torch.randn(4, 4),
        "kv_lengths": torch.tensor([3, 4]), "alibi_slopes": torch.rand(2), "sinks": torch.randn(2),
        "dropout_p": 0.25, "seed": 7,
    },
    "softmax": {"x": X, "mask": torch.rand(3, 8) < 0.9, "bias": torch.randn(8)},
    "layer_norm": {**NORM, "bias": torch.randn(8)},
    "rms_norm": {**NORM, "dropout_p": 0.25},
    "apply_rotary": {"x": Q, **TURN},
    "apply_rotary_qk": {"q": Q, "k": Q + 1, **TURN},
    "add_sinusoidal": {"x": X, "positions": torch.arange(3)},
    "swiglu": {"gate": X, "up": X + 1},
}  # fmt: skip

VALUES = {
    "None": None, "1": 1, "-1": -1, "0.5": 0.5, "NaN": float("nan"), "inf": float("inf"),
    "-inf": -float("inf"), "True": True, "2**63": 2**63, "-2**63-1": -(2**63) - 1,
    "10**5000": 10**5000, "a string": "x", "bytes": b"x", "a list": [1.5, "x", None],
    "a tuple": (1, 2), "a dict": {"x": []}, "a set": {1.5}, "an object": object(),
    "a function": len, "a type": Tensor, "complex": 1 + 0j, "Decimal": Decimal(1),
    "a dtype": torch.int8, "float16": torch.float16, "np.float32": np.float32(0.5),
    "np.int64": np.int64(1), "np.bool": np.True_, "an array": np.ones(1),
    "number": torch.tensor(0.5), "integer": torch.tensor(1), "flag": torch.tensor(True),
    "leaf": torch.tensor(0.5, requires_grad=True), "vector": torch.ones(5),
    "lazy": torch.nn.UninitializedParameter(), "rule": causal_upper_left(4, 4),
}  # fmt: skip


def nested(x: Tensor, layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([x, x], layout=layout)


# Made from the tensor that the argument is otherwise.
TENSORS = {
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.reshape(-1, x.shape[-1]).to_sparse_csr(),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "nested": lambda x: nested(x, torch.strided),
    "jagged": lambda x: nested(x, torch.jagged),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "complex tensor": lambda x: x.to(torch.complex64),
    "short": lambda x: x.to(torch.int16),
    "bits": lambda x: x.to(BOOL),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "meta": lambda x: x.to("meta"),
    "too long": lambda x: torch.cat([x, x, x], -1),
    "no dimension": lambda x: x.flatten()[0],
    "subclass": lambda x: x.as_subclass(Subclass),
}

# --- what is taken -------------------------------------------------------------------------------

FLAGS, INTEGERS = {"True", "np.bool", "flag"}, {"1", "np.int64", "integer"}
NUMBERS = {"0.5", "2**63", "np.float32", "number", "no dimension"} | INTEGERS
ANY_NUMBER = NUMBERS | {"-1", "-2**63-1", "NaN", "inf", "-inf"}
TAKEN = {
    "causal": FLAGS, "deterministic": FLAGS, "interleaved": FLAGS, "inplace": FLAGS,
    "return_lse": FLAGS, "dim": INTEGERS | {"-1"}, "offset": INTEGERS, "seed": INTEGERS | {"-1"},
    "scale": ANY_NUMBER, "weight_offset": ANY_NUMBER, "eps": NUMBERS | {"inf"}, "base": NUMBERS,
    "softcap": NUMBERS, "dropout_p": NUMBERS - {"2**63"}, "window": {"a tuple"},
    "residual_dtype": {"float16"}, "normalized_shape": set(), "backend": set(),
    "activation": set(),
}  # fmt: skip
SCORES = {"subclass", "no dimension"}
MORE = {
    ("attention", "mask"): SCORES | {"flag", "bits", "rule"},
    ("attention", "bias"): SCORES | {"number", "leaf", "rule"},
    ("attention", "scale"): ANY_NUMBER | {"leaf"},
    ("softmax", "mask"): SCORES | {"flag", "bits"},
    ("softmax", "bias"): SCORES | {"number", "leaf"},
    ("attention", "v"): {"subclass", "too long"},
    ("apply_rotary", "x"): {"subclass", "too long"},
    ("add_sinusoidal", "x"): {"subclass", "too long"},
    ("add_sinusoidal", "offset"): INTEGERS | {"-1"},
}
AS_PYTHON = {
    "np.float32": 0.5, "np.int64": 1, "np.bool": True, "number": 0.5, "integer": 1, "flag": True,
    "no dimension": 1.0, "2**63": 2.0**63, "-2**63-1": -(2.0**63),
}  # fmt: skip
FUNCTIONS = {name: getattr(fusedattn, name) for name in CALLS}
ARGUMENTS = [
    (function, parameter)
    for function, call in FUNCTIONS.items()
    for parameter, about in inspect.signature(call).parameters.items()
    if about.kind is not inspect.Parameter.VAR_KEYWORD
]


def legal(function: str, parameter: str) -> set[str]:
    found = MORE.get((function, parameter), TAKEN.get(parameter, {"subclass"}))
    default = inspect.signature(FUNCTIONS[function]).parameters[parameter].default
    return found | ({"None"} if default is None else set())


def values(given: object) -> dict:
    """All but those of which torch makes no such tensor."""
    found, source = dict(VALUES), given if isinstance(given, Tensor) else torch.ones(4)
    for name, make in TENSORS.items():
        with contextlib.suppress(RuntimeError):
            found[name] = make(source.clone())
    return found


def run(function: str, **options) -> tuple:
    fresh = {x: y.clone() if isinstance(y, Tensor) else y for x, y in CALLS[function].items()}
    found = FUNCTIONS[function](**fresh | options)
    return found if isinstance(found, tuple) else (found,)


def attempt(function: str, **options) -> tuple | Exception:
    try:
        return run(function, **options)
    except (fusedattn.UnsupportedError, TypeError, ValueError) as error:
        return error


@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:.*Sparse", "ignore:.*quantize_per")
@pytest.mark.parametrize(("function", "parameter"), ARGUMENTS)
def test_value(function, parameter):
    said = function.removesuffix("_qk")
    option = not isinstance(CALLS[function].get(parameter, 0), Tensor)
    taken = legal(function, parameter)
    for name, value in values(CALLS[function].get(parameter)).items():
        found = attempt(function, **{parameter: value})
        if isinstance(found, fusedattn.UnsupportedError):
            assert name in taken
            assert f"{parameter} is not supported yet" in str(found)
        elif isinstance(found, Exception):
            assert name not in taken, found
            assert str(found).startswith(said), name
            assert parameter in str(found) or "got positions -1" in str(found), name
        else:
            assert name in taken
            if option and name in AS_PYTHON and parameter not in ("alibi_slopes", "sinks"):
                want = run(function, **{parameter: AS_PYTHON[name]})
                for x, y in zip(found, want, strict=True):
                    assert (x == y) if isinstance(x, str) else torch.equal(x, y), name


@pytest.mark.parametrize(
    ("function", "parameter"),
    [("attention", "scale"), ("softmax", "scale"), ("add_sinusoidal", "scale"),
     ("layer_norm", "eps"), ("rms_norm", "weight_offset")],
)  # fmt: skip
def test_number_that_is_none(function, parameter):
    """NaN and infinities do as in the formula."""
    for name in legal(function, parameter) & {"NaN", "inf", "-inf"}:
        found = run(function, **{parameter: VALUES[name]})
        want = run(function, **{parameter: VALUES[name]}, backend="reference")
        for x, y in zip(found, want, strict=True):
            torch.testing.assert_close(x.nan_to_num(0.0, 1.0, -1.0), y.nan_to_num(0.0, 1.0, -1.0))
            assert torch.equal(x.isnan(), y.isnan()), name


@pytest.mark.parametrize("asked", ["auto", "reference"])
@pytest.mark.parametrize("function", CALLS)
def test_results_have_memory_of_their_own(function, asked):
    """No output is an input, and no gradient another one or what came from behind."""
    given = {x: y.clone() if isinstance(y, Tensor) else y for x, y in CALLS[function].items()}
    tensors = {x: y for x, y in given.items() if isinstance(y, Tensor)}
    leaves = [
        y.requires_grad_()
        for x, y in tensors.items()
        if y.is_floating_point() and x not in ("cos", "sin")
    ]
    found = FUNCTIONS[function](**given, backend=asked)
    found = found if isinstance(found, tuple) else (found,)
    behind = [torch.ones_like(x) for x in found]
    torch.autograd.backward(found, behind)
    grads = [x.grad for x in leaves if x.grad is not None]
    everything = [*tensors.values(), *found, *behind, *grads]
    assert len({x.untyped_storage().data_ptr() for x in everything}) == len(everything)
