"""Tests of teacher forcing: it equals decoding token by token, and its figures are what they say."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import glass_mlx
from glass_mlx import GlassConfig
from glass_mlx.core.compensation import Response
from glass_mlx.core.importance import SIGNALS
from glass_mlx.evaluation import teacher_forcing
from glass_mlx.evaluation.selectors import (
    Evidence,
    by_chance,
    by_oracle,
    by_session,
    is_compensated,
    standard_selectors,
)
from glass_mlx.evaluation.teacher_forcing import TextBatch, as_masks, collect_evidence, score_selectors, teacher_forced
from glass_mlx.evaluation.tiny_models import tiny_model
from glass_mlx.loading import DEMO_PATH, load_dense
from glass_mlx.model.blocks import Block
from glass_mlx.ranks.format import GlobalStatistics
from glass_mlx.ranks.lookup import STATS_DIR

PROMPTS = [[1, 300, 400, 500, 600], [1, 7], [1, 900, 31, 31, 2000, 77, 8, 9]]


CONTINUATIONS = [[12, 700, 41, 5, 99, 3000], [8, 8, 1500, 23, 610, 4], [444, 10, 32, 2, 1, 650]]


# What decoding can do by itself.
PLAIN = {"layer_budgets": "uniform", "compensation": False}
CONFIGS = {
    "griffin": GlassConfig(0.4, 0.0, "activation", **PLAIN),
    "static": GlassConfig(0.4, 1.0, **PLAIN),
    "glass-a": GlassConfig(0.4, 0.5, "activation", **PLAIN),
    "glass-i": GlassConfig(0.4, 0.5, **PLAIN),
    "expected": GlassConfig(0.4, **PLAIN),
    "griffin+": GlassConfig(0.4, 0.0, "activation", layer_budgets="uniform"),
    "glass-i+": GlassConfig(0.4, 0.5, layer_budgets="uniform"),
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


def read(model) -> tuple[TextBatch, Evidence]:
    batch = TextBatch(PROMPTS, CONTINUATIONS)
    return batch, collect_evidence(model, batch)[0]


@pytest.fixture(scope="module")
def exact_texts(exact):
    return read(exact[0])


def assert_equals_decoding(model, texts: tuple[TextBatch, Evidence], selector, config: GlassConfig) -> None:
    batch, evidence = texts
    evidence.density = config.density
    kept = selector(evidence)
    masks = as_masks(model, kept)
    sums = evidence.sums if config.compensation else None
    assert config.compensation == is_compensated(selector)
    logits = batch.predictions(teacher_forced(model, batch, masks, sums))
    for b, (prompt, said) in enumerate(zip(PROMPTS, CONTINUATIONS)):
        expected, neurons = decoded(model, prompt, said, config)
        for mine, its in zip(kept, neurons):
            np.testing.assert_array_equal(mine[b], its)
        np.testing.assert_allclose(logits[b], expected, atol=2e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_teacher_forcing_equals_decoding_token_by_token(exact, exact_texts, name):
    assert_equals_decoding(exact[0], exact_texts, standard_selectors([0.5])[name], CONFIGS[name])


def test_where_neurons_are_kept_in_units():
    dense, _, _ = load_dense(DEMO_PATH)
    nn.quantize(dense, group_size=64, bits=4)
    dense.set_dtype(mx.float32)
    model = glass_mlx.wrap(dense, stats=False)
    GlobalStatistics.read(STATS_DIR / "demo.safetensors").use_in(model)
    assert model.blocks[0].group == 64
    assert_equals_decoding(model, read(model), standard_selectors([0.5])["glass"], CONFIGS["glass"])


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
        expected, _ = decoded(model, prompts[b], said[b], GlassConfig(0.5, 0.0, "activation", compensation=False))
        np.testing.assert_allclose(logits[b], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("signal", SIGNALS)
def test_evidence_is_what_a_session_records(exact, exact_texts, signal):
    (model, _), (_, evidence) = exact, exact_texts
    for b, prompt in enumerate(PROMPTS):
        cache = model.make_cache(signal=signal)
        mx.eval(model.prefill(mx.array([prompt]), cache))
        mine = mx.concatenate([e[b] for e in evidence.local[signal]])
        np.testing.assert_allclose(mine, model.session(cache).energy, rtol=1e-3, atol=1e-5)
        for ours, its in zip(evidence.sums, model._plan.layout.sums(model.session(cache).evidence)):
            np.testing.assert_allclose(ours.hidden[b], its.hidden, rtol=1e-3, atol=1e-2)
            np.testing.assert_allclose(ours.inputs[b], its.inputs, rtol=1e-3, atol=1e-2)
            assert ours.tokens[b].item() == its.tokens.item() == len(prompt) - 1
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
    k, o = set(np.flatnonzero(scores.kept[1][1])), set(np.flatnonzero(best[1][1]))
    assert scores.jaccard[1, 1] == pytest.approx(len(k & o) / len(k | o))


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


def random_response(block: Block, rank: int = 3) -> Response:
    shapes = ((block.input_size,), (block.size,), (block.input_size, rank), (rank, block.size))
    return Response(*(0.2 * mx.random.normal(shape, key=mx.random.key(rank)) for shape in shapes))


@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_routed_experts(family):
    """Texts of unequal length side by side, of which mlx-lm sorts the vectors by expert."""
    model = glass_mlx.GlassModel(tiny_model(family), GlassConfig(experts="sparse"))
    prompts = [[3, 14, 15, 9, 26, 5, 35], [8, 97, 9], [(5 * i) % 89 for i in range(30)]]
    said = [[9, 8, 7, 6], [1, 2, 3, 4], [11, 12, 13, 14]]
    model.set_global_ranks(None, responses=[random_response(block) for block in model.blocks])
    batch = TextBatch(prompts, said)
    evidence, _ = collect_evidence(model, batch)
    for signal, config in (
        ("impact", GlassConfig(0.4, 0.0, **PLAIN)),
        ("activation", CONFIGS["griffin"]),
        ("activation", CONFIGS["griffin+"].updated(global_weight=0.0)),
    ):
        config, evidence.density = config.updated(experts="sparse"), config.density
        masks = as_masks(model, by_session(signal, 0.0)(evidence))
        sums = evidence.sums if config.compensation else None
        logits = batch.predictions(teacher_forced(model, batch, masks, sums))
        for b, (prompt, rest) in enumerate(zip(prompts, said)):
            expected, neurons = decoded(model, prompt, rest, config)
            for mask, kept in zip(masks, neurons):
                assert mx.array_equal(mask[b], mx.zeros(mask[b].shape, mx.bool_).at[kept].add(True))
            assert mx.max(mx.abs(logits[b] - expected)) <= 1e-3 * mx.max(mx.abs(expected))
    chosen = {
        name: by
        for name, by in standard_selectors([0.5]).items()
        if name in ("random", "magnitude", "griffin+", "oracle")
    }
    scores = score_selectors(model, prompts, said, chosen, [0.5])
    assert set(scores) == {"dense", *chosen} and scores["oracle"][0.5].kl.mean() < scores["random"][0.5].kl.mean()
