"""The cases of attention's options: their work, their grids and their inputs.

FLOPs count the pairs of a query and a key that are seen: 2·pairs·(D + Dv), forward and backward
together 3.5 times that. What the options are stands in option_rules.py.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import attention_cases
from .harness import Limits
from .option_rules import RULES, Packed, Rule, on_grid
from .versions import DTYPES

INPUT_SETS = 2


@dataclass(frozen=True)
class Case:
    """One call: q (batch, heads, seq_q, head_dim), k and v (batch, kv_heads or heads, seq_k,
    head_dim), with one option, of which `size` is the window, the length of a document, …
    """

    option: str
    batch: int
    heads: int
    seq_q: int
    seq_k: int
    head_dim: int
    dtype: str
    backward: bool = False
    size: int = 0
    kv_heads: int = 0

    alone = bound_by_bytes = False

    def __post_init__(self) -> None:
        if self.option not in RULES:
            raise ValueError(f"Case: got option={self.option!r}, expected one of {list(RULES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"Case: got dtype={self.dtype!r}, expected one of {list(DTYPES)}")
        if RULES[self.option].takes_size != (self.size > 0):
            expected = "at least 1" if RULES[self.option].takes_size else "0"
            raise ValueError(f"Case: got size={self.size} for {self.option}, expected {expected}")
        if self.kv_heads < 0 or (self.kv_heads and self.heads % self.kv_heads):
            raise ValueError(
                f"Case: got kv_heads={self.kv_heads}, expected a divisor of heads={self.heads}"
            )
        if self.seq_q != self.seq_k and self.option != "cross":
            raise ValueError(
                f"Case: got seq_q={self.seq_q} and seq_k={self.seq_k} for {self.option}, expected "
                "equal lengths"
            )

    @property
    def title(self) -> str:
        return f"{self.option} {self.size}" if self.size else self.option

    @property
    def label(self) -> str:
        """What tells the case apart from the others, for people and as a pytest id."""
        heads = f"{self.heads}/{self.kv_heads}" if self.kv_heads else f"{self.heads}"
        length = f"{self.seq_q}" if self.seq_q == self.seq_k else f"{self.seq_q}v{self.seq_k}"
        shape = f"{self.batch}x{heads}x{length}x{self.head_dim}"
        return f"{self.title} {self.dtype} {shape} {self.passes}"

    @property
    def passes(self) -> str:
        return "fwd+bwd" if self.backward else "fwd"

    @property
    def key_heads(self) -> int:
        """Heads of k and v."""
        return self.kv_heads or self.heads

    @property
    def flops(self) -> float:
        return 2.0 * _pairs(self) * 2 * self.head_dim * (3.5 if self.backward else 1.0)

    @property
    def work(self) -> float:
        """What a second of this case is counted in."""
        return self.flops

    def limit(self, limits: Limits) -> float:
        return limits.flops_per_second[self.dtype]

    @property
    def rule(self) -> Rule:
        return RULES[self.option](self)


@functools.cache
def _pairs(case: Case) -> int:
    return case.rule.pairs()


# --- the grids -----------------------------------------------------------------------------------

# Option, batch, heads, lengths of queries and keys, head dim, size, heads of the keys.
_SHAPES: tuple[tuple[str, int, int, int, int, int, int, int], ...] = (
    ("window", 1, 8, 4096, 4096, 64, 256, 0),
    ("documents", 1, 8, 4096, 4096, 64, 512, 0),
    ("prefix", 2, 8, 1024, 1024, 64, 256, 0),
    ("dense-mask", 2, 6, 1024, 1024, 64, 300, 0),
    ("padding", 4, 8, 1024, 1024, 64, 0, 0),
    ("packed", 16, 8, 512, 512, 64, 0, 0),
    ("softcap", 2, 8, 1024, 1024, 64, 0, 0),
    ("alibi", 2, 8, 1024, 1024, 64, 0, 0),
    ("sinks", 2, 8, 1024, 1024, 64, 0, 0),
    ("t5", 1, 8, 1024, 1024, 64, 0, 0),
    # Of two heads: those of eight would be past what versions may take that store all scores.
    ("t5", 1, 2, 4096, 4096, 64, 0, 0),
    ("bias", 4, 8, 512, 512, 64, 0, 0),
    ("bias", 64, 4, 128, 128, 32, 0, 0),
    ("dropout", 4, 8, 512, 512, 64, 0, 0),
    ("cross", 2, 8, 4096, 77, 40, 0, 0),
    ("grouped", 2, 8, 1024, 1024, 64, 0, 2),
)
# In bf16 what a processor without it takes long for, in PyTorch, is left to the full grid.
_FORWARD, _TRAINING, _FORWARD16, _TRAINING16 = itertools.product(("fp32", "bf16"), (False, True))
_QUICK = {
    "window": (_FORWARD, _TRAINING),
    "documents": (_FORWARD, _TRAINING),
    "prefix": (_TRAINING,),
    "dense-mask": (_FORWARD, _FORWARD16),
    "padding": (_TRAINING,),
    "packed": (_TRAINING, _FORWARD16),
    "softcap": (_FORWARD, _TRAINING),
    "alibi": (_TRAINING,),
    "sinks": (_TRAINING,),
    "t5": (_TRAINING,),
    "bias": (_TRAINING, _TRAINING16),
    "dropout": (_TRAINING,),
    "cross": (_TRAINING,),
    "grouped": (_TRAINING, _FORWARD16),
}


def full_grid(device: torch.device) -> list[Case]:
    """Every option in fp32 and bf16, forward alone and with the backward pass; on a GPU in bf16."""
    dtypes = ("bf16",) if device.type == "cuda" else ("fp32", "bf16")
    return [
        Case(option, batch, heads, seq_q, seq_k, dim, dtype, backward, size, kv_heads)
        for option, batch, heads, seq_q, seq_k, dim, size, kv_heads in _SHAPES
        for dtype, backward in itertools.product(dtypes, (False, True))
    ]


def quick_grid(device: torch.device) -> list[Case]:
    """A subset of the full grid with every option in it; on a GPU all with their gradients."""
    full = full_grid(device)
    if device.type == "cuda":
        return [case for case in full if case.backward]
    return [case for case in full if (case.dtype, case.backward) in _QUICK[case.option]]


# --- inputs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem(attention_cases.Problem):
    """A case with its input sets, each (q, k, v, what the option learns …, dout).

    `fixed` is what its rule reads beside those.
    """

    case: Case
    sets: list[tuple[Tensor, ...]]
    fixed: dict[str, Tensor] = field(default_factory=dict)

    @functools.cached_property
    def rule(self) -> Rule:
        return self.case.rule

    @functools.cached_property
    def mask(self) -> Tensor | None:
        """The dense mask, True = may attend, of four dimensions; None where all is seen."""
        if not self.rule.hides:
            return None
        return on_grid(self.rule.sees, self.fixed, *self.rule.places(self.device))

    def given(self, learned: Sequence[Tensor]) -> dict[str, Tensor]:
        """What the rule reads, with these learned inputs."""
        return {**self.fixed, **dict(zip(self.rule.learned, learned, strict=True))}

    def packed(self, x: Tensor) -> Tensor:
        """(B, H, S, D) → (total, H, D), without the padding."""
        return x.transpose(1, 2)[self._valid].contiguous()

    def padded(self, x: Tensor) -> Tensor:
        """A result (total, H, D) or (B, H, S, D) → (B, H, S, D), with zeros in the padding."""
        if x.dim() == 4:
            return x.masked_fill(~self._valid[:, None, :, None], 0.0)
        whole = x.new_zeros(*self._valid.shape, *x.shape[1:])
        whole[self._valid] = x
        return whole.transpose(1, 2)

    @property
    def _valid(self) -> Tensor:
        if not isinstance(self.rule, Packed):
            raise TypeError(f"Problem: got {self.case.option}, expected packed sequences")
        return self.rule.valid(self.fixed)


def make_problem(
    case: Case, device: torch.device, seed: int, score_bytes: float = 2**30
) -> Problem:
    """The case with fresh normal random inputs; the same seed gives the same inputs."""
    generator = torch.Generator(device).manual_seed(seed)
    rule = case.rule
    fixed = {name: x.to(device) for name, x in rule.fixed().items()}

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(DTYPES[case.dtype])

    def draw() -> tuple[Tensor, ...]:
        keys = (case.batch, case.key_heads, case.seq_k, case.head_dim)
        queries = (case.batch, case.heads, case.seq_q, case.head_dim)
        q, k, v, dout = random(*queries), random(*keys), random(*keys), random(*queries)
        if isinstance(rule, Packed):
            dout = dout.masked_fill(~rule.valid(fixed)[:, None, :, None], 0.0)
        return q, k, v, *rule.draw(random).values(), dout

    return Problem(case, [draw() for _ in range(INPUT_SETS)], score_bytes, fixed=fixed)
