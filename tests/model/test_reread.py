"""Tests of rereading: the next prompt reads what was decoded sparsely again, densely, and so repairs the cache."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache, trim_prompt_cache

from glass_mlx import GlassModel, stream_generate
from glass_mlx.decoding.stream import PhasedModel
from glass_mlx.evaluation.tiny_models import tiny_model
from glass_mlx.model.session import Phase, Session

PROMPT, SAID = [3, 14, 15, 9, 26, 5, 35], [8, 97, 9, 32, 38, 46, 2, 64]

# Of every kind of projection table, attention and cache that can be trimmed.
FAMILIES = "llama qwen2 qwen3 gemma gemma2 gemma3_text phi3 gpt2 gpt_neox phi olmo2 cohere2 internlm2 exaone4".split()


def read(model: GlassModel, prompt: list[int], cache: list | None = None, **config) -> list:
    cache = cache or model.make_cache(**config)
    mx.eval(model.prefill(mx.array([prompt]), cache), [entry.state for entry in cache])
    return cache


def step(model: GlassModel, cache: list, inputs: mx.array | None, **kwargs) -> mx.array:
    return model.run_phase(Phase.DECODE, inputs, cache, **kwargs)


def say(model: GlassModel, cache: list, tokens: list[int]) -> list[mx.array]:
    """One token a call, as mlx-lm's loop decodes."""
    logits = []
    for token in tokens:
        logits.append(step(model, cache, mx.array([[token]]))[0, -1])
        mx.eval(logits[-1], [entry.state for entry in cache])
    return logits


def contents(cache: list) -> list[np.ndarray]:
    arrays = [a for entry in cache if not isinstance(entry, Session) for _, a in tree_flatten(entry.state)]
    return [np.array(a) for a in arrays if isinstance(a, mx.array) and a.dtype == mx.float32]


def close(ours, theirs, tolerance: float = 2e-4) -> bool:
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and np.abs(a - b).max() <= tolerance * max(1, np.abs(b).max()) for a, b in zip(ours, theirs)
    )


@pytest.mark.few(7)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_next_prompt_reads_the_answer_as_well(name):
    """After it, cache, evidence, choice and logits are those of a session that read all of it as a prompt, but for the
    weight of what came before."""
    model = GlassModel(tiny_model(name))
    cache = read(model, PROMPT)
    ours = model.session(cache)
    before = ours.evidence
    sparse = say(model, cache, SAID[:4])
    assert not close(contents(cache), contents(read(model, PROMPT + SAID[:4])), 1e-3)  # what was sparse
    logits = model.prefill(mx.array([SAID[4:5]]), cache)
    whole = read(model, PROMPT + SAID[:5])
    assert close(contents(cache), contents(whole))
    theirs = model.session(whole)
    theirs.evidence = theirs.evidence - (1 - 0.5 ** (4 / 128)) * before
    assert close([np.array(ours.evidence)], [np.array(theirs.evidence)], 1e-3)
    assert ours.offset == theirs.offset == ours.prompt_tokens == 12
    assert (ours.generated, ours.pending_reread) == (0, [])
    dense = model.dense(mx.array([PROMPT + SAID[:5]]))[0]
    assert logits.shape[1] == 1 and close([np.array(logits[0, -1])], [np.array(dense[-1])])
    assert not close([np.array(sparse[-1])], [np.array(dense[-2])], 1e-3)
    expected = model.kept_neurons(whole)
    assert all(mx.array_equal(kept, expected[path]) for path, kept in model.kept_neurons(cache).items())


def test_at_density_1_nothing_is_to_repair():
    model = GlassModel(tiny_model("llama"))
    cache = read(model, PROMPT, density=1.0)
    say(model, cache, SAID)
    assert model.session(cache).pending_reread == []


def test_a_long_answer_is_read_again_in_several_calls(monkeypatch):
    monkeypatch.setattr("glass_mlx.model.glass_model._REREAD", 3)
    model = GlassModel(tiny_model("llama"))
    cache = read(model, PROMPT)
    say(model, cache, SAID[:7])
    logits = model.prefill(mx.array([[50, 60]]), cache)
    dense = model.dense(mx.array([[*PROMPT, *SAID[:7], 50, 60]]))[0, -2:]
    assert close([np.array(logits[0])], [np.array(dense)])
    assert close(contents(cache), contents(read(model, [*PROMPT, *SAID[:7], 50, 60])))
    assert model.session(cache).prompt_tokens == 16


def test_a_next_prompt_of_embeddings_reads_the_answer_as_well():
    model = GlassModel(tiny_model("llama"))
    cache = read(model, PROMPT)
    say(model, cache, SAID[:3])
    embeddings = model.dense.model.embed_tokens(mx.array([SAID[3:5]]))
    mx.eval(model.prefill(None, cache, input_embeddings=embeddings), [entry.state for entry in cache])
    assert close(contents(cache), contents(read(model, PROMPT + SAID[:5])))


def test_embeddings_that_are_decoded_cannot_be_read_again():
    """Nor what was said before them; but nothing of it is lost."""
    model = GlassModel(tiny_model("llama"))
    cache = read(model, PROMPT)
    say(model, cache, SAID[:2])
    step(model, cache, None, input_embeddings=model.dense.model.embed_tokens(mx.array([SAID[2:3]])))
    say(model, cache, SAID[3:4])
    assert [tokens.tolist() for tokens in model.session(cache).pending_reread] == [[SAID[3:4]]]
    read(model, [50, 60], cache)
    assert model.session(cache).offset == cache[0].offset == len(PROMPT) + 6


def test_an_answer_that_ends_at_density_1_is_read_again_from_its_sparse_part_on():
    model = GlassModel(tiny_model("llama"))
    cache = read(model, PROMPT)
    say(model, cache, SAID[:3])
    model.session(cache).configure(density=1.0)
    say(model, cache, SAID[3:5])
    read(model, SAID[5:7], cache)
    assert close(contents(cache), contents(read(model, PROMPT + SAID[:7])))


def test_a_given_continuation_is_decoded_at_once_as_token_by_token():
    model, tokens = GlassModel(tiny_model("llama")), (SAID * 5)[:37]
    cache, at_once = read(model, PROMPT), read(model, PROMPT)
    one_by_one = say(model, cache, tokens)
    logits = step(model, at_once, mx.array([tokens]))[0]
    assert close([np.array(logits)], [np.array(mx.stack(one_by_one))])
    assert model.session(at_once).generated == model.session(cache).generated == 37


def test_caches_that_cannot_be_trimmed_are_left_as_they_are():
    """A sliding window that is full has lost what it would go back to: the next prompt is read after what is there."""
    model = GlassModel(tiny_model("qwen2"))
    cache = model.make_cache(max_kv_size=8)
    read(model, PROMPT, cache)
    say(model, cache, SAID)
    recorded = model.session(cache).prompt_tokens
    read(model, [50, 60], cache)
    session = model.session(cache)
    assert session.prompt_tokens == recorded + 2 and session.offset == len(PROMPT) + len(SAID) + 2


@pytest.mark.few(5)
@pytest.mark.parametrize("n", range(1, 11))
def test_an_answer_may_end_anywhere(n):
    """The next turn reads on from exact keys and values."""
    model = GlassModel(tiny_model("llama"))
    cache = model.make_cache()
    phased = PhasedModel(model, len(PROMPT))
    said = [int(token) for token, _ in generate_step(mx.array(PROMPT), phased, max_tokens=n, prompt_cache=cache)]
    in_cache = [*PROMPT, *said][: model.session(cache).offset]
    assert len(in_cache) == cache[0].offset >= len(PROMPT) + n - 1
    read(model, [50, 60], cache)
    whole = contents(read(model, [*in_cache, 50, 60]))
    assert whole and close(contents(cache), whole)
    assert model.session(cache).prompt_tokens == len(in_cache) + 2


def test_dense_weights_that_were_let_go_repair_the_next_prompt(tmp_path):
    dense = tiny_model("llama")
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(dense.parameters())))
    model = GlassModel(dense, path=tmp_path, low_memory=True)
    cache = read(model, PROMPT)
    say(model, cache, SAID[:4])
    read(model, SAID[4:6], cache)
    assert close(contents(cache), contents(read(GlassModel(tiny_model("llama")), PROMPT + SAID[:6])))


def test_trimming_takes_unread_tokens_along():
    model = GlassModel(tiny_model("llama"))
    cache = read(model, PROMPT)
    say(model, cache, SAID[:5])
    trim_prompt_cache(cache, 2)
    session = model.session(cache)
    assert mx.concatenate(session.pending_reread, axis=1).tolist() == [SAID[:3]] and session.generated == 3
    read(model, SAID[3:5], cache)
    assert close(contents(cache), contents(read(model, PROMPT + SAID[:5])))
    trim_prompt_cache(cache, 10)
    assert not session.pending_reread and session.offset == 2


def test_a_saved_answer_is_read_again_with_the_next_prompt(tmp_path):
    model = GlassModel(tiny_model("llama"))
    cache = read(model, PROMPT)
    say(model, cache, SAID[:4])
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert mx.concatenate(model.session(loaded).pending_reread, axis=1).tolist() == [SAID[:4]]
    trim_prompt_cache(loaded, 1)
    read(model, [50, 60], loaded)
    assert close(contents(loaded), contents(read(model, [*PROMPT, *SAID[:3], 50, 60])))


def test_copies_have_their_own_unread_tokens():
    model = GlassModel(tiny_model("llama"))
    cache = read(model, PROMPT)
    say(model, cache, SAID[:2])
    twin = copy.deepcopy(cache)
    say(model, twin, SAID[2:4])
    assert len(model.session(cache).pending_reread) == 2 and len(model.session(twin).pending_reread) == 4


def test_a_quantised_kv_cache_is_repaired_too(demo):
    model, tokenizer = demo
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    cache = model.make_cache()
    for prompt in ("The ship sailed", " and then"):
        said = [r.token for r in stream_generate(model, tokenizer, prompt, 6, prompt_cache=cache, **options)]
    session = model.session(cache)
    assert len(said) == 6 and session.prompt_tokens == session.offset - session.generated
    assert not any(isinstance(entry, KVCache) for entry in cache)


@pytest.mark.parametrize("refresh", [0, 4, "auto"])
def test_a_retired_setting_changes_nothing(exact, refresh):
    """Programs that name it go on."""
    model, tokenizer = exact
    answers = [
        [r.token for r in stream_generate(model, tokenizer, "The ship sailed", 6, **options)]
        for options in ({}, {"refresh": refresh}, {"prompt_cache": model.make_cache(refresh=refresh)})
    ]
    assert answers[0] == answers[1] == answers[2]
