"""The oracle of positions: rotary embedding and sinusoidal encoding."""

from __future__ import annotations

import torch
from torch import Tensor

# --- rotary embedding -----------------------------------------------------------------------------


def table_rows(
    table: Tensor, length: int, positions: Tensor | None, offset: int | Tensor
) -> Tensor:
    """The rows of a table (T, N) or (B, T, N) at `length` positions: (S, N) or (B, S, N).

    A position without a row gives NaN.
    """
    rows = torch.arange(length, device=table.device) if positions is None else positions.long()
    rows = rows + offset
    absent = (rows < 0) | (rows >= table.shape[-2])
    rows = rows.clamp(0, table.shape[-2] - 1)
    if table.dim() == 2:
        found = table[rows]
    else:
        rows = (
            rows.expand(table.shape[0], length) if table.shape[0] > 1 else rows.reshape(-1, length)
        )
        index = torch.arange(table.shape[0], device=table.device)[:, None]
        found = table[index.expand(rows.shape[0], 1), rows]
    return found.masked_fill(absent[..., None], float("nan"))


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
) -> Tensor:
    """Pairs (a, b) of x (…, S, D) become (a·cos − b·sin, b·cos + a·sin), in the dtype of x.

    cos, sin (T, R/2) or (B, T, R/2); positions (S,) or (B, S), B the first dimension of x. The
    features from R on are unchanged.
    """
    cos, sin = (table_rows(t, x.shape[-2], positions, offset).to(x.dtype) for t in (cos, sin))
    if cos.dim() == 3:
        between = (1,) * (x.dim() - 3)
        cos, sin = (t.reshape(t.shape[0], *between, *t.shape[1:]) for t in (cos, sin))
        cos, sin = (t[0] if x.dim() == 2 else t for t in (cos, sin))
    half = cos.shape[-1]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = rotated[..., :half], rotated[..., half:]
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((out, rest), dim=-1)


# --- sinusoidal positions -------------------------------------------------------------------------


def sinusoidal_positions(
    length: int,
    width: int,
    *,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    base: float = 10000.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """sin(p / base^(2i/W)) in feature 2i and cos in feature 2i + 1; (S, W) or (B, S, W), fp64."""
    p = torch.arange(length, device=device) if positions is None else positions.long()
    i = torch.arange((width + 1) // 2, dtype=torch.float64, device=p.device)
    phase = (p + offset).double()[..., None] * base ** (-2.0 * i / width)
    return torch.stack((phase.sin(), phase.cos()), dim=-1).flatten(-2)[..., :width]


def add_sinusoidal(
    x: Tensor,
    *,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    base: float = 10000.0,
    scale: float = 1.0,
) -> Tensor:
    """scale · x + sinusoidal positions (Vaswani et al. 2017, §3.5), in the dtype of x (…, S, W).

    The phase is fp64 whatever the dtype; the encoding is rounded to it before the sum.
    """
    encoding = sinusoidal_positions(
        x.shape[-2], x.shape[-1], positions=positions, offset=offset, base=base, device=x.device
    )
    return scale * x + encoding.to(x.dtype)
