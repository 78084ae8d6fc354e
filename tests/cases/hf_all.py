"""Any model of transformers from a tiny config: is it right with our attention, or refused?

python tests/cases/hf_all.py [model_type …]     prints a line for each; all by default
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import fusedattn
import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from cases.hf import softmax_in_fp64

adapter = fusedattn.integrations.transformers

LENGTH, VOCABULARY, LARGEST = 33, 99, 2e7
MOST = 1e-4
NO_MODEL = "no base model"

# What a config gets where it has such a field.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size",
                     "projection_dim", "out_hidden_size", "encoder_hidden_dim", "hidden_dim",
                     "decoder_hidden_size", "encoder_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
                     "decoder_layers", "num_encoder_layers", "num_decoder_layers", "depth",
                     "decoder_num_hidden_layers", "encoder_num_hidden_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads",
                     "encoder_attention_heads", "decoder_attention_heads",
                     "decoder_num_attention_heads", "encoder_num_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff",
                     "n_inner", "mlp_dim", "moe_intermediate_size", "decoder_intermediate_size",
                     "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "n_group"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim"), 16),
    "num_key_value_heads": 2, "v_head_dim": 12, "topk_group": 1, "first_k_dense_replace": 1,
    "vocab_size": VOCABULARY, "image_size": 24, "patch_size": 8, "num_mel_bins": 8,
    "sliding_window": 9, "max_source_positions": 20, "conv_dim": (16, 16), "conv_kernel": (5, 3),
    "conv_stride": (4, 2), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "type_vocab_size": 2, "rotary_dim": 4,
    "dropout": 0.0, "layerdrop": 0.0,
}  # fmt: skip
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
       "cls_token_id": 1, "sep_token_id": 2, "mask_token_id": 3}  # fmt: skip


def tiny(kind: Any, **changes: Any) -> Any:
    """A config of this class with small sizes, its parts too."""
    fields = {x.name for x in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    fields |= set(inspect.signature(kind.__init__).parameters)
    chosen = {name: x for name, x in (SIZES | IDS | changes).items() if name in fields}
    if "kv_lora_rank" in fields:
        chosen["num_key_value_heads"] = 4
    default = kind()
    for name in tuple(chosen):
        try:
            had = getattr(default, name, None)
        except ValueError:  # it is another for each layer
            had = None
        if (
            had is None
            or chosen[name] is None
            or (isinstance(had, (list, tuple)) != isinstance(chosen[name], tuple))
        ):
            del chosen[name]  # it has none, or one for each of several stages
    for name, part in kind.sub_configs.items():
        had = getattr(default, name, None)
        if had is not None:
            chosen[name] = tiny(type(had) if part is transformers.AutoConfig else part, **changes)
    return kind(**chosen)


def arguments(model: Any) -> Iterator[dict[str, Tensor]]:
    """Sets of inputs that a model might take, the likeliest first."""
    known = inspect.signature(model.forward).parameters
    ids = torch.randint(5, VOCABULARY - 1, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, -9:] = 0
    config = model.config
    size = getattr(getattr(config, "vision_config", config), "image_size", 24)
    size = size if isinstance(size, int) else 24
    image = torch.randn(2, 3, size, size)
    text = {"input_ids": ids, "attention_mask": mask}
    bins = getattr(config, "num_mel_bins", 8)
    every = [
        text, text | {"decoder_input_ids": ids[:, :21]}, {"pixel_values": image},
        text | {"pixel_values": image}, {"input_values": torch.randn(2, 400)},
        {"input_features": torch.randn(2, bins, 40), "decoder_input_ids": ids[:, :21]},
        {"input_features": torch.randn(2, bins, 40)}, {"input_features": torch.randn(2, 40, bins)},
        {"input_values": torch.randn(2, 400), "decoder_input_ids": ids[:, :21]},
        {"pixel_values": image, "decoder_input_ids": ids[:, :21]},
        {"pixel_values": image[:, None].expand(-1, 4, -1, -1, -1)},
        {"input_ids": ids},
    ]  # fmt: skip
    for each in every:
        if all(name in known for name in each):
            yield each


def floats(found: Any, given: dict[str, Tensor]) -> list[Tensor]:
    """The outputs, where nothing is padding."""
    values = found.values() if hasattr(found, "values") else found
    kept = [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]
    mask = given.get("attention_mask")
    if mask is not None:
        kept = [x[mask.bool()] if x.shape[:2] == mask.shape else x for x in kept]
    return kept


def built(model_type: str) -> tuple[Any, dict[str, Tensor], list[Tensor]]:
    """The model with eager attention, its inputs and outputs.

    Raises:
        Exception: whatever the model does about a config or inputs that do not suit it.
    """
    problems = []
    for changes in VARIANTS:
        try:
            return _built(model_type, tiny(CONFIG_MAPPING[model_type], **changes))
        except Exception as error:
            problems.append(error)
    raise problems[0]


# Where the sizes above do not fit together: more layers, as many heads of keys, wider heads, angles
# of three kinds of positions.
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_hidden_layers": 4},
    {"num_key_value_heads": 4},
    {"rope_parameters": ROPE},
    {"head_dim": 16, "hidden_size": 64, "num_hidden_layers": 6},
    dict.fromkeys(("num_hidden_layers", "num_attention_heads", "head_dim", "n_layers", "depth",
                   "image_size", "patch_size", "num_layers", "n_embd", "vocab_size", "num_mel_bins",
                   "conv_dim", "conv_kernel", "conv_stride")),
)  # fmt: skip


def _built(model_type: str, config: Any) -> tuple[Any, dict[str, Tensor], list[Tensor]]:
    kind = MODEL_MAPPING[CONFIG_MAPPING[model_type]]
    kind = kind[0] if isinstance(kind, (list, tuple)) else kind
    with torch.device("meta"):
        size = sum(x.numel() for x in kind(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:.0f} parameters")
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn_like(x), alpha=0.1)
        with contextlib.suppress(Exception):  # without experts
            model.set_experts_implementation("eager")
        problem: Exception | None = None
        for given in arguments(model):
            try:
                torch.manual_seed(1)
                want = floats(model(**given), given)
            except Exception as error:
                problem = problem or error
                continue
            if want and all(x.isfinite().all() for x in want):
                return model, given, want
            problem = problem or ValueError("outputs that are not finite")
    raise problem or ValueError("no inputs")


def verdict(model_type: str) -> tuple[str, str]:
    """right, refused, unused, wrong or not built, and what there is to say about it."""
    if CONFIG_MAPPING[model_type] not in MODEL_MAPPING:
        return "not built", NO_MODEL
    try:
        model, given, want = built(model_type)
    except Exception as error:
        return "not built", said(error)
    calls: list[Any] = []

    def counted(module: Any, *args: Any, **options: Any) -> Any:
        calls.append(module)
        return adapter.attention_forward(module, *args, **options)

    transformers.AttentionInterface.register(adapter.NAME, counted)
    try:
        error = difference(model, given, want)
        used = len(calls)
        if error > MOST:  # of scores so large that rounding decides, as in dory
            error = difference(*in_fp64(model, given))
    except (ValueError, fusedattn.UnsupportedError) as refusal:
        known = ("does not call transformers' AttentionInterface", "use attn_implementation=")
        kind = "refused" if any(text in str(refusal) for text in known) else "wrong"
        return kind, said(refusal)
    except Exception as failure:
        return "wrong", said(failure)
    finally:
        transformers.AttentionInterface.register(adapter.NAME, adapter.attention_forward)
    kind = "wrong" if error > MOST else "right" if used else "unused"
    return kind, f"{used} calls, error {error:.1e}, {', '.join(given)}"


def difference(model: Any, given: dict[str, Tensor], want: list[Tensor]) -> float:
    """The largest between outputs with our attention and those wanted, where these exceed 1 of
    the largest of them."""
    model.set_attn_implementation(adapter.NAME)
    with torch.no_grad():
        torch.manual_seed(1)
        got = floats(model(**given), given)
    scaled = (
        ((a - b).abs().max() / b.abs().max().clamp_min(1.0)).item()
        for a, b in zip(got, want, strict=True)
        if b.numel()
    )
    return max(scaled)


def in_fp64(model: Any, given: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor], list[Tensor]]:
    """The same with eager attention."""
    model.double().set_attn_implementation("eager")
    given = {k: x.double() if x.is_floating_point() else x for k, x in given.items()}
    with torch.no_grad(), softmax_in_fp64():
        torch.manual_seed(1)
        return model, given, floats(model(**given), given)


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"


ABOUT = {
    "right": "Right: their attention runs here, and outputs are as with eager attention",
    "refused": "Refused by name: a `ValueError`, for they compute attention in their own code",
    "unused": "Without attention of the interface, and as they were",
    "not built": "Not tried: their configs do not take such sizes, or they need other inputs",
}
HEAD = """# Models of Hugging Face transformers

Each model type of transformers {version}, as `tests/cases/hf_all.py` finds it: a base model of
small sizes and random weights, with padding where it takes text, run with eager attention and with
`attn_implementation="fusedattn"`. The models in `tests/cases/hf.py` are held to the tolerance rule
besides, with losses and gradients.
"""


def listed(lines: list[str]) -> str:
    """The page, of what `main` has printed."""
    rows = [line.split("\t") for line in lines]
    page = HEAD.format(version=transformers.__version__)
    for kind, what in ABOUT.items():
        names = sorted(name for name, found, why in rows if found == kind and why != NO_MODEL)
        page += f"\n## {len(names)} {kind}\n\n{what}.\n\n"
        page += textwrap.fill(", ".join(names), 100, break_on_hyphens=False) + "\n"
    return page


def main() -> None:
    if sys.argv[1:2] == ["--list"]:
        print(listed(Path(sys.argv[2]).read_text().splitlines()), end="")
        return
    adapter.register()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(50)
    for model_type in sys.argv[1:] or CONFIG_MAPPING.keys():
        print(model_type, *verdict(model_type), sep="\t", flush=True)


if __name__ == "__main__":
    main()
