"""transformers' models with our attention: outputs, losses and gradients as with their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fusedattn
import pytest
import torch

hf = pytest.importorskip("cases.hf")
adapter = fusedattn.integrations.transformers


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are small
    adapter.register()
    adapter.register()
    yield
    adapter.unregister()
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of our function, for each call."""
    seen: list[str] = []

    def counted(name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            seen.append(name)
            return getattr(fusedattn, name)(*args, **options)

        return call

    for name in ("attention", "attention_varlen"):
        monkeypatch.setattr(adapter, name, counted(name))
    return seen


PADDED = [name for name, model in hf.MODELS.items() if model.inputs in ("text", "pair")]


@pytest.mark.parametrize("name", hf.MODELS)
def test_equals_eager(name: str, calls: list[str]) -> None:
    padding = {"text": "right", "pair": "right"}.get(hf.MODELS[name].inputs, "none")
    model = hf.build(name)
    hf.compared(model, hf.inputs(name, padding), name, hf.set_ours)
    assert len(calls) >= 2  # every layer


DECODERS = ("gpt2", "gpt_neox", "llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "t5")


@pytest.mark.parametrize("name", DECODERS)
def test_padded_on_the_left(name: str) -> None:
    hf.compared(hf.build(name), hf.inputs(name, "left"), name, hf.set_ours)


GENERATED: dict[str, tuple[str, dict[str, Any]]] = {
    "padded": ("llama", {}),
    "static cache": ("llama", {"cache_implementation": "static"}),
    "sliding cache": ("mistral", {}),
    "static, sliding and full": ("gemma3", {"cache_implementation": "static"}),
    "softcap": ("gemma2", {}),
    "sinks": ("gpt_oss", {}),
    "Dv": ("deepseek_v3", {}),
    "learned positions": ("gpt2", {}),
    "beams": ("llama", {"num_beams": 3}),
    "beams of an encoder-decoder": ("bart", {"num_beams": 2}),
    "beams with biases": ("t5", {"num_beams": 2, "num_return_sequences": 2}),
    "relative biases": ("t5", {}),
    "static cross attention": ("t5", {"cache_implementation": "static"}),
    "sound": ("whisper", {}),
    "chunked prefill": ("llama", {"prefill_chunk_size": 10}),
    "without a cache": ("qwen3", {"use_cache": False}),
    "assisted": ("llama", {"prompt_lookup_num_tokens": 3}),
}


@pytest.mark.parametrize("case", GENERATED)
def test_generates_what_eager_does(case: str, calls: list[str]) -> None:
    name, options = GENERATED[case]
    model = hf.build(name)
    given = hf.inputs(name, "none" if name == "whisper" or case == "assisted" else "left")
    del given["labels"]
    if case == "assisted":  # takes one sequence
        given = {k: x[:1] for k, x in given.items()}
    options = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True} | options
    options |= {"output_scores": True, "return_dict_in_generate": True, "eos_token_id": None}
    want = model.generate(**given, **options)
    hf.set_ours(model)
    got = model.generate(**given, **options)
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.scores, want.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(calls) > 12


@pytest.mark.parametrize("name", ["llama", "whisper"])
def test_assisted_by_a_second_model(name: str, calls: list[str]) -> None:
    """A draft of which some tokens are kept and some not: several queries on a cache at a time."""
    model, draft = hf.build(name), hf.build(name)
    torch.manual_seed(1)
    with torch.no_grad():
        for x in draft.parameters():
            x.add_(torch.randn_like(x), alpha=0.05)
    given = {k: x[:1] for k, x in hf.inputs(name).items() if k != "labels"}
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    want = model.generate(**given, **options, assistant_model=draft)
    alone = draft.generate(**given, **options)
    assert not torch.equal(alone, want)  # the draft has to be corrected
    hf.set_ours(model)
    hf.set_ours(draft)
    calls.clear()
    assert torch.equal(model.generate(**given, **options, assistant_model=draft), want)
    assert len(calls) > 12


def test_generates_compiled() -> None:
    """`generate` compiles the steps after the prompt itself, where the cache is static."""
    transformers = pytest.importorskip("transformers")
    model = hf.build("llama")
    given = {k: x for k, x in hf.inputs("llama", "left").items() if k != "labels"}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    options["cache_implementation"] = "static"
    want = model.generate(**given, **options, disable_compile=True)
    hf.set_ours(model)
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters
    counted.clear()
    compiling = transformers.CompileConfig(backend="eager", fullgraph=True)
    compiling._compile_all_devices = True  # a CPU among them
    got = model.generate(**given, **options, compile_config=compiling)
    assert torch.equal(got, want)
    assert counted["stats"]["unique_graphs"] >= 1


def packed() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Three sequences in one row, as position_ids say, and where each begins and ends."""
    lengths = torch.tensor([7, 15, 11])
    ids = hf.inputs("llama")["input_ids"][:1]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ends = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    return {"input_ids": ids, "labels": ids, "position_ids": positions}, ends


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences(name: str, calls: list[str]) -> None:
    given, ends = packed()
    model = hf.build(name)
    model.config.use_cache = False  # with one, transformers does not look for packing
    hf.compared(model, given, name, hf.set_ours)
    assert set(calls) == {"attention"}
    calls.clear()
    want = model(**given).logits
    offsets = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 15, "max_length_k": 15}
    for more in ({}, {"attention_mask": torch.ones(1, hf.LENGTH)}):  # without a mask of positions
        got = model(**given | offsets | more).logits
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert ("attention_varlen" in calls) == (name != "mistral")  # all layers of which have windows


def test_packed_sequences_with_windows() -> None:
    """Masks of windows that know nothing of the sequences, for the positions go on."""
    given, ends = packed()
    given["position_ids"] = torch.arange(hf.LENGTH)[None]
    model = hf.build("mistral")
    hf.set_ours(model)
    got = model(**given, cu_seq_lens_q=ends, cu_seq_lens_k=ends, use_cache=False).logits
    parts = zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    for begin, end in parts:
        rows = slice(begin, end)
        alone = {k: x[:, rows] for k, x in given.items()}
        want = model(**alone, use_cache=False).logits
        torch.testing.assert_close(got[:, rows], want, rtol=1e-5, atol=1e-5)


def test_weights_where_they_are_asked_for() -> None:
    for name in ("bert", "gemma2", "gpt_oss", "t5", "vit"):
        model = hf.build(name)
        given = hf.inputs(name)
        asked = {"output_attentions": True}
        want = model(**given, **asked)
        hf.set_ours(model)
        got = model(**given, **asked)
        for kind in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
            pairs = zip(got.get(kind) or (), want.get(kind) or (), strict=True)
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=f"{name} {kind}")
        assert got.get("attentions") or got.get("cross_attentions")
    module, (q, k, v) = torch.nn.Identity(), torch.randn(3, 1, 2, 9, 8)
    out, weights = adapter.attention_forward(module, q, k, v, None, dropout=0.5, **asked)
    assert 0.2 < (weights.tril() == 0).sum() / weights.numel() < 0.8
    torch.testing.assert_close(out.transpose(1, 2), weights @ v)  # after the same dropout


def test_dropout_while_training(calls: list[str]) -> None:
    model = hf.build("gpt2").train()
    hf.set_ours(model)
    given, losses = hf.inputs("gpt2"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(**given).loss)
    assert losses[0] == losses[1] != losses[2]


def test_compiled_in_one_graph(calls: list[str]) -> None:
    model = hf.build("llama")
    hf.set_ours(model)
    given = hf.inputs("llama", "left")
    want = hf.results(model, given, torch.float32)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    got = hf.results(model, given, torch.float32)
    for name, ref in want.items():
        torch.testing.assert_close(got[name], ref, rtol=1e-4, atol=1e-5)


def test_refuses_who_ignores_the_interface() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=99)
    message = "BloomForCausalLM: got attn_implementation='fusedattn', expected 'eager'"
    with pytest.raises(ValueError, match=message):
        transformers.BloomForCausalLM._from_config(config, attn_implementation="fusedattn")
    model = transformers.BloomForCausalLM._from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation("fusedattn")
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(fusedattn.UnsupportedError, match="Identity: sinks of each query"):
        adapter.attention_forward(torch.nn.Identity(), q, q, q, None, sinks=q[..., :1])


def test_nothing_is_left_behind() -> None:
    transformers = pytest.importorskip("transformers")
    masks = transformers.AttentionMaskInterface()
    assert "fusedattn" in transformers.AttentionInterface()
    adapter.unregister()
    adapter.unregister()
    assert "fusedattn" not in transformers.AttentionInterface()
    assert "fusedattn" not in masks
    with pytest.raises(ValueError, match="fusedattn"):
        hf.set_ours(hf.build("llama"))
    adapter.register()
    hf.set_ours(hf.build("llama"))


# All that can be built from tiny configs are listed in docs/transformers.md.
SAMPLE = {
    "opt": "right", "pegasus_x": "right", "qwen3_next": "right", "longt5": "right",
    "swinv2": "not built", "mamba": "unused", "falcon": "refused", "deberta-v2": "refused",
    "git": "refused", "bigbird_pegasus": "refused",
}  # fmt: skip


@pytest.mark.parametrize("model_type", SAMPLE)
def test_any_model_is_right_or_refused(model_type: str) -> None:
    from cases import hf_all

    found, what = hf_all.verdict(model_type)
    assert found == SAMPLE[model_type], what


def test_causal_without_a_mask_where_nobody_tried_it() -> None:
    """A decoder's modules say that they are not causal in models that are run without SDPA."""
    transformers = pytest.importorskip("transformers")
    config = transformers.PegasusXConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, block_size=8,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=hf.VOCABULARY,
        num_global_tokens=4,
    )  # fmt: skip
    model = transformers.PegasusXModel._from_config(config, attn_implementation="eager").eval()
    ids = hf.inputs("t5")["input_ids"]
    want = model(input_ids=ids, decoder_input_ids=ids).last_hidden_state
    hf.set_ours(model)
    got = model(input_ids=ids, decoder_input_ids=ids).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
