"""Export to ONNX by both of torch's exporters: standard ops, held to ONNX Runtime."""

from __future__ import annotations

import logging
from typing import Any

import fusedattn
import pytest
import torch
from ops import OPS, outputs
from test_library_ops import Call

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.parametrize(
        "dynamo", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["torchscript", "dynamo"]
    ),
]


def exported(module: torch.nn.Module, tensors: dict[str, torch.Tensor], path: Any, **options: Any):
    """What ONNX Runtime computes of named inputs with the exported module."""
    logging.disable(logging.CRITICAL)
    try:
        torch.onnx.export(
            module.eval(), tuple(tensors.values()), path, input_names=list(tensors), verbose=False,
            **options,
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}  # standard ops alone
    session = runtime.InferenceSession(path)
    return lambda given: session.run(None, {name: x.numpy() for name, x in given.items()})


def check(found: list[Any], want: Any) -> None:
    for got, expected in zip(found, outputs(want), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("op", OPS)
def test_an_op(op, dynamo, tmp_path):
    tensors = OPS[op].tensors(torch.float32)
    program = exported(Call(op), tensors, tmp_path / "op.onnx", dynamo=dynamo)
    given = OPS[op].tensors(torch.float32)
    check(program(given), Call(op)(*given.values()))


class Block(torch.nn.Module):
    """Modules as a transformer has them, causal, with a row that sees nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = fusedattn.nn.LayerNorm(8), fusedattn.nn.RMSNorm(8)
        self.attention = fusedattn.nn.MultiheadAttention(8, 2, batch_first=True)
        self.rotary = fusedattn.nn.RotaryEmbedding(4)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        y = self.attention(y, y, y, key_padding_mask=padding, need_weights=False)[0]
        q = self.scale(x + y).reshape(*x.shape[:-1], 2, 4).transpose(1, 2)
        q, k = self.rotary(q, q)
        return fusedattn.attention(q, k, q, causal=True)


def test_modules_at_other_lengths(dynamo, tmp_path):
    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        padding = torch.zeros(batch, length, dtype=torch.bool)
        padding[0] = True
        return {"x": torch.randn(batch, length, 8), "padding": padding}

    module = Block()
    dims = {0: "batch", 1: "length"}
    dynamic = {"x": dims, "padding": dims}
    options = {"dynamic_shapes": dynamic} if dynamo else {"dynamic_axes": dynamic}
    program = exported(module, inputs(2, 5), tmp_path / "m.onnx", dynamo=dynamo, **options)
    for given in (inputs(2, 5), inputs(3, 9)):
        with torch.no_grad():
            check(program(given), module(**given))
