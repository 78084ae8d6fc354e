"""Small random models of transformers, their inputs, and how they are held to the rule.

Each is run with its own eager attention, in fp64 and in fp32, and with ours in fp32.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from compare import check
from torch import Tensor, nn

LENGTH, VOCABULARY = 33, 99


class Model(NamedTuple):
    """A model class, what its config is made of, and which inputs it has."""

    name: str
    config: str
    options: dict[str, Any]
    inputs: str = "text"


BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 64}  # fmt: skip
LLAMA = BERT | {"num_key_value_heads": 2}
HEADS = LLAMA | {"head_dim": 8}
IMAGE = BERT | {"image_size": 24, "patch_size": 8}
SLIDING = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
WHISPER = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip
TOWERS = {"text_config": BERT | {"vocab_size": VOCABULARY, "projection_dim": 16},
          "vision_config": IMAGE | {"projection_dim": 16}}  # fmt: skip
CLIP = {
    x: y | {"eos_token_id": VOCABULARY - 1} if x == "text_config" else y for x, y in TOWERS.items()
}

MODELS = {
    "bert": Model("BertForMaskedLM", "BertConfig", BERT),
    "bert-decoder": Model("BertLMHeadModel", "BertConfig", BERT | {"is_decoder": True}),
    "roberta": Model("RobertaForMaskedLM", "RobertaConfig", BERT),
    "distilbert": Model("DistilBertForMaskedLM", "DistilBertConfig",
                        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "gpt2": Model("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt_neox": Model("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT),
    "llama": Model("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "mistral": Model("MistralForCausalLM", "MistralConfig", HEADS | {"sliding_window": 9}),
    "mixtral": Model("MixtralForCausalLM", "MixtralConfig",
                     HEADS | {"num_local_experts": 4, "sliding_window": 9}),
    "qwen2": Model("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "qwen3": Model("Qwen3ForCausalLM", "Qwen3Config", HEADS),
    "phi3": Model("Phi3ForCausalLM", "Phi3Config", LLAMA | {"pad_token_id": 0}),
    "gemma2": Model("Gemma2ForCausalLM", "Gemma2Config", HEADS | SLIDING),
    "gemma3": Model("Gemma3ForCausalLM", "Gemma3TextConfig", HEADS | SLIDING),
    "gpt_oss": Model("GptOssForCausalLM", "GptOssConfig",
                     HEADS | SLIDING | {"num_local_experts": 4}),
    "deepseek_v3": Model("DeepseekV3ForCausalLM", "DeepseekV3Config",
                         BERT | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
                                 "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
                                 "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
                                 "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                                 "first_k_dense_replace": 1}),
    "olmo2": Model("Olmo2ForCausalLM", "Olmo2Config", LLAMA),
    "modernbert": Model("ModernBertForMaskedLM", "ModernBertConfig",
                        BERT | {"local_attention": 8, "global_attn_every_n_layers": 2,
                                "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2,
                                "bos_token_id": 1, "eos_token_id": 2}),
    "bart": Model("BartForConditionalGeneration", "BartConfig",
                  WHISPER | {"max_position_embeddings": 64}, "pair"),
    "t5": Model("T5ForConditionalGeneration", "T5Config",
                {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
                 "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"}, "pair"),
    "whisper": Model("WhisperForConditionalGeneration", "WhisperConfig",
                     WHISPER | {"num_mel_bins": 8, "max_source_positions": 20,
                                "pad_token_id": 0, "decoder_start_token_id": 1}, "spectrum"),
    "vit": Model("ViTForImageClassification", "ViTConfig", IMAGE, "image"),
    "dinov2": Model("Dinov2ForImageClassification", "Dinov2Config", IMAGE, "image"),
    "clip": Model("CLIPModel", "CLIPConfig", CLIP, "image and text"),
    "siglip": Model("SiglipModel", "SiglipConfig", TOWERS, "image and text"),
    "wav2vec2": Model("Wav2Vec2ForCTC", "Wav2Vec2Config",
                      BERT | {"conv_dim": (16, 16), "conv_kernel": (5, 3), "conv_stride": (4, 2),
                              "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
                              "num_conv_pos_embedding_groups": 2}, "sound"),
}  # fmt: skip


def build(name: str) -> Any:
    """The model, in evaluation, with eager attention and random weights that matter."""
    model = MODELS[name]
    config = getattr(transformers, model.config)(**{"vocab_size": VOCABULARY} | model.options)
    torch.manual_seed(0)
    made = getattr(transformers, model.name)._from_config(config, attn_implementation="eager")
    with contextlib.suppress(ValueError):  # without experts
        made.set_experts_implementation("eager")
    with torch.no_grad():
        for x in made.parameters():  # those of zeros and of ones, and scores that differ
            x.add_(torch.randn_like(x), alpha=0.1)
    return made.eval()


def inputs(name: str, padding: str = "none") -> dict[str, Tensor]:
    """Arguments of `forward`, labels among them; of two sequences one is shorter if padded."""
    kind = MODELS[name].inputs
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY - 1, (2, LENGTH), generator=source)
    made: dict[str, Tensor] = {"input_ids": ids}
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    if padding != "none":
        mask[1, :9] = 0
        mask = mask if padding == "left" else mask.flip(1)
    labels = ids.where(mask == 1, -100)
    labels[1, 9] = -100  # which the last one of padding would predict
    image = torch.randn(2, 3, 24, 24, generator=source)
    if kind == "text":
        return made | {"attention_mask": mask, "labels": labels}
    if kind == "pair":
        return made | {"attention_mask": mask, "labels": labels[:, -21:].contiguous()}
    if kind == "spectrum":
        features = torch.randn(2, 8, 40, generator=source)
        return {"input_features": features, "labels": ids[:, :21].contiguous()}
    if kind == "image":
        return {"pixel_values": image, "labels": torch.tensor([0, 1])}
    if kind == "image and text":
        made["input_ids"][:, -1] = VOCABULARY - 1
        return made | {"pixel_values": image, "attention_mask": mask}
    return {"input_values": torch.randn(2, 400, generator=source), "labels": ids[:, :5]}


@contextlib.contextmanager
def softmax_in_fp64() -> Iterator[None]:
    """Eager attention asks for it in fp32, where the least number of fp64, its mask, is −inf."""
    usual = F.softmax

    def exact(x: Tensor, dim: int = -1, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return usual(x, dim, dtype=x.dtype if x.dtype == torch.float64 else dtype)

    with mock.patch.object(F, "softmax", exact):
        yield


def results(model: Any, given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The loss, the first output where nothing is padding, and the gradients of all parameters."""
    given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in given.items()}
    model.zero_grad()
    found = model(**given, **({} if "labels" in given else {"return_loss": True}))
    found.loss.backward()
    out = found.logits if "logits" in found else found.logits_per_image
    mask = given.get("attention_mask")
    if mask is not None and out.shape[:2] == mask.shape:
        out = out[mask.bool()]
    grads = {n: x.grad.clone() for n, x in model.named_parameters() if x.grad is not None}
    return {"loss": found.loss.detach(), "out": out.detach(), **grads}


def compared(model: Any, given: dict[str, Tensor], case: object, change: Any) -> None:
    """The model after `change(model)` against its eager self, by the tolerance rule."""
    with softmax_in_fp64():
        exact = results(copy.deepcopy(model).double(), given, torch.float64)
    eager = results(model, given, torch.float32)
    change(model)
    got = results(model, given, torch.float32)
    assert got.keys() == exact.keys()
    for name, ref in exact.items():
        gradient = name not in ("loss", "out")
        rows = 2 * LENGTH if gradient else 1
        check(got[name], ref, eager[name], what=name, case=case, gradient=gradient, rows=rows)


def set_ours(model: nn.Module) -> None:
    model.set_attn_implementation("fusedattn")  # type: ignore[operator]
