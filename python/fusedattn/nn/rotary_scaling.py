"""The frequencies of a rotary embedding under the scalings that Hugging Face's models name.

Everything is fp64. `RotaryScaling(dim, base, scaling, max_position_embeddings)` reads a dict like
`config.rope_parameters` (or the older `rope_scaling`); `frequencies(length)` gives the R/2 angles
per position for a sequence of that length, `attention_factor` what cos and sin are multiplied by.

    linear    f / factor
    dynamic   base · (factor · L/M − (factor − 1))^(R/(R−2)) beyond M positions (NTK-aware)
    yarn      f / factor where a pair turns less than beta_slow times within the original length,
              f where it turns more than beta_fast times, a ramp between (Peng et al. 2023)
    llama3    the same by wavelength, with low_freq_factor and high_freq_factor
    longrope  f / short_factor, and f / long_factor beyond the original length (Ding et al. 2024)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops._checks import check_number

_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_ABOVE_0 = (
    "factor", "rope_theta", "original_max_position_embeddings", "low_freq_factor",
    "high_freq_factor", "beta_fast", "beta_slow", "attention_factor",
)  # fmt: skip


class RotaryScaling:
    """One scaling, checked: `frequencies(length)`, `attention_factor`, `limit`.

    limit is the length beyond which the frequencies are others, None where they never change.

    Raises:
        ValueError: a type that is not known, a missing or impossible entry.
    """

    def __init__(
        self, dim: int, base: float, scaling: dict[str, Any] | None, max_position_embeddings: int
    ) -> None:
        if not isinstance(scaling, (Mapping, type(None))):
            raise TypeError(
                f"RotaryEmbedding: got scaling of type {type(scaling).__name__}, expected a dict"
            )
        given = dict(scaling or {})
        self.kind = given.get("rope_type", given.get("type", "default"))
        if self.kind not in _REQUIRED:
            raise ValueError(
                f"RotaryEmbedding: got scaling of type {self.kind!r}, expected one of "
                f"{', '.join(map(repr, _REQUIRED))}"
            )
        missing = [key for key in _REQUIRED[self.kind] if given.get(key) is None]
        if missing:
            raise ValueError(
                f"RotaryEmbedding: got scaling {self.kind!r} without {', '.join(missing)}"
            )
        for key in (key for key in _ABOVE_0 if given.get(key) is not None):
            check_number("RotaryEmbedding", f"scaling[{key!r}]", given[key])
            if not given[key] > 0:
                raise ValueError(
                    f"RotaryEmbedding: got scaling[{key!r}]={given[key]}, expected one above 0"
                )
        if given.get("partial_rotary_factor", 1.0) not in (None, 1.0):
            raise ValueError(
                f"RotaryEmbedding: got partial_rotary_factor={given['partial_rotary_factor']}, "
                "expected dim to be the rotary dim already"
            )
        self.dim, self.options = dim, given
        self.base = float(given.get("rope_theta") or base)
        self.max_positions = max_position_embeddings
        self.original = given.get("original_max_position_embeddings") or max_position_embeddings
        # DeepSeek and Phi-3 leave the factor to the ratio of the two lengths.
        self.factor = float(given.get("factor") or max_position_embeddings / self.original)
        if self.kind == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
            raise ValueError(
                f"RotaryEmbedding: got low_freq_factor={given['low_freq_factor']} and "
                f"high_freq_factor={given['high_freq_factor']}, expected the first to be smaller"
            )
        if self.kind == "dynamic" and dim < 4:
            raise ValueError(f"RotaryEmbedding: got dim={dim}, expected at least 4 for 'dynamic'")
        for name in _REQUIRED["longrope"] if self.kind == "longrope" else ():
            if not isinstance(given[name], Sequence):
                got = type(given[name]).__name__
                raise TypeError(f"RotaryEmbedding: got {name} of type {got}, expected a list")
            if len(given[name]) != dim // 2:
                raise ValueError(
                    f"RotaryEmbedding: got {name} of {len(given[name])} numbers, "
                    f"expected {dim // 2}"
                )
        self.limit = {"dynamic": self.max_positions, "longrope": self.original}.get(self.kind)
        self.attention_factor = self._attention_factor()

    def _attention_factor(self) -> float:
        given, factor = self.options, self.factor
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if given.get("attention_factor") is not None:
            return float(given["attention_factor"])
        if factor <= 1.0:
            return 1.0
        if self.kind == "longrope":
            return math.sqrt(1.0 + math.log(factor) / math.log(self.original))
        above, below = given.get("mscale"), given.get("mscale_all_dim")
        if above and below:
            return (0.1 * above * math.log(factor) + 1.0) / (0.1 * below * math.log(factor) + 1.0)
        return 0.1 * math.log(factor) + 1.0

    def frequencies(self, length: int) -> Tensor:
        """Angles per position of the R/2 pairs, fp64, on the CPU."""
        base = self.base
        if self.kind == "dynamic" and length > self.max_positions:
            stretch = self.factor * length / self.max_positions - (self.factor - 1.0)
            base = base * stretch ** (self.dim / (self.dim - 2))
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float64, device="cpu") / self.dim
        plain = base**-exponent
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "yarn":
            kept = 1.0 - self._yarn_ramp()
            return plain * kept + plain / self.factor * (1.0 - kept)
        if self.kind == "llama3":
            return self._llama3(plain)
        if self.kind == "longrope":
            name = "long_factor" if length > self.original else "short_factor"
            return plain / torch.tensor(self.options[name], dtype=torch.float64, device="cpu")
        return plain

    def _yarn_ramp(self) -> Tensor:
        """0 for the pairs that keep their frequency, 1 for those that are interpolated."""

        def pair_that_turns(times: float) -> float:
            turns = self.original / (times * 2.0 * math.pi)
            return self.dim * math.log(turns) / (2.0 * math.log(self.base))

        low = pair_that_turns(self.options.get("beta_fast") or 32)
        high = pair_that_turns(self.options.get("beta_slow") or 1)
        if self.options.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001
        pair = torch.arange(self.dim // 2, dtype=torch.float64, device="cpu")
        return ((pair - low) / (high - low)).clamp(0.0, 1.0)

    def _llama3(self, plain: Tensor) -> Tensor:
        low, high = self.options["low_freq_factor"], self.options["high_freq_factor"]
        turns = self.original * plain / (2.0 * math.pi)  # within the original length
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return plain * kept + plain / self.factor * (1.0 - kept)
