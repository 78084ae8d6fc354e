"""The cases of whole models: those of Hugging Face transformers at the sizes of their layers.

Few layers stand for all of a model, and as many of its words as those layers are of its own: then
the last layer, whose work grows with the vocabulary, takes the share of a step that it really has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .versions import DTYPES

TRAINING, GENERATION = TASKS = ("training", "generation")
LAYERS = 12  # of each of these models in its usual size
PATCH = 16  # pixels along a side, of ViT


@dataclass(frozen=True)
class Size:
    """How large. `length`: tokens of a sequence in training, of sources and targets alike; `prompt`
    and `tokens`: what generation is given and adds; `image`: pixels along a side.
    """

    layers: int = 2
    width: int = 768
    heads: int = 12
    length: int = 1024
    batch: int = 1
    image: int = 224
    images: int = 4
    prompt: int = 2048
    tokens: int = 64

    def words(self, of_the_model: int) -> int:
        """The part of its vocabulary that goes with so many layers."""
        return max(64, of_the_model * self.layers // LAYERS)


@dataclass(frozen=True)
class Case:
    """One model at one task."""

    model: str
    task: str
    dtype: str
    size: Size = Size()

    def __post_init__(self) -> None:
        known = {"model": MODELS, "task": TASKS, "dtype": DTYPES}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"Case: got {name}={getattr(self, name)!r}, expected one of {list(values)}"
                )
        if self.task == GENERATION and not MODELS[self.model].generates:
            raise ValueError(f"Case: got task={self.task!r}, which {self.model} does not do")

    @property
    def label(self) -> str:
        """What tells the case apart from the others."""
        size = self.size
        if self.task == GENERATION:
            shape = f"{size.batch}x{size.prompt}+{size.tokens}"
        elif self.model == "vit":
            shape = f"{size.images}x{size.image}x{size.image}"
        else:
            shape = f"{size.batch}x{size.length}"
        return f"{MODELS[self.model].title} {self.task} {self.dtype} {shape}"

    @property
    def tokens(self) -> int:
        """What tokens per second count: those trained on, or those generated."""
        size = self.size
        if self.task == GENERATION:
            return size.batch * size.tokens
        if self.model == "vit":
            return size.images * ((size.image // PATCH) ** 2 + 1)
        return size.batch * size.length * (2 if self.model == "t5" else 1)

    def shortened(self) -> Case:
        """The case that is checked: of fewer tokens, so that checking takes a part of the time."""
        short = {name: max(1, getattr(self.size, name) // 4) for name in ("length", "prompt")}
        new = {"tokens": min(8, self.size.tokens), "images": 1}
        return replace(self, size=replace(self.size, **short, **new))


# --- models --------------------------------------------------------------------------------------

Maker = Callable[[Any, Size], nn.Module]


@dataclass(frozen=True)
class Model:
    """How a model is called, and how transformers makes one of a size with random weights."""

    title: str
    make: Maker
    generates: bool = False


def _gpt2(hf: Any, size: Size) -> nn.Module:
    config = hf.GPT2Config(
        n_embd=size.width, n_layer=size.layers, n_head=size.heads, vocab_size=size.words(50257),
        n_positions=_positions(size), **_NO_ENDS,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def _bert(hf: Any, size: Size) -> nn.Module:
    config = hf.BertConfig(
        hidden_size=size.width, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        intermediate_size=4 * size.width, vocab_size=size.words(30522),
        max_position_embeddings=size.length,
    )  # fmt: skip
    return hf.BertForMaskedLM(config)


def _llama(hf: Any, size: Size) -> nn.Module:
    grouped = size.heads // 3 if size.heads % 3 == 0 else size.heads
    config = hf.LlamaConfig(
        hidden_size=size.width, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=grouped, intermediate_size=8 * size.width // 3,
        vocab_size=size.words(32000), max_position_embeddings=_positions(size), **_NO_ENDS,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def _t5(hf: Any, size: Size) -> nn.Module:
    """T5 1.1, whose feed-forward networks are gated."""
    config = hf.T5Config(
        d_model=size.width, d_kv=size.width // size.heads, d_ff=8 * size.width // 3,
        num_layers=size.layers, num_heads=size.heads, vocab_size=size.words(32128),
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def _vit(hf: Any, size: Size) -> nn.Module:
    config = hf.ViTConfig(
        hidden_size=size.width, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        intermediate_size=4 * size.width, image_size=size.image, patch_size=PATCH, num_labels=1000,
    )  # fmt: skip
    return hf.ViTForImageClassification(config)


_NO_ENDS = {"bos_token_id": None, "eos_token_id": None}


def _positions(size: Size) -> int:
    return max(size.length, size.prompt + size.tokens)


MODELS: dict[str, Model] = {
    "gpt2": Model("GPT-2", _gpt2, generates=True),
    "bert": Model("BERT", _bert),
    "llama": Model("LLaMA", _llama, generates=True),
    "t5": Model("T5", _t5, generates=True),
    "vit": Model("ViT", _vit),
}


def build(case: Case, seed: int) -> nn.Module:
    """The model as it comes, with random weights; for generation in the dtype and in evaluation."""
    import transformers

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = MODELS[case.model].make(transformers, case.size)
    return model.to(DTYPES[case.dtype]).eval() if case.task == GENERATION else model.train()


def batch(case: Case, seed: int) -> dict[str, Tensor]:
    """Arguments of the model, or of its `generate`; the same seed gives the same."""
    size, source = case.size, torch.Generator().manual_seed(seed)
    if case.model == "vit":
        pixels = torch.randn(size.images, 3, size.image, size.image, generator=source)
        return {
            "pixel_values": pixels,
            "labels": torch.randint(1000, (size.images,), generator=source),
        }
    generating = case.task == GENERATION
    length = size.prompt if generating else size.length
    ids = torch.randint(5, 64, (size.batch, length), generator=source)
    if generating:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"input_ids": ids, "labels": ids}


# --- the grids -----------------------------------------------------------------------------------


def grid(size: Size, *, generation: Sequence[str] = ("fp32",)) -> list[Case]:
    """Training in fp32, of every model, then under autocast; generation in these dtypes."""
    return [*_cases(TRAINING, ("fp32", "bf16"), size), *_cases(GENERATION, generation, size)]


def _cases(task: str, dtypes: Sequence[str], size: Size) -> Iterator[Case]:
    names = [name for name, x in MODELS.items() if task == TRAINING or x.generates]
    return (Case(name, task, dtype, size) for dtype, name in itertools.product(dtypes, names))


QUICK = Size()
FULL = Size(layers=4, batch=2, images=16)
