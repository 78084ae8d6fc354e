"""The table of ops: every test that goes over all of them reads it. A new op is a row here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fusedattn
import torch
from fusedattn.reference import functional as reference
from torch import Tensor


class Op(NamedTuple):
    """`run(**tensors(dtype, n), **options)` is a call with all its tensors, of n rows or queries.

    `formula` takes the same. A call needs no more than the tensors `needed`; `differentiable` ones
    carry a gradient; autograd keeps `kept` tensors of a call with all. `function` is that of
    `fusedattn.autograd`, and `variants` are options that have derivatives of their own.
    """

    run: Callable[..., Any]
    formula: Callable[..., Any]
    tensors: Callable[..., dict[str, Tensor]]
    needed: tuple[str, ...]
    differentiable: tuple[str, ...]
    kept: int
    function: str
    variants: tuple[dict[str, Any], ...] = ()


def _normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def _attention(dtype: torch.dtype, n: int = 5) -> dict[str, Tensor]:
    """Every query sees a key."""
    mask = torch.rand(2, 1, n, n + 1) > 0.2
    mask[..., 0] = True
    return {
        "q": _normal(2, 2, n, 8, dtype=dtype),
        "k": _normal(2, 1, n + 1, 8, dtype=dtype),
        "v": _normal(2, 1, n + 1, 8, dtype=dtype),
        "mask": mask,
        "bias": _normal(2, n, n + 1, dtype=dtype),
        "kv_lengths": torch.tensor([n + 1, n - 1], dtype=torch.int32),
        "alibi_slopes": _normal(2, 2, dtype=dtype),
        "sinks": _normal(2, dtype=dtype),
    }


def _norm(dtype: torch.dtype, n: int = 3) -> dict[str, Tensor]:
    return {
        "x": _normal(2, n, 8, dtype=dtype),
        "weight": _normal(8, dtype=dtype),
        "bias": _normal(8, dtype=dtype),
        "residual": _normal(2, n, 8, dtype=dtype),
    }


def _without_bias(dtype: torch.dtype, n: int = 3) -> dict[str, Tensor]:
    return {name: x for name, x in _norm(dtype, n).items() if name != "bias"}


def _softmax(dtype: torch.dtype, n: int = 3) -> dict[str, Tensor]:
    return {
        "x": _normal(2, n, 8, dtype=dtype),
        "mask": torch.rand(n, 8) > 0.2,
        "bias": _normal(2, 1, 8, dtype=dtype),
    }


def _rotary(dtype: torch.dtype, n: int = 5) -> dict[str, Tensor]:
    return {
        "x": _normal(2, 2, n, 8, dtype=dtype),
        "cos": _normal(9, 3, dtype=dtype),
        "sin": _normal(9, 3, dtype=dtype),
        "positions": torch.randint(7, (2, n)),
        "offset": torch.tensor([1]),
    }


def _sinusoidal(dtype: torch.dtype, n: int = 5) -> dict[str, Tensor]:
    return {
        "x": _normal(2, n, 8, dtype=dtype),
        "positions": torch.randint(9, (2, n)),
        "offset": torch.tensor([1]),
    }


def _swiglu(dtype: torch.dtype, n: int = 3) -> dict[str, Tensor]:
    return {"gate": _normal(2, n, 8, dtype=dtype), "up": _normal(2, n, 8, dtype=dtype)}


def _layer_norm(module: Any, x: Tensor, weight: Any = None, bias: Any = None, **more: Any) -> Any:
    return module.layer_norm(x, 8, weight, bias, **more)


def _rms_norm(module: Any, x: Tensor, weight: Any = None, **more: Any) -> Any:
    return module.rms_norm(x, 8, weight, **{"eps": 1e-6, **more})


def _attend(module: Any, **given: Any) -> tuple[Tensor, Tensor]:
    lse = {"return_lse": True} if module is fusedattn else {}
    return module.attention(**{"causal": True, **lse, **given})


def _scaled_softmax(module: Any, x: Tensor, **given: Any) -> Tensor:
    return module.softmax(x, **{"scale": 0.7, **given})


def _scaled_sinusoidal(module: Any, x: Tensor, **given: Any) -> Tensor:
    return module.add_sinusoidal(x, **{"scale": 1.5, **given})


def _op(call: Callable[..., Any] | str, *row: Any) -> Op:
    """`call(module, **tensors)`, or the name of what takes them as they are, in both modules."""
    if isinstance(call, str):
        name = call
        return Op(getattr(fusedattn, name), getattr(reference, name), *row)
    return Op(
        lambda **given: call(fusedattn, **given), lambda **given: call(reference, **given), *row
    )


OPS = {
    "attention": _op(
        _attend, _attention, ("q", "k", "v"), ("q", "k", "v", "bias", "alibi_slopes", "sinks"), 10,
        "Attention",
        ({"causal": False}, {"causal": "top_left", "scale": -0.7}, {"softcap": 0.9},
         {"causal": False, "window": (5, 1)}, {"dropout_p": 0.4, "seed": 7},
         {"mask": torch.tensor([True, False, True, True, True])[:, None]}),
    ),
    "layer_norm": _op(
        _layer_norm, _norm, ("x",), ("x", "weight", "bias", "residual"), 4, "LayerNorm",
        ({"eps": 1e-3, "dropout_p": 0.4, "seed": 7},),
    ),
    "rms_norm": _op(
        _rms_norm, _without_bias, ("x",), ("x", "weight", "residual"), 3, "RMSNorm",
        ({"eps": 1e-3, "dropout_p": 0.4, "seed": 7}, {"weight_offset": 1.0}),
    ),
    "softmax": _op(
        _scaled_softmax, _softmax, ("x",), ("x", "bias"), 1, "Softmax",
        ({"causal": True}, {"causal": "top_left", "scale": -0.7}, {"dim": 0, "scale": 1.3},
         {"mask": torch.tensor([True, False, True])[:, None]}),
    ),
    "apply_rotary": _op(
        "apply_rotary", _rotary, ("x", "cos", "sin"), ("x",), 4, "Rotary", ({"interleaved": True},)
    ),
    "add_sinusoidal": _op(
        _scaled_sinusoidal, _sinusoidal, ("x",), ("x",), 0, "Sinusoidal", ({"base": 20.0},)
    ),
    "swiglu": _op(
        "swiglu", _swiglu, ("gate", "up"), ("gate", "up"), 2, "SwiGLU",
        tuple({"activation": name} for name in ("gelu", "gelu_tanh", "relu")),
    ),
}  # fmt: skip


def arguments() -> Iterator[tuple[str, str]]:
    """(op, name) of every tensor that an op takes."""
    for op, call in OPS.items():
        for name in call.tensors(torch.float32):
            yield op, name


def outputs(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def few(op: str, dtype: torch.dtype = torch.float32, n: int = 5) -> dict[str, Tensor]:
    """The tensors that a call needs."""
    made = OPS[op].tensors(dtype, n)
    return {name: made[name] for name in OPS[op].needed}


def raw_calls(backend: str = "cpu") -> Iterator[tuple[str, tuple]]:
    """Library ops and arguments that they take."""
    from fusedattn.ops.attention_config import AttentionCall, AttentionConfig

    R = torch.randn
    q, k, dout, lse = R(2, 2, 5, 8), R(2, 1, 6, 8), R(2, 2, 5, 8), R(2, 2, 5)
    extras = (torch.ones(2, 1, 5, 6, dtype=torch.bool), R(1, 2, 5, 6), torch.tensor([6, 4]))
    of_heads = (R(2, 2, 1, 1), R(1, 2, 1, 1))
    config = AttentionConfig(2, 0.3, window_left=3, block_size=2)
    ids = torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 0, 0]])
    rules = (R(1, 2, 1, 10), torch.tensor([3, 9]), ids, torch.zeros(1, 6).long())
    blocks = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    *inputs, _ = AttentionCall(q, k, k.clone(), *extras, *of_heads, None, *rules, blocks)
    yield "attention_fwd", (*inputs, backend, *config)
    grads = (dout, lse.clone(), dout.clone(), lse)
    yield "attention_bwd", (*grads, *inputs, backend, *config, *(True,) * 7)
    yield "attention_jvp", (*inputs, q.clone(), None, k.clone(), R(1, 2, 5, 6), backend, *config)
    seed, f32, bf16 = torch.tensor([7]), torch.float32, torch.bfloat16
    dropped = AttentionCall(q, k, k.clone(), seed=seed, config=config._replace(dropout_p=0.3))
    *inputs, config = dropped
    yield "attention_fwd", (*inputs, backend, *config)
    yield "attention_bwd", (*grads, *inputs, backend, *config)
    x, w, b, rows = R(4, 3, 8), R(8), R(8), R(4, 3)
    for centre in (True, False):
        norm = (backend, centre, 1e-5, 0.0, 0.0)
        yield "norm_fwd", (x, x.clone(), w, b, None, 1, f32, *norm, True)
        yield "norm_fwd", (x, None, w, b, seed, 1, f32, *norm[:-1], 0.5, True)
        yield "norm_fwd", (x, x.clone(), w, b, seed, 1, bf16, *norm[:-1], 0.5, True)
        yield "norm_bwd", (x, x.clone(), x, w, rows, rows, None, 1, f32, f32, f32, f32, *norm)
    soft = (backend, 0, 1.0)
    mask = torch.ones(3, 8, dtype=torch.bool)
    yield "softmax_fwd", (x, mask, R(3, 8), -1, *soft)
    yield "softmax_fwd", (x.bfloat16(), mask, R(3, 1), 1, *soft)
    yield "softmax_bwd", (x, x.clone(), -1, *soft, True, True)
    yield "softmax_bwd", (x, x.clone(), 1, *soft, False, True)
    tables = (R(9, 4), R(9, 4), torch.randint(5, (2, 5)), torch.tensor([2]))
    yield "rotary_fwd", (q, k[:, :, :5], *tables, backend, False, False, 0)
    yield "rotary_fwd", (q, None, *tables, backend, True, False, 1)
    yield "rotary_", (q.clone(), k[:, :, :5].clone(), *tables, backend, True, True, 0)
    yield "sinusoidal_fwd", (x, torch.randint(5, (4, 3)), torch.tensor([2]), backend, 1e4, 1.0, 0)
    yield "swiglu_fwd", (x, x.clone(), backend, 0)
    yield "swiglu_bwd", (x[..., :4].clone(), x, None, backend, 1)
