"""Tests of verified decoding: what it says is what the dense model says."""

from __future__ import annotations

import itertools

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors

from glass_mlx import GlassError, GlassModel, stream_generate
from glass_mlx.decoding.draft_scheduler import DraftScheduler
from glass_mlx.decoding.sampling import CommonRandomNumbers, make_sampler
from glass_mlx.decoding.speculative import verified_generate_step
from glass_mlx.evaluation.tiny_models import tiny_model
from glass_mlx.generate import main

PROMPT = [3, 14, 15, 9, 26, 5, 35]
N = 16
# Of every kind of projection table, attention and cache that can be trimmed.
FAMILIES = """llama qwen3 gemma2 gemma3_text phi3 gpt2 gpt_neox phi olmo3 cohere2 internlm2 starcoder2 exaone4 minicpm
    glm4 nemotron""".split()


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


def dense(model: GlassModel, prompt: list[int], n: int = N, **options) -> list[int]:
    return [int(token) for token, _ in generate_step(mx.array(prompt), model.dense, max_tokens=n, **options)]


def verified(model: GlassModel, prompt: list[int], n: int = N, cache: list | None = None, **options) -> list[int]:
    cache = cache or model.make_cache()
    return [t for t, *_ in verified_generate_step(mx.array(prompt), model, prompt_cache=cache, max_tokens=n, **options)]


@pytest.mark.few(6)
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_is_the_dense_model(name):
    model = GlassModel(tiny_model(name))
    assert verified(model, PROMPT, 7, draft_tokens=3) == dense(model, PROMPT, 7)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_greedy_with_as_many_drafts_as_pay(name):
    model = GlassModel(tiny_model(name))
    for prompt in (PROMPT, [8, 97]):
        assert verified(model, prompt) == dense(model, prompt)


@pytest.mark.parametrize("k", [0, 1, 5])
def test_however_much_is_drafted(k):
    """Much is wrong at density 0.02, nothing at 1: all ways of accepting are gone through."""
    model, drafted = GlassModel(tiny_model("llama")), {}
    for density in (0.02, 0.5, 1.0):
        cache = model.make_cache(density=density, compensation=False)  # which would get too much right
        steps = verified_generate_step(mx.array(PROMPT), model, prompt_cache=cache, max_tokens=N, draft_tokens=k)
        steps = list(steps)
        assert [t for t, *_ in steps] == dense(model, PROMPT)
        drafted[density] = sum(d for *_, d in steps)
    if k == 0:
        assert set(drafted.values()) == {0}
    else:
        assert drafted[0.02] < drafted[1.0] == (N - 2) // (k + 1) * k + max(0, (N - 2) % (k + 1) - 1)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 11])
def test_max_tokens_cuts_anywhere(n):
    model = GlassModel(tiny_model("llama"))
    assert verified(model, PROMPT, n, draft_tokens=4) == dense(model, PROMPT, n)


def test_many_prompts_on_a_trained_model(real_demo):
    model, tokenizer = real_demo
    for text in ("The old house stood", "I want to find a restaurant"):
        expected = [r.token for r in mlx_lm.stream_generate(model.dense, tokenizer, text, max_tokens=8)]
        ours = list(stream_generate(model, tokenizer, text, 8, verify=True, draft_tokens=4))
        assert [r.token for r in ours] == expected
        assert any(r.from_draft for r in ours) and not ours[0].from_draft


def test_the_text_and_its_end(demo):
    model, tokenizer = demo
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    theirs = list(mlx_lm.stream_generate(model.dense, tokenizer, prompt, max_tokens=60))
    ours = list(stream_generate(model, tokenizer, prompt, 60, verify=True))
    assert "".join(r.text for r in ours) == "".join(r.text for r in theirs)
    assert ours[-1].finish_reason == theirs[-1].finish_reason
    assert [r.generation_tokens for r in ours] == list(range(1, len(ours) + 1))
    assert ours[-1].density == 0.5 and ours[-1].prompt_tokens == len(prompt)


def test_logprobs_are_the_dense_models():
    model = GlassModel(tiny_model("llama"))
    cache = model.make_cache()
    steps = verified_generate_step(mx.array(PROMPT), model, prompt_cache=cache, max_tokens=9, draft_tokens=3)
    for (_, ours, _), (_, theirs) in zip(steps, generate_step(mx.array(PROMPT), model.dense, max_tokens=9)):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_logits_processors_see_the_same_tokens():
    model = GlassModel(tiny_model("llama"))
    for k in (0, 3):
        seen = {"dense": [], "ours": []}

        def spy(name, seen=seen):
            return lambda tokens, logits: (seen[name].append(tokens.tolist()), logits)[1]

        processors = make_logits_processors(repetition_penalty=1.5, repetition_context_size=6)
        expected = dense(model, PROMPT, logits_processors=[spy("dense"), *processors])
        assert verified(model, PROMPT, draft_tokens=k, logits_processors=[spy("ours"), *processors]) == expected
        assert expected != dense(model, PROMPT)
        assert {tuple(t) for t in seen["dense"][:-1]} <= {tuple(t) for t in seen["ours"]}


def test_a_sampled_answer_follows_the_dense_distribution():
    """The marginal of the third token, drafted and rejected in all combinations, against the exact one."""
    model, few = GlassModel(tiny_model("llama")), 6
    only_few = lambda _, logits: mx.where(mx.arange(logits.shape[-1]) < few, 2 * logits, -mx.inf)  # noqa: E731
    exact = np.zeros(few)
    for pair in itertools.product(range(few), repeat=2):
        logits = model.dense(mx.array([[*PROMPT, *pair]]))[0, len(PROMPT) - 1 :]
        p = np.array(mx.softmax(2 * logits[:, :few], axis=-1))
        exact += p[0, pair[0]] * p[1, pair[1]] * p[2]
    runs, counts = 100, np.zeros(few)
    mx.random.seed(1)
    options = {"sampler": make_sampler(temp=1.0), "logits_processors": [only_few], "draft_tokens": 2}
    for _ in range(runs):
        counts[verified(model, PROMPT, 3, model.make_cache(density=0.2), **options)[2]] += 1
    assert (counts**2 / (runs * exact)).sum() - runs < 20.5  # chi-square with 5 degrees of freedom: p = .001
    uniform = np.full(few, 1 / few)
    assert ((runs * exact - runs * uniform) ** 2 / (runs * uniform)).sum() > 20.5  # the test can tell distributions


@pytest.mark.parametrize("k", [0, 1, 4, None])
def test_a_seed_gives_one_answer_however_much_is_drafted(k):
    """Each place of an answer has random numbers of its own, and the dense model with the same ones says the same."""
    model, sampler = GlassModel(tiny_model("llama")), make_sampler(temp=1.0, top_p=0.95)
    mx.random.seed(3)
    randomness, place = CommonRandomNumbers(), itertools.count()
    expected = dense(model, PROMPT, sampler=lambda logprobs: (randomness.at(next(place)), sampler(logprobs))[1])
    mx.random.seed(3)
    assert verified(model, PROMPT, draft_tokens=k, sampler=sampler) == expected


def test_a_next_turn_goes_on(exact):
    """The cache after a verified answer is what dense reading leaves, without what was rejected."""
    model, tokenizer = exact
    cache, text = model.make_cache(), []
    for turn in ("The ship sailed", " and then they", " home"):
        text = text[: model.session(cache).offset] + tokenizer.encode(turn)
        expected = dense(model, text, 5)
        options = {"prompt_cache": cache, "verify": True, "draft_tokens": 4}
        said = [r.token for r in stream_generate(model, tokenizer, tokenizer.encode(turn), 5, **options)]
        assert said == expected
        text += said
        assert {entry.offset for entry in cache} == {model.session(cache).offset}


def test_a_listener_who_leaves_takes_only_what_he_heard():
    model = GlassModel(tiny_model("llama"))
    cache = model.make_cache(density=0.95)
    steps = verified_generate_step(mx.array(PROMPT), model, prompt_cache=cache, max_tokens=N, draft_tokens=6)
    heard = [token for token, *_ in itertools.islice(steps, 5)]
    steps.close()
    session = model.session(cache)
    assert heard == dense(model, PROMPT)[:5]
    assert session.offset == cache[0].offset <= len(PROMPT) + 5


def test_evidence_is_recorded_and_the_choice_is_made_again():
    model = GlassModel(tiny_model("llama"))
    cache = model.make_cache()
    session, choices = model.session(cache), []
    for _ in verified_generate_step(mx.array(PROMPT), model, prompt_cache=cache, max_tokens=110, draft_tokens=3):
        if session.kept is not None and (not choices or choices[-1] is not session.kept):
            choices.append(session.kept)
    assert len(choices) == 3  # after the prompt, and after 32 and 96 tokens
    assert session.prompt_tokens >= len(PROMPT) + 100
    recorded = session.energy.sum().item() / len(model.blocks)  # in tokens, some of them faded
    assert 0.6 * session.prompt_tokens < recorded < session.prompt_tokens


def test_bad_arguments():
    model = GlassModel(tiny_model("llama"))
    with pytest.raises(GlassError, match="must"):
        verified(model, PROMPT, draft_tokens=-1)


def test_caches_that_cannot_go_back():
    """A sliding window that fills up is decoded densely from there on."""
    model = GlassModel(tiny_model("qwen2"))
    for size in (9, 16, 100):
        expected = dense(model, PROMPT, 14, max_kv_size=size)
        cache = model.make_cache(max_kv_size=size)
        steps = list(verified_generate_step(mx.array(PROMPT), model, prompt_cache=cache, max_tokens=14, draft_tokens=2))
        assert [t for t, *_ in steps] == expected
        assert any(d for *_, d in steps) == (size > 9)


@pytest.mark.parametrize("name", ["recurrent_gemma", "lfm2", "qwen3_5"])
def test_a_recurrent_state_is_decoded_densely(name):
    """It cannot go back to before what was rejected."""
    model = GlassModel(tiny_model(name))
    steps = list(verified_generate_step(mx.array(PROMPT), model, prompt_cache=model.make_cache(), max_tokens=N))
    assert [t for t, *_ in steps] == dense(model, PROMPT)
    assert not any(d for *_, d in steps)


@pytest.mark.parametrize("start", [0, 6])
def test_a_quantised_kv_cache(demo, start):
    model, tokenizer = demo
    prompt, kv = tokenizer.encode("The ship sailed"), {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": start}
    assert verified(model, prompt, 8, draft_tokens=3, **kv) == dense(model, prompt, 8, **kv)


def test_without_a_limit():
    model = GlassModel(tiny_model("llama"))
    cache = model.make_cache()
    steps = verified_generate_step(mx.array(PROMPT), model, prompt_cache=cache, max_tokens=-1, draft_tokens=3)
    assert [t for t, *_ in itertools.islice(steps, 40)] == dense(model, PROMPT, 40)


def test_needs_a_glass_model(demo):
    with pytest.raises(GlassError, match="GlassModel"):
        next(stream_generate(demo[0].dense, demo[1], "Hi", verify=True))


# How much to draft


def paced(acceptance: float, sparse: float, marginal: float) -> int:
    """What the cost model settles on where a dense step takes 1, and each token more in a call so much more."""
    scheduler, rng = DraftScheduler(), np.random.default_rng(0)
    for _ in range(400):
        k = scheduler.choose() if scheduler.measured else 0
        right = (rng.random(k) < acceptance).tolist()
        accepted = right.index(False) if False in right else k
        scheduler.observe(k, accepted, k * sparse, 1 + k * marginal)
    return scheduler.choose() if not scheduler._probe else max(range(9), key=scheduler._speed)


def test_pace():
    assert paced(0.3, 0.6, 0.02) == 0  # drafts are mostly wrong
    assert paced(0.9, 1.0, 0.02) == 0  # and drafting is no faster
    assert paced(0.9, 0.6, 0.9) == 0  # or checking is no faster than decoding
    assert 1 <= paced(0.85, 0.6, 0.02) <= 5
    assert paced(0.99, 0.3, 0.01) == 8


@pytest.mark.parametrize(("acceptance", "sparse", "marginal"), [(0.0, 0.65, 0.15), (0.3, 0.6, 0.05), (0.9, 1.1, 0.1)])
def test_pace_costs_little_where_drafting_does_not_pay(acceptance, sparse, marginal):
    """In the time of dense steps, with the compact weights made once (2 steps) and slow first calls."""
    scheduler, rng = DraftScheduler(), np.random.default_rng(0)
    said, spent, slow = 0, 2.0, 3.0
    while said < 1000:
        k = scheduler.choose() if scheduler.measured else 0
        if k == 0:
            n = scheduler.stretch if scheduler.measured else 1
            scheduler.observe(0, 0, 0.0, 1.0)
            said, spent = said + n, spent + n
            continue
        right = (rng.random(k) < acceptance).tolist()
        accepted = right.index(False) if False in right else k
        draft, dense_call = k * sparse * slow, (1 + k * marginal) * slow
        scheduler.observe(k, accepted, draft, dense_call)
        said, spent, slow = said + accepted + 1, spent + draft + dense_call, 1.0
    assert spent / said < 1.03


def test_a_slow_first_call_is_forgotten():
    scheduler = DraftScheduler()
    scheduler.observe(0, 0, 0.0, 1.0)
    scheduler.observe(2, 2, 20.0, 10.0)
    assert scheduler.choose() == 0
    for _ in range(3):
        scheduler.observe(0, 0, 0.0, 1.0)
        scheduler.observe(2, 2, 0.6, 1.1)
    assert scheduler.choose() > 0


def test_what_was_learnt_serves_the_next_answer():
    model = GlassModel(tiny_model("llama"))
    verified(model, PROMPT)
    assert model.draft_schedulers[0.5].measured
    scheduler = model.draft_schedulers[0.5]
    verified(model, PROMPT)
    assert model.draft_schedulers == {0.5: scheduler}


def test_it_drafts_at_the_conversations_density(demo):
    model, tokenizer = demo
    model.draft_schedulers.clear()
    for density in (0.3, 0.6):
        *_, last = stream_generate(model, tokenizer, "The ship", 5, density=density, verify=True)
        assert last.density == density
    assert set(model.draft_schedulers) == {0.3, 0.6}


def test_the_command_line(invoke):
    options = ["--prompt", "The old house", "--ignore-chat-template", "--max-tokens", 8]
    checked = invoke(main, *options, "--verify", "--verbose", "False")
    plain = invoke(main, *options, "--dense", "--verbose", "False")
    assert (checked.code, checked.out) == (0, plain.out)
    assert invoke(main, *options, "--verify", "--draft-tokens", "-1").code == 2
