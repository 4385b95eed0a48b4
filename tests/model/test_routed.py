"""Tests of routed experts as blocks: what they have beyond dense ones, which ``test_glass_model.py`` tests in every
family."""

from __future__ import annotations

import copy
import importlib
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU

from glass_mlx import GlassConfig, GlassModel
from glass_mlx.core.importance import dense_weight
from glass_mlx.core.ranking import rank_by_expert
from glass_mlx.core.slicing import ScatterLinear
from glass_mlx.evaluation.tiny_models import tiny_config, tiny_model
from glass_mlx.model.blocks import Block, by_token, hooked, run_with
from glass_mlx.model.discovery import check, find_blocks

PROMPT = [3, 14, 15, 9, 26, 5, 35]
SPARSE = GlassConfig(experts="sparse")
LONG = [(7 * i) % 97 for i in range(60)]  # so many that mlx-lm sorts them by expert


@pytest.fixture(scope="module")
def mixtral() -> GlassModel:
    return GlassModel(tiny_model("mixtral"), SPARSE)


def prefilled(model: GlassModel, prompt: list[int] = PROMPT, chunk: int = 1000, **config) -> list:
    cache = model.make_cache(**config)
    for i in range(0, len(prompt), chunk):
        mx.eval(model.prefill(mx.array([prompt[i : i + chunk]]), cache))
    return cache


def energies(model: GlassModel, cache: list) -> list[np.ndarray]:
    """The energies of a session by block, [E, F / E]."""
    parts = np.split(np.array(model.session(cache).energy), np.cumsum([b.size for b in model.blocks])[:-1])
    return [part.reshape(block.experts or 1, -1) for part, block in zip(parts, model.blocks)]


def masked_logits(model: GlassModel, cache: list, tokens: list[int]) -> mx.array:
    """The dense model's logits after a prompt, with the hidden values of the neurons that were dropped zeroed."""
    masks = [
        mx.zeros((block.size,)).at[kept].add(1.0)
        for block, kept in zip(model.blocks, model.kept_neurons(cache).values())
    ]
    hooks = hooked(model.blocks, lambda i, h, *of: h * model.blocks[i].beside(masks[i], *of).astype(h.dtype))
    return run_with(hooks, model.dense, mx.array([tokens]), cache=copy.deepcopy(cache[:-1]))


def close(a: mx.array, b: mx.array, tolerance: float = 1e-4) -> bool:
    return mx.max(mx.abs(a - b)).item() <= tolerance * mx.max(mx.abs(b)).item()


def assert_masked_dense(model: GlassModel, prompt: list[int] = PROMPT, **config) -> None:
    cache = prefilled(model, prompt, compensation=False, **config)
    expected = masked_logits(model, cache, [8, 97, 9])
    model.select(cache)
    assert close(model.decode(mx.array([[8, 97, 9]]), cache), expected)


# Which neurons are kept


def test_as_many_of_every_expert_are_kept(mixtral):
    for density, k in ((0.5, 64), (0.3, 38)):
        for kept in mixtral.kept_neurons(prefilled(mixtral, density=density)).values():
            assert kept.reshape(4, k).tolist() == np.sort(kept).reshape(4, k).tolist()
            assert (np.array(kept).reshape(4, k) // 128 == np.arange(4)[:, None]).all()


def test_energies_by_hand(mixtral):
    """Each hidden vector counts for the expert that computed it, half of a token for each of two."""
    block, seen = mixtral.blocks[0], []
    run_with(hooked([block], lambda _, *shown: seen.append(shown)), mixtral.dense, mx.array([PROMPT]))
    ((hidden, experts),) = seen
    norms = np.linalg.norm(np.array(block.module.down_proj.weight), axis=1)
    expected = np.zeros((4, 128))
    for h, expert in zip(np.array(hidden).reshape(-1, 128), np.array(experts).reshape(-1)):
        g = h * norms[expert]
        expected[expert] += (g / np.linalg.norm(g)) ** 2 / 2
    assert expected.sum() == pytest.approx(len(PROMPT))
    np.testing.assert_allclose(energies(mixtral, prefilled(mixtral))[0], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "llama4"])
def test_sorted_by_expert_or_not_is_the_same_evidence(family):
    model = GlassModel(tiny_model(family), SPARSE)
    for whole, chunked in zip(*(energies(model, prefilled(model, LONG, chunk)) for chunk in (len(LONG), 7))):
        np.testing.assert_allclose(whole, chunked, rtol=1e-3, atol=1e-6)
    assert_masked_dense(model, LONG)


def test_hidden_vectors_by_token(mixtral):
    """In the order of the tokens, whatever order they are computed in; what an observer returns goes back to it."""

    def tokens(model: GlassModel, n: int) -> tuple[mx.array, mx.array]:
        seen: list = []

        def observe(_: int, h: mx.array, experts: mx.array) -> mx.array:
            seen[:] = h, experts
            return h * mx.where(mx.arange(n)[:, None, None, None] == n - 1, 2, 1)  # of the last token

        logits = run_with(by_token(model.blocks[:1], observe), model.dense, mx.array([LONG[:n]]))
        return seen[0], seen[1], logits

    assert 2 * 20 < 64 <= 2 * 50
    few, many = tokens(mixtral, 20), tokens(mixtral, 50)
    assert few[0].shape == (1, 20, 2, 1, 128) and few[1].shape == (1, 20, 2)
    assert mx.array_equal(many[1][:, :20], few[1]) and close(many[0][:, :20], few[0])
    assert close(many[2][:, :49], mixtral.dense(mx.array([LONG[:49]])))
    assert not close(many[2][:, 49:], mixtral.dense(mx.array([LONG[:50]]))[:, 49:], tolerance=1e-2)


class Avoiding(nn.Module):
    """A router that sends nothing to the last expert."""

    def __init__(self, gate: nn.Module):
        super().__init__()
        self.gate = gate

    def __call__(self, x: mx.array) -> mx.array:
        return self.gate(x) - 1e4 * (mx.arange(4) == 3)


def ranks(model: GlassModel) -> dict[str, list[mx.array]]:
    rng = np.random.default_rng(5)
    made = [rank_by_expert(mx.array(rng.random(b.size).astype(np.float32)), b.experts) for b in model.blocks]
    return {"impact": made, "activation": made}


def test_an_expert_that_saw_nothing_of_the_prompt():
    """Global ranks decide, or any neurons are kept."""
    model = GlassModel(tiny_model("mixtral"), SPARSE)
    for layer in model.dense.layers:
        layer.block_sparse_moe.gate = Avoiding(layer.block_sparse_moe.gate)
    cache = prefilled(model)
    assert all(e[3].sum() == 0 < e[:3].sum() for e in energies(model, cache))
    assert all(kept.shape == (4 * 64,) for kept in model.kept_neurons(cache).values())
    assert_masked_dense(model)
    model.set_global_ranks(ranks(model))
    for weight in (0, 0.5, 1, "auto"):
        kept = model.kept_neurons(prefilled(model, global_weight=weight)).values()
        for own, rank in zip(kept, model.global_ranks["impact"]):
            best = np.flatnonzero(np.array(rank)[3 * 128 :] <= 64)
            assert (np.array(own)[3 * 64 :] - 3 * 128).tolist() == best.tolist()


# Quantised weights


@pytest.mark.few(7)
@pytest.mark.parametrize(
    "quantisation",
    [
        {"group_size": 64, "bits": 4},
        {"group_size": 128, "bits": 3},
        {"group_size": 64, "bits": 8},
        {"group_size": 32, "bits": 4},
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    ],
    ids=lambda q: "-".join(map(str, q.values())),
)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_quantised(name, quantisation):
    dense = tiny_model(name)
    group = quantisation["group_size"]
    fits = lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % group == 0  # noqa: E731
    nn.quantize(dense, **quantisation, class_predicate=fits)
    model = GlassModel(dense, SPARSE)
    assert_masked_dense(model)
    assert_masked_dense(model, LONG)
    cache = prefilled(model)
    model.select(cache)
    compact, block = model.session(cache).compact.projections[0], model.blocks[0]
    down = compact["down_proj"]
    assert type(down) is (QuantizedSwitchLinear if group > 32 else ScatterLinear)
    if group == 32:  # the projection stays whole
        return
    kept = np.array(model.kept_neurons(cache)[block.path]).reshape(4, -1) % block.width
    whole = {name: np.array(dense_weight(block.module[name])) for name in block.names}
    for expert, own in enumerate(kept):
        assert np.array_equal(dense_weight(compact["up_proj"])[expert], whole["up_proj"][expert][own])
        assert np.array_equal(dense_weight(down)[expert], whole["down_proj"][expert][:, own])


# Finding them


class Normalised(SwitchGLU):
    """Each hidden vector is normalised over its neurons."""

    def __call__(self, x, indices):
        x = mx.expand_dims(x, (-2, -3))
        h = mx.fast.rms_norm(self.activation(self.up_proj(x, indices), self.gate_proj(x, indices)), None, 1e-5)
        return self.down_proj(h, indices).squeeze(-2)


@pytest.mark.parametrize(("kind", "reason"), [(SwitchGLU, ""), (Normalised, "its neurons are not independent")])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_check(kind, reason, dtype):
    """In float32, which MLX's CPU backend has experts in, whatever their own type is."""
    module = kind(16, 64, 6)
    module.set_dtype(dtype)
    found = check(Block("experts", module, ("gate_proj", "up_proj"), "down_proj", 6 * 64, experts=6))[1]
    assert found.startswith(reason) if reason else found == ""


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gemma4_text", {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}),
        ("granitemoehybrid", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_families_with_and_without_experts(family, fields):
    module = importlib.import_module(f"mlx_lm.models.{family}")
    model = module.Model(module.ModelArgs.from_dict(tiny_config(family) | fields))
    model.set_dtype(mx.float32)
    blocks, left = find_blocks(model)
    assert not left and [(b.experts, b.active) for b in blocks] == [(0, 1), (4, 2)] * 2


def test_how_many_experts_a_token_is_sent_to():
    """As the family's own code says, in any number; all where its code fails."""
    dense = tiny_model("mixtral")
    for layer, k in zip(dense.layers, (1, 3)):
        layer.block_sparse_moe.num_experts_per_tok = k
    assert [block.active for block in find_blocks(dense)[0]] == [1, 3]
    dense.model.embed_tokens = None
    assert [block.active for block in find_blocks(dense)[0]] == [4, 4]


# Prompt caches and memory


def test_a_saved_conversation_goes_on(mixtral, tmp_path):
    cache = prefilled(mixtral)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))

    def say(cache: list) -> list[int]:
        return [int(t) for t, _ in generate_step(mx.array([8, 9]), mixtral, max_tokens=5, prompt_cache=cache)]

    assert say(loaded) == say(cache)


def test_low_memory(tmp_path, caplog):
    """Routed experts are let go of like dense blocks, and read again."""
    dense, config = tiny_model("mixtral"), tiny_config("mixtral")
    (tmp_path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(dense.parameters())))
    said = []
    for low_memory in (False, True):
        model = GlassModel(tiny_model("mixtral"), SPARSE, path=tmp_path, low_memory=low_memory)
        cache = model.make_cache()
        turns = [
            [int(t) for t, _ in generate_step(mx.array(p), model, max_tokens=4, prompt_cache=cache)]
            for p in (PROMPT, [8])
        ]
        said.append(turns)
    assert said[0] == said[1]
    assert "all of them stay there" not in caplog.text


# Left dense


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_experts_that_stay_dense(family):
    """They keep all their neurons and decode with their own weights; the density holds for the other blocks."""
    model = GlassModel(tiny_model(family), GlassConfig(experts="dense"))
    assert_masked_dense(model)
    cache = prefilled(model, layer_budgets="uniform")
    for block, kept in zip(model.blocks, model.kept_neurons(cache).values()):
        assert kept.size == (block.size if block.experts else block.size / 2)
    model.select(cache)
    projections = model.session(cache).compact.projections
    assert [bool(compact) for compact in projections] == [not block.experts for block in model.blocks]


def test_a_model_with_nothing_but_dense_experts_is_dense(mixtral):
    config = mixtral.config.updated(experts="dense")
    assert mixtral.keeps_all(config) and not mixtral.keeps_all(mixtral.config)
    cache, own = prefilled(mixtral, experts="dense"), mixtral.make_cache()[:-1]
    mixtral.dense(mx.array([PROMPT]), cache=own)
    mixtral.select(cache)
    assert mx.array_equal(mixtral.decode(mx.array([[8]]), cache), mixtral.dense(mx.array([[8]]), cache=own))
    assert not mixtral.session(cache).compact and not mixtral.session(cache).pending_reread


def test_experts_change_within_a_conversation(mixtral):
    cache = prefilled(mixtral, experts="dense")
    mixtral.session(cache).configure(experts="sparse")
    assert_equal_kept(mixtral, cache, prefilled(mixtral))


def assert_equal_kept(model: GlassModel, *caches: list) -> None:
    first, second = (model.kept_neurons(cache).values() for cache in caches)
    assert all(mx.array_equal(a, b) for a, b in zip(first, second, strict=True))
