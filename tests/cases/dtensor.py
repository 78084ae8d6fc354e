"""Calls on DTensors: how their tensors are spread, and where what they give lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import fusedattn
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

R, P, S0, S1, S2 = Replicate(), Partial(), Shard(0), Shard(1), Shard(2)


class Case(NamedTuple):
    """A call on DTensors: name → (tensor, its placement, that of its gradient if it has one)."""

    run: Callable[..., Any]
    outs: list[Any]
    tensors: dict[str, tuple]
    silent: bool = True  # nothing is sent, forward or backward


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def seen(*shape: int) -> torch.Tensor:
    """A mask in which every row sees something."""
    mask = torch.rand(shape) > 0.2
    mask[..., 0] = True
    return mask


def attention(**given: torch.Tensor) -> Any:
    return fusedattn.attention(**given, causal=True, return_lse=True)


def inputs(at: Any, kv_heads: int, at_keys: Any = None, grad_keys: Any = None) -> dict[str, tuple]:
    keys = at_keys or at, grad_keys or at
    return {
        "q": (normal(2, 4, 5, 8), at, at),
        "k": (normal(2, kv_heads, 6, 8), *keys),
        "v": (normal(2, kv_heads, 6, 3), *keys),
    }


def layer_norm(x: Any, weight: Any, bias: Any, **options: Any) -> Any:
    return fusedattn.layer_norm(x, weight.shape, weight, bias, **options)


def rms_norm(x: Any, weight: Any, **options: Any) -> Any:
    return fusedattn.rms_norm(x, weight.shape, weight, **options)


def cases() -> dict[str, Case]:
    lengths, weight, row = torch.tensor([6, 4], dtype=torch.int32), (normal(8), R, P), (2, 4, 8)
    affine = {"weight": weight, "bias": (normal(8), R, P)}
    by_batch = {"mask": (seen(2, 1, 5, 6), S0, None), "kv_lengths": (lengths, S0, None)}
    by_heads = {"mask": (seen(5, 6), R, None), "kv_lengths": (lengths, R, None)}
    positions = torch.randint(9, (2, 5))
    tables = {name: (normal(9, 3), R, None) for name in ("cos", "sin")}
    of_rows = {name: (normal(2, 9, 3), S0, None) for name in ("cos", "sin")}
    q, k = normal(2, 4, 5, 8), normal(2, 2, 5, 8)
    rotary, rotary_qk, add = fusedattn.apply_rotary, fusedattn.apply_rotary_qk, add_sinusoidal
    return {
        "attention, batch": Case(
            attention, [S0, S0],
            inputs(S0, 2) | by_batch | {"bias": (normal(2, 4, 1, 6), S0, S0)},
        ),
        "attention, batch, one bias": Case(
            attention, [S0, S0], inputs(S0, 2) | by_batch | {"bias": (normal(5, 6), R, P)}
        ),
        "attention, heads": Case(
            attention, [S1, S1],
            inputs(S1, 2) | by_heads | {"bias": (normal(1, 4, 5, 6), S1, S1)},
        ),
        "attention, heads, one bias": Case(
            attention, [S1, S1], inputs(S1, 2) | by_heads | {"bias": (normal(2, 1, 5, 6), R, P)}
        ),
        "attention, heads, slopes and sinks": Case(
            attention, [S1, S1],
            inputs(S1, 2) | {n: (normal(4), S0, S0) for n in ("alibi_slopes", "sinks")},
        ),
        "attention, heads on one key": Case(attention, [S1, S1], inputs(S1, 1, R, P)),
        "attention, replicas": Case(attention, [R, R], inputs(R, 2)),
        # Three heads of keys: a process would pair queries with another's keys.
        "attention, uneven groups": Case(
            attention, [R, R],
            {n: (normal(2, h, 5, 8), S1, R) for n, h in (("q", 6), ("k", 3), ("v", 3))},
            silent=False,
        ),
        "attention, packed sequences, heads": Case(
            fusedattn.attention_varlen, [S1],
            {n: (normal(9, h, 8), S1, S1) for n, h in (("q", 4), ("k", 2), ("v", 2))}
            | {f"cu_seqlens_{n}": (torch.tensor([0, 4, 4, 9]), R, None) for n in "qk"}
            | {"alibi_slopes": (normal(3, 4), S1, S1)},
        ),
        "attention, sequence": Case(
            attention, [R, R],
            {n: (x, S2, R) for n, (x, *_) in inputs(S2, 2).items()}, silent=False,
        ),
        "layer norm, batch": Case(layer_norm, [S0], {"x": (normal(*row), S0, S0)} | affine),
        "layer norm, sequence": Case(layer_norm, [S1], {"x": (normal(*row), S1, S1)} | affine),
        "layer norm, uneven": Case(layer_norm, [S0], {"x": (normal(3, 2, 8), S0, S0)} | affine),
        "layer norm of two dims": Case(
            layer_norm, [S0],
            {"x": (normal(*row), S0, S0)} | {n: (normal(4, 8), R, P) for n in affine},
        ),
        "layer norm, features": Case(
            layer_norm, [R],
            {"x": (normal(*row), S2, R)} | {n: (normal(8), S0, R) for n in affine}, silent=False,
        ),
        "rms norm, residual": Case(
            rms_norm, [S1, S1],
            {n: (normal(*row), S1, S1) for n in ("x", "residual")} | {"weight": weight},
        ),
        "softmax, batch": Case(
            fusedattn.softmax, [S0],
            {"x": (normal(2, 3, 8), S0, S0), "mask": (seen(3, 8), R, None)}
            | {"bias": (normal(2, 1, 8), S0, S0)},
        ),
        "softmax, rows": Case(
            fusedattn.softmax, [S1],
            {"x": (normal(2, 4, 8), S1, S1), "bias": (normal(2, 1, 8), R, P)},
        ),
        "softmax, another dim": Case(
            softmax_of_rows, [S2], {"x": (normal(2, 3, 8), S2, S2), "bias": (normal(8), S0, S0)}
        ),
        "softmax, causal rows": Case(
            causal_softmax, [R], {"x": (normal(3, 4, 8), S1, R)}, silent=False
        ),
        "rotary, batch": Case(
            rotary, [S0], {"x": (q, S0, S0), "positions": (positions, S0, None)} | of_rows
        ),
        "rotary, heads": Case(
            rotary, [S1], {"x": (q, S1, S1), "positions": (positions, R, None)} | tables
        ),
        "rotary, sequence": Case(
            rotary, [S2],
            {"x": (normal(2, 4, 6, 8), S2, S2), "positions": (torch.arange(6), S0, None)} | tables,
        ),
        "rotary, sequence from 0": Case(rotary, [R], {"x": (q, S2, R)} | tables, silent=False),
        "rotary of q and k": Case(
            rotary_qk, [S1, S1], {"q": (q, S1, S1), "k": (k, S1, S1)} | tables
        ),
        "rotary of q and one k": Case(
            rotary_qk, [S1, R], {"q": (q, S1, S1), "k": (k[:, :1], R, R)} | tables
        ),
        "swiglu, batch": Case(
            fusedattn.swiglu, [S0], {n: (normal(2, 3, 8), S0, S0) for n in ("gate", "up")}
        ),
        "swiglu, features": Case(
            fusedattn.swiglu, [S2], {n: (normal(2, 3, 8), S2, S2) for n in ("gate", "up")}
        ),
        "swiglu of both, sequence": Case(
            fusedattn.swiglu, [S1], {"gate": (normal(2, 4, 8), S1, S1)}
        ),
        "swiglu of both, features": Case(
            fusedattn.swiglu, [R], {"gate": (normal(2, 4, 8), S2, R)}, silent=False
        ),
        "sinusoidal, batch": Case(
            add, [S0],
            {"x": (normal(2, 5, 8), S0, S0), "positions": (positions, S0, None)},
        ),
        "sinusoidal, sequence": Case(
            add, [S1],
            {"x": (normal(2, 4, 8), S1, S1), "positions": (positions[:, :4], S1, None)},
        ),
        "sinusoidal, sequence from 0": Case(add, [R], {"x": (normal(2, 4, 8), S1, R)}, False),
    }  # fmt: skip


def add_sinusoidal(**given: torch.Tensor) -> Any:
    return fusedattn.add_sinusoidal(**given, scale=1.5)


def softmax_of_rows(**given: torch.Tensor) -> Any:
    return fusedattn.softmax(**given, dim=1)


def causal_softmax(**given: torch.Tensor) -> Any:
    return fusedattn.softmax(**given, causal=True)
