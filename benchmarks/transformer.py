"""The reference transformers trained side by side: same seed, same batches, other ops.

The text is the Python manual's own (`pydoc_data.topics`), byte by byte. The versions take turns
step by step on the same batch, so their speeds are ratios in one process, and their losses differ
only by rounding.
"""

from __future__ import annotations

import pydoc_data.topics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import fusedattn
import torch
import torch.nn.functional as F
from fusedattn.reference import transformer
from fusedattn.reference.generation import Remembering, generate
from fusedattn.reference.transformer import BEGIN, END, MASK, PAD, Ops, TransformerConfig
from torch import Tensor, nn

from .harness import PeakMemory, Timing, clock_for

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """How large and how long: `length` tokens per sequence, at most `steps` or `seconds`."""

    width: int = 128
    heads: int = 2
    layers: int = 2
    length: int = 1024
    batch: int = 2
    steps: int = 150
    seconds: float = 21.0

    def config(self) -> TransformerConfig:
        return TransformerConfig(
            width=self.width,
            heads=self.heads,
            layers=self.layers,
            feed_forward=4 * self.width,
            max_length=self.length,
            kv_heads=self.heads // 2,
        )


QUICK = Size()
FULL = Size(width=256, heads=4, layers=4, batch=4, steps=600, seconds=900.0)
GPU = Size(width=512, heads=8, layers=6, batch=16, steps=1000, seconds=30.0)


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, kv_lengths: Tensor | None = None
) -> Tensor:
    """`F.scaled_dot_product_attention` in the signature of the reference transformer's ops."""
    mask = None
    if kv_lengths is not None:
        mask = (torch.arange(k.shape[2], device=k.device) < kv_lengths[:, None])[:, None, None]
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )


VERSIONS: dict[str, Callable[[], Ops]] = {
    "plain": Ops.plain,
    "sdpa": lambda: Ops(attention=sdpa_attention),
    "fused attention": lambda: Ops(attention=fusedattn.attention),
    "all fused": Ops.fused,
}


BEST = "all fused"


# --- text ----------------------------------------------------------------------------------------


@cache
def manual() -> Tensor:
    """The Python manual's help topics as bytes, int64 (about 465,000 of them)."""
    text = "\n".join(pydoc_data.topics.topics.values())
    return torch.tensor(list(text.encode()), dtype=torch.int64)


class Text:
    """Draws batches from the manual; the same seed draws the same batches."""

    def __init__(self, size: Size, seed: int) -> None:
        self.size = size
        self.rng = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.rng))

    def passage(self, length: int) -> Tensor:
        start = self.integer(0, len(manual()) - length)
        return manual()[start : start + length]

    def next_bytes(self) -> Batch:
        """GPT, LLaMA: windows of `length` bytes and the one after each."""
        rows = [self.passage(self.size.length + 1) for _ in range(self.size.batch)]
        return {"tokens": torch.stack(rows)}

    def masked_pairs(self) -> Batch:
        """BERT: two passages, the second of which follows the first in half of the rows.

        Of 15 % of the bytes, to be guessed, 80 % show as MASK, 10 % as another byte, 10 % as they
        are (Devlin et al. 2018, §3.1).
        """
        rows = [self._masked_pair() for _ in range(self.size.batch)]
        names = ("tokens", "targets", "segments")
        batch = {name: pad([row[name] for row in rows]) for name in names}
        batch["segments"] = batch["segments"].masked_fill(batch["segments"] == PAD, 0)
        batch["is_next"] = torch.cat([row["is_next"] for row in rows])
        batch["lengths"] = lengths_of([row["tokens"] for row in rows])
        return batch

    def _masked_pair(self) -> Batch:
        total = self.integer(self.size.length * 3 // 4, self.size.length + 1) - 3
        first_length = total // 2
        both = self.passage(total)
        first, second = both[:first_length], both[first_length:]
        follows = self.integer(0, 2)
        if not follows:
            second = self.passage(len(second))
        ends = [torch.tensor([token]) for token in (BEGIN, END, END)]
        tokens = torch.cat([ends[0], first, ends[1], second, ends[2]])
        segments = (torch.arange(len(tokens)) >= first_length + 2).long()
        draw, guess = (torch.rand(len(tokens), generator=self.rng) for _ in range(2))
        chosen = (draw < 0.15) & (tokens < 256)
        shown = torch.where(chosen & (guess < 0.8), MASK, tokens)
        other = torch.randint(32, 127, tokens.shape, generator=self.rng)
        shown = torch.where(chosen & (guess >= 0.8) & (guess < 0.9), other, shown)
        targets = torch.where(chosen, tokens, PAD)
        return {
            "tokens": shown,
            "targets": targets,
            "segments": segments,
            "is_next": torch.tensor([follows]),
        }

    def hidden_vowels(self) -> Batch:
        """Encoder-decoder: passages whose vowels are hidden, to be restored."""
        low, high = self.size.length * 3 // 4, self.size.length - 1
        targets = [self.passage(self.integer(low, high)) for _ in range(self.size.batch)]
        sources = [hide_vowels(target) for target in targets]
        ends = [torch.tensor([token]) for token in (BEGIN, END)]
        return {
            "source": pad(sources),
            "target": pad([torch.cat([ends[0], target, ends[1]]) for target in targets]),
            "lengths": lengths_of(sources),
        }


def hide_vowels(text: Tensor) -> Tensor:
    """The bytes of `text` (S,), with an underscore for every vowel."""
    return text.masked_fill(torch.isin(text, torch.tensor(list(b"aeiouAEIOU"))), ord("_"))


def pad(rows: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def lengths_of(rows: list[Tensor]) -> Tensor:
    return torch.tensor([len(row) for row in rows], dtype=torch.int32)


def readable(tokens: Tensor) -> str:
    """Tokens (S,) as text; a masked byte shows as ▒, the other special tokens do not."""
    shown = (
        bytes([t]) if t < 256 else "▒".encode() for t in tokens.tolist() if t <= 255 or t == MASK
    )
    return b"".join(shown).decode(errors="replace")


# --- samples -------------------------------------------------------------------------------------


def continue_text(model: Any, text: Text, device: torch.device) -> dict[str, str]:
    """GPT, LLaMA: what follows a prompt."""
    prompt = "The value of "
    start = torch.tensor([list(prompt.encode())], device=device)
    rng = torch.Generator(device).manual_seed(0)
    whole = start.shape[1] + 200 <= text.size.length
    context = {} if whole else {"context": text.size.length}
    tokens = generate(
        Remembering(model) if whole else model, start, 200, temperature=0.7, top_p=0.9,
        generator=rng, **context,
    )  # fmt: skip
    return {"prompt": prompt, "text": readable(tokens[0, start.shape[1] :])}


def fill_masks(model: Any, text: Text, device: torch.device) -> dict[str, str]:
    """BERT: a masked passage, and the likeliest byte at each mask."""
    batch = text.masked_pairs()
    tokens = batch["tokens"][:1].to(device)
    segments, lengths = batch["segments"][:1].to(device), batch["lengths"][:1].to(device)
    guesses = model.token_logits(model(tokens, segments, lengths)).argmax(-1)
    filled = torch.where(tokens == MASK, guesses, tokens)
    return {"prompt": readable(tokens[0, :200]), "text": readable(filled[0, :200])}


def restore_vowels(model: Any, text: Text, device: torch.device) -> dict[str, str]:
    """Encoder-decoder: a passage with hidden vowels, and the text it is restored to."""
    source = hide_vowels(text.passage(min(160, text.size.length - 2)))[None].to(device)
    begin = torch.full((1, 1), BEGIN, device=device)
    rng = torch.Generator(device).manual_seed(0)
    tokens = generate(
        model.given(source), begin, source.shape[1] + 1, temperature=0.7, top_p=0.9, generator=rng
    )
    return {"prompt": readable(source[0]), "text": readable(tokens[0])}


@dataclass(frozen=True)
class Model:
    """One of them: its class, how a batch is drawn and what a sample shows."""

    title: str
    task: str
    build: Callable[[TransformerConfig, Ops], nn.Module]
    draw: Callable[[Text], Batch]
    sample: Callable[[Any, Text, torch.device], dict[str, str]]


MODELS: dict[str, Model] = {
    "encoder-decoder": Model(
        "encoder-decoder (2017)",
        "restore the vowels of a passage",
        transformer.EncoderDecoder,
        Text.hidden_vowels,
        restore_vowels,
    ),
    "bert": Model(
        "encoder (BERT)",
        "masked bytes, and whether the second passage follows the first",
        transformer.Encoder,
        Text.masked_pairs,
        fill_masks,
    ),
    "gpt": Model(
        "decoder (GPT)", "the next byte", transformer.Decoder, Text.next_bytes, continue_text
    ),
    "llama": Model(
        "decoder (LLaMA)", "the next byte", transformer.Llama, Text.next_bytes, continue_text
    ),
}


# --- training ------------------------------------------------------------------------------------


@dataclass
class Run:
    """One version of one model in training."""

    model: Any
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def step(self, batch: Batch, device: torch.device) -> None:
        """Forward, backward and update; the loss is read after the clock has stopped."""
        clock = clock_for(device) if device.type == "cuda" else None
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = self.model.loss(**batch)
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad(set_to_none=True)
        if clock:
            clock.wait()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


def start_runs(model: Model, size: Size, device: torch.device, seed: int) -> dict[str, Run]:
    """Every version of the model with the same parameters."""
    runs = {}
    for name, ops in VERSIONS.items():
        torch.manual_seed(seed)
        built = model.build(size.config(), ops()).to(device)
        runs[name] = Run(built, *_optimiser(built))
    return runs


def _optimiser(
    model: nn.Module,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with a linear warm-up of ten steps.

    Embeddings start small and most of their rows get few gradients: they learn ten times as fast,
    or a run this short would not leave the plateau of letter frequencies.
    """
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    known = set(map(id, tables))
    others = [p for p in model.parameters() if id(p) not in known]
    groups = [{"params": tables, "lr": 1e-2}, {"params": others, "lr": 1e-3}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    return optimiser, torch.optim.lr_scheduler.LinearLR(optimiser, 0.1, total_iters=10)


def train(
    model: Model,
    size: Size,
    device: torch.device,
    seed: int,
    progress: Callable[[int, str], None] = lambda done, label: None,
) -> dict[str, Any]:
    """Train every version of the model in lockstep; returns its losses, speed, memory and sample.

    It stops after `size.steps` steps or `size.seconds` seconds, for all versions at once.
    """
    runs = start_runs(model, size, device, seed)
    text = Text(size, seed)
    end = time.perf_counter() + size.seconds
    tokens = []
    for step in range(size.steps):
        batch = {name: x.to(device) for name, x in model.draw(text).items()}
        tokens.append(_tokens_in(batch))
        for run in _rotated(runs, step):
            if step == 1:
                with PeakMemory(device) as probe:
                    run.step(batch, device)
                run.peak_bytes = probe.peak_bytes
            else:
                run.step(batch, device)
        progress(step + 1, f"{model.title}: loss {runs[BEST].losses[-1]:.3f}")
        if step >= 2 and time.perf_counter() > end:
            break
    fused = runs[BEST].model.eval()
    with torch.no_grad():
        sample = model.sample(fused, Text(size, seed + 1), device)
    return {
        "title": model.title,
        "task": model.task,
        "size": asdict(size),
        "parameters": sum(p.numel() for p in fused.parameters()),
        "steps": len(tokens),
        "tokens": sum(tokens),
        "runs": {name: _figures(run, runs["plain"], tokens) for name, run in runs.items()},
        "sample": sample,
    }


def _rotated(runs: dict[str, Run], step: int) -> Iterator[Run]:
    order = list(runs.values())
    start = step % len(order)
    yield from order[start:] + order[:start]


def _tokens_in(batch: Batch) -> int:
    """The tokens of a batch that are no padding, on both sides of an encoder-decoder."""
    names = ("tokens", "source", "target")
    return sum(int((batch[n] != PAD).sum()) for n in names if n in batch)


def _figures(run: Run, plain: Run, tokens: list[int]) -> dict[str, Any]:
    """Speed without the first two steps, which warm up and measure memory."""
    per_token = [s / n for s, n in zip(run.seconds[2:], tokens[2:], strict=True)]
    timing = Timing.of(per_token or [run.seconds[-1] / tokens[-1]])
    differences = [abs(a - b) for a, b in zip(run.losses, plain.losses, strict=True)]
    return {
        "losses": run.losses,
        "tokens_per_second": 1 / timing.median,
        "tokens_per_second_p20": 1 / timing.p80,
        "tokens_per_second_p80": 1 / timing.p20,
        "peak_bytes": run.peak_bytes,
        "max_loss_difference": max(differences),
    }
