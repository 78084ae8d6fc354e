"""Positions as modules: rotary embedding, sinusoidal and learned encodings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from ..ops._checks import check_number, check_probability
from ..ops._library import plain
from ..ops.rotary import apply_rotary_qk
from ..ops.rotary_config import validate_input, validate_positions
from ..ops.sinusoidal import add_sinusoidal
from ._inputs import check_dtype, check_sizes, recorded
from .rotary_scaling import RotaryScaling

Tables = tuple[Tensor, Tensor]


def alibi_slopes(num_heads: int) -> Tensor:
    """The slopes of `fusedattn.attention(alibi_slopes=…)` in Press et al. 2022, (H,) float64.

    2^(−8 h / H) for h = 1 … H; where H is no power of two, those of the next lower one, then every
    other one of twice that.

    >>> from fusedattn.nn import alibi_slopes
    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    check_sizes("alibi_slopes", num_heads=num_heads)
    whole = 2 ** (num_heads.bit_length() - 1)
    steps = torch.arange(1, whole + 1, dtype=torch.float64)
    between = 2 * torch.arange(num_heads - whole, dtype=torch.float64) + 1
    return torch.exp2(torch.cat([-8 / whole * steps, -4 / whole * between]))


class RotaryEmbedding(torch.nn.Module):
    """Rotates queries and keys by the angles of their positions (Su et al. 2021).

    The tables come from fp64 phases and are float32 (float64 for float64 queries), whatever the
    module is cast to. They are no part of the state: a `state_dict` is empty, a module made on the
    meta device is complete, and the tables follow the tensors they meet. They are made on first
    use for `max_position_embeddings` and grow on demand.

    Where positions are tensors on a GPU or under `torch.compile`, nothing waits for their values:
    the angles of just these positions are computed. "dynamic" and "longrope", whose frequencies
    depend on the greatest position, must wait. Their frequencies are those of the call's own
    length, whatever came before.

    Args:
        dim: R, even: how many features of a head are rotated, the head dim or less.
        base: of the frequencies base^(−2i/R).
        scaling: a dict like Hugging Face's `rope_parameters`, with "rope_type" "default", "linear",
            "dynamic", "yarn", "llama3" or "longrope" and its entries; see `rotary_scaling`.
        max_position_embeddings: the length that "dynamic" starts from, the original length where
            the dict names none, and the tables' first length.
        interleaved: pairs are features (2i, 2i + 1), else (i, i + R/2).
        backend: as in `fusedattn.apply_rotary`.

    Raises:
        TypeError: an option of another type.
        ValueError: dim that is odd or not positive, or a scaling that is not understood.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        scaling: dict[str, Any] | None = None,
        *,
        max_position_embeddings: int = 2048,
        interleaved: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_sizes("RotaryEmbedding", dim=dim, max_position_embeddings=max_position_embeddings)
        if dim % 2 != 0:
            raise ValueError(f"RotaryEmbedding: got dim={dim}, expected an even number above 0")
        check_number("RotaryEmbedding", "base", base)
        if not base > 0:
            raise ValueError(f"RotaryEmbedding: got base={base}, expected a number above 0")
        self.dim, self.base, self.interleaved, self.backend = dim, base, interleaved, backend
        self.max_position_embeddings = max_position_embeddings
        self.scaling = RotaryScaling(dim, base, scaling, max_position_embeddings)
        self._tables: dict[Any, Tables] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_tables": {}}

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"{self.dim}, base={self.base}, scaling={self.scaling.kind!r}"

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        *,
        positions: Tensor | None = None,
        offset: int | Tensor = 0,
    ) -> tuple[Tensor, Tensor]:
        """(q, k) rotated: (…, S, D) each; positions and offset as in `fusedattn.apply_rotary`."""
        if isinstance(q, Proxy):
            call = recorded(self, q, k, positions=positions, offset=offset)
            if call is not None:
                return call
        for name, x in (("q", q), ("k", k)):
            validate_input("RotaryEmbedding", name, x)
        cos, sin, rows, start = self._lookup(q, positions, offset)
        return apply_rotary_qk(
            q, k, cos, sin, interleaved=self.interleaved, positions=rows, offset=start,
            backend=self.backend,
        )  # fmt: skip

    def _lookup(
        self, q: Tensor, positions: Tensor | None, offset: int | Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, int | Tensor]:
        """cos and sin, and the positions and the offset at which to read them."""
        if positions is not None or type(offset) is not int:
            validate_positions("RotaryEmbedding", q, positions, offset)
        length, limit = q.shape[-2], self.scaling.limit
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        given = [x for x in (positions, offset) if isinstance(x, Tensor)]
        known = all(x.is_cpu and plain(x) for x in given)
        if known or limit is not None:
            last = length - 1 if positions is None else int(positions.max()) if length else -1
            total = last + 1 + (int(offset) if isinstance(offset, Tensor) else offset)
            beyond = limit is not None and total > limit
            if known and not (beyond and self.scaling.kind == "dynamic"):
                cos, sin = self._table(total, beyond, q.device, dtype)
                return cos, sin, positions, offset
        else:
            total = 0
        own = torch.arange(length, device=q.device) if positions is None else positions
        return *self._angles(own + offset, total, q.device, dtype), None, 0

    def _angles(self, rows: Tensor, total: int, device: Any, dtype: torch.dtype) -> Tables:
        """cos and sin at the positions `rows`, for a sequence of `total`: (…, S, R/2)."""
        frequencies = self.scaling.frequencies(total).to(device)
        phase = rows.to(device, torch.float64)[..., None] * frequencies
        factor = self.scaling.attention_factor
        return (phase.cos() * factor).to(dtype), (phase.sin() * factor).to(dtype)

    def _table(self, total: int, beyond: bool, device: Any, dtype: torch.dtype) -> Tables:
        """Tables of at least `total` rows."""
        key = (device, dtype, beyond)
        found = self._tables.get(key)
        if found is not None and found[0].shape[0] >= total:
            return found
        if torch.compiler.is_compiling() or device.type == "meta":
            return self._angles(torch.arange(total, device=device), total, device, dtype)
        rows = max(total, self.max_position_embeddings, 2 * found[0].shape[0] if found else 0)
        # An inference tensor could not be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad():
            made = self._angles(torch.arange(rows, device="cpu"), total, "cpu", dtype)
            self._tables[key] = (made[0].to(device), made[1].to(device))
        return self._tables[key]


class SinusoidalPositionalEncoding(torch.nn.Module):
    """scale · x + sinusoidal positions, then dropout (Vaswani et al. 2017, §3.5).

    It has no table and no state: any length and position will do.

    Args:
        scale: multiplies x; √W in the original transformer.
        base: the longest wavelength is 2π·base, nearly.
        dropout: probability of dropping a feature of the sum while training, in [0, 1].
        backend: as in `fusedattn.add_sinusoidal`.
    """

    def __init__(
        self,
        *,
        scale: float = 1.0,
        base: float = 10000.0,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_probability("SinusoidalPositionalEncoding", "dropout", dropout)
        self.scale, self.base, self.dropout, self.backend = scale, base, dropout, backend

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"scale={self.scale}, base={self.base}, dropout={self.dropout}"

    def forward(
        self, x: Tensor, *, positions: Tensor | None = None, offset: int | Tensor = 0
    ) -> Tensor:
        """x (…, S, W); positions and offset as in `fusedattn.add_sinusoidal`."""
        if isinstance(x, Proxy):
            call = recorded(self, x, positions=positions, offset=offset)
            if call is not None:
                return call
        out = add_sinusoidal(
            x, positions=positions, offset=offset, base=self.base, scale=self.scale,
            backend=self.backend,
        )  # fmt: skip
        return F.dropout(out, self.dropout, self.training) if self.dropout else out


class LearnedPositionalEncoding(torch.nn.Module):
    """x + a learned vector per position, then dropout. The weight is that of an `nn.Embedding`.

    Args:
        max_length: positions that have a vector.
        width: W, features of x.
        dropout: probability of dropping a feature of the sum while training, in [0, 1].
        device, dtype: of the weight.
    """

    def __init__(
        self,
        max_length: int,
        width: int,
        dropout: float = 0.0,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("LearnedPositionalEncoding", max_length=max_length, width=width)
        check_probability("LearnedPositionalEncoding", "dropout", dropout)
        check_dtype("LearnedPositionalEncoding", dtype)
        self.dropout = dropout
        self.weight = torch.nn.Parameter(torch.empty(max_length, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation 0.02, as GPT-2 and BERT start."""
        torch.nn.init.normal_(self.weight, std=0.02)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}, dropout={self.dropout}"

    def forward(self, x: Tensor, *, positions: Tensor | None = None, offset: int = 0) -> Tensor:
        """x (…, S, W); positions (S,) or what broadcasts to x without W, 0 to S − 1 by
        default.

        Raises:
            TypeError: x not floating point, positions or an offset that are no integers.
            ValueError: shapes that do not fit, or a position without a vector where that is known
                (a GPU is not waited for).
        """
        if isinstance(x, Proxy):
            call = recorded(self, x, positions=positions, offset=offset)
            if call is not None:
                return call
        weight = self.weight
        _check_learned(weight, x, positions, offset)
        if positions is None:
            encoding = weight[offset : offset + x.shape[-2]]
        else:
            encoding = F.embedding(positions + offset, weight)
        out = x + encoding.to(x.dtype)
        return F.dropout(out, self.dropout, self.training) if self.dropout else out


def _check_learned(weight: Tensor, x: Tensor, positions: Tensor | None, offset: int) -> None:
    name, (rows, width), device = "LearnedPositionalEncoding", weight.shape, weight.device
    validate_input(name, "x", x)
    if x.device != device or x.layout is not torch.strided:
        raise ValueError(
            f"{name}: got x on {x.device}, {x.layout}, expected a dense tensor on {device}"
        )
    if x.shape[-1] != width:
        raise ValueError(f"{name}: got x of shape {tuple(x.shape)}, expected (…, S, {width})")
    if not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"{name}: got offset of type {type(offset).__name__}, expected an int")
    length = x.shape[-2]
    lowest, highest = offset, offset + length - 1
    if positions is not None:
        if not isinstance(positions, Tensor) or positions.dtype not in (torch.int32, torch.int64):
            got = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
            raise TypeError(f"{name}: got positions of type {got}, expected int32 or int64")
        shape, of_x = positions.shape, x.shape[:-1]
        # Aligned at the last: the lengths are the same, further sizes those of x or 1.
        sizes = list(zip(reversed(shape), reversed(of_x), strict=False))
        fits = 0 < len(shape) <= len(of_x) and all(n in (1, size) for n, size in sizes[1:])
        if not fits or shape[-1] != length or positions.device != device:
            raise ValueError(
                f"{name}: got positions of shape {tuple(shape)} on {positions.device}, "
                f"expected ({length},) or what broadcasts to {tuple(of_x)}, on {device}"
            )
        lowest, highest = 0, 0
        if positions.is_cpu and plain(positions) and positions.numel():
            lowest, highest = (int(p) + offset for p in torch.aminmax(positions))
    if length and (lowest < 0 or highest >= rows):
        raise ValueError(f"{name}: got positions {lowest} to {highest}, expected 0 to {rows - 1}")
