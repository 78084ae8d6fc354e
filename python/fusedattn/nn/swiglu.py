"""The gated feed-forward network as a module, over the fused op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..ops._checks import check_tensor
from ..ops.swiglu import configure, swiglu
from ._inputs import check_dtype, check_sizes, recorded


class SwiGLU(nn.Module):
    """down_proj(act(gate_proj(x)) ∘ up_proj(x)): a gated feed-forward network (Shazeer 2020).

    The three `nn.Linear`s have the names that they have in Hugging Face's Llama, Mistral, Qwen and
    Gemma, whose `mlp` loads as it is: gate_proj.weight and up_proj.weight (hidden_dim, dim),
    down_proj.weight (dim, hidden_dim), and a bias of each where there are some. In other
    checkpoints they are w1, w3 and w2.

    Args:
        dim: features of x and of the output.
        hidden_dim: features between; 8/3 of `dim`, say, so that the parameters are those of two
            layers with 4·`dim` between them.
        bias: whether the layers have one.
        activation, backend: as in `fusedattn.swiglu`.
        device, dtype: of the parameters.

    >>> import torch, fusedattn
    >>> fusedattn.nn.SwiGLU(64, 172)(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        bias: bool = False,
        activation: str = "silu",
        *,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("SwiGLU", dim=dim, hidden_dim=hidden_dim)
        check_dtype("SwiGLU", dtype)
        configure("SwiGLU", activation)
        self.dim, self.activation, self.backend = dim, activation, backend
        where: Any = {"device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(dim, hidden_dim, bias, **where)
        self.up_proj = nn.Linear(dim, hidden_dim, bias, **where)
        self.down_proj = nn.Linear(hidden_dim, dim, bias, **where)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"activation={self.activation!r}"

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) from x (…, dim)."""
        if isinstance(x, Proxy):
            call = recorded(self, x)
            if call is not None:
                return call
        shape = check_tensor("SwiGLU", "x", x)
        if not shape or shape[-1] != self.dim:
            raise ValueError(f"SwiGLU: got x of shape {tuple(shape)}, expected (…, {self.dim})")
        hidden = swiglu(
            self.gate_proj(x), self.up_proj(x), activation=self.activation, backend=self.backend
        )
        out: Tensor = self.down_proj(hidden)
        return out
