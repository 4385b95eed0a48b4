"""Tests of the measuring: it equals decoding token by token, and its figures are what they say."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

import glass_mlx
from glass_mlx import GlassConfig, stream_generate
from glass_mlx.core.importance import SIGNALS
from glass_mlx.core.metrics import kl_divergence
from glass_mlx.evaluation import teacher_forcing
from glass_mlx.evaluation.free_running import readability, sample_continuations, self_nll
from glass_mlx.evaluation.selectors import (
    Evidence,
    by_chance,
    by_magnitude,
    by_oracle,
    by_session,
    magnitude,
    standard_selectors,
)
from glass_mlx.evaluation.teacher_forcing import TextBatch, as_masks, collect_evidence, score_selectors, teacher_forced
from glass_mlx.evaluation.tiny_models import tiny_model
from glass_mlx.loading import DEMO_PATH, load_dense
from glass_mlx.ranks.format import GlobalStatistics
from glass_mlx.ranks.lookup import STATS_DIR

PROMPTS = [[1, 300, 400, 500, 600], [1, 7], [1, 900, 31, 31, 2000, 77, 8, 9]]
CONTINUATIONS = [[12, 700, 41, 5, 99, 3000], [8, 8, 1500, 23, 610, 4], [444, 10, 32, 2, 1, 650]]

# What decoding can do by itself.
CONFIGS = {
    "griffin": GlassConfig(0.4, 0.0, "activation", layer_budgets="uniform"),
    "static": GlassConfig(0.4, 1.0, layer_budgets="uniform"),
    "glass-a": GlassConfig(0.4, 0.5, "activation", layer_budgets="uniform"),
    "glass-i": GlassConfig(0.4, 0.5, layer_budgets="uniform"),
    "glass-uniform": GlassConfig(0.4, layer_budgets="uniform"),
    "glass": GlassConfig(0.4),
}


def decoded(model, prompt: list[int], said: list[int], config: GlassConfig) -> tuple[mx.array, list[mx.array]]:
    """Logits of a continuation as decoding computes them, and the neurons that it keeps."""
    cache = model.make_cache(**vars(config))
    logits = [model.prefill(mx.array([prompt]), cache)[0, -1]]
    model.select(cache)
    for token in said[:-1]:
        logits.append(model.decode(mx.array([[token]]), cache)[0, -1])
        mx.eval(logits[-1])
    return mx.stack(logits), list(model.kept_neurons(cache).values())


def assert_equals_decoding(model, selector, config: GlassConfig) -> None:
    batch = TextBatch(PROMPTS, CONTINUATIONS)
    evidence, _ = collect_evidence(model, batch)
    evidence.density = config.density
    kept = selector(evidence)
    masks = as_masks(model, kept)
    logits = batch.predictions(teacher_forced(model, batch, masks))
    for b, (prompt, said) in enumerate(zip(PROMPTS, CONTINUATIONS)):
        expected, neurons = decoded(model, prompt, said, config)
        for mine, its in zip(kept, neurons):
            np.testing.assert_array_equal(mine[b], its)
        np.testing.assert_allclose(logits[b], expected, atol=2e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_teacher_forcing_equals_decoding_token_by_token(exact, name):
    assert_equals_decoding(exact[0], standard_selectors([0.5])[name], CONFIGS[name])


@pytest.mark.parametrize("name", ["griffin", "glass"])
def test_where_neurons_are_kept_in_units(name):
    dense, _, _ = load_dense(DEMO_PATH)
    nn.quantize(dense, group_size=64, bits=4)
    dense.set_dtype(mx.float32)
    model = glass_mlx.wrap(dense, stats=False)
    GlobalStatistics.read(STATS_DIR / "demo.safetensors").use_in(model)
    assert model.blocks[0].group == 64
    assert_equals_decoding(model, standard_selectors([0.5])[name], CONFIGS[name])


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gemma3_text"])
def test_other_families(family):
    model = glass_mlx.wrap(tiny_model(family))
    prompts, said = [[1, 2, 3], [5, 4, 3, 2, 6]], [[7, 8, 9], [3, 3, 1]]
    batch = TextBatch(prompts, said)
    evidence, _ = collect_evidence(model, batch)
    evidence.density = 0.5
    kept = by_session("activation", 0.0)(evidence)
    masks = as_masks(model, kept)
    logits = batch.predictions(teacher_forced(model, batch, masks))
    for b in range(2):
        expected, _ = decoded(model, prompts[b], said[b], GlassConfig(0.5, 0.0, "activation"))
        np.testing.assert_allclose(logits[b], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("signal", SIGNALS)
def test_evidence_is_what_a_session_records(exact, signal):
    model, _ = exact
    evidence, _ = collect_evidence(model, TextBatch(PROMPTS, CONTINUATIONS))
    for b, prompt in enumerate(PROMPTS):
        cache = model.make_cache(signal=signal)
        mx.eval(model.prefill(mx.array([prompt]), cache))
        mine = mx.concatenate([e[b] for e in evidence.local[signal]])
        np.testing.assert_allclose(mine, model.session(cache).energy, rtol=1e-3, atol=1e-5)
    for energy, oracle in zip(evidence.local[signal], evidence.oracle[signal]):
        np.testing.assert_allclose(energy.sum(axis=1), [len(p) for p in PROMPTS], rtol=1e-4)
        np.testing.assert_allclose(oracle.sum(axis=1), [len(s) - 1 for s in CONTINUATIONS], rtol=1e-4)


def test_figures_equal_a_plain_computation(exact):
    model, _ = exact
    result = score_selectors(
        model, PROMPTS, CONTINUATIONS, {"griffin": standard_selectors([])["griffin"], "oracle": by_oracle}, [0.4, 1.0]
    )
    assert set(result) == {"dense", "griffin", "oracle"} and set(result["griffin"]) == {0.4, 1.0}
    assert not result["dense"][1.0].kl.any() and result["dense"][1.0].agree.all()
    np.testing.assert_allclose(result["griffin"][1.0].nll, result["dense"][1.0].nll, atol=1e-4)
    assert (result["oracle"][0.4].jaccard == 1).all()

    scores = result["griffin"][0.4]
    for b, (prompt, said) in enumerate(zip(PROMPTS, CONTINUATIONS)):
        p, q = (
            np.array(nn.log_softmax(decoded(model, prompt, said, config)[0]), np.float64)
            for config in (GlassConfig(1.0), CONFIGS["griffin"])
        )
        np.testing.assert_allclose(scores.nll[b], -q[np.arange(len(said)), said], atol=2e-3)
        np.testing.assert_allclose(scores.kl[b], (np.exp(p) * (p - q)).sum(axis=-1), atol=2e-3)
        assert (scores.agree[b] == (p.argmax(axis=-1) == q.argmax(axis=-1))).all()
    best = result["oracle"][0.4].kept
    k, o = set(np.flatnonzero(scores.kept[2][1])), set(np.flatnonzero(best[2][1]))
    assert scores.jaccard[1, 2] == pytest.approx(len(k & o) / len(k | o))


def test_batches_make_no_difference(exact, monkeypatch):
    model, _ = exact
    selectors = {"random": by_chance, "glass": by_session("impact", "auto")}
    together = score_selectors(model, PROMPTS, CONTINUATIONS, selectors, [0.5])
    monkeypatch.setattr(teacher_forcing, "_MAX_LOGITS", 2 * 4096 * 14)
    done = []
    apart = score_selectors(model, PROMPTS, CONTINUATIONS, selectors, [0.5], progress=done.append)
    assert done == [2, 1]
    np.testing.assert_allclose(apart["glass"][0.5].kl, together["glass"][0.5].kl, atol=1e-4)
    assert all((a == t).all() for a, t in zip(apart["glass"][0.5].kept, together["glass"][0.5].kept))


def test_divergence_of_the_same_is_zero():
    logits = 30 * mx.random.normal((5, 1000))
    assert not mx.any(kl_divergence(logits, logits)).item()
    assert mx.all(kl_divergence(logits, logits[::-1])[:2] > 0).item()


def evidence_of(model, density: float) -> Evidence:
    energies = {s: [mx.random.uniform(shape=(2, block.size)) for block in model.blocks] for s in SIGNALS}
    return Evidence(model, density, PROMPTS[:2], energies, energies)


def test_selectors_keep_what_the_density_says(exact):
    model, _ = exact
    for density in (0.3, 1.0):
        evidence = evidence_of(model, density)
        for name, selector in standard_selectors([0.2, 0.8]).items():
            budgets = "measured" if name == "glass" else "uniform"
            assert [k.shape for k in selector(evidence)] == [(2, k) for k in model.kept_counts(density, budgets)]


def test_chance_differs_from_prompt_to_prompt(tiny):
    evidence = evidence_of(tiny[0], 0.5)
    kept, again = by_chance(evidence), by_chance(evidence)
    assert mx.array_equal(kept[0], again[0]) and not mx.array_equal(kept[0][0], kept[0][1])
    evidence.first = 2
    assert not mx.array_equal(by_chance(evidence)[0], kept[0])


def test_magnitude(tiny):
    block = tiny[0].blocks[1]
    norms = [np.linalg.norm(np.array(block.module[name].weight), axis=1) for name in block.inputs]
    expected = norms[0] * norms[1] * np.linalg.norm(np.array(block.module[block.output].weight), axis=0)
    np.testing.assert_allclose(magnitude(block), expected, rtol=1e-5)
    kept = by_magnitude(evidence_of(tiny[0], 0.5))[1]
    assert set(kept[0].tolist()) == set(np.argsort(-expected)[:48].tolist())


def test_magnitude_of_a_fused_projection():
    block = glass_mlx.wrap(tiny_model("phi3")).blocks[0]
    assert block.fused == "halves"
    weight = np.array(block.module[block.inputs[0]].weight)
    norms = np.linalg.norm(weight, axis=1).reshape(2, -1).prod(axis=0)
    expected = norms * np.linalg.norm(np.array(block.module[block.output].weight), axis=0)
    np.testing.assert_allclose(magnitude(block), expected, rtol=1e-5)


def test_speaking_equals_generating(exact):
    """A batch of prompts, masked, says what each of them says by itself on compact weights."""
    model, tokenizer = exact
    evidence, _ = collect_evidence(model, TextBatch(PROMPTS, CONTINUATIONS))
    evidence.density = 0.5
    masks = as_masks(model, standard_selectors([])["glass"](evidence))
    for given, config in ((None, GlassConfig(1.0)), (masks, GlassConfig(0.5))):
        said = sample_continuations(model, PROMPTS, 12, 0, given)
        for prompt, row in zip(PROMPTS, said):
            cache = model.make_cache(**vars(config))
            alone = [r.token for r in stream_generate(model, tokenizer, prompt, 12, prompt_cache=cache)]
            assert row[: len(alone)] == alone


def test_speaking_from_a_beginning(exact):
    model, _ = exact
    said = sample_continuations(model, PROMPTS, 6, 0)
    begin = [said[0][:3], [], [9, 9]]
    again = sample_continuations(model, PROMPTS, 6, 0, begin=begin)
    assert again[:2] == said[:2] and again[2][:2] == [9, 9]
    assert again[2][2:] == sample_continuations(model, [[*PROMPTS[2], 9, 9]], 4, 0)[0]


def test_sampling_follows_the_seed(tiny):
    model, _ = tiny
    runs = []
    for seed in (1, 1, 2):
        mx.random.seed(seed)
        runs.append(sample_continuations(model, PROMPTS, 5))
    assert runs[0] == runs[1] != runs[2]


def test_caches_that_stay_apart(tiny, monkeypatch):
    model, _ = tiny

    class Alone:  # a cache without a merge
        def __init__(self):
            self.cache = KVCache()

        def __getattr__(self, name):
            if name == "merge":
                raise AttributeError(name)
            return getattr(self.cache, name)

    together = sample_continuations(model, PROMPTS, 5, 0)
    monkeypatch.setattr("glass_mlx.evaluation.free_running.make_prompt_cache", lambda m: [Alone() for _ in m.layers])
    assert sample_continuations(model, PROMPTS, 5, 0) == together


def test_how_texts_read(exact):
    model, _ = exact
    scores = readability([[1, 2, 3, 4, 5, 6, 7], [5] * 7])
    assert scores["repetition"].tolist() == [0, 0.75]
    assert scores["distinct-1"].tolist() == [1, 1 / 7] and scores["distinct-2"].tolist() == [1, 1 / 6]
    expected = score_selectors(model, PROMPTS, CONTINUATIONS, {}, [0.5])["dense"][1.0].nll.mean(axis=1)
    np.testing.assert_allclose(self_nll(model, PROMPTS, CONTINUATIONS), expected, atol=1e-4)
