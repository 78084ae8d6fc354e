"""Sharding rules: how the library ops run on DTensors, each process on its own shards.

A rule gives each dimension of an op's tensors a letter, as in einsum, or a "." where it must be
whole. An op may be split along a letter, or along some together: what it computes for an index
needs that index of its inputs alone. Then a tensor with the letter is sharded there, and an input
without it, or of size 1 where others are not, is replicated; the gradient of such an input is a sum
over the letter, of which each process has a part. What is placed otherwise torch redistributes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from ..ops._library import with_defaults
from ..ops.attention_config import AttentionCall, AttentionConfig

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _shardings(
    ways: Sequence[str],
    inputs: Sequence[tuple[Any, str]],
    outputs: Sequence[str | None],
    *,
    gradients: bool = False,
) -> list[tuple[list[Any], list[Any]]]:
    """What `register_sharding` asks for: placements of the outputs and of the inputs, for each way.

    Inputs come with the letters of their last dimensions, of outputs the letters are enough; an
    absent tensor is None.
    """
    named = [None if x is None else _named(x, letters) for x, letters in inputs]
    known = "".join(filter(None, named))
    found = [([Replicate()] * len(outputs), [None if x is None else Replicate() for x in named])]
    for way in ways:
        if all(letter in known for letter in way):
            rest = Partial() if gradients else Replicate()
            given = [None if x is None else _place(x, way, Replicate()) for x in named]
            # The place of an output that nobody wants holds an empty tensor.
            made = [Replicate() if x is None else _place(x, way, rest) for x in outputs]
            found.append((made, given))
    return found


def _named(x: Any, letters: str) -> str:
    """The letters of x, without those along which it is broadcast."""
    letters = letters[len(letters) - x.ndim :]
    return "".join(
        "." if size == 1 else letter for letter, size in zip(letters, x.shape, strict=True)
    )


def _place(letters: str, way: str, otherwise: Any) -> Any:
    return next((Shard(dim) for dim, letter in enumerate(letters) if letter in way), otherwise)


def _refuse_dropout(op: str, dropout_p: float, whole: str) -> None:
    if dropout_p != 0.0:
        raise NotImplementedError(
            f"{op}: got dropout_p={dropout_p} with a DTensor, expected 0: the mask depends on the "
            f"place of a {whole}"
        )


# --- attention: along the batch, or along the heads of queries and keys together -----------------


# Among the arguments of attention_fwd: behind the tensors and the backend.
_DROPOUT_P = len(AttentionCall._fields) + AttentionConfig._fields.index("dropout_p")


def _attention_ways(q: Any, k: Any) -> list[str]:
    """Grouped heads are split where each process gets the queries of its keys."""
    heads = k.shape[1]
    mesh = q.mesh.shape
    parts = (math.prod(dims) for n in range(len(mesh)) for dims in combinations(mesh, n + 1))
    grouped = heads not in (1, q.shape[1])
    return ["b"] if grouped and any(heads % n for n in parts if n <= heads) else ["b", "h"]


def _attention_inputs(given: Sequence[Any]) -> tuple[list[tuple[Any, str]], bool]:
    """The inputs of attention's call, and whether sequences are packed in one batch entry."""
    dims = {
        "kv_lengths": "b", "seed": ".", "prefix_lengths": "b", "documents_q": "b.",
        "documents_k": "b.", "cu_seqlens_q": ".", "cu_seqlens_k": ".",
    }  # fmt: skip
    call = AttentionCall(*given[: len(AttentionCall._fields) - 1])
    packed = call.cu_seqlens_q is not None
    named = [(x, dims.get(name, "bh..")) for name, x in zip(call._fields[:-1], call, strict=False)]
    last = max(i for i, (x, _) in enumerate(named) if x is not None)
    return named[: max(last + 1, 8)], packed


def _attention_fwd(*given: Any):
    q, k = given[:2]
    _refuse_dropout("attention", given[_DROPOUT_P], "weight in the whole batch, of all heads")
    inputs, packed = _attention_inputs(given)
    ways = [way for way in _attention_ways(q, k) if way != "b" or not packed]
    return _shardings(ways, inputs, ["bh..", "bh."])


def _attention_bwd(dout, dlse, out, lse, *given: Any):
    call = AttentionCall(*given[: len(AttentionCall._fields) - 1])
    _refuse_dropout("attention", given[_DROPOUT_P], "weight in the whole batch, of all heads")
    like_out = [(dout, "bh.."), (dlse, "bh."), (out, "bh.."), (lse, "bh.")]
    of_call, packed = _attention_inputs(given)
    of = (call.q, call.k, call.v, call.bias, call.alibi_slopes, call.sinks, call.distance_bias)
    grads = [
        _named(x, "bh..") if asked else None for x, asked in zip(of, given[-len(of) :], strict=True)
    ]
    ways = [way for way in _attention_ways(call.q, call.k) if way != "b" or not packed]
    return _shardings(ways, like_out + of_call, grads, gradients=True)


def _attention_jvp(*given: Any):
    n = len(AttentionCall._fields) - 1
    q, k = given[:2]
    _refuse_dropout("attention", given[_DROPOUT_P + 4], "weight in the whole batch, of all heads")
    inputs, packed = _attention_inputs(given)
    absent = [(None, "bh..")] * (n - len(inputs))
    tangents = [(x, "bh..") for x in given[n : n + 4]]
    ways = [way for way in _attention_ways(q, k) if way != "b" or not packed]
    return _shardings(ways, [*inputs, *absent, *tangents], ["bh..", "bh."] * 2)


# --- norms and softmax: along every dimension that is not reduced ---------------------------------


def _rows(x: Any, dims: int, dropout_p: float) -> str:
    remedy = "call torch.nn.functional.dropout on x before"
    _refuse_dropout("norm", dropout_p, f"row in the whole tensor; {remedy}")
    return _LETTERS[: x.ndim - dims]


def _norm_fwd(x, residual, weight, bias, seed, dims, z_dtype, backend, centre, *options: Any):
    *_, dropout_p, statistics = options
    rows, row = _rows(x, dims, dropout_p), "." * dims
    inputs = [(x, rows + row), (residual, rows + row), (weight, row), (bias, row)]
    z = rows + row if z_dtype is not None else None
    wanted = (centre and statistics, statistics)
    return _shardings(rows, inputs, [rows + row, z, *(rows if each else None for each in wanted)])


def _norm_bwd(
    dout, dz, z, weight, mean, rstd, seed, dims, x_dtype, residual_dtype, weight_dtype, bias_dtype,
    *options: Any,
):  # fmt: skip
    rows, row = _rows(z, dims, options[-1]), "." * dims
    known = rows if rstd.ndim == len(rows) else "."  # in one dimension they follow no row
    inputs = [*((x, rows + row) for x in (dout, dz, z)), (weight, row)]
    inputs += [(mean, known), (rstd, known)]
    wanted = ((rows + row, residual_dtype), (".", weight_dtype), (".", bias_dtype))
    grads = [None if dtype is None else letters for letters, dtype in wanted]
    ways = known.replace(".", "")
    return _shardings(ways, inputs, [rows + row, *grads], gradients=True)


def _softmax_letters(x: Any, dim: int, causal: int) -> str:
    letters = _LETTERS[: x.ndim]
    if causal:
        letters = letters[:-2] + ".."
    return letters.replace(letters[dim], ".") if letters else ""


def _softmax_fwd(x, mask, bias, dim, backend, causal, scale):
    letters = _softmax_letters(x, dim, causal)
    inputs = [(y, letters) for y in (x, mask, bias)]
    return _shardings(letters.replace(".", ""), inputs, [letters])


def _softmax_bwd(dout, out, dim, backend, causal, scale, x_grad, bias_grad):
    letters = _softmax_letters(out, dim, causal)
    grads = [letters if wanted else None for wanted in (x_grad, bias_grad)]
    return _shardings(letters.replace(".", ""), [(dout, letters), (out, letters)], grads)


# --- SwiGLU: along every dimension, but where a row holds both halves -----------------------------


def _swiglu_letters(gate: Any, up: Any) -> str:
    letters = _LETTERS[: gate.ndim]
    return letters if up is not None else f"{letters[:-1]}."


def _swiglu_fwd(gate, up, *_: Any):
    letters = _swiglu_letters(gate, up)
    return _shardings(letters.replace(".", ""), [(gate, letters), (up, letters)], [letters])


def _swiglu_bwd(dout, gate, up, *_: Any):
    letters = _swiglu_letters(gate, up)
    inputs = [(x, letters) for x in (dout, gate, up)]
    grads = [letters, None if up is None else letters]
    return _shardings(letters.replace(".", ""), inputs, grads)


# --- positions: along batch and heads, and along the length where each row says its position ------


def _rotary_fwd(x, x2, cos, sin, positions, start, *_: Any):
    length = "." if positions is None else "s"
    of_x, of_x2 = f"bh{length}.", f"bg{length}."
    inputs = [(x, of_x), (x2, of_x2), (cos, "b.."), (sin, "b.."), (positions, "bs"), (start, ".")]
    ways = ("b", "hg", "h", "g", "s")
    return _shardings(ways, inputs, [of_x, None if x2 is None else of_x2])


def _sinusoidal_fwd(x, positions, start, *_: Any):
    of_x = "b.." if positions is None else "bs."
    return _shardings("bs", [(x, of_x), (positions, "bs"), (start, ".")], [of_x])


@functools.cache
def register() -> None:
    """Tell DTensor the rules. `rotary_` has none: in place nothing can be redistributed."""
    rules = (
        _attention_fwd, _attention_bwd, _attention_jvp, _norm_fwd, _norm_bwd, _softmax_fwd,
        _softmax_bwd, _rotary_fwd, _sinusoidal_fwd, _swiglu_fwd, _swiglu_bwd,
    )  # fmt: skip
    for rule in rules:
        op = getattr(torch.ops.fusedattn, rule.__name__.removeprefix("_")).default
        register_sharding(op)(_on_all_arguments(op, rule))


def _on_all_arguments(op: Any, rule: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: rule(*with_defaults(op, args))
