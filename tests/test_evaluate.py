"""Tests of the evaluation: it decodes as generation does, and its figures are what they say."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from glass_mlx import GlassConfig, evaluate, stream_generate
from glass_mlx.evaluate import PROMPTS, continuation, forced_logprobs, main

PROMPT = [1, 300, 400, 500, 600]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("The old house\n\nShe had never\n")
    return path


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_teacher_forcing_equals_decoding_token_by_token(exact, density):
    model, tokenizer = exact
    config = GlassConfig(density, 0.5)
    steps = list(stream_generate(model, tokenizer, PROMPT, 12, prompt_cache=model.make_cache(**vars(config))))
    said = [step.token for step in steps]
    forced = forced_logprobs(model, PROMPT, said, config)
    np.testing.assert_allclose(forced, mx.stack([step.logprobs for step in steps]), atol=2e-3)


def test_the_continuation_is_the_dense_models(exact):
    model, tokenizer = exact
    greedy = [r.token for r in stream_generate(model, tokenizer, PROMPT, 12, density=1.0)]
    assert continuation(model, PROMPT, 12, temperature=0.0)[: len(greedy)] == greedy


def test_figures_equal_a_plain_computation(tiny):
    model, _ = tiny
    arms = {"half": GlassConfig(0.5), "all": GlassConfig(1.0)}
    result = evaluate.evaluate(model, [PROMPT, [1, 7, 9]], arms, tokens=6, seed=3)
    assert result["all"] == result["dense"]
    assert result["dense"]["kl"] == 0 and result["dense"]["agreement"] == 1

    mx.random.seed(3)
    nll, kl = [], []
    for prompt in (PROMPT, [1, 7, 9]):
        said = continuation(model, prompt, 6, 1.0)
        p, q = (np.array(forced_logprobs(model, prompt, said, GlassConfig(d)), np.float64) for d in (1.0, 0.5))
        nll.append(-q[np.arange(6), said].mean())
        kl.append((np.exp(p) * (p - q)).sum(axis=-1).mean())
    assert result["half"]["ppl"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    assert result["half"]["kl"] == pytest.approx(np.mean(kl), rel=1e-3, abs=1e-6)
    assert result["half"]["kl_std_error"] == pytest.approx(np.std(kl, ddof=1) / 2**0.5, rel=1e-2, abs=1e-6)


def test_the_bundled_prompts_are_read_without_a_second_bos(demo):
    _, tokenizer = demo
    for line in PROMPTS.read_text(encoding="utf-8").splitlines():
        assert tokenizer.encode(line).count(tokenizer.bos_token_id) == 1


def test_the_command_line(invoke, prompts, tiny_dir):
    outcome = invoke(main, "--model", tiny_dir, "--prompts", prompts, "--tokens", 4, "--global-weight", 0, "--json")
    arms = json.loads(outcome.out)["arms"]
    assert outcome.code == 0 and set(arms) == {"dense", "0.0"}
    assert arms["0.0"]["ppl"] > 0


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--density", "0"], 2, "not above 0"),
        (["--global-weight", "0,2"], 2, "auto"),
        (["--tokens", "1"], 2, "at least 2"),
        (["--prompts", "nowhere.txt"], 1, "nowhere.txt"),
        (["--global-weight", "0.5"], 1, "no global ranks"),
    ],
)
def test_bad_input_is_one_line(invoke, prompts, tiny_dir, options, code, says):
    outcome = invoke(main, "--model", tiny_dir, "--global-weight", 0, "--prompts", prompts, *options)
    assert outcome.code == code
    assert says in outcome.err.splitlines()[-1]


def test_an_empty_prompt_file(invoke, tmp_path, tiny_dir):
    (tmp_path / "empty.txt").write_text("\n")
    outcome = invoke(main, "--model", tiny_dir, "--global-weight", 0, "--prompts", tmp_path / "empty.txt")
    assert (outcome.code, "no prompts" in outcome.err) == (1, True)
