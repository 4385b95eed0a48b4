"""Tests of the conversion of GGUF files: models written as llama.cpp has them come back as they were."""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3_text, llama

import glass_mlx
from glass_mlx.errors import GlassError
from glass_mlx.evaluation.from_gguf import convert, main
from glass_mlx.ranks.identity import describe

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install gguf")

LAYERS, HEADS, KV_HEADS, HIDDEN, FFN = 6, 4, 2, 64, 96
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": 16,
}
NAMES = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
BYTES = [*map(chr, range(33, 127)), "Ġ", "Ċ"]  # of byte-level BPE: what prints, space and line feed
CHAT = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"


def tiny(architecture: str, vocabulary: int, tied: bool = True) -> Any:
    """A random model of mlx-lm's in which every parameter matters."""
    mx.random.seed(0)
    if architecture == "llama":
        args = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 5e4, "tie_word_embeddings": tied}
        model = llama.Model(llama.ModelArgs(vocab_size=vocabulary, **SIZES, **args))
    else:
        args = {"model_type": "gemma3_text", "query_pre_attn_scalar": 16, "sliding_window": 8}
        model = gemma3_text.Model(gemma3_text.ModelArgs(vocab_size=vocabulary, **SIZES, **args))
        model.sanitize({})  # ties the embeddings
    random = [(name, mx.random.normal(value.shape) * 0.3) for name, value in tree_flatten(model.parameters())]
    model.load_weights(random)
    return model


def write(path, architecture: str, model: Any, quantised: bool = False, split: str = "smollm", scaling=None) -> None:
    """A model as a GGUF file: query and key rows of Llama interleaved, norms of Gemma with 1 added."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5 if architecture == "llama" else 1e-6)
    if architecture == "llama":
        writer.add_rope_freq_base(5e4)
        _byte_level(writer, split)
    else:
        writer.add_key_length(16)
        writer.add_value_length(16)
        writer.add_sliding_window(8)
        _sentencepiece(writer)
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
    for name, value in tree_flatten(model.parameters()):
        new, values = _as_llama_cpp(architecture, name, np.array(value))
        if quantised and "ffn" in new and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(new, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(new, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _as_llama_cpp(architecture: str, name: str, values: np.ndarray) -> tuple[str, np.ndarray]:
    gemma = architecture == "gemma3"
    norms = {
        "norm": "output_norm",
        "post_attention_layernorm": "post_attention_norm" if gemma else "ffn_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    parts = name.split(".")
    short = (NAMES | norms)[parts[-2]]
    if not gemma and short in ("attn_q", "attn_k"):
        heads = HEADS if short == "attn_q" else KV_HEADS
        values = values.reshape(heads, 2, -1, HIDDEN).swapaxes(1, 2).reshape(values.shape)
    if gemma and short.endswith("norm"):
        values = values + 1
    layer = f"blk.{parts[2]}." if "layers" in parts else ""
    return f"{layer}{short}.weight", values


def _byte_level(writer, split: str) -> None:
    tokens = ["<s>", "</s>", *BYTES, "12", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["1 2", "a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(CHAT)


def _sentencepiece(writer) -> None:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *map(chr, range(97, 123)), "▁", "ab"]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * 4 + [-float(i) for i in range(len(tokens) - 4)])
    writer.add_token_types([3] * 4 + [1] * (len(tokens) - 4))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(4)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)


VOCABULARY = {"llama": len(BYTES) + 4, "gemma3": 32}


@pytest.mark.parametrize("architecture, tied", [("llama", True), ("llama", False), ("gemma3", True)])
def test_the_converted_model_is_the_same(tmp_path, architecture, tied):
    model = tiny(architecture, VOCABULARY[architecture], tied)
    write(tmp_path / "tiny.gguf", architecture, model)
    found, _ = glass_mlx.load(convert(tmp_path / "tiny.gguf", tmp_path / "out"), stats=False)
    tokens = mx.array([[5, 9, 17, 4, 30, 11, 8, 2, 25, 6, 19, 3]])  # longer than the sliding window
    assert mx.allclose(found.dense(tokens), model(tokens), rtol=1e-4, atol=1e-4)
    assert not mx.allclose(found.dense(tokens), model(tokens[:, ::-1]), rtol=1e-2, atol=1e-2)


def test_quantised_weights_and_the_dtype(tmp_path):
    model = tiny("llama", VOCABULARY["llama"])
    write(tmp_path / "tiny.gguf", "llama", model, quantised=True)
    found, _ = glass_mlx.load(convert(tmp_path / "tiny.gguf", tmp_path / "out", "float16"), stats=False)
    old, new = model.layers[1].mlp.down_proj.weight, found.layers[1].mlp.down_proj.weight
    assert new.dtype == mx.float16
    error = mx.abs(new - old).max().item()
    assert 1e-4 < error < 0.02  # eight bits


def test_the_byte_level_tokenizer(tmp_path):
    write(tmp_path / "tiny.gguf", "llama", tiny("llama", VOCABULARY["llama"]))
    _, tokenizer = glass_mlx.load(convert(tmp_path / "tiny.gguf", tmp_path / "out"), stats=False)
    text = "So, ab 12\n</s>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and ids[-1] == 1 and tokenizer.bos_token_id == 0
    assert tokenizer.encode("ab") == [VOCABULARY["llama"] - 1]
    assert len(tokenizer.encode("12")) == 2  # digits one by one, whatever the merges say
    assert tokenizer.eos_token_ids == {1}
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert rendered == "<s>ab</s>"


def test_the_sentencepiece_tokenizer(tmp_path):
    write(tmp_path / "tiny.gguf", "gemma3", tiny("gemma3", VOCABULARY["gemma3"]))
    _, tokenizer = glass_mlx.load(convert(tmp_path / "tiny.gguf", tmp_path / "out"), stats=False)
    ids = tokenizer.encode("ab c")
    assert [tokenizer.decode([i]) for i in ids] == ["<bos>", "ab", " ", "c"]
    assert not tokenizer.has_chat_template and tokenizer.eos_token_ids == {1, 4}


def test_the_origin_is_kept(tmp_path):
    write(tmp_path / "tiny.gguf", "llama", tiny("llama", VOCABULARY["llama"]))
    out = convert(tmp_path / "tiny.gguf", tmp_path / "my-tiny", base_model="somebody/tiny")
    model, _, config = glass_mlx.load(out, stats=False, return_config=True)
    assert describe(model)["original"] == "somebody/tiny"
    assert config["gguf"] == {"file": "tiny.gguf", "type": "Q8_0", "base_model": "somebody/tiny"}
    assert "dequantised Q8_0" in (out / "README.md").read_text()
    anonymous, _ = glass_mlx.load(convert(tmp_path / "tiny.gguf", tmp_path / "anonymous"), stats=False)
    assert describe(anonymous)["original"] == ""


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"split": "unheard-of"}, "splits texts as 'unheard-of'"),
        ({"scaling": gguf.RopeScalingType.YARN}, "rotary positions by 'yarn'"),
    ],
)
def test_what_cannot_be_converted(tmp_path, fields, message):
    write(tmp_path / "tiny.gguf", "llama", tiny("llama", VOCABULARY["llama"]), **fields)
    with pytest.raises(GlassError, match=message):
        convert(tmp_path / "tiny.gguf", tmp_path / "out")


def test_one_line_says_what_is_wrong(tmp_path, invoke, monkeypatch):
    bad, other = tmp_path / "bad.gguf", tmp_path / "other.gguf"
    bad.write_bytes(b"no such thing" * 9)
    write(other, "bloom", tiny("llama", VOCABULARY["llama"]))
    for file, message in ((bad, "is not a GGUF file"), (tmp_path / "none", "No such file"), (other, "'bloom'")):
        outcome = invoke(main, file, tmp_path / "out")
        assert outcome.code == 1 and message in outcome.err, outcome.err
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install -U gguf" in invoke(main, bad, tmp_path / "out").err
