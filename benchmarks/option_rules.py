"""The options of attention, each written once as a rule on pairs of a query and a key.

`sees` and `bias` are elementwise, with the arguments of FlexAttention's `mask_mod` and `score_mod`.
From them come the dense masks and biases of eager and SDPA, FlexAttention's functions, the fp64
reference and the count of FLOPs, so that no version computes something else. `ours` says the same
in the arguments of fusedattn, and is held to the reference as all others are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import fusedattn
import torch
import torch.nn.functional as F
from torch import Tensor

Given = Mapping[str, Tensor]
ROWS = 1024  # queries at a time, where all pairs are looked at


class Rule:
    """One option, for one case; without any: attention as it is.

    hides, adds: whether `sees` and `bias` are there.
    learned: inputs that have a gradient → which of their dimensions is that of the heads.
    sinks: one of them is a logit of each head. packed: q, k and v hold sequences of `lengths`.
    """

    hides = adds = sinks = packed = False
    softcap: float | None = None
    dropout_p = 0.0
    learned: ClassVar[Mapping[str, int]] = {}
    takes_size = False

    def __init__(self, case: Any) -> None:
        self.case = case

    def fixed(self) -> dict[str, Tensor]:
        """What the rule reads beside the inputs; the same in every input set."""
        return {}

    def draw(self, random: Callable[..., Tensor]) -> dict[str, Tensor]:
        """One set of the learned inputs."""
        return {}

    def sees(self, x: Given, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Whether query i sees key j, in head h of batch entry b."""
        raise NotImplementedError

    def bias(self, x: Given, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """What is added to the score of query i and key j."""
        raise NotImplementedError

    def written_out(self, x: Given) -> Tensor:
        """`bias` of all pairs, the way that a model makes it; differentiable."""
        learned = x[next(iter(self.learned))]
        return on_grid(self.bias, x, *self.places(learned.device))

    def ours(self, x: Given) -> dict[str, Any]:
        """The keyword arguments of fusedattn.attention, or of attention_varlen where packed.

        x has the dense mask too, as "mask", where there is one.
        """
        return {}

    def places(self, device: torch.device | None = None) -> list[Tensor]:
        """The numbers of all batch entries, heads, queries and keys."""
        case = self.case
        counts = (case.batch, case.heads, case.seq_q, case.seq_k)
        return [torch.arange(n, device=device) for n in counts]

    def pairs(self) -> int:
        """How many pairs of a query and a key are seen, in all heads and batch entries."""
        case = self.case
        of_head = case.seq_q * case.seq_k
        if not self.hides:
            return case.batch * case.heads * of_head
        x, total = self.fixed(), 0.0
        b, h, i, j = self.places()
        for rows in i.split(ROWS):
            seen = on_grid(self.sees, x, b, h, rows, j)
            share = seen.sum().item() / seen.numel()
            total += share * case.batch * case.heads * len(rows) * case.seq_k
        return round(total)


def on_grid(
    rule: Callable[..., Tensor], x: Given, b: Tensor, h: Tensor, i: Tensor, j: Tensor
) -> Tensor:
    """The rule at all these places: of four dimensions, 1 where it does not depend on one."""
    found = rule(x, b[:, None, None, None], h[:, None, None], i[:, None], j)
    return found[(None,) * (4 - found.dim())]


# --- masks ---------------------------------------------------------------------------------------


class Causal(Rule):
    """A query sees itself and the keys before it; the options below are used with it."""

    hides = True

    def sees(self, x: Given, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def ours(self, x: Given) -> dict[str, Any]:
        return {"causal": True}


class Window(Causal):
    """Causal, and of `size` keys at most: itself and those just before it (Mistral)."""

    takes_size = True

    def sees(self, x: Given, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < self.case.size)

    def ours(self, x: Given) -> dict[str, Any]:
        return {"causal": True, "window": (self.case.size - 1, 0)}


class Documents(Rule):
    """Documents of `size` tokens one after the other; each sees itself."""

    hides = takes_size = True

    def fixed(self) -> dict[str, Tensor]:
        return {"ids": torch.arange(self.case.seq_q) // self.case.size}

    def sees(self, x: Given, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return x["ids"][i] == x["ids"][j]

    def ours(self, x: Given) -> dict[str, Any]:
        return {"mask": fusedattn.masks.documents(x["ids"])}


class Prefix(Rule):
    """Causal behind a prefix of about `size` keys, which all queries see (T5's prefix-LM)."""

    hides = takes_size = True

    def fixed(self) -> dict[str, Tensor]:
        return {"lengths": self.case.size - torch.arange(self.case.batch)}

    def sees(self, x: Given, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j < x["lengths"][b]) | (j <= i)

    def ours(self, x: Given) -> dict[str, Any]:
        return {"mask": fusedattn.masks.prefix(x["lengths"])}


class DenseMask(Rule):
    """A dense bool mask as Hugging Face makes it: causal, each batch entry `size` tokens shorter
    than the one before."""

    hides = takes_size = True

    def fixed(self) -> dict[str, Tensor]:
        lengths = self.case.seq_k - self.case.size * torch.arange(self.case.batch)
        return {"lengths": lengths.clamp(min=1)}

    def sees(self, x: Given, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j < x["lengths"][b])

    def ours(self, x: Given) -> dict[str, Any]:
        return {"mask": x["mask"]}


class Padding(Rule):
    """Keys of a padded batch, the shortest entry a quarter as long as the longest."""

    hides = True

    def fixed(self) -> dict[str, Tensor]:
        longest = self.case.seq_k
        lengths = torch.linspace(longest, max(1, longest // 4), self.case.batch)
        return {"lengths": lengths.round().long()}

    def sees(self, x: Given, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < x["lengths"][b]

    def ours(self, x: Given) -> dict[str, Any]:
        return {"kv_lengths": x["lengths"]}


class Packed(Padding):
    """Sequences of random lengths: ours packed one after the other, the others padded.

    What stands in the padding is nobody's result; its gradient is 0.
    """

    packed = True

    def fixed(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(1, self.case.seq_q + 1, (self.case.batch,), generator=generator)
        offsets = F.pad(drawn.cumsum(0), (1, 0)).int()
        return {"lengths": drawn, "offsets": offsets}

    def ours(self, x: Given) -> dict[str, Any]:
        return {"cu_seqlens_q": x["offsets"], "cu_seqlens_k": x["offsets"]}

    def pairs(self) -> int:
        return self.case.heads * int(self.fixed()["lengths"].square().sum())

    def valid(self, x: Given) -> Tensor:
        """(B, S): where there is a token."""
        return torch.arange(self.case.seq_q, device=x["lengths"].device) < x["lengths"][:, None]


# --- scores --------------------------------------------------------------------------------------


class Softcap(Causal):
    """c · tanh(s / c), causal as in Gemma 2, with a c that shows at random inputs."""

    softcap = 5.0

    def ours(self, x: Given) -> dict[str, Any]:
        return {"causal": True, "softcap": self.softcap}


class Sinks(Causal):
    """A learned logit for each head that takes probability and gives no value (gpt-oss)."""

    sinks = True
    learned: ClassVar[Mapping[str, int]] = {"sinks": 0}

    def draw(self, random: Callable[..., Tensor]) -> dict[str, Tensor]:
        return {"sinks": random(self.case.heads)}

    def ours(self, x: Given) -> dict[str, Any]:
        return {"causal": True, "sinks": x["sinks"]}


class Alibi(Causal):
    """−slope · distance, causal, the slopes learned (Press et al. 2022)."""

    adds = True
    learned: ClassVar[Mapping[str, int]] = {"slopes": 0}

    def draw(self, random: Callable[..., Tensor]) -> dict[str, Tensor]:
        noise = random(self.case.heads).float()
        powers = torch.arange(1, self.case.heads + 1, device=noise.device) / self.case.heads
        return {"slopes": 2.0 ** (-8.0 * powers) * (1 + 0.1 * noise)}

    def bias(self, x: Given, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return -x["slopes"][h] * (i - j).abs()

    def ours(self, x: Given) -> dict[str, Any]:
        return {"causal": True, "alibi_slopes": x["slopes"]}


class DenseBias(Rule):
    """A tensor, learned and shared by the batch."""

    adds = True
    learned: ClassVar[Mapping[str, int]] = {"bias": 1}

    def draw(self, random: Callable[..., Tensor]) -> dict[str, Tensor]:
        return {"bias": random(1, self.case.heads, self.case.seq_q, self.case.seq_k)}

    def bias(self, x: Given, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return x["bias"][0, h, i, j]

    def written_out(self, x: Given) -> Tensor:
        return x["bias"]

    def ours(self, x: Given) -> dict[str, Any]:
        return {"bias": x["bias"]}


class T5(Rule):
    """T5's learned bias of 32 buckets of distances (Raffel et al. 2020), bidirectional."""

    adds = True
    learned: ClassVar[Mapping[str, int]] = {"table": 1}
    buckets, max_distance = 32, 128

    def fixed(self) -> dict[str, Tensor]:
        """The bucket of each distance j − i, from 1 − Sq on, and that of each pair."""
        i, j = torch.arange(self.case.seq_q)[:, None], torch.arange(self.case.seq_k)
        of_distance = self._bucket(torch.arange(1 - self.case.seq_q, self.case.seq_k))
        return {"buckets": of_distance, "of_pairs": of_distance.int()[j - i + len(i) - 1]}

    def _bucket(self, step: Tensor) -> Tensor:
        half, exact = self.buckets // 2, self.buckets // 4
        far = step.abs().clamp(min=1)
        ratio = torch.log(far.float() / exact) / math.log(self.max_distance / exact)
        wide = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
        return (step > 0) * half + torch.where(far < exact, step.abs(), wide)

    def draw(self, random: Callable[..., Tensor]) -> dict[str, Tensor]:
        return {"table": random(self.buckets, self.case.heads)}

    def bias(self, x: Given, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return x["table"][x["buckets"][j - i + self.case.seq_q - 1], h]

    def written_out(self, x: Given) -> Tensor:
        return F.embedding(x["of_pairs"], x["table"]).permute(2, 0, 1)[None]

    def ours(self, x: Given) -> dict[str, Any]:
        table, distance = x["table"], self.max_distance
        return {"bias": fusedattn.biases.t5(table, bidirectional=True, max_distance=distance)}


class Dropout(Rule):
    """Of the weights, one in ten."""

    dropout_p = 0.1

    def ours(self, x: Given) -> dict[str, Any]:
        return {"dropout_p": self.dropout_p}


# In the order in which they are reported.
RULES: dict[str, type[Rule]] = {
    "window": Window,
    "documents": Documents,
    "prefix": Prefix,
    "dense-mask": DenseMask,
    "padding": Padding,
    "packed": Packed,
    "softcap": Softcap,
    "alibi": Alibi,
    "sinks": Sinks,
    "t5": T5,
    "bias": DenseBias,
    "dropout": Dropout,
    "cross": Rule,
    "grouped": Rule,
}
