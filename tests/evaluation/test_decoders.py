"""Tests of decoders side by side: their speed, and how far their answers are from the dense model's."""

from __future__ import annotations

import mlx.core as mx
import pytest

from glass_mlx import GlassModel
from glass_mlx.decoding.sampling import make_sampler
from glass_mlx.evaluation.decoders import (
    CountingScheduler,
    disagreement,
    measure_decoders,
    simulated_decoders,
    simulated_sampler,
    standard_decoders,
    timed_answer,
)
from glass_mlx.evaluation.tiny_models import tiny_model

PROMPTS = [[3, 14, 15, 9, 26], [8, 97, 9]]


@pytest.fixture(scope="module")
def model() -> GlassModel:
    return GlassModel(tiny_model("llama"))


@pytest.fixture(scope="module", params=[0.0, 1.0])
def found(request, model):
    return measure_decoders(
        model, PROMPTS, standard_decoders([0.25, 1.0], draft_tokens=2), tokens=10, temperature=request.param
    )


def test_what_equals_the_dense_model_does_not_disagree(found):
    assert found["dense"]["1"]["strays"] == found["dense"]["1"]["kl"] == 0
    for d in ("0.25", "1"):
        assert found["verified"][d]["strays"] == found["verified"][d]["kl"] == 0
    for name in ("glass", "griffin"):
        assert found[name]["1"]["strays"] == 0 and found[name]["1"]["kl"] < 1e-5


def test_what_is_sparse_does(found):
    for name in ("glass", "griffin"):
        assert found[name]["0.25"]["strays"] > 0 and found[name]["0.25"]["kl"] > 1e-3


def test_only_some_decoders(model):
    decoders = standard_decoders([0.3], kinds=["glass", "verified"])
    assert list(decoders) == ["dense", "glass", "verified"]
    row = measure_decoders(model, PROMPTS, decoders, tokens=8)["glass"]["0.3"]
    assert len(row["kl_by_position"]) == 8 and sum(row["kl_by_position"]) / 8 == pytest.approx(row["kl"])


def test_rank_fusion_can_be_one_of_the_decoders():
    decoders = standard_decoders([0.3], 0.5, layer_budgets="uniform")
    for name, decoder in ((n, by_density[0.3]) for n, by_density in decoders.items() if n not in ("dense", "griffin")):
        assert (decoder.config["global_weight"], decoder.config["layer_budgets"]) == (0.5, "uniform"), name


def test_speeds_and_counts(found):
    for rows in found.values():
        for row in rows.values():
            low, high = row["range"]["tps"]
            assert 0 < low <= row["tps"] <= high and row["speedup"] > 0 and row["own_ppl"] >= 1
    assert found["verified"]["1"]["acceptance"] == 1
    # of 36 tokens the prompt's call says the first and a dense step one more; the last pass is cut short
    assert found["verified"]["1"]["tokens_per_pass"] == pytest.approx(3, abs=0.2)
    assert found["verified"]["0.25"]["acceptance"] < 1
    assert "acceptance" not in found["glass"]["0.25"]


def test_disagreement_counts_tokens(model):
    decoder, sampler = standard_decoders([0.5])["dense"][1.0], make_sampler(temp=1.0)
    answer, _ = timed_answer(model, decoder, PROMPTS[0], 20, sampler, seed=5)
    assert disagreement(model, PROMPTS[0], answer, sampler, seed=5)[0] == 0
    answer[-1] = (answer[-1] + 1) % 100
    assert disagreement(model, PROMPTS[0], answer, sampler, seed=5)[0] == pytest.approx(1 / 20)
    assert disagreement(model, PROMPTS[0], answer, sampler, seed=6)[0] > 0.2  # other random numbers


def test_simulated_acceptance(model):
    mx.random.seed(0)
    sampler, logprobs = simulated_sampler(0.7), mx.zeros((1, 1000))
    firsts, seconds = mx.stack([sampler(logprobs) for _ in range(800)]).reshape(400, 2).T
    assert mx.mean(firsts == seconds).item() == pytest.approx(0.7, abs=0.05)
    decoders = simulated_decoders([0.5], [0.95, 0.3])
    for by_density in decoders.values():
        for decoder in by_density.values():
            decoder.draft_tokens = 3
    found = measure_decoders(model, PROMPTS, decoders, tokens=32, fidelity=False)
    high, low = (found[f"verified, acceptance {a}"]["0.5"] for a in ("0.95", "0.3"))
    assert high["acceptance"] == pytest.approx(0.95, abs=0.05) and low["acceptance"] == pytest.approx(0.3, abs=0.15)
    assert high["tokens_per_pass"] > low["tokens_per_pass"] and "strays" not in high


def test_counting():
    scheduler = CountingScheduler()
    for drafted, accepted in ((0, 0), (3, 3), (3, 1), (2, 0)):
        scheduler.observe(drafted, accepted, 0.1, 0.1)
    assert (scheduler.passes, scheduler.kept, scheduler.checked) == (3, 4, 6)
