"""The demo's model in PyTorch: a Llama, or with routed experts a Mixtral."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    """The fields of a ``config.json`` that differ between our models; without experts it is a Llama's."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 1024  # of one expert, where there are experts
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    num_local_experts: int = 0
    num_experts_per_tok: int = 0

    def to_json(self) -> dict:
        fields = asdict(self)
        if not self.num_local_experts:
            del fields["num_local_experts"], fields["num_experts_per_tok"]
        return {
            "architectures": ["MixtralForCausalLM" if self.num_local_experts else "LlamaForCausalLM"],
            "model_type": "mixtral" if self.num_local_experts else "llama",
            **fields,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        }


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(q, c.hidden_size, bias=False)

    def forward(self, x, cos, sin):
        B, L, _ = x.shape

        def heads(y, n, rotary):
            y = y.view(B, L, n, self.c.head_dim).transpose(1, 2)
            if not rotary:
                return y
            a, b = y.chunk(2, dim=-1)
            return y * cos + torch.cat((-b, a), dim=-1) * sin

        q = heads(self.q_proj(x), self.c.num_attention_heads, True)
        k = heads(self.k_proj(x), self.c.num_key_value_heads, True)
        v = heads(self.v_proj(x), self.c.num_key_value_heads, False)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, L, -1))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Routed experts: each token goes to a few of them, weighed by the softmax over the few (Mixtral's routing).

    After a forward pass ``balance`` is the load-balancing loss of its tokens: 1 where all experts get the same.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.active = c.num_experts_per_tok
        self.gate = nn.Linear(c.hidden_size, c.num_local_experts, bias=False)
        self.experts = nn.ModuleList(MLP(c) for _ in range(c.num_local_experts))
        self.balance = torch.tensor(0.0)

    def forward(self, x):
        tokens = x.flatten(0, -2)
        logits = self.gate(tokens).float()
        top, chosen = logits.topk(self.active, dim=-1)
        weights = top.softmax(-1).flatten()
        order = chosen.flatten().argsort()  # one stretch of rows for each expert
        counts = chosen.flatten().bincount(minlength=len(self.experts))
        stretches = tokens[order // self.active].split(counts.tolist())
        out = torch.cat([expert(rows) for expert, rows in zip(self.experts, stretches)])
        out = out * weights[order, None].to(out.dtype)
        shares = counts / counts.sum()
        self.balance = len(self.experts) * (shares * logits.softmax(-1).mean(0)).sum()
        return torch.zeros_like(out[: len(tokens)]).index_add(0, order // self.active, out).view_as(x)


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = Experts(c) if c.num_local_experts else MLP(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """Parameter names equal those of a Hugging Face Llama checkpoint without the ``model.`` prefix; experts are below
    ``mlp.experts``."""

    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(p)  # the residual stream starts as the embedding
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        freqs = c.rope_theta ** (-torch.arange(0, c.head_dim, 2).float() / c.head_dim)
        angles = torch.outer(torch.arange(c.max_position_embeddings).float(), freqs).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens):
        """Logits [B, L, vocabulary] of tokens [B, L] int64."""
        L = tokens.shape[1]
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, self.cos[:L], self.sin[:L])
        return F.linear(self.norm(x), self.embed_tokens.weight)

    def loss(self, tokens, reduction="mean"):
        """Cross-entropy in nats of ``tokens[:, 1:]`` given what precedes them; tokens [B, L] int64."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction)

    def balance(self):
        """The load-balancing loss of the last forward pass, a mean over the layers; 0 without experts."""
        losses = [layer.mlp.balance for layer in self.layers if isinstance(layer.mlp, Experts)]
        return sum(losses) / max(len(losses), 1)

    def published(self) -> dict:
        """The weights by the names of a Hugging Face checkpoint, Llama's or Mixtral's."""
        weights = {f"model.{k}": v for k, v in self.state_dict().items()}
        if self.c.num_local_experts:
            names = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
            for old, new in names.items():
                weights = {k.replace(old, new): v for k, v in weights.items()}
        return weights


def grow(weights: dict, layers: int) -> dict:
    """Deepen a checkpoint without changing what it computes: the added blocks, spread evenly, are
    copies of their predecessors with zero output projections."""
    old = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("layers."))
    if layers < old:
        sys.exit(f"--init has {old} layers, more than the {layers} asked for.")
    source = [i * old // layers for i in range(layers)]
    grown = {k: v for k, v in weights.items() if not k.startswith("layers.")}
    for new, i in enumerate(source):
        copied = new > 0 and source[new - 1] == i
        for k, v in weights.items():
            if k.startswith(f"layers.{i}."):
                zero = copied and ("o_proj" in k or "down_proj" in k)
                name = k.replace(f"layers.{i}.", f"layers.{new}.")
                grown[name] = torch.zeros_like(v) if zero else v.clone()
    return grown


def split_into_experts(weights: dict, c: Config) -> dict:
    """Make the experts of ``c`` of a checkpoint's dense FFNs: each gets neurons of its layer's FFN, drawn at random,
    which the router's weight of about 1 / active lets count in full. Routers are left to their initial values."""
    made = {k: v for k, v in weights.items() if ".mlp." not in k}
    for layer in range(c.num_hidden_layers):
        old = f"layers.{layer}.mlp."
        gate, up, down = (weights[f"{old}{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj"))
        for expert in range(c.num_local_experts):
            drawn, new = torch.randperm(len(gate))[: c.intermediate_size], f"{old}experts.{expert}."
            made[f"{new}gate_proj.weight"] = gate[drawn]
            made[f"{new}up_proj.weight"] = up[drawn]
            made[f"{new}down_proj.weight"] = down[:, drawn] * c.num_experts_per_tok
    return made
