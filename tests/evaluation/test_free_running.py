"""Tests of continuations: they equal generating one by one, and their figures are what they say."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from glass_mlx import GlassConfig, stream_generate
from glass_mlx.evaluation.free_running import PromptBatch, fit_length, readability, sample_continuations, self_nll
from glass_mlx.evaluation.prompts import read_prompts
from glass_mlx.evaluation.selectors import by_session, standard_selectors
from glass_mlx.evaluation.teacher_forcing import TextBatch, as_masks, collect_evidence, prompt_sums, score_selectors

PROMPTS = [[1, 300, 400, 500, 600], [1, 7], [1, 900, 31, 31, 2000, 77, 8, 9]]
CONTINUATIONS = [[12, 700, 41, 5, 99, 3000], [8, 8, 1500, 23, 610, 4], [444, 10, 32, 2, 1, 650]]


def test_speaking_equals_generating(exact):
    """A batch of prompts, masked, says what each of them says by itself on compact weights."""
    model, tokenizer = exact
    evidence, _ = collect_evidence(model, TextBatch(PROMPTS, CONTINUATIONS))
    evidence.density = 0.5
    masks = as_masks(model, standard_selectors([])["glass"](evidence))
    plain = as_masks(model, by_session("impact", "auto", "measured")(evidence))  # where all of a dropped neuron is lost
    sums = prompt_sums(model, PROMPTS)
    for ours, theirs in zip(sums, evidence.sums):
        np.testing.assert_allclose(ours.hidden, theirs.hidden, rtol=1e-3, atol=1e-3)
        assert ours.tokens.tolist() == theirs.tokens.tolist()
    ways = [(None, None, GlassConfig(1.0)), (plain, None, GlassConfig(0.5, compensation=False))]
    for given, own, config in (*ways, (masks, sums, GlassConfig(0.5))):
        said = sample_continuations(model, PROMPTS, 12, 0, given, sums=own)
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
            if name == "merge" or name.startswith("__"):  # the latter for copying
                raise AttributeError(name)
            return getattr(self.cache, name)

    together = sample_continuations(model, PROMPTS, 5, 0)
    monkeypatch.setattr("glass_mlx.evaluation.free_running.make_prompt_cache", lambda m: [Alone() for _ in m.layers])
    batch = PromptBatch(model, PROMPTS)
    assert batch.sample(5, 0) == batch.sample(5, 0) == together


def test_prompts_are_read_once_and_continued_again(tiny):
    model, _ = tiny
    batch = PromptBatch(model, PROMPTS)
    nothing = [mx.zeros((3, block.size), mx.bool_) for block in model.blocks]
    first, without = batch.sample(6, 0), batch.sample(6, 0, nothing)
    assert batch.sample(6, 0) == first == sample_continuations(model, PROMPTS, 6, 0) != without
    assert without == sample_continuations(model, PROMPTS, 6, 0, nothing)


def test_how_texts_read(exact):
    model, _ = exact
    scores = readability([[1, 2, 3, 4, 5, 6, 7], [5] * 7])
    assert scores["repetition"].tolist() == [0, 0.75]
    assert scores["distinct-1"].tolist() == [1, 1 / 7] and scores["distinct-2"].tolist() == [1, 1 / 6]
    expected = score_selectors(model, PROMPTS, CONTINUATIONS, {}, [0.5])["dense"][1.0].nll.mean(axis=1)
    np.testing.assert_allclose(self_nll(model, PROMPTS, CONTINUATIONS), expected, atol=1e-4)


def test_prompts_are_cut_and_continued(exact):
    model, tokenizer = exact
    prompts = read_prompts("prose", tokenizer, 3)
    assert fit_length(model, prompts, None, 0, 0) == prompts
    length = len(prompts[0])
    short = fit_length(model, prompts, length + 3, 0, 0)[0]
    assert short[:length] == prompts[0] and short[length:] == sample_continuations(model, prompts[:1], 3, 0)[0]
    assert fit_length(model, prompts, 5, 0, 0) == [p[:5] for p in prompts]
