"""Tiny randomly initialised models of every mlx-lm family.

They answer "does it work on this architecture?" in milliseconds and without a download. A config is made from the
family's own `ModelArgs`: each field with a known name gets a small value, and `_FAMILY` holds only what names cannot
tell.

On a CPU, `mx.disable_compile()` saves most of the time, because mlx-lm's compiled functions go through a C++ compiler
there.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import sys
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..model.randomness import random_state_kept

_PACKAGE = "mlx_lm.models"


class Unbuildable(Exception):
    """The family cannot be built or run on this machine. The message says why."""


# Small values by field name: two layers; four experts, two of them active, but a dense FFN in
# the first layer where a field says so; inputs of weights as multiples of 64, for quantisation.
_VALUES: dict[str, Any] = {
    name: value
    for value, names in {
        0: "altup_active_idx num_kv_shared_layers num_nextn_predict_layers",
        1: """altup_coef_clip attention_multiplier attention_out_multiplier decoder_sparse_step
            emb_split_num embedding_multiplier first_k_dense_replace key_multiplier
            lm_head_multiplier logit_scale logits_scaling mamba_n_groups moe_layer_freq
            moe_layer_interval moe_layer_start_index mup_width_multiplier n_group
            num_dense_layers num_expert_group num_kv_reuse_layers output_multiplier
            residual_multiplier routed_scaling_factor scale_depth scale_emb ssm_out_multiplier
            topk_group zero_expert_num""",
        2: """attn_layer_period block_ffn_dim_multiplier cla_share_factor conv_window
            dense_attention_every_n_layers emb_neighbor_num expert_layer_period
            full_attention_interval group_norm_size hc_mult hidden_dim_scale_factor
            index_n_heads layer_group_size linear_num_key_heads mamba_expand mamba_step moe_k
            moe_num_shared_experts moe_top_k moe_topk n_groups n_kv_heads n_layer n_layers
            n_shared_experts n_shared_head ngram_vocab_size_ratio no_rope_layer_interval
            num_attention_groups num_experts_per_tok num_experts_per_token
            num_global_key_value_heads num_hidden_layers num_key_value_heads num_kv_heads
            num_layers num_loops num_shared_expert num_shared_experts num_transformer_layers
            o_groups sliding_window_pattern swa_num_key_value_heads top_k_experts""",
        3: "conv_L_cache",
        4: """altup_num_inputs conv1d_width conv_kernel linear_conv_kernel_dim
            linear_num_value_heads mamba_d_conv mamba_n_heads mamba_num_heads moe_num_experts
            n_head n_heads n_routed_experts num_attention_heads num_experts num_heads
            num_local_experts num_query_heads short_conv_kernel_size swa_num_attention_heads""",
        16: """a_low_rank_dim attention_chunk_size attention_window_size decay_low_rank_dim
            gate_low_rank_dim head_dim hidden_size_per_head index_topk kv_channels laurel_rank
            linear_key_head_dim linear_value_head_dim mamba_d_head mamba_d_state mamba_head_dim
            qk_rope_head_dim query_pre_attn_scalar rotary_dim sliding_window sliding_window_size
            ssm_state_size state_size swa_head_dim swa_v_head_dim v_head_dim v_low_rank_dim
            window_size""",
        32: "block_multiple_of global_head_dim index_head_dim",
        64: """block_dim d_model dim_model_base expert_ffn_hidden_size ffn_dim_divisor hidden_dim
            hidden_size hidden_size_per_layer_input kv_lora_rank mamba_d_ssm model_dim
            moe_hidden_size moe_intermediate_size n_embd o_lora_rank q_lora_rank
            qk_nope_head_dim""",
        100: "embedding_size num_vocab vocab_size vocab_size_per_layer_input",
        128: """block_ff_dim block_size dense_intermediate_size ff_intermediate_size ffn_hidden_size
            intermediate_size intermediate_size_mlp max_position_embeddings mlp_hidden_size
            model_max_length moe_shared_expert_intermediate_size n_ctx n_inner n_positions
            original_max_position_embeddings share_expert_dim shared_expert_intermediate_size
            shared_intermediate_size""",
        1e4: "rope_freq_constant rope_local_base_freq rope_theta rotary_emb_base swa_rope_theta",
    }.items()
    for name in names.split()
}
_SLIDING_FULL = ["sliding_attention", "full_attention"]
_ROPE = {
    "rope_theta": 1e4,
    "rope_type": "default",
    **{layer_type: {"rope_theta": 1e4} for layer_type in _SLIDING_FULL},
}

# Values for fields without a default; flags and epsilons need none.
_REQUIRED: dict[str, Any] = {
    "activation_sparsity_pattern": [0.5, 0.0],
    "final_logit_softcapping": 30.0,
    "is_moe_layer": [False, True],
    "layer_types": _SLIDING_FULL,
    "logits_soft_cap": 30.0,
    "mlp_only_layers": [0],
    "norm_topk_prob": True,
    "partial_rotary_factor": 0.5,
    "rope_parameters": _ROPE,
    "rope_scaling": None,
    "rotary_pct": 0.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}

_ROPE_SCALING = {
    "type": "yarn",
    "factor": 2.0,
    "alpha": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}
_LONGCAT = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
_ROPE_SCALED = _ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
_CONV_FULL = {"layer_types": ["conv", "full_attention"]}
_NAS_BLOCK = {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}}
_LINEAR = {
    "linear_attn_config": {
        "num_heads": 4,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
        "kda_layers": [1],
    }
}

# What names cannot tell: layer patterns, nested settings, names that mean something else here.
_FAMILY: dict[str, dict[str, Any]] = {
    "baichuan_m1": {"sliding_window_layers": [0]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"rope_scaling": _ROPE_SCALING},
    "exaone4": {"sliding_window_pattern": "LG"},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": None},
    "hunyuan": {"rope_scaling": _ROPE_SCALING, "use_mixed_mlp_moe": True},
    "jamba": {"attn_layer_offset": 1, "expert_layer_offset": 1},
    "kimi_k3": _LINEAR,
    "kimi_linear": _LINEAR,
    "lfm2": _CONV_FULL,
    "lfm2_moe": _CONV_FULL,
    "llama4": {"interleave_moe_layer_step": 2, "num_experts_per_tok": 1, "num_hidden_layers": 4},
    "llama4_text": {"no_rope_layers": [1, 0]},
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": _LONGCAT,
    "mamba": {"time_step_rank": "auto"},
    "mamba2": {"time_step_rank": "auto", "time_step_limit": [0.001, 100.0]},
    "mellum": {"rope_parameters": _ROPE},
    "mimo_v2_flash": {"hybrid_layer_pattern": [1, 0], "moe_layer_freq": [0, 1]},
    "minicpm3": {"rope_scaling": _ROPE_SCALING},
    "minimax_m3_vl": {"moe_layer_freq": [0, 1]},
    "ministral3": {"rope_parameters": _ROPE_SCALED},
    "mistral4": {"rope_parameters": _ROPE_SCALED},
    "muse_spark": {"num_shared_experts": 0, "layer_rope_theta": [1e4, 0.0]},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {"block_configs": [_NAS_BLOCK] * 2},
    "nemotron_h": {"hybrid_override_pattern": "M*-E"},
    "olmo3": {"layer_types": _SLIDING_FULL},
    "openelm": {
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [2.0, 2.0],
    },
    "phi3small": {"gegelu_limit": 20.0},
    "prism_hadamard_qwen35": {
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {
                "path": "model.layers.0.mlp.down_proj",
                "embedding": False,
                "dtype": "float16",
                "block": 0,
            }
        ],
    },
    "qwen3_5": {"num_experts": 0},
    "qwen3_5_moe": {"num_experts": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
}

_METAL_ONLY = {"bitnet", "muse_spark"}


def _load(model_type: str) -> ModuleType:
    """Imports a family's module."""
    if model_type == "olmo":  # its import ends the process where that package is missing
        raise Unbuildable(
            "needs the ai2-olmo package, and fails in mlx-lm on any prompt of two tokens: "
            'its attention adds the mask, the string "causal", to an array'
        )
    return importlib.import_module(f"{_PACKAGE}.{model_type}")


def _text_args(module: ModuleType) -> type:
    """The class of a family's `text_config`: its own, its parent's or a sibling family's."""
    parents = [sys.modules[c.__module__] for c in module.Model.__mro__]
    for parent in parents:
        for name in ("TextArgs", "TextConfig", "TextModelArgs"):
            if hasattr(parent, name):
                return getattr(parent, name)
    return next(
        value.ModelArgs
        for value in vars(module).values()
        if isinstance(value, ModuleType) and hasattr(value, "ModelArgs")
    )


def _fill(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    """Values for the fields of a config class, `given` taking precedence."""
    config = {}
    for field in dataclasses.fields(cls):
        name = field.name
        required = field.default is field.default_factory is dataclasses.MISSING
        if name in given:
            config[name] = given[name]
        elif name in _VALUES:
            config[name] = _VALUES[name]
        elif not required:
            pass
        elif name in _REQUIRED:
            config[name] = _REQUIRED[name]
        elif "bool" in str(field.type):
            config[name] = False
        elif "eps" in name:
            config[name] = 1e-5
        else:
            raise Unbuildable(f"no small value is known for the field {name} of {cls.__module__}")
    return copy.deepcopy(config)


def tiny_config(model_type: str) -> dict[str, Any]:
    """A tiny config, as `config.json` would have it, that the family's `ModelArgs` accepts."""
    module = _load(model_type)
    given = {"model_type": model_type} | _FAMILY.get(model_type, {})
    if any(field.name == "text_config" for field in dataclasses.fields(module.ModelArgs)):
        text_args = _text_args(module)
        text_type = text_args.__module__.rpartition(".")[2]
        text = {"model_type": text_type} | _FAMILY.get(text_type, {}) | given
        given = given | {"text_config": _fill(text_args, text | {"model_type": text_type})}
    return _fill(module.ModelArgs, given)


def _enliven(model: nn.Module) -> None:
    """Replaces the parameters by float32 ones that are nowhere constant."""
    named, parameters = tree_flatten(model.parameters()), []
    bounds = mx.stack([bound(p).astype(mx.float32) for _, p in named for bound in (mx.min, mx.max)]).tolist()
    for (name, p), low, high in zip(named, bounds[::2], bounds[1::2]):
        shape, dtype = p.shape, p.dtype
        if not mx.issubdtype(dtype, mx.floating):
            if low == high:  # packed weights
                p = mx.random.randint(0, 2**8, (p.nbytes,)).astype(mx.uint8)
                p = p.view(dtype).reshape(shape)
        elif p.ndim > 1 and name.endswith("weight") and (low < high or low == 0):
            fan_in = shape[-1] if shape[-1] > 1 else math.prod(shape[1:])
            p = mx.random.normal(shape) * fan_in**-0.5
        else:
            p = p.astype(mx.float32)
            if low == high:  # norms, biases
                p += 0.1 * mx.random.normal(shape)
        parameters.append((name, p))
    model.update(tree_unflatten(parameters))


def tiny_model(model_type: str, seed: int = 0) -> nn.Module:
    """A tiny float32 model of a family, the same for the same seed.

    Its weights have unit gain and its norms and biases some noise, so that logits vary and
    every block matters.

    Raises:
        Unbuildable: The family needs something that this machine lacks.
    """
    if model_type in _METAL_ONLY and not mx.metal.is_available():
        raise Unbuildable("needs Metal: its kernels have no CPU version in mlx-lm")
    module = _load(model_type)
    args = module.ModelArgs.from_dict(tiny_config(model_type))
    with random_state_kept():
        mx.random.seed(seed)
        model = module.Model(args)
        _enliven(model)
        mx.eval(model.parameters())
    if hasattr(model, "_dummy_tokenizer_ids"):
        # phi3small masks tokens above 100256, for this vocabulary a write out of bounds.
        model._dummy_tokenizer_ids = mx.array([], dtype=mx.int32)
    return model.eval()
