"""Tests of the selectors: how many neurons they keep, and which."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

import glass_mlx
from glass_mlx.core.importance import SIGNALS
from glass_mlx.evaluation.selectors import (
    Evidence,
    by_chance,
    by_magnitude,
    choose_selectors,
    magnitude,
    standard_selectors,
)
from glass_mlx.evaluation.tiny_models import tiny_model

PROMPTS = [[1, 300, 400, 500, 600], [1, 7], [1, 900, 31, 31, 2000, 77, 8, 9]]


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


def test_selectors_by_name():
    assert set(choose_selectors(["griffin"], ["auto"], True)) == {"griffin"}
    assert set(choose_selectors(["glass-i"], [0.1, "auto", 1.0], True)) == {"glass-i 0.1", "glass-i 1"}
