"""The shapes of models that random weights can have (``shapes.py``)."""

from __future__ import annotations

from typing import Any

BITS = (4, 8, 16, 32)

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "rope_theta": 5e5}
_QWEN3 = {
    "model_type": "qwen3",
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1e6,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}

_GEMMA3 = {
    "model_type": "gemma3_text",
    "rms_norm_eps": 1e-6,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
}
_QWEN3_MOE = {
    **_QWEN3,
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
_GPT_OSS = {
    "model_type": "gpt_oss",
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rope_theta": 150000,
    "sliding_window": 128,
    "vocab_size": 201088,
}


def _shape(base: dict, hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return {**base, **sizes, "num_attention_heads": heads, "tie_word_embeddings": False, **more}


# From the models' own config.json on the Hub.
SHAPES = {
    "mistral-7b": _shape(_LLAMA, 4096, 14336, 32, 32, vocab_size=32768, rope_theta=1e6),
    "llama-3.1-8b": _shape(_LLAMA, 4096, 14336, 32, 32, vocab_size=128256),
    "llama-3.2-1b": _shape(_LLAMA, 2048, 8192, 16, 32, vocab_size=128256, tie_word_embeddings=True),
    "llama-3.2-3b": _shape(_LLAMA, 3072, 8192, 28, 24, vocab_size=128256, tie_word_embeddings=True),
    "qwen3-0.6b": _shape(_QWEN3, 1024, 3072, 28, 16, tie_word_embeddings=True),
    "qwen3-1.7b": _shape(_QWEN3, 2048, 6144, 28, 16, tie_word_embeddings=True),
    "qwen3-4b": _shape(_QWEN3, 2560, 9728, 36, 32, tie_word_embeddings=True),
    "qwen3-8b": _shape(_QWEN3, 4096, 12288, 36, 32),
    "qwen3-14b": _shape(_QWEN3, 5120, 17408, 40, 40),
    "gemma-3-4b": _shape(_GEMMA3, 2560, 10240, 34, 8, num_key_value_heads=4),
    "qwen3-30b-a3b": _shape(
        _QWEN3_MOE, 2048, 6144, 48, 32, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768
    ),
    "qwen3-235b-a22b": _shape(
        _QWEN3_MOE, 4096, 12288, 94, 64, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536
    ),
    "llama-3.3-70b": _shape(_LLAMA, 8192, 28672, 80, 64, vocab_size=128256),
    "gpt-oss-20b": _shape(_GPT_OSS, 2880, 2880, 24, 64, num_local_experts=32, num_experts_per_tok=4),
}
