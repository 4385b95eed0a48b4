"""Make an mlx-lm model directory from a GGUF file of the architectures ``llama`` and ``gemma3``.

    python -m glass_mlx.evaluation.from_gguf model-Q4_K_M.gguf DIR --base-model OWNER/NAME

Small models come as GGUF files where the Hub is out of reach. The weights are dequantised by ggml's own package
(``pip install gguf``); the tokenizer is the one that transformers makes of the file's vocabulary. ``--base-model`` goes
into the model card, by which global ranks are found for other conversions of the same model.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import save_config, save_model
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..errors import GlassError

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

# mlx-lm's model of each architecture, and its names of the tensors. Those of layers are below model.layers.N.
_MODEL_TYPES = {"llama": "llama", "gemma3": "gemma3_text"}
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    **{"attn_norm": "input_layernorm", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}
_NORMS = {
    "llama": {"ffn_norm": "post_attention_layernorm"},
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}

# llama.cpp's names of ways to split a text before byte-level BPE that transformers does not know.
_PLAIN_SPLITS = {"gpt-2", "default", "phi-2", "mpt", "olmo", "roberta-bpe"}
_DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r"}  # digits one by one


def convert(file: str | Path, out: str | Path, dtype: str = "float32", base_model: str | None = None) -> Path:
    """Make a model directory.

    Args:
        file (str or Path): the GGUF file.
        out (str or Path): the directory.
        dtype (str): of the weights, a key of ``DTYPES``.
        base_model (str, optional): the Hub repository, owner/name, that the file was made from.

    Returns:
        Path: the directory.

    Raises:
        GlassError: the package ``gguf`` is missing, the file cannot be read, or the model in it is of another kind.
    """
    (gguf, vocabularies), out = _packages(), Path(out)
    try:
        reader = gguf.GGUFReader(file)
    except (OSError, ValueError, IndexError) as e:
        raise GlassError(f"{file} is not a GGUF file that can be read: {e}") from e
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture not in _MODEL_TYPES:
        raise GlassError(f"{file} holds a model of {architecture!r}: give one of {', '.join(_MODEL_TYPES)}.")
    try:
        weights = _weights(gguf, reader, architecture, fields, DTYPES[dtype])
        config = _config(architecture, fields, weights, dtype)
        tokenizer = _tokenizer(vocabularies, architecture, fields)
    except KeyError as e:
        raise GlassError(f"{file} lacks {e}: give a whole model with its tokenizer.") from e
    config["gguf"] = {"file": Path(file).name, "type": _file_type(gguf, fields), "base_model": base_model or ""}
    try:
        save_model(out, _filled(config, weights))
        save_config(config, out / "config.json")
        tokenizer.save_pretrained(out)
        (out / "README.md").write_text(_card(fields, config["gguf"]), encoding="utf-8")
    except OSError as e:
        raise GlassError(f"Cannot write {out}: {e}") from e
    return out


def _packages() -> tuple[Any, Any]:
    """ggml's package, and transformers' module of vocabularies in GGUF files, which its older versions lack."""
    try:
        import gguf
        from transformers.integrations.gguf import gguf_tokenizer_mapping
    except ImportError as e:
        raise GlassError(f"Reading GGUF files needs more packages ({e}): pip install -U gguf transformers") from e
    return gguf, gguf_tokenizer_mapping


def _file_type(gguf: Any, fields: dict[str, Any]) -> str:
    """Such as ``Q4_K_M``; most tensors are of that type."""
    try:
        return gguf.LlamaFileType(fields["general.file_type"]).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except (KeyError, ValueError):
        return "unknown"


def _weights(gguf: Any, reader: Any, architecture: str, fields: dict[str, Any], dtype: mx.Dtype) -> dict[str, mx.array]:
    """The tensors by mlx-lm's names, dequantised."""
    heads = fields[f"{architecture}.attention.head_count"]
    heads_of = {"attn_q": heads, "attn_k": fields.get(f"{architecture}.attention.head_count_kv", heads)}
    weights = {}
    for tensor in reader.tensors:
        layer, name, kind = _split(tensor.name)
        if name == "rope_freqs":
            raise GlassError("The file scales rotary frequencies as Llama 3.1 does, which this cannot convert.")
        new = (_TENSORS | _NORMS[architecture]).get(name)
        if new is None:
            raise GlassError(f"The file has a tensor {tensor.name}, which this cannot convert: give a plain model.")
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as e:
            raise GlassError(f"{tensor.name}: {e}: give a file of another type, such as Q4_K_M.") from e
        if architecture == "llama" and name in heads_of:
            values = _halves(values, heads_of[name])
        elif architecture == "gemma3" and name.endswith("norm"):
            values = values - 1  # the file has the whole factor, mlx-lm's model adds 1
        weights[f"{layer}{new}.{kind}"] = mx.array(values).astype(dtype)
        mx.eval(weights[f"{layer}{new}.{kind}"])
    return weights


def _split(name: str) -> tuple[str, str, str]:
    """``blk.3.attn_q.weight`` as ``model.layers.3.``, ``attn_q``, ``weight``."""
    *block, name, kind = name.split(".")
    return f"model.layers.{block[1]}." if block else "", name, kind


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows of query or key weights with the halves of each head one after the other, as rotary embeddings want them
    here; llama.cpp has them interleaved."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _config(architecture: str, fields: dict[str, Any], weights: dict[str, mx.array], dtype: str) -> dict[str, Any]:
    """What mlx-lm's config.json says."""
    own = {name.removeprefix(f"{architecture}."): value for name, value in fields.items()}
    heads, hidden = own["attention.head_count"], own["embedding_length"]
    head_dim = own.get("attention.key_length", hidden // heads)
    config = {
        "model_type": _MODEL_TYPES[architecture],
        "hidden_size": hidden,
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _short(own["attention.layer_norm_rms_epsilon"]),
        "rope_theta": own.get("rope.freq_base", 1e6 if architecture == "gemma3" else 1e4),
        "max_position_embeddings": own["context_length"],
        "vocab_size": weights["model.embed_tokens.weight"].shape[0],
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "torch_dtype": dtype,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(fields),
    }
    scaling = own.get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise GlassError(f"The file scales rotary positions by {scaling!r}, which this cannot convert.")
    if scaling == "linear":
        config["rope_scaling"] = {"rope_type": scaling, "factor": own["rope.scaling.factor"]}
    if architecture == "llama":
        config["attention_bias"] = any(name.endswith("q_proj.bias") for name in weights)
    else:
        config["rope_local_base_freq"] = own.get("rope.freq_base_swa", 1e4)
        config["sliding_window"] = own["attention.sliding_window"]
        config["sliding_window_pattern"] = 6  # files do not say it; all sizes have it
        # the largest of them scales by another number than the width of its heads
        config["query_pre_attn_scalar"] = hidden // heads if own["block_count"] == 62 else head_dim
    return config


def _short(value: float) -> float:
    """A float32 as the shortest decimal number that is the same one: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _end_tokens(fields: dict[str, Any]) -> list[int]:
    """The tokens that end a text, a turn or a message."""
    ends = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(token for token in ends if token is not None))


def _filled(config: dict[str, Any], weights: dict[str, mx.array]) -> nn.Module:
    """mlx-lm's model with these weights."""
    family = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = family.Model(family.ModelArgs.from_dict(config))
    weights = model.sanitize(weights)
    try:
        model.load_weights(list(weights.items()), strict=True)
    except ValueError as e:
        raise GlassError(f"The file's tensors are not those of {config['model_type']}: {str(e).splitlines()[0]}") from e
    mx.eval([value for _, value in tree_flatten(model.parameters())])
    return model


def _tokenizer(vocabularies: Any, architecture: str, fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that transformers makes of the file's vocabulary, with its chat template."""
    keys = vocabularies.GGUF_TOKENIZER_MAPPING["tokenizer"]
    described = {new: fields[f"tokenizer.{key}"] for key, new in keys.items() if f"tokenizer.{key}" in fields}
    tokens = fields["tokenizer.ggml.tokens"]
    backend, _ = vocabularies.convert_gguf_tokenizer(architecture, described)
    if described["tokenizer_type"] == "gpt2":
        name = described.get("pre_tokenizer_type", "default")
        if name not in vocabularies.GGUF_PRE_TOKENIZER_SPLITS:
            backend.pre_tokenizer = _split_by(name)
    numbers = {
        f"{name}_token": fields.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    special = {name: tokens[number] for name, number in numbers.items() if number is not None}
    adds_bos = fields.get("tokenizer.ggml.add_bos_token", described["tokenizer_type"] == "llama")
    flags = {"add_bos_token": adds_bos, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special, **flags)
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def _split_by(name: str) -> pre_tokenizers.PreTokenizer:
    """What splits texts as the vocabulary's merges were learned, by llama.cpp's name."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _PLAIN_SPLITS:
        return words
    if name in _DIGIT_SPLITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    raise GlassError(f"The file's tokenizer splits texts as {name!r}, which this cannot convert.")


def _card(fields: dict[str, Any], origin: dict[str, str]) -> str:
    """A model card: what the model was converted from."""
    metadata = {"license": fields.get("general.license"), "library_name": "mlx"}
    if origin["base_model"]:
        metadata |= {"base_model": origin["base_model"], "base_model_relation": "quantized"}
    head = "".join(f"{name}: {json.dumps(value)}\n" for name, value in metadata.items() if value)
    name = origin["base_model"] or fields.get("general.name", "A model")
    return f"---\n{head}---\n\n{name}, dequantised {origin['type']} from `{origin['file']}`.\n"


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glass_mlx.evaluation.from_gguf", description="Make an mlx-lm model directory from a GGUF file."
    )
    parser.add_argument("file", metavar="FILE.gguf", help="a model of the architecture llama or gemma3")
    parser.add_argument("out", metavar="DIR", help="the directory to make")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--base-model", metavar="OWNER/NAME", help="the Hub repository that the file was made from")
    return parser


def main() -> None:
    args = setup_arg_parser().parse_args()
    try:
        print(f"wrote {convert(args.file, args.out, args.dtype, args.base_model)}")
    except GlassError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
