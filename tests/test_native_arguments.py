"""The native functions refuse what would make a kernel leave its tensors, whoever calls them.

A traced program, a saved-tensor hook or `torch.ops.fusedattn` reach them with tensors that nobody
has looked at. Each argument of each function is spoilt in every way; the calls run in a forked
child, one an op, so that a crash is told from a refusal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_type_hints

import pytest
import torch
from fusedattn import _native
from fusedattn.ops import (
    attention_config,
    attention_jvp,
    attention_kernels,
    norm_kernels,
    rotary_kernels,
    sinusoidal,
    softmax_kernels,
    swiglu,
)
from ops import OPS, few, outputs
from processes import Call, wrong_in_a_fork
from torch import Tensor

HALF, FLOAT, DOUBLE = torch.float16, torch.float32, torch.float64
FLOATS = (HALF, torch.bfloat16, FLOAT)
QUERIES = ("q", "k", "dq", "dk")  # of head dim D
INTEGERS = (torch.int32, torch.int64)
DTYPES = (*FLOATS, DOUBLE, *INTEGERS, torch.bool, torch.uint8, torch.complex64)


class Arg(NamedTuple):
    """An argument, and what else in its place is right."""

    value: Any
    optional: bool = False
    dtypes: tuple[torch.dtype, ...] = ()
    strides: bool = True  # any
    broadcast: bool = False  # a size may be 1
    copies: int = 0  # so many of the first dimensions may be 1


def freed(x: Tensor) -> Tensor:
    """As FSDP frees parameters."""
    x.untyped_storage().resize_(0)
    return x


def freed_behind(x: Tensor) -> Tensor:
    """Its address is no null pointer."""
    behind = torch.stack([x, x])[1]
    return freed(behind)


def spread(x: Tensor) -> Tensor:
    """The same elements, each followed by a gap."""
    return torch.stack([x, x], -1)[..., 0]


def spoilt(arg: Arg) -> Iterator[tuple[str, Any, bool]]:
    """(how, another value, whether that is right)."""
    x = arg.value
    yield "None", None, arg.optional
    for other in ("text", 3, [1.0], object()):
        yield repr(other), other, False
    for dtype in DTYPES:
        if dtype is not x.dtype:
            yield str(dtype), x.to(dtype), dtype in arg.dtypes
    yield "meta", x.to("meta"), False
    yield "sparse", x.to_sparse(), False
    yield "scalar", x.new_zeros(()), x.numel() == 1 or arg.broadcast
    yield "five dimensions", x.expand(2, *(1,) * (4 - x.dim()), *x.shape), False
    yield "freed", freed(x.clone()), False
    yield "freed behind others", freed_behind(x), False
    yield "zero", torch._efficientzerotensor(x.shape, dtype=x.dtype), False
    for dim, size in enumerate(x.shape):
        single = arg.broadcast or dim < arg.copies
        for n in {0, 1, size - 1, size + 1, 10**7} - {size}:
            shape = [n if i == dim else m for i, m in enumerate(x.shape)]
            yield f"shape {shape}", x.new_zeros(()).expand(shape), n == 1 and single
            if n < 100:
                yield f"shape {shape}, dense", x.new_zeros(shape), n == 1 and single
    yield "spread", spread(x), arg.strides or x.numel() == 1


# --- right calls of each function -----------------------------------------------------------------


def _attention(native: Any) -> tuple[dict[str, Arg], dict[str, Arg], tuple]:
    cpu = native is _native.cpu
    dtype, stat = (FLOAT, FLOAT) if cpu else (HALF, FLOAT)
    q, k, v = (torch.randn(2, h, s, d).to(dtype) for h, s, d in ((4, 5, 8), (2, 6, 8), (2, 6, 16)))
    out, lse = torch.randn(2, 4, 5, 16).to(dtype), torch.randn(2, 4, 5).to(stat)
    inputs = {name: Arg(x, strides=cpu) for name, x in (("q", q), ("k", k), ("v", v))}
    mask, bias = torch.ones(2, 4, 5, 6, dtype=torch.bool), torch.randn(2, 4, 5, 6)
    distances, ids = torch.randn(2, 4, 1, 10), [torch.zeros(2, n).long() for n in (5, 6)]
    blocks = torch.ones(2, 4, 2, 2, dtype=torch.bool)
    pairs = {
        "mask": Arg(mask if cpu else None, optional=True, broadcast=True),
        "bias": Arg(bias, optional=True, dtypes=FLOATS, broadcast=True),
        "kv_lengths": Arg(
            torch.tensor([3, 4], dtype=torch.int32),
            optional=True,
            dtypes=INTEGERS if cpu else (torch.int32,),
        ),
    }
    slopes, sinks = (torch.randn(n, 4, 1, 1) for n in (2, 1))
    pairs["alibi_slopes"] = Arg(slopes, optional=True, broadcast=True)
    pairs["sinks"] = Arg(sinks, optional=True, broadcast=True)
    pairs["seed"] = Arg(torch.tensor([7]), optional=True)
    rules = {
        "distance_bias": Arg(distances, optional=True, copies=2),
        "prefix_lengths": Arg(torch.tensor([3, 4]), optional=True, dtypes=INTEGERS),
        "documents_q": Arg(ids[0], dtypes=INTEGERS, copies=1),
        "documents_k": Arg(ids[1], dtypes=INTEGERS, copies=1),
        "mask_blocks": Arg(blocks, optional=True, copies=2),
    }
    pairs |= rules if cpu else {}
    results = {"out": Arg(out, strides=cpu), "lse": Arg(lse)}
    config = tuple(attention_config.AttentionConfig(2, 0.5, block_size=4))
    grads = {
        "dout": Arg(out, optional=True, strides=cpu), "dlse": Arg(lse, optional=True), **inputs,
        **results, **{f"d{n}": Arg(a.value.clone(), True, strides=cpu) for n, a in inputs.items()},
        "dbias": Arg(bias.clone(), optional=True), **pairs, "bias": Arg(bias),
        "dalibi_slopes": Arg(slopes.clone(), optional=True), "alibi_slopes": Arg(slopes),
        "ddistance_bias": Arg(distances.clone() if cpu else None, optional=True),
        "distance_bias": Arg(distances if cpu else None),
    }  # fmt: skip
    return {**inputs, **pairs, **results}, grads, config


def _attention_jvp(native: Any) -> tuple[dict[str, Arg], tuple]:
    forward, _, config = _attention(native)
    tangents = {f"t_{n}": Arg(forward[n].value.clone(), optional=True) for n in "qkv"}
    tangents["t_bias"] = Arg(torch.randn(2, 4, 5, 6), optional=True, broadcast=True)
    results = {f"t_{n}": Arg(forward[n].value.clone()) for n in ("out", "lse")}
    forward["bias"] = forward["bias"]._replace(optional=False, dtypes=())
    return {**forward, **tangents, **results}, config


def _norm(native: Any) -> tuple[dict[str, Arg], dict[str, Arg], tuple]:
    every = DTYPES[:4] if native is _native.cpu else FLOATS
    rows = [torch.randn(3, 16) for _ in range(8)]
    vector = Arg(torch.randn(16), optional=True, dtypes=every, strides=False)
    stat = Arg(torch.ones(3), optional=True, strides=False)
    other = {"optional": True, "dtypes": FLOATS, "strides": False}
    seed = Arg(torch.tensor([7]), optional=True)
    forward = {
        "x": Arg(rows[0], strides=False), "residual": Arg(rows[1], **other), "weight": vector,
        "bias": vector, "seed": seed, "out": Arg(rows[2], strides=False),
        "z": Arg(rows[3], dtypes=FLOATS, strides=False), "mean": stat, "rstd": stat,
    }  # fmt: skip
    backward = {
        "dout": Arg(rows[0], optional=True, strides=False), "dz": Arg(rows[1], **other),
        "z": Arg(rows[2], dtypes=FLOATS, strides=False), "weight": vector,
        "mean": stat._replace(optional=False), "rstd": stat._replace(optional=False), "seed": seed,
        "dx": Arg(rows[3], strides=False), "dresidual": Arg(rows[4], **other),
        "dweight": vector._replace(value=torch.randn(16)),
        "dbias": vector._replace(value=torch.randn(16)),
    }  # fmt: skip
    return forward, backward, (True, 1e-5, 0.0, 0.25)


def _softmax(native: Any) -> tuple[dict[str, Arg], dict[str, Arg], tuple]:
    x = [Arg(torch.randn(2, 3, 4, 5)) for _ in range(4)]
    mask = Arg(x[0].value > 0, optional=True, broadcast=True)
    bias = x[1]._replace(optional=True, dtypes=FLOATS, broadcast=True)
    forward = {"x": x[0], "mask": mask, "bias": bias, "out": x[2]}
    given = {"dx": x[2]._replace(optional=True), "ds": x[3]._replace(optional=True)}
    return forward, {"dout": x[0], "out": x[1], **given}, (2, 0.5)


def _rotary(native: Any) -> tuple[dict[str, Arg], tuple]:
    x, x2 = torch.randn(2, 4, 5, 8), torch.randn(2, 3, 5, 8)
    positions = Arg(torch.zeros(2, 5, dtype=torch.int64), True, INTEGERS, copies=1)
    return {
        "x": Arg(x), "x2": Arg(x2),
        "cos": Arg(torch.randn(2, 7, 3)), "sin": Arg(torch.randn(2, 7, 3)),
        "positions": positions, "start": Arg(torch.tensor([1]), True, INTEGERS),
        "out": Arg(x.clone()), "out2": Arg(x2.clone()),
    }, (False, False, 0)  # fmt: skip


def _sinusoidal(native: Any) -> tuple[dict[str, Arg], tuple]:
    x = torch.randn(2, 5, 6)
    positions = Arg(torch.zeros(2, 5, dtype=torch.int64), True, INTEGERS, copies=1)
    start = Arg(torch.tensor([1]), True, INTEGERS)
    return {"x": Arg(x), "positions": positions, "start": start, "out": Arg(x.clone())}, (
        1e4, 1.0, 0,
    )  # fmt: skip


def _swiglu(native: Any) -> tuple[dict[str, Arg], dict[str, Arg], tuple]:
    tensors = (Arg(torch.randn(2, 3, 4, 5), strides=False) for _ in range(5))
    dout, gate, up, dgate, dup = tensors
    forward = {"gate": gate, "up": up, "out": dout}
    return forward, {"dout": dout, "gate": gate, "up": up, "dgate": dgate, "dup": dup}, (3,)


FUNCTIONS: dict[str, Callable[[Any], tuple[dict[str, Arg], tuple]]] = {
    "attention_forward": lambda native: _attention(native)[::2],
    "attention_backward": lambda native: _attention(native)[1:],
    "attention_jvp": _attention_jvp,
    "norm_forward": lambda native: _norm(native)[::2],
    "norm_backward": lambda native: _norm(native)[1:],
    "softmax_forward": lambda native: _softmax(native)[::2],
    "softmax_backward": lambda native: _softmax(native)[1:],
    "rotary_forward": _rotary,
    "sinusoidal_forward": _sinusoidal,
    "swiglu_forward": lambda native: _swiglu(native)[::2],
    "swiglu_backward": lambda native: _swiglu(native)[1:],
}


CPU_ALONE = {"attention_jvp"}


def _with_dropout(config: tuple) -> tuple:
    return tuple(attention_config.AttentionConfig(*config)._replace(dropout_p=0.5))


def _beyond_cuda(name: str, right: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the CPU takes and the CUDA kernels do not."""
    if not name.startswith("attention"):
        return
    tensors = {n: x for n, x in right.items() if isinstance(x, Tensor)}
    yield "float32", {n: x.float() for n, x in tensors.items() if x.is_floating_point()}
    for n in (4, 12, 264):
        wide = {i: x.new_zeros(*x.shape[:-1], n) for i, x in tensors.items() if i in QUERIES}
        yield f"D {n}", wide
    yield "mask", {"mask": torch.ones(5, 6, dtype=torch.bool)[None, None]}
    yield "distance_bias", {"distance_bias": torch.ones(1, 1, 1, 10)}
    yield "prefix_lengths", {"prefix_lengths": torch.ones(2, dtype=torch.int32)}
    ids = {f"documents_{x}": torch.ones(1, n, dtype=torch.int32) for x, n in (("q", 5), ("k", 6))}
    yield "documents", ids
    blocks = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    yield "mask_blocks", {"mask_blocks": blocks}


def hostile_calls(native: Any, name: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """(how, arguments, whether the function takes them)."""
    args, config = FUNCTIONS[name](native)
    right = {each: arg.value for each, arg in args.items()} | {"config": config}
    yield "nothing", right, True
    for each, arg in args.items():
        if arg.value is None:
            continue
        for how, value, taken in spoilt(arg):
            yield f"{each}: {how}", right | {each: value}, taken
    yield "all None", dict.fromkeys(right), False
    half = {n: x.half() if isinstance(x, Tensor) else x for n, x in right.items()}
    yield "all half", half, name.startswith("swiglu")  # whose tensors are of one dtype
    yield "all empty", {n: x[:0] if isinstance(x, Tensor) else x for n, x in right.items()}, False
    for other in ((), config[:-1], ("x",) * len(config), (None,) * len(config), list(config), None):
        yield f"config {other}", right | {"config": other}, False
    if native is not _native.cpu:
        yield from ((how, right | changed, False) for how, changed in _beyond_cuda(name, right))
    if name.startswith(("attention", "softmax", "swiglu")):  # their first option is an enum
        for number in (-1, 4 if name.startswith("swiglu") else 3, 2**40):
            yield f"option {number}", right | {"config": (number, *config[1:])}, False


@pytest.fixture(params=["cpu", "cuda_emulated"])
def native(request) -> Any:
    found = _native.cpu if request.param == "cpu" else _native.cuda_emulated()
    if found is None:
        pytest.skip(f"{request.param} is not built")
    return found


def _call(native: Any, name: str, arguments: dict[str, Any]) -> None:
    """The function on a call and outputs of these; what they leave out is None."""
    fields, _, outputs = native.fields[name]
    call = (*(arguments.get(field) for field in fields), arguments["config"])
    getattr(native, name)(call, *(arguments[output] for output in outputs))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_does_not_fit_is_refused(native, name):
    if name in CPU_ALONE and native is not _native.cpu:
        pytest.skip("the CPU alone has it")

    def calls() -> Iterator[Call]:
        for how, arguments, taken in hostile_calls(native, name):
            yield how, functools.partial(_call, native, name, arguments), taken

    assert wrong_in_a_fork(calls) == []


CALLS = {
    "attention_forward": attention_kernels.attention_fwd,
    "attention_backward": attention_kernels.attention_bwd,
    "attention_jvp": attention_jvp.attention_jvp,
    "norm_forward": norm_kernels.norm_fwd,
    "norm_backward": norm_kernels.norm_bwd,
    "softmax_forward": softmax_kernels.softmax_fwd,
    "softmax_backward": softmax_kernels.softmax_bwd,
    "rotary_forward": rotary_kernels.rotary_fwd,
    "sinusoidal_forward": sinusoidal.sinusoidal_fwd,
    "swiglu_forward": swiglu.swiglu_fwd,
    "swiglu_backward": swiglu.swiglu_bwd,
}


def test_the_fields_of_a_call_have_the_same_names_on_both_sides(native):
    """C++ reads them by place: another order there would be another meaning."""
    want = {}
    for name, library in CALLS.items():
        if name in CPU_ALONE and native is not _native.cpu:
            continue
        *fields, _ = library.call._fields
        outputs = [output.name for output in library.packet.default._schema.returns]
        if name == "attention_backward":
            outputs.remove("dsinks")  # no kernel has it
        config = get_type_hints(library.call)["config"]._fields
        want[name] = tuple(fields), config, tuple(outputs)
    assert native.fields == want


def test_a_cache_is_checked(native):
    """Pages of a call that says it is on a cache, in modules that take one; and forward alone."""
    args, config = FUNCTIONS["attention_forward"](native)
    right = {n: arg.value for n, arg in args.items()}
    for name in ("bias", "mask", "distance_bias", "prefix_lengths", "documents_q", "documents_k"):
        right[name] = None
    cached = attention_config.AttentionConfig(*config)._replace(cached=True, block_size=0)
    right |= {"config": tuple(cached), "mask_blocks": None}
    table = torch.tensor([[0], [1]], dtype=torch.int32)
    if native is not _native.cpu:
        with pytest.raises(ValueError, match="no mask, rule or cache"):
            _call(native, "attention_forward", right)
        return
    _call(native, "attention_forward", right)
    _call(native, "attention_forward", right | {"block_table": table})
    wrong = {
        "shape": table[0], "number of rows": table[:1], "floats": table.float(),
        "freed": freed(table.clone()), "no cache": table,
    }  # fmt: skip
    for how, given in wrong.items():
        changed = {"block_table": given}
        if how == "no cache":
            changed["config"] = tuple(cached._replace(cached=False))
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            _call(native, "attention_forward", right | changed)
    args, _ = FUNCTIONS["attention_backward"](native)
    right |= {n: arg.value for n, arg in args.items() if n not in right}
    with pytest.raises(ValueError, match="no gradient"):
        _call(native, "attention_backward", right | {"dbias": None, "ddistance_bias": None})


def test_dropout_needs_a_seed(native):
    for name in ("attention_forward", "attention_backward"):
        args, config = FUNCTIONS[name](native)
        right = {n: arg.value for n, arg in args.items()} | {"seed": None}
        right["config"] = _with_dropout(config)
        with pytest.raises(TypeError, match="got no seed"):
            _call(native, name, right)


# --- storages that were freed, through the public functions ---------------------------------------


_NOT_IN_CUDA = ("mask",)


def calls_on_freed(backend: str) -> Iterator[Call]:
    for op, call in OPS.items():
        for tensors in (few(op, HALF), call.tensors(HALF)):
            if backend == "cuda_emulated" and op == "attention":
                tensors = {n: x for n, x in tensors.items() if n not in _NOT_IN_CUDA}
            run = functools.partial(call.run, backend=backend)
            for name, x in tensors.items():
                for free in (freed, freed_behind):
                    given = tensors | {name: free(x.clone())}
                    what = f"{op}, {name} {free.__name__}"
                    yield what, functools.partial(run, **given), False
            if op == "add_sinusoidal":  # its gradient is no kernel
                continue
            first = call.needed[0]
            out = outputs(run(**tensors | {first: tensors[first].clone().requires_grad_()}))[0]
            for free in (freed, freed_behind):
                backward = functools.partial(out.backward, free(out.detach().clone()))
                yield f"{op}, gradient {free.__name__}", backward, False


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is not interpreted here")
def test_a_freed_storage_is_refused_by_triton():
    pytest.importorskip("triton")
    assert wrong_in_a_fork(lambda: calls_on_freed("triton")) == []


def test_a_freed_storage_is_refused(native):
    backend = native.__name__.removeprefix("fusedattn._")
    assert wrong_in_a_fork(lambda: calls_on_freed(backend)) == []
