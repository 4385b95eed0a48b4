"""Tests of refreshing: what was said sparsely is read again densely, the cache repaired, the neurons chosen again."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, load_prompt_cache, make_prompt_cache, save_prompt_cache, trim_prompt_cache

from glass_mlx import GlassConfig, GlassError, GlassModel, stream_generate
from glass_mlx.decoding.stream import PhasedModel
from glass_mlx.evaluation.teacher_forcing import decode_given
from glass_mlx.evaluation.tiny_models import tiny_model
from glass_mlx.model.session import Session

PROMPT, SAID = [3, 14, 15, 9, 26, 5, 35], [8, 97, 9, 32, 38, 46, 2, 64]

# Of every kind of projection table, attention and cache that can be trimmed.
FAMILIES = "llama qwen2 qwen3 gemma gemma2 gemma3_text phi3 gpt2 gpt_neox phi olmo2 cohere2 internlm2 exaone4".split()


def read(model: GlassModel, prompt: list[int], cache: list | None = None, **config) -> list:
    cache = cache or model.make_cache(**config)
    mx.eval(model.prefill(mx.array([prompt]), cache), [entry.state for entry in cache])
    return cache


def step(model: GlassModel, cache: list, inputs: mx.array | None, **kwargs) -> mx.array:
    return model.run_phase(model.session(cache).decoding_phase(), inputs, cache, **kwargs)


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


@pytest.mark.parametrize("name", FAMILIES)
def test_a_refresh_is_dense_reading(name):
    """After it, cache, evidence, choice and logits are those of a session that read all of it as a prompt, but for the
    weight of what came before."""
    model = GlassModel(tiny_model(name))
    cache = read(model, PROMPT, refresh=4)
    ours = model.session(cache)
    before = ours.evidence
    logits = say(model, cache, SAID[:5])  # four sparse ones, and the fifth with a refresh
    whole = read(model, PROMPT + SAID[:5])
    assert close(contents(cache), contents(whole))
    theirs = model.session(whole)
    theirs.evidence = theirs.evidence - (1 - 0.5 ** (5 / 128)) * before
    assert close([np.array(ours.evidence)], [np.array(theirs.evidence)], 1e-3)
    assert ours.offset == theirs.offset == ours.prompt_tokens == 12
    assert not ours.pending_reread and not ours.in_prompt
    dense = model.dense(mx.array([PROMPT + SAID[:5]]))[0, -1]
    assert close([np.array(logits[-1])], [np.array(dense)])
    assert not close([np.array(logits[-2])], [np.array(model.dense(mx.array([PROMPT + SAID[:4]]))[0, -1])], 1e-3)
    expected = model.kept_neurons(whole)
    assert all(mx.array_equal(kept, expected[path]) for path, kept in model.kept_neurons(cache).items())


def refreshes(model: GlassModel, cache: list, tokens: int) -> list[int]:
    """After how many tokens said the model reads again."""
    seen, session = [], model.session(cache)
    for i in range(tokens):
        before = session.prompt_tokens
        say(model, cache, [SAID[i % len(SAID)]])
        if session.prompt_tokens > before:
            seen.append(i)
    return seen


@pytest.mark.parametrize(("refresh", "expected"), [(0, []), (20, [20, 40, 60]), ("auto", [16, 32, 48, 64])])
def test_schedule(refresh, expected):
    model = GlassModel(tiny_model("llama"))
    cache = read(model, PROMPT, refresh=refresh)
    assert refreshes(model, cache, 70) == expected
    read(model, PROMPT, cache)  # begins anew with every prompt
    assert refreshes(model, cache, 41) == [e for e in expected if e < 41]


def test_neurons_are_chosen_at_some_refreshes():
    session, read, chosen = Session(GlassConfig(refresh="auto")), [], []
    for _ in range(500):
        session.advance(1, mx.array([[1]]))
        if session.until_reread() == 0:
            read.append(session.generated)
            chosen += [session.generated] * session.choice_is_due()
    assert read == list(range(16, 501, 16)) and chosen == [32, 96, 224, 352, 480]


def test_reading_alone_keeps_the_choice():
    model = GlassModel(tiny_model("llama"))
    cache = read(model, PROMPT, refresh="auto")
    session, choices = model.session(cache), []
    for i in range(40):
        say(model, cache, [SAID[i % len(SAID)]])
        choices.append(session.kept)
    assert all(kept is choices[0] for kept in choices[:32]) and choices[0] is not None
    assert choices[32] is None and choices[33] is not choices[0]
    assert session.prompt_tokens == len(PROMPT) + 33


def test_at_density_1_nothing_is_to_repair():
    model = GlassModel(tiny_model("llama"))
    assert refreshes(model, read(model, PROMPT, density=1.0, refresh=2), 9) == []


@pytest.mark.parametrize("refresh", [0, 100])
def test_a_next_prompt_reads_the_answer_as_well(refresh):
    model = GlassModel(tiny_model("llama"))
    cache = read(model, PROMPT, refresh=refresh)
    say(model, cache, SAID[:3])
    unread = copy.deepcopy(cache)
    logits = model.prefill(mx.array([SAID[3:5]]), unread)
    assert logits.shape[1] == 2
    whole = read(model, PROMPT + SAID[:5])
    assert close(contents(unread), contents(whole))
    assert not close(contents(cache), contents(read(model, PROMPT + SAID[:3])), 1e-3)  # without: what was sparse stays
    session = model.session(unread)
    assert (session.prompt_tokens, session.generated, session.pending_reread) == (12, 0, [])


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


@pytest.mark.parametrize("refresh", [3, "auto", 0])
def test_a_given_continuation_is_refreshed_as_if_it_came_token_by_token(refresh):
    model, tokens = GlassModel(tiny_model("llama")), (SAID * 5)[:37]
    cache = read(model, PROMPT, refresh=refresh)
    one_by_one = say(model, cache, tokens)
    at_once = read(model, PROMPT, refresh=refresh)
    logits = decode_given(model, mx.array([tokens]), at_once)[0]
    assert close([np.array(logits)], [np.array(mx.stack(one_by_one))])
    assert model.session(at_once).generated == model.session(cache).generated == 37


def test_mlx_lms_own_loop_refreshes(demo):
    model, tokenizer = demo
    prompt = "The old house stood at the end of the street, and"
    config, model.config = model.config, GlassConfig(0.1, refresh=4, compensation=False)
    try:
        theirs = [r.token for r in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=24)]
    finally:
        model.config = config
    options = {"density": 0.1, "compensation": False}  # with it, nothing would be left to mend here
    ours = [r.token for r in stream_generate(model, tokenizer, prompt, 24, refresh=4, **options)]
    assert ours == theirs
    assert ours != [r.token for r in stream_generate(model, tokenizer, prompt, 24, refresh=0, **options)]


def test_caches_that_cannot_be_trimmed_are_left_as_they_are():
    """A sliding window that is full has lost what it would go back to: decoding goes on, without a refresh."""
    model = GlassModel(tiny_model("qwen2"))
    cache = model.make_cache(max_kv_size=8, refresh=2)
    read(model, PROMPT, cache)
    assert refreshes(model, cache, 12) == []
    assert len(model.session(cache).pending_reread) <= 2


@pytest.mark.parametrize("n", range(1, 11))
def test_an_answer_may_end_anywhere(n):
    """At a refresh, before or after it: the next turn reads on from exact keys and values."""
    model = GlassModel(tiny_model("llama"))
    cache = model.make_cache(refresh=4)
    phased = PhasedModel(model, len(PROMPT))
    said = [int(token) for token, _ in generate_step(mx.array(PROMPT), phased, max_tokens=n, prompt_cache=cache)]
    in_cache = [*PROMPT, *said][: model.session(cache).offset]
    assert len(in_cache) == cache[0].offset >= len(PROMPT) + n - 1
    read(model, [50, 60], cache)
    whole = contents(read(model, [*in_cache, 50, 60]))
    assert whole and close(contents(cache), whole)
    assert model.session(cache).prompt_tokens == len(in_cache) + 2


def test_never_by_itself_where_the_dense_weights_are_let_go(tmp_path):
    dense = tiny_model("llama")
    for low_memory, refresh, expected in ((False, "auto", "auto"), (True, "auto", 0), (True, 16, 16)):
        model = GlassModel(dense, GlassConfig(refresh=refresh), path=tmp_path, low_memory=low_memory)
        assert model.session(model.make_cache()).config.refresh == expected


def test_dense_weights_that_were_let_go_repair_the_next_prompt(tmp_path):
    dense = tiny_model("llama")
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(dense.parameters())))
    model = GlassModel(dense, path=tmp_path, low_memory=True)
    cache = read(model, PROMPT)
    say(model, cache, SAID[:4])
    read(model, SAID[4:6], cache)
    assert close(contents(cache), contents(read(GlassModel(tiny_model("llama")), PROMPT + SAID[:6])))


@pytest.mark.parametrize("refresh", [0, 100])
def test_trimming_takes_unread_tokens_along(refresh):
    model = GlassModel(tiny_model("llama"))
    cache = read(model, PROMPT, refresh=refresh)
    say(model, cache, SAID[:5])
    trim_prompt_cache(cache, 2)
    session = model.session(cache)
    assert mx.concatenate(session.pending_reread, axis=1).tolist() == [SAID[:3]] and session.generated == 3
    read(model, SAID[3:5], cache)
    assert close(contents(cache), contents(read(model, PROMPT + SAID[:5])))
    trim_prompt_cache(cache, 10)
    assert not session.pending_reread and session.offset == 2


def test_unread_tokens_are_saved(tmp_path):
    model = GlassModel(tiny_model("llama"))
    cache = read(model, PROMPT, refresh=5)
    say(model, cache, SAID[:3])
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    ours, theirs = say(model, cache, SAID[3:]), say(model, loaded, SAID[3:])
    assert close([np.array(a) for a in ours], [np.array(a) for a in theirs], 1e-6)
    assert model.session(loaded).prompt_tokens == model.session(cache).prompt_tokens == 13


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
    cache = read(model, PROMPT, refresh=100)
    say(model, cache, SAID[:2])
    twin = copy.deepcopy(cache)
    say(model, twin, SAID[2:4])
    assert len(model.session(cache).pending_reread) == 2 and len(model.session(twin).pending_reread) == 4


def test_a_quantised_kv_cache_is_repaired_too(demo):
    model, tokenizer = demo
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0, "refresh": 4}
    cache = model.make_cache()
    said = [r.token for r in stream_generate(model, tokenizer, "The ship sailed", 14, prompt_cache=cache, **options)]
    assert len(said) == 14 and model.session(cache).prompt_tokens > 14
    assert not any(isinstance(entry, KVCache) for entry in cache)


def test_dense_caches_are_none_of_its_business():
    model = GlassModel(tiny_model("llama"), GlassConfig(refresh=1))
    cache = make_prompt_cache(model.dense)
    for token in SAID:
        model(mx.array([[token]]), cache=cache)
    assert cache[0].offset == len(SAID)


@pytest.mark.parametrize("refresh", [-1, 1.5, True, "often", None])
def test_bad_values(refresh):
    with pytest.raises(GlassError, match="refresh"):
        GlassConfig(refresh=refresh)
