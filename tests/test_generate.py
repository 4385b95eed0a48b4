"""Tests of generation, from Python and from the command line."""

from __future__ import annotations

import copy
import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache, save_prompt_cache
from mlx_lm.sample_utils import make_logits_processors

import glass_mlx
from glass_mlx import GlassConfig, GlassError, StatsError, generate, stream_generate, wrap
from glass_mlx.evaluation.tiny_models import tiny_model
from glass_mlx.generate import main
from glass_mlx.ranks.lookup import STATS_DIR

PROMPT = "The old house stood at the end of the street, and"
N = 6


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


def _tokens(stream) -> list[int]:
    return [response.token for response in stream]


def _dense(demo, prompt=PROMPT, n=N, **options) -> list[int]:
    """What mlx-lm itself generates."""
    return _tokens(mlx_lm.stream_generate(demo[0].dense, demo[1], prompt, max_tokens=n, **options))


@pytest.mark.few(3)
@pytest.mark.parametrize("prompt", [PROMPT, "Hi", "<s><|user|> Hello<|assistant|>"])
@pytest.mark.parametrize("step", [2048, 3])
def test_density_1_is_mlx_lm(exact, prompt, step):
    ours = stream_generate(*exact, prompt, N, density=1.0, prefill_step_size=step)
    assert _tokens(ours) == _dense(exact, prompt, prefill_step_size=step)


def test_sampling_at_density_1_is_mlx_lm(exact):
    options = {"sampler": lambda logprobs: mx.random.categorical(logprobs)}
    mx.random.seed(5)
    expected = _dense(exact, **options)
    mx.random.seed(5)
    assert _tokens(stream_generate(*exact, PROMPT, N, density=1.0, **options)) == expected


def test_sparse_is_not_dense(exact):
    """All of the tests here would pass if nothing were pruned."""
    assert _tokens(stream_generate(*exact, PROMPT, N, density=0.1)) != _dense(exact)


def test_kinds_of_prompts(exact):
    tokens = exact[1].encode(PROMPT)
    said = [_tokens(stream_generate(*exact, p, N)) for p in (PROMPT, tokens, mx.array(tokens))]
    assert said[0] == said[1] == said[2]


def test_plain_tokenizer(exact):
    """As with mlx-lm, transformers' own tokenizer will do."""
    assert generate(exact[0], exact[1]._tokenizer, PROMPT, max_tokens=N) == generate(*exact, PROMPT, max_tokens=N)


@pytest.mark.parametrize("prompt", [[], mx.array([], mx.int32)])
def test_empty_prompt(exact, prompt):
    with pytest.raises(GlassError, match="empty"):
        generate(*exact, prompt)


def test_empty_text(demo):
    """With this tokenizer it is the BOS token, so global ranks choose, with a fixed weight alone."""
    for weight, expected in (("auto", 256 / 257), (0.3, 1.0)):
        [response] = stream_generate(*demo, "", 1, global_weight=weight)
        assert (response.prompt_tokens, response.global_weight) == (1, pytest.approx(expected, abs=1e-3))


@pytest.mark.parametrize("signal", ["impact", "activation"])
def test_response(exact, signal):
    options = {"density": 0.3, "global_weight": 0.25, "signal": signal}
    responses = list(stream_generate(*exact, PROMPT, N, **options))
    total = sum(block.size for block in exact[0].blocks)
    for n, r in enumerate(responses, 1):
        assert (r.density, r.global_weight, r.signal) == (0.3, 0.25, signal)
        assert (r.kept_neurons, r.total_neurons) == (round(0.3 * total), total)
        assert (r.prompt_tokens, r.generation_tokens) == (len(exact[1].encode(PROMPT)), n)
        assert r.logprobs.shape == (4096,) and not r.from_draft
        assert min(r.prompt_tps, r.peak_memory) > 0
        assert (r.generation_tps > 0) == (n > 1)  # one token is no interval
    assert [r.finish_reason for r in responses] == [None] * (N - 1) + ["length"]
    assert generate(*exact, PROMPT, max_tokens=N, **options) == "".join(r.text for r in responses)


@pytest.mark.parametrize(
    "prompt, low, high",
    [
        ([1], 0.99, 1),
        ("The old house stood at the end of the lane, and the wind", 0.9, 0.96),
        ([1, 3, 298, 4032, 455, 4], 0.9, 0.98),  # a dialogue
    ],
)
def test_auto_global_weight(real_demo, prompt, low, high):
    [response] = stream_generate(*real_demo, prompt, 1)
    assert low <= response.global_weight <= high


def test_stops_at_end_token(demo):
    *_, last = stream_generate(*demo, "<s><|user|> I want to find a restaurant in San Jose.<|assistant|>", 100)
    assert last.finish_reason == "stop" and last.token == demo[1].eos_token_id


def test_kept_neurons_are_decoded_with(exact):
    """A decode step equals the dense model with the other neurons' output weights set to zero."""
    model, tokenizer = exact
    cache, tokens = model.make_cache(density=0.3, compensation=False), tokenizer.encode(PROMPT)
    first, second = list(stream_generate(model, tokenizer, tokens, 2, prompt_cache=cache))
    masked = copy.deepcopy(model.dense)
    expected = [KVCache() for _ in masked.layers]
    masked(mx.array([tokens]), cache=expected)
    kept = model.kept_neurons(cache)
    for i, layer in enumerate(masked.layers):
        mask = np.zeros(layer.mlp.down_proj.weight.shape[1], np.float32)
        mask[np.array(kept[f"model.layers.{i}.mlp"])] = 1
        layer.mlp.down_proj.weight *= mx.array(mask)
    logits = masked(mx.array([[first.token]]), cache=expected)[0, -1]
    assert mx.allclose(second.logprobs, logits - mx.logsumexp(logits), atol=1e-3)


def test_prompt_cache_over_turns(exact):
    """Two turns on one cache: the tokens are those of one dense run, and both turns' evidence counts."""
    model, tokenizer = exact
    cache = model.make_cache(density=1.0)
    first = _tokens(stream_generate(model, tokenizer, PROMPT, 5, prompt_cache=cache))
    more = tokenizer.encode(" Then he said", add_special_tokens=False)
    second = _tokens(stream_generate(model, tokenizer, more, 5, prompt_cache=cache))
    whole = [*tokenizer.encode(PROMPT), *first, *more]
    assert second == _dense(exact, whole, 5)
    assert cache[0].offset == cache[-1].offset == len(whole) + 5


def test_evidence_of_both_turns(exact):
    """And of the answer in between."""
    model, tokenizer = exact
    cache = model.make_cache()
    list(stream_generate(model, tokenizer, PROMPT, 3, prompt_cache=cache))
    before, said = model.session(cache).energy, model.session(cache).generated
    list(stream_generate(model, tokenizer, [500, 600], 3, prompt_cache=cache))
    assert said >= 2
    assert model.session(cache).prompt_tokens == len(tokenizer.encode(PROMPT)) + 2 + said
    new = model.session(cache).energy - 0.5 ** (said / 128) * before
    assert (new >= -1e-5).all()
    assert mx.sum(new).item() == pytest.approx(len(model.blocks) * (2 + said), rel=1e-4)


def test_choice_per_call(demo):
    model, tokenizer = demo
    cache = model.make_cache()
    [response] = stream_generate(model, tokenizer, PROMPT, 1, prompt_cache=cache, density=0.25)
    assert response.density == 0.25
    [response] = stream_generate(model, tokenizer, [500], 1, prompt_cache=cache)
    assert response.density == 0.25  # it stays the conversation's
    list(stream_generate(model, tokenizer, [500], 2, prompt_cache=cache, layer_budgets="uniform"))
    kept = [k.size for k in model.kept_neurons(cache).values()]
    assert kept == model.kept_counts(0.25, "uniform") != model.kept_counts(0.25, "measured")
    assert model.config == GlassConfig()
    with pytest.raises(GlassError, match="density"):
        generate(model, tokenizer, PROMPT, density=0)


def test_foreign_prompt_cache(demo):
    with pytest.raises(GlassError, match="make_cache"):
        generate(*demo, PROMPT, prompt_cache=[KVCache() for _ in demo[0].blocks])


@pytest.mark.parametrize("draft, drafts", [("itself", 3), ("itself", 1), ("dense", 2), ("other", 3)])
@pytest.mark.parametrize("n", [1, 5])
def test_draft_model(exact, demo, draft, drafts, n):
    """Speculative decoding gives the dense model's greedy tokens, whatever the draft."""
    model = {"itself": exact[0], "dense": exact[0].dense, "other": demo[0]}[draft]
    stream = stream_generate(*exact, PROMPT, n, draft_model=model, num_draft_tokens=drafts)
    responses = list(stream)
    assert _tokens(responses) == _dense(exact, n=n)
    assert responses[0].kept_neurons == responses[0].total_neurons
    assert any(r.from_draft for r in responses) or draft == "other" or n == 1


@pytest.mark.parametrize(
    "option",
    [
        {"density": 0.5},
        {"global_weight": 0.0},
        {"signal": "impact"},
        {"layer_budgets": "uniform"},
        {"prompt_cache": []},
    ],
)
def test_draft_model_takes_no_choice(demo, option):
    with pytest.raises(GlassError, match="draft"):
        generate(*demo, PROMPT, draft_model=demo[0], **option)


def test_plain_model_passes_through(exact):
    responses = list(stream_generate(exact[0].dense, exact[1], PROMPT, N))
    assert _tokens(responses) == _dense(exact)
    assert responses[0].density == 1.0 and responses[0].total_neurons == 0


def test_kv_bits(demo):
    cache = demo[0].make_cache(density=1.0)
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    tokens = _tokens(stream_generate(*demo, PROMPT, N, prompt_cache=cache, **options))
    assert isinstance(cache[0], QuantizedKVCache)
    assert tokens == _dense(demo, **options)


@pytest.mark.parametrize("options", [{"kv_bits": 0}, {"kv_bits": 4, "kv_group_size": 0}, {"kv_bits": -1}])
def test_kv_bits_of_nothing(demo, options):
    """MLX would divide by zero, which ends the process."""
    with pytest.raises(GlassError, match="at least 1"):
        generate(*demo, "Once", max_tokens=2, quantized_kv_start=0, **options)


def test_max_kv_size(demo):
    """In a family whose caches mlx-lm makes: of the demo's it ignores the size."""
    model, prompt = wrap(tiny_model("qwen3"), stats=False), list(range(3, 30))
    options = {"max_kv_size": 8, "prefill_step_size": 4}
    tokens = _tokens(stream_generate(model, demo[1], prompt, N, density=1.0, **options))
    assert tokens == _dense((model, demo[1]), prompt, **options) != _dense((model, demo[1]), prompt)
    cache = model.make_cache(8)
    assert _tokens(stream_generate(model, demo[1], prompt, N, prompt_cache=cache))
    assert isinstance(cache[0], RotatingKVCache) and cache[0].offset == cache[-1].offset == 27 + N


def test_logits_processors(exact):
    banned = _dense(exact)[0]
    options = {"logits_processors": make_logits_processors(logit_bias={banned: -1e9})}
    tokens = _tokens(stream_generate(*exact, PROMPT, N, density=1.0, **options))
    assert banned not in tokens and tokens == _dense(exact, **options)


def test_input_embeddings(exact):
    """Embeddings of the prompt in place of its tokens: the same evidence, the same answer."""
    tokens = mx.array(exact[1].encode(PROMPT))
    embeddings = exact[0].dense.model.embed_tokens(tokens)
    empty = mx.array([], mx.int32)
    said = _tokens(stream_generate(*exact, empty, N, input_embeddings=embeddings))
    assert said == _tokens(stream_generate(*exact, tokens, N))


def test_verbose(exact, capsys):
    text = generate(*exact, PROMPT, max_tokens=N, verbose=True)
    out = capsys.readouterr().out
    assert text in out and "GLASS: density 0.5" in out and f"Generation: {N} tokens" in out


# The command line


RAW = ("--ignore-chat-template", "--prompt", PROMPT, "--max-tokens", N)
KEYS = """text tokens prompt_tokens generation_tokens prompt_tps generation_tps peak_memory density global_weight
    signal finish_reason""".split()


def test_json(demo, invoke):
    done = invoke(main, *RAW, "--json", "--density", 0.25)
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    assert set(KEYS) <= result.keys()
    assert result["tokens"] == _tokens(stream_generate(*demo, PROMPT, N, density=0.25))
    assert result["text"] == generate(*demo, PROMPT, max_tokens=N, density=0.25)
    assert (result["density"], result["generation_tokens"], result["finish_reason"]) == (0.25, N, "length")


def test_chat_template(demo, invoke):
    done = invoke(main, "--prompt", "Hi\\nthere", "--system-prompt", "Be brief.", "--max-tokens", N, "--json")
    prompt = "<s><|user|> Be brief.<|user|> Hi\nthere<|assistant|>"
    assert json.loads(done.out)["text"] == generate(*demo, prompt, max_tokens=N)


def test_prefilled_response(demo, invoke):
    done = invoke(main, "--prompt", "Hi", "--prefill-response", "Good", "--max-tokens", 2, "--json")
    prompt = demo[1].apply_chat_template(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good"}], continue_final_message=True
    )
    assert json.loads(done.out)["prompt_tokens"] == len(prompt)


def test_memory_options_change_no_token(invoke):
    plain = invoke(main, *RAW, "--json")
    small = invoke(main, *RAW, "--json", "--low-memory", "--max-session-memory", "1kB")
    assert json.loads(small.out)["tokens"] == json.loads(plain.out)["tokens"]


@pytest.mark.parametrize("options", [("--dense",), ("--density", 1)])
def test_dense_is_mlx_lm(demo, invoke, options):
    expected = mlx_lm.generate(demo[0].dense, demo[1], PROMPT, max_tokens=N)
    assert json.loads(invoke(main, *RAW, "--json", *options).out)["text"] == expected
    if options == ("--dense",):
        assert invoke(main, *RAW, "--verbose", "False", *options).out == f"{expected}\n"
        assert expected in invoke(main, *RAW, *options).out


@pytest.mark.parametrize(
    "options, weight", [((), 0.0), (("--build", "--global-weight", 0.3), 1.0), (("--build", "--global-weight", 0), 0.0)]
)
def test_ranks_are_measured_if_asked(tiny_dir, cache_root, invoke, small_builds, options, weight):
    """Here only then; with them, a prompt of one token is decoded by the model's own ranks."""
    command = ("--model", tiny_dir, "--ignore-chat-template", "--prompt", "", "--max-tokens", 2, "--json")
    assert json.loads(invoke(main, *command, *options).out)["global_weight"] == weight
    assert (cache_root / "glass_cache_dir").exists() == bool(weight)


def test_seed(invoke):
    said = [invoke(main, *RAW, "--verbose", "F", "--temp", 1, "--seed", seed).out for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_process(real_demo, forked):
    """A process of its own: the prompt on stdin, nothing on stderr, not even a warning of Python's."""
    options = ("--ignore-chat-template", "--max-tokens", N, "--verbose", "False")
    done = forked("-m", "glass_mlx.generate", "--prompt", "-", *options, stdin=PROMPT)
    assert (done.code, done.err) == (0, "")
    assert done.out == generate(*real_demo, PROMPT, max_tokens=N) + "\n"


@pytest.mark.parametrize(
    "options",
    [
        *(("--density", d) for d in ("0", "1.5", "abc", "nan", "")),
        *(("--global-weight", w) for w in ("2", "-1", "abc")),
        ("--signal", "loudness"),
        ("--max-tokens", "0"),
        ("--max-tokens", "-2"),
        *((f"--{name}", "-1") for name in ("temp", "top-p", "min-p", "top-k", "xtc-threshold", "draft-tokens")),
        *(("--top-p", "1.5"), ("--temp", "nan"), ("--xtc-threshold", "0.6"), ("--prefill-step-size", "0")),
        ("--image", "x.png"),
        ("--chat-template-config", "{"),
        ("--chat-template-config", "[1]"),
        ("--draft-model", "demo", "--prompt-cache-file", "x"),
    ],
)
def test_usage_errors(invoke, options):
    done = invoke(main, "--model", "/no/model", *options)
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1].startswith("glass_mlx.generate: error: ")
    assert options[0] in done.err.splitlines()[-1]


@pytest.fixture(scope="module")
def failing(tiny_dir, tmp_path_factory):
    """Options that fail, by name."""
    tmp_path = tmp_path_factory.mktemp("failing")
    (tmp_path / "garbage.safetensors").write_bytes(b"\x07" * 99)
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), {"a": mx.ones(3)})
    save_prompt_cache(str(tmp_path / "plain.safetensors"), [KVCache.from_state((*mx.ones((2, 1, 4, 2, 32)), 2))])
    other = glass_mlx.load(tiny_dir, stats=False)
    cache = other[0].make_cache()
    generate(*other, "Hi", max_tokens=2, prompt_cache=cache)
    save_prompt_cache(str(tmp_path / "other.safetensors"), cache)
    return {
        "unknown model": ("--model", "nonsense"),
        "not cached": ("--model", "mistral-7b"),
        "stats of another model": ("--model", tiny_dir, "--stats", STATS_DIR / "demo.safetensors"),
        "missing stats": ("--stats", tmp_path / "missing.safetensors"),
        "missing adapter": ("--adapter-path", tmp_path / "missing"),
        "missing draft": ("--draft-model", "nonsense"),
        "missing cache": ("--prompt-cache-file", tmp_path / "missing.safetensors"),
        "garbage as cache": ("--prompt-cache-file", tmp_path / "garbage.safetensors"),
        "weights as cache": ("--prompt-cache-file", tmp_path / "weights.safetensors"),
        "shorter cache": ("--prompt-cache-file", tmp_path / "plain.safetensors"),
        "other model's cache": ("--prompt-cache-file", tmp_path / "other.safetensors"),
        "kv group size": ("--kv-bits", 4, "--kv-group-size", 128, "--quantized-kv-start", 0),
    }


FAILURES = """unknown model, not cached, stats of another model, missing stats, missing adapter, missing draft,
    missing cache, garbage as cache, weights as cache, shorter cache, other model's cache, kv group size"""


@pytest.mark.parametrize("name", [name.strip() for name in FAILURES.split(",")])
def test_failures(invoke, failing, name):
    done = invoke(main, *failing[name], "--json")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1


def test_traceback_on_demand(invoke):
    with pytest.raises(StatsError):
        invoke(main, "--stats", "missing.safetensors", "--verbose", "True")


def test_refusing_chat_template(model_copy, invoke):
    (model_copy / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    done = invoke(main, "--model", model_copy, "--prompt", "Hi", "--stats", STATS_DIR / "demo.safetensors", "--dense")
    assert done.code == 1
    done = invoke(main, "--model", model_copy, "--prompt", "Hi", "--dense")
    assert (done.code, done.out) == (1, "") and "no system role" in done.err


def test_other_vocabulary_drafts(model_copy, invoke):
    tokenizer = json.loads((model_copy / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["more"] = 4096
    (model_copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = invoke(main, "--draft-model", model_copy)
    assert done.code == 1 and "vocabularies differ" in done.err


@pytest.mark.parametrize("options", [(), ("--dense",)])
def test_prompt_cache_file(demo, tmp_path, invoke, options):
    """A saved cache goes on where it was, without another BOS: the saved session decides."""
    model, tokenizer = demo
    path, cache = tmp_path / "cache.safetensors", model.make_cache(density=0.25)
    list(stream_generate(model, tokenizer, PROMPT, 3, prompt_cache=cache))
    save_prompt_cache(str(path), cache)
    done = invoke(main, *RAW, "--prompt-cache-file", path, "--json", *options)
    result = json.loads(done.out)
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
    if options:
        expected = _dense(demo, prompt, prompt_cache=cache[:-1])
    else:
        expected = _tokens(stream_generate(model, tokenizer, prompt, N, prompt_cache=cache))
        assert result["density"] == 0.25
    assert result["tokens"] == expected


@pytest.mark.parametrize("options", [("--density", 0.25), ("--dense",)])
def test_prompt_cache_of_mlx_lm(demo, tmp_path, invoke, options):
    """A cache without a session, as ``mlx_lm.cache_prompt`` makes; then the user's text only, as mlx-lm does."""
    model, tokenizer = demo
    path, cache = tmp_path / "cache.safetensors", make_prompt_cache(model.dense)
    start = tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=False)
    _dense(demo, start, 1, prompt_cache=cache)
    save_prompt_cache(str(path), cache)
    command = ("--prompt", "Hello", "--max-tokens", N, "--prompt-cache-file", path, "--json", *options)
    result = json.loads(invoke(main, *command).out)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer.encode(text[text.index("Hello") :], add_special_tokens=False)
    assert result["prompt_tokens"] == len(prompt)
    if "--dense" in options:
        assert result["tokens"] == _dense(demo, prompt, prompt_cache=cache)
    else:
        cache = model.add_session(cache)
        assert result["tokens"] == _tokens(
            stream_generate(model, tokenizer, prompt, N, density=0.25, prompt_cache=cache)
        )
