"""Tests of GlassModel: what decoding on some of the neurons must be, on every family that mlx-lm has."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from family_kinds import by_family
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache, trim_prompt_cache
from mlx_lm.tuner.lora import LoRALinear

import glass_mlx
from glass_mlx import GlassConfig, GlassError, GlassModel
from glass_mlx.core.compensation import Response
from glass_mlx.core.prior import Prior
from glass_mlx.core.slicing import ScatterLinear, plain_class
from glass_mlx.evaluation.tiny_models import Unbuildable, tiny_model
from glass_mlx.hub.model_files import model_types
from glass_mlx.model.blocks import Block
from glass_mlx.ranks.format import GlobalStatistics
from glass_mlx.ranks.lookup import STATS_DIR

PROMPT = [3, 14, 15, 9, 26, 5, 35]
OTHER = [8, 97, 9, 32, 38, 46]
STEPS = [8, 97, 9]


NO_DENSE_FFN = set("dbrx mamba mamba2 rwkv7".split())
FAMILIES = set(model_types()) - NO_DENSE_FFN
# Of every kind of block and of what stands beside it: plain, gated, fused, scaled, shared experts, hybrids.
BLOCKS = "gpt2 llama phi3 phi3small gemma3_text qwen2_moe deepseek_v3 falcon_h1 lfm2 recurrent_gemma gemma3n".split()
# mlx-lm's own block-sparse attention sees other keys when a prompt comes in chunks.
CHUNKABLE = FAMILIES - {"phi3small"}


@functools.cache
def family(name: str) -> GlassModel:
    """A tiny model of a family, built once."""
    try:
        model = GlassModel(tiny_model(name), GlassConfig(experts="sparse"))
    except Unbuildable as e:
        pytest.skip(f"{name} {e}")
    model.set_global_ranks(None, responses=made_up_responses(model))
    return model


def made_up_ranks(model: GlassModel) -> dict[str, list[mx.array]]:
    """Global ranks that have nothing to do with the model."""
    rng = np.random.default_rng(5)

    def ranks(block: Block) -> mx.array:
        return mx.array(np.concatenate([rng.permutation(block.width) + 1 for _ in range(block.experts or 1)]))

    return {signal: [ranks(block) for block in model.blocks] for signal in ("impact", "activation")}


def made_up_responses(model: GlassModel, rank: int = 3) -> list[Response]:
    """Responses that have nothing to do with the model."""
    rng = np.random.default_rng(6)

    def random(*shape: int) -> mx.array:
        return mx.array(rng.normal(size=shape, scale=0.2).astype(np.float32))

    def response(h: int, f: int) -> Response:
        return Response(random(h), random(f), random(h, rank), random(rank, f))

    return [response(block.input_size, block.size) for block in model.blocks]


@pytest.fixture(scope="module")
def llama() -> GlassModel:
    model = tiny_model("llama")
    glass = GlassModel(model)
    glass.set_global_ranks(made_up_ranks(glass))
    return glass


@pytest.fixture(scope="module")
def trained() -> tuple[GlassModel, Any]:
    """The demo model, with made-up global ranks, and its tokenizer."""
    model, tokenizer = glass_mlx.load("demo", stats=False, global_weight=0)
    model.set_global_ranks(made_up_ranks(model))
    return model, tokenizer


@dataclass
class Seen:
    """What the dense model computed in one block: its inputs and hidden vectors, a matrix for each call; of routed
    experts also which of them these are of."""

    inputs: list[mx.array] = field(default_factory=list)
    hidden: list[mx.array] = field(default_factory=list)
    experts: list[mx.array] = field(default_factory=list)


class Watched:
    """A projection that shows its input, and computes with what it gets for it."""

    def __init__(self, projection: nn.Module, show: Callable[..., mx.array]):
        self.projection, self.show = projection, show

    def __call__(self, x: mx.array, *routing: mx.array, **kwargs: bool) -> mx.array:
        return self.projection(self.show(x, *routing), *routing, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.projection, name)


@contextmanager
def watched(
    model: GlassModel, change: Callable[..., mx.array] = lambda i, x, h, *experts: h
) -> Iterator[dict[str, Seen]]:
    """The dense model with what it computes shown by block; ``change`` makes other hidden vectors of block i from its
    inputs and hidden vectors, and of routed experts from which these are: what sparse decoding is to equal, without a
    compact weight."""
    blocks = model.blocks  # as they are before they are changed
    seen = {block.path: Seen() for block in blocks}
    own = [(block, name, block.module[name]) for block in blocks for name in (block.inputs[0], block.output)]

    def show_input(i: int, x: mx.array, *experts: mx.array) -> mx.array:
        seen[blocks[i].path].inputs.append(x)
        return x

    def show_hidden(i: int, h: mx.array, *experts: mx.array) -> mx.array:
        own = seen[blocks[i].path]
        own.hidden.append(h)
        own.experts += experts
        return change(i, own.inputs[-1], h, *experts)

    for i, block in enumerate(blocks):
        for name, show in ((block.inputs[0], show_input), (block.output, show_hidden)):
            block.module[name] = Watched(block.module[name], functools.partial(show, i))
    try:
        yield seen
    finally:
        for block, name, projection in own:
            block.module[name] = projection


def expected_of_the_dropped(
    response: Response | None, seen: Seen | None, tokens: int
) -> Callable[[np.ndarray], np.ndarray]:
    """The formula of ``core/compensation.py`` in NumPy, for one block after a prompt: hidden vectors from inputs. The
    prompt does not count for routed experts: nothing is ``seen``."""

    def counted(calls: list[mx.array]) -> np.ndarray:
        vectors = [np.array(c.astype(mx.float32), np.float64).reshape(-1, c.shape[-1]) for c in calls]
        return np.concatenate([v[1:] if len(v) == tokens else v for v in vectors])  # the first token does not count

    if seen is not None:
        x, h = counted(seen.inputs), counted(seen.hidden)
    if response is None:
        mean = 0.0 if seen is None else h.sum(axis=0) / (len(h) + 64)
        return lambda inputs: np.broadcast_to(mean, (*inputs.shape[:-1], *np.shape(mean)))
    mu, a, p, c = (
        np.array(v.astype(mx.float32), np.float64) for v in vars(response).values() if isinstance(v, mx.array)
    )
    e = 0.0 if seen is None else (h - a - (x - mu) @ p @ c).sum(axis=0) / (len(h) + 64)
    return lambda inputs: a + e + (inputs - mu) @ p @ c


def without_dropped(
    model: GlassModel, cache: list, prompt: list[int], seen: dict[str, Seen]
) -> Callable[..., mx.array]:
    """For ``watched``: the hidden values of the neurons that a conversation dropped are those to expect of them after
    a prompt of which this was ``seen``, or 0 without compensation and in routed experts without a response."""
    masks = [np.isin(np.arange(b.size), kept) for b, kept in zip(model.blocks, model.kept_neurons(cache).values())]
    responses = model.responses or [None] * len(masks)
    expect = [
        expected_of_the_dropped(r, None if block.experts else seen[block.path], len(prompt))
        for r, block in zip(responses, model.blocks)
    ]

    def change(i: int, x: mx.array, h: mx.array, experts: mx.array | None = None) -> mx.array:
        block, mask, others = model.blocks[i], masks[i], 0.0
        if model.session(cache).config.compensation and (experts is None or responses[i] is not None):
            others = expect[i](np.array(x.astype(mx.float32), np.float64))
        if experts is not None:  # each hidden vector is of one of them
            mask = mask.reshape(block.experts, -1)[np.array(experts)][..., None, :]
            if np.ndim(others):
                rows = others.reshape(-1, block.experts, block.width)
                others = np.take_along_axis(rows, np.array(experts, np.int64).reshape(len(rows), -1, 1), axis=1)
        others = np.reshape(others, h.shape) if np.ndim(others) else others
        return mx.array(np.where(mask, np.array(h.astype(mx.float32)), others).astype(np.float32)).astype(h.dtype)

    return change


def run(model: nn.Module, cache: list | None, *calls: list[int]) -> list[mx.array]:
    """The logits of several calls."""
    logits = [model(mx.array([tokens]), cache=cache) for tokens in calls]
    mx.eval(logits)
    return logits


def prefilled(model: GlassModel, prompt: list[int] = PROMPT, chunk: int | None = None, **config) -> list:
    """A prompt cache after a prompt."""
    cache = model.make_cache(**config)
    chunk = chunk or len(prompt)
    for i in range(0, len(prompt), chunk):
        mx.eval(model.prefill(mx.array([prompt[i : i + chunk]]), cache))
    return cache


def decoded(model: GlassModel, cache: list, *tokens: int) -> list[mx.array]:
    """The logits of tokens that are decoded one by one."""
    logits = []
    for token in tokens:
        model.select(cache)
        logits.append(model.decode(mx.array([[token]]), cache))
    mx.eval(logits)
    return logits


def say(model: nn.Module, prompt: list[int], cache: list, n: int = 6) -> list[int]:
    """Tokens that mlx-lm's own loop generates."""
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=n, prompt_cache=cache)]


def close(a: mx.array, b: mx.array, tolerance: float = 1e-4) -> bool:
    return mx.max(mx.abs(a - b)).item() <= tolerance * mx.max(mx.abs(b)).item()


def steps(tokens: list[int]) -> list[list[int]]:
    return [[token] for token in tokens]


def assert_masked_dense(model: GlassModel, prompt: list[int] = PROMPT, **config) -> None:
    """Sparse decoding equals the dense model with other hidden values for the dropped neurons."""
    cache, reference = model.make_cache(density=0.5, **config), make_prompt_cache(model.dense)
    (read,) = run(model, cache, prompt)
    with watched(model) as seen:
        (expected,) = run(model.dense, reference, prompt)
    assert mx.array_equal(read, expected)  # prefill is dense to the bit
    dense = copy.deepcopy(reference)
    sparse = decoded(model, cache, *STEPS[:2])
    with watched(model, without_dropped(model, cache, prompt, seen)):
        expected = run(model.dense, reference, *steps(STEPS[:2]))
    assert all(map(close, sparse, expected))
    assert not close(sparse[0], *run(model.dense, dense, STEPS[:1]), tolerance=1e-2)


# Every family


@pytest.mark.parametrize("name", sorted(NO_DENSE_FFN))
def test_a_family_without_dense_blocks_is_refused(name):
    with pytest.raises(GlassError, match="no FFN block"):
        GlassModel(tiny_model(name))


@by_family(FAMILIES)
def test_density_1_is_the_dense_model(name):
    model = family(name)
    calls = [PROMPT, *steps(STEPS[:1])]
    glass = run(model, model.make_cache(density=1.0), *calls)
    dense = run(model.dense, make_prompt_cache(model.dense), *calls)
    assert all(map(mx.array_equal, glass, dense))


@by_family(FAMILIES)
def test_decoding_equals_the_dense_model_with_the_dropped_neurons_predicted(name):
    assert_masked_dense(family(name))


@pytest.mark.parametrize("name", BLOCKS)
def test_decoding_equals_the_dense_model_without_the_dropped_neurons(name):
    assert_masked_dense(family(name), compensation=False)


@by_family(CHUNKABLE)
def test_prefill_in_chunks_chooses_the_same_neurons(name):
    model = family(name)
    whole, chunked = prefilled(model, PROMPT[:5]), prefilled(model, PROMPT[:5], chunk=4)  # the last one has one token
    np.testing.assert_allclose(model.session(chunked).energy, model.session(whole).energy, rtol=1e-3, atol=1e-7)
    neurons = model.kept_neurons(chunked)
    for path, kept in model.kept_neurons(whole).items():
        assert kept.shape == neurons[path].shape
        assert len(np.setdiff1d(kept, neurons[path])) <= 1  # a near-tie


# The choice of neurons


def ranks_of(importance: np.ndarray) -> list[int]:
    ranks = np.empty(len(importance), int)
    ranks[np.argsort(-importance, kind="stable")] = np.arange(1, len(importance) + 1)
    return ranks.tolist()


def energies_by_hand(model: GlassModel, seen: dict[str, list[mx.array]], signal: str) -> list[np.ndarray]:
    """The evidence of hidden vectors that were watched, in float64."""
    energies = []
    for block in model.blocks:
        g = np.concatenate([np.array(h[0].astype(mx.float32), np.float64) for h in seen[block.path].hidden])
        if signal == "impact":
            g *= np.linalg.norm(np.array(block.module[block.output].weight.astype(mx.float32), np.float64), axis=0)
        energies.append(((g / np.linalg.norm(g, axis=1, keepdims=True)) ** 2).sum(0))
    return energies


def choose(local: list[int], model_ranks: list[int], weight: Fraction, k: int) -> list[int]:
    """The formulas of GLASS for one block, in fractions: the indices that are kept."""
    fused = [(1 - weight) * a + weight * b for a, b in zip(local, model_ranks)]
    return sorted(sorted(range(len(fused)), key=lambda j: (fused[j], j))[:k])


@pytest.mark.parametrize("signal", ["impact", "activation"])
@pytest.mark.parametrize(
    ("which", "global_weight"),
    [
        *(("llama", weight) for weight in (0, 0.5, 0.95, 1, "auto")),
        *(pytest.param("trained", weight, marks=pytest.mark.few(2)) for weight in (0.5, "auto")),
    ],
)
def test_choice_by_hand(which, signal, global_weight, request):
    """From the hidden vectors of every prompt token, the last one included, which mlx-lm reads by itself."""
    model, prompt, density = request.getfixturevalue(which), PROMPT, 0.4
    if which == "trained":
        model, tokenizer = model
        prompt = tokenizer.encode("The old house stood at the end of the lane,")[:12]
    weight = None if global_weight == "auto" else Fraction(round(global_weight * 10**6), 10**6)
    cache = model.make_cache(density=density, global_weight=global_weight, signal=signal)
    say(model, prompt, cache, 1)
    kept = model.kept_neurons(cache)
    assert list(kept) == [block.path for block in model.blocks]
    with watched(model) as seen:
        run(model.dense, make_prompt_cache(model.dense), prompt[:-1], prompt[-1:])
    energies = energies_by_hand(model, seen, signal)
    # made from the ranks, a neuron of twice the rank having half the energy
    worlds = [1 / np.array(ranks) / (1 / np.array(ranks)).sum() for ranks in model.global_ranks[signal]]
    halves = [np.array(ranks) <= block.size // 2 for block, ranks in zip(model.blocks, model.global_ranks[signal])]
    fits = [e[half].sum() / e.sum() / world[half].sum() for e, half, world in zip(energies, halves, worlds)]
    pseudo_tokens = 4 + 252 * min(max((np.mean(fits) - 0.85) / 0.1, 0), 1) ** 2
    for world, block, energy, ranks in zip(worlds, model.blocks, energies, model.global_ranks[signal]):
        assert energy.sum() == pytest.approx(len(prompt))
        local = ranks_of(energy if weight is not None else energy + pseudo_tokens * world)
        expected = choose(local, ranks.tolist(), weight or Fraction(0), round(density * block.size))
        assert kept[block.path].dtype == mx.int32 and kept[block.path].tolist() == expected


@pytest.mark.parametrize("signal", ["impact", "activation"])
def test_a_block_that_runs_more_than_once_per_token(signal):
    model = family("iquestloopcoder")
    cache = prefilled(model, signal=signal)
    with watched(model) as seen:
        run(model.dense, make_prompt_cache(model.dense), PROMPT)
    assert {len(calls.hidden) for calls in seen.values()} == {2}
    expected = np.concatenate(energies_by_hand(model, seen, signal))
    np.testing.assert_allclose(model.session(cache).energy, expected, rtol=1e-4, atol=1e-8)


def top(model: GlassModel, density: float, signal: str = "impact") -> list[list[int]]:
    """What the global ranks alone keep."""
    return [np.flatnonzero(np.array(r) <= round(density * len(r))).tolist() for r in model.global_ranks[signal]]


def kept_lists(model: GlassModel, cache: list) -> list[list[int]]:
    return [kept.tolist() for kept in model.kept_neurons(cache).values()]


@pytest.mark.parametrize(
    ("prompt", "weight", "by_the_model"),
    [(1, "auto", False), (1, 0.3, True), (1, 0, False), (0, "auto", True), (0, 0, True), (2, "auto", False)],
)
def test_short_prompts(llama, prompt, weight, by_the_model):
    """With nothing local but one token, fixed weights leave the choice to the global ranks, unless they are not to."""
    cache = llama.make_cache(global_weight=weight)
    if prompt:
        mx.eval(llama.prefill(mx.array([PROMPT[:prompt]]), cache))
    assert (kept_lists(llama, cache) == top(llama, 0.5)) == by_the_model
    assert (llama.global_weight(llama.session(cache)) == 1) == by_the_model


def test_without_global_ranks_the_prompt_decides(llama):
    model = GlassModel(llama.dense)
    cache = model.make_cache(global_weight=0.9)
    with pytest.raises(GlassError, match="prefill a prompt first"):
        model.kept_neurons(cache)
    say(model, PROMPT, cache, 1)
    assert model.global_weight(model.session(cache)) == 0
    alone = llama.make_cache(global_weight=0)
    say(llama, PROMPT, alone, 1)
    assert kept_lists(model, cache) == kept_lists(llama, alone)


def test_evidence_of_two_turns_adds_up(llama):
    """And that of the answers between, with the next prompt."""
    cache = prefilled(llama)
    session, prompt = llama.session(cache), copy.deepcopy(cache[:-1])
    first = np.array(session.energy)
    decoded(llama, cache, *STEPS)
    compact = session.compact
    decoded(llama, cache, *STEPS)
    assert session.compact is compact  # one choice for each answer
    with watched(llama) as seen:
        run(llama.dense, prompt, [*STEPS, *STEPS, *OTHER])
    mx.eval(llama.prefill(mx.array([OTHER]), cache))
    expected = 0.5 ** (2 * len(STEPS) / 128) * first + np.concatenate(energies_by_hand(llama, seen, "impact"))
    np.testing.assert_allclose(session.energy, expected, rtol=1e-4, atol=1e-8)
    assert session.prompt_tokens == len(PROMPT) + 2 * len(STEPS) + len(OTHER)
    assert session.compact is None


def test_density_is_changed_in_a_conversation(llama):
    """The evidence of a prompt that was read at one density serves another, density 1 included."""
    expected = prefilled(llama, density=0.25)
    for before in (0.5, 1.0):
        cache = prefilled(llama, density=before)
        llama.session(cache).configure(density=0.25)
        assert kept_lists(llama, cache) == kept_lists(llama, expected)


def test_signal_is_changed_in_a_conversation(llama):
    cache = prefilled(llama)
    llama.session(cache).configure(signal="activation")
    assert kept_lists(llama, cache) == top(llama, 0.5, "activation")


def test_density_1_keeps_all(llama):
    cache = prefilled(llama, density=1.0)
    assert kept_lists(llama, cache) == [list(range(block.size)) for block in llama.blocks]


# In mlx-lm's hands


@pytest.mark.few(1)
@pytest.mark.parametrize("prefill_step_size", [4, 2048])
def test_mlx_lm_generates_what_glass_mlx_does(trained, prefill_step_size):
    model, tokenizer = trained
    prompt = tokenizer.encode("The captain looked at the sea and")[:8]
    options = {"max_tokens": 6, "prefill_step_size": prefill_step_size}
    here = list(glass_mlx.stream_generate(model, tokenizer, prompt, **options))
    there = list(mlx_lm.stream_generate(model, tokenizer, prompt, **options))
    dense = list(mlx_lm.stream_generate(model.dense, tokenizer, prompt, **options))
    assert [r.token for r in here] == [r.token for r in there]
    assert close(here[-1].logprobs, there[-1].logprobs, tolerance=0.02)
    assert here[0].token == dense[0].token  # the prompt was read densely
    assert not close(here[1].logprobs, dense[1].logprobs, tolerance=0.02)
    text = mlx_lm.generate(model, tokenizer, prompt, **options)
    assert text == glass_mlx.generate(model, tokenizer, prompt, **options) == "".join(r.text for r in here)


def test_interleaved_conversations(llama):
    """Several conversations on one model, turn by turn, each say what they say alone."""
    settings = [(PROMPT, {}), (OTHER, {"density": 0.25}), (PROMPT[::-1], {"density": 1.0}), (OTHER[1:], {})]

    def speaker(prompt: list[int], config: dict) -> Iterator:
        return generate_step(mx.array(prompt), llama, max_tokens=6, prompt_cache=llama.make_cache(**config))

    alone = [[int(token) for token, _ in speaker(*s)] for s in settings]
    together = zip(*(speaker(*s) for s in settings))
    assert [[int(token) for token, _ in turn] for turn in together] == [list(turn) for turn in zip(*alone)]
    assert len(set(map(tuple, alone))) == len(alone)


@pytest.mark.parametrize("read", [len(PROMPT) - 1, len(PROMPT)])
def test_deep_copies_go_on_alike(llama, read):
    cache = prefilled(llama, PROMPT[:read])
    first, rest = (PROMPT[read:] or [STEPS[0]])[:1], 5
    twin = copy.deepcopy(cache)
    said = say(llama, first, cache, rest)
    assert say(llama, first, copy.deepcopy(twin), rest) == say(llama, first, twin, rest) == said


def test_trimmed_and_regenerated(llama):
    cache = llama.make_cache()
    said = say(llama, PROMPT, cache)
    kept = kept_lists(llama, cache)
    offset = llama.session(cache).offset
    assert offset == cache[0].offset
    trim_prompt_cache(cache, offset - len(PROMPT) + 1)  # mlx-lm reads a prompt's last token by itself
    assert say(llama, PROMPT[-1:], cache) == said
    assert kept_lists(llama, cache) == kept


@pytest.mark.parametrize("generated", [0, 4])
def test_saved_and_loaded(llama, tmp_path, generated):
    """Between prompt and answer, and within an answer."""
    path = str(tmp_path / "cache.safetensors")
    cache = prefilled(llama, PROMPT[:-1], global_weight=0.25)
    token = (say(llama, PROMPT[-1:], cache, generated) if generated else PROMPT)[-1]
    save_prompt_cache(path, cache)
    loaded = load_prompt_cache(path)
    assert say(llama, [token], loaded) == say(llama, [token], cache)
    assert llama.session(loaded).config == llama.session(cache).config
    assert llama.session(loaded).offset == llama.session(cache).offset == loaded[0].offset
    assert kept_lists(llama, loaded) == kept_lists(llama, cache)


def test_a_loaded_dense_cache_runs_dense(llama, tmp_path):
    path = str(tmp_path / "cache.safetensors")
    cache = make_prompt_cache(llama.dense)
    run(llama.dense, cache, PROMPT)
    save_prompt_cache(path, cache)
    loaded = load_prompt_cache(path)
    assert mx.array_equal(run(llama, loaded, [8])[0], run(llama.dense, cache, [8])[0])
    with pytest.raises(GlassError, match="has no session"):
        llama.session(loaded)


def test_a_session_for_a_cache_of_mlx_lms(llama):
    """What plain mlx-lm has read left no evidence; what comes is decoded by the global ranks and itself."""
    dense = make_prompt_cache(llama.dense)
    run(llama.dense, dense, PROMPT)
    cache = llama.add_session(dense)
    assert cache[:-1] == dense and llama.add_session(cache) is cache
    assert kept_lists(llama, cache) == top(llama, 0.5)
    say(llama, OTHER, cache, 1)
    session = llama.session(cache)
    assert session.prompt_tokens == len(OTHER) and session.offset == cache[0].offset
    assert trim_prompt_cache(cache, 1 + len(OTHER)) == 1 + len(OTHER)
    assert session.energy is None and session.offset == cache[0].offset == len(PROMPT)


def test_not_batched_by_mlx_lms_server(llama):
    """The server's question is whether all entries of a cache can be merged with other conversations' entries."""
    assert all(hasattr(c, "merge") for c in make_prompt_cache(llama.dense))
    assert not all(hasattr(c, "merge") for c in make_prompt_cache(llama))


def test_max_kv_size_reaches_mlx_lm():
    assert [getattr(c, "max_size", None) for c in family("qwen2").make_cache(max_kv_size=16)] == [16, 16, None]


def test_input_embeddings_are_a_prompt(llama):
    cache, expected = llama.make_cache(), prefilled(llama)
    embeddings = llama.model.embed_tokens(mx.array([PROMPT]))
    llama(mx.array([[]], mx.int32), cache=cache, input_embeddings=embeddings)
    assert llama.session(cache).offset == len(PROMPT)
    assert mx.array_equal(llama.session(cache).energy, llama.session(expected).energy)


def test_decode_of_several_tokens(llama):
    one, several = prefilled(llama), prefilled(llama)
    llama.select(several)
    logits = llama.decode(mx.array([STEPS]), several)
    assert close(logits, mx.concatenate(decoded(llama, one, *STEPS), axis=1))
    assert llama.session(several).offset == llama.session(one).offset == len(PROMPT) + len(STEPS)
    assert llama.session(several).prompt_tokens == len(PROMPT)


QUANTISATIONS = [
    {"bits": 4},
    {"bits": 3, "group_size": 64},
    {"bits": 6, "group_size": 128},
    {"bits": 4, "group_size": 32},
    {"mode": "mxfp4"},
    {"mode": "nvfp4"},
    {"mode": "mxfp8"},
]


@pytest.mark.few(11)
@pytest.mark.parametrize("quantisation", QUANTISATIONS, ids=lambda q: "-".join(map(str, q.values())))
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_quantised(name, quantisation):
    dense = tiny_model(name)
    group = quantisation.get("group_size", 32)
    fits = lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % group == 0  # noqa: E731
    nn.quantize(dense, **quantisation, class_predicate=fits)
    model = GlassModel(dense)
    assert_masked_dense(model)
    cache = prefilled(model)
    decoded(model, cache, 8)
    block, compact = model.blocks[0], model.session(cache).compact.projections[0]
    assert {type(compact[name]) for name in block.inputs} == {plain_class(block.module[block.inputs[0]])}
    in_units = quantisation.get("mode") is None and quantisation.get("group_size", 64) > 32
    assert type(compact[block.output]) is (nn.QuantizedLinear if in_units else ScatterLinear)


def test_mixed_precision():
    """As mlx-lm's recipes have it: some down projections get more bits."""
    dense = tiny_model("llama")

    def recipe(path, module):
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": 6, "group_size": 128} if path.endswith("0.mlp.down_proj") else {"bits": 3, "group_size": 64}

    nn.quantize(dense, class_predicate=recipe)
    model = GlassModel(dense)
    assert [block.group for block in model.blocks] == [128, 64]
    assert_masked_dense(model)


# The wrapped model stays as it is


def snapshot(model: nn.Module) -> dict[str, int]:
    """The identities of a model's modules and arrays."""
    arrays = {name: id(array) for name, array in tree_flatten(model.parameters())}
    return arrays | {f"{name}()": id(module) for name, module in model.named_modules()}


def test_the_dense_model_is_unchanged(llama):
    before, logits = snapshot(llama.dense), run(llama.dense, None, PROMPT)
    say(llama, PROMPT, llama.make_cache())
    assert snapshot(llama.dense) == before
    assert mx.array_equal(run(llama.dense, None, PROMPT)[0], *logits)


class Broken:
    """A cache entry that fails in the middle of a forward."""

    offset = 0

    def update_and_fetch(self, keys, values):
        raise MemoryError


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_an_error_in_a_forward_leaves_the_model_as_it_is(llama, phase):
    before, logits = snapshot(llama.dense), run(llama.dense, None, PROMPT)
    cache = llama.make_cache() if phase == "prefill" else prefilled(llama)
    cache[1] = Broken()
    with pytest.raises(MemoryError):
        run(llama, cache, PROMPT if phase == "prefill" else [8])
    assert snapshot(llama.dense) == before
    assert mx.array_equal(run(llama.dense, None, PROMPT)[0], *logits)


def test_calls_without_a_session_are_dense(llama):
    expected = run(llama.dense, make_prompt_cache(llama.dense), PROMPT, [8])
    assert all(map(mx.array_equal, run(llama, make_prompt_cache(llama.dense), PROMPT, [8]), expected))
    assert mx.array_equal(run(llama, None, PROMPT)[0], expected[0])


def test_parameters_are_the_dense_models(llama):
    cache = prefilled(llama)
    decoded(llama, cache, 8)
    assert llama.session(cache).compact
    names = [[name for name, _ in tree_flatten(model.parameters())] for model in (llama, llama.dense)]
    assert names[0] == names[1]


def test_attributes_are_the_dense_models(llama):
    assert llama.layers is llama.dense.layers and llama.args is llama.dense.args
    assert llama.model_type == "llama"
    with pytest.raises(AttributeError):
        _ = llama.no_such_attribute


def test_compact_weights_go_with_their_conversation(llama):
    say(llama, PROMPT, llama.make_cache())  # leaves the norms, once
    mx.synchronize()  # mlx-lm is a step ahead when it stops
    before = mx.get_active_memory()
    compact_bytes = math.prod((3, len(llama.blocks), 64, 64, 4))
    for _ in range(3):
        cache = llama.make_cache()
        say(llama, PROMPT, cache)
        assert mx.get_active_memory() >= before + compact_bytes
        mx.synchronize()
        del cache
        assert mx.get_active_memory() <= before + 1024


def test_auto_expects_what_the_model_says_after_prompts_like_it(demo):
    """The demo's domains are prose and answers; each prompt is taken for one of its own kind."""
    model, tokenizer = demo
    statistics = GlobalStatistics.read(STATS_DIR / "demo.safetensors")
    prior = Prior(statistics.domains["impact"])
    for text, domain in (
        ("The old house at the end of the lane had stood empty for many", "null prompt"),
        ("<|user|> I want to find a restaurant in San Jose.<|assistant|>", "own conversation"),
    ):
        cache = model.make_cache()
        mx.eval(model(mx.array(tokenizer.encode(text))[None], cache=cache))
        weights = prior.weights(model.session(cache).energy).tolist()
        assert weights[statistics.domain_names.index(domain)] > 0.95


def test_measured_layer_budgets(llama):
    """Blocks the model is more sensitive to keep more neurons, of the same number in all."""
    model = GlassModel(llama.dense)
    model.set_global_ranks(made_up_ranks(model), sensitivity=[1.0, 3.0])
    counts = model.kept_counts(0.5)
    assert counts[1] > counts[0] and sum(counts) == sum(model.kept_counts(0.5, "uniform"))
    assert len(set(model.kept_counts(0.5, "uniform"))) == 1
    for budgets in ("measured", "uniform"):
        cache = model.make_cache(layer_budgets=budgets)
        say(model, PROMPT, cache, 4)
        assert [len(k) for k in model.kept_neurons(cache).values()] == model.kept_counts(0.5, budgets)


# Models that change after they were wrapped


def changed(change) -> tuple[GlassModel, GlassModel]:
    """A model that changed after an answer, and one wrapped after the same change."""
    model = GlassModel(tiny_model("llama"))
    say(model, PROMPT, model.make_cache())
    change(model.dense)
    other = tiny_model("llama")
    change(other)
    return model, GlassModel(other)


def scale_down_projections(dense: nn.Module) -> None:
    for i, layer in enumerate(dense.layers):
        down = layer.mlp.down_proj
        down.weight = down.weight * mx.exp(mx.random.normal((down.weight.shape[1],), key=mx.random.key(i)))


def replace_blocks(dense: nn.Module) -> None:
    for layer in dense.layers:
        layer.mlp = copy.deepcopy(layer.mlp)


@pytest.mark.parametrize(
    "change",
    [
        lambda dense: nn.quantize(dense, 64, 4),
        lambda dense: dense.set_dtype(mx.bfloat16),
        lambda dense: dense.update(tree_map(lambda a: a * 1.5, dense.parameters())),
        scale_down_projections,
        replace_blocks,
    ],
)
def test_a_model_that_changed_is_planned_again(change):
    model, fresh = changed(change)
    caches = model.make_cache(), fresh.make_cache()
    assert say(model, PROMPT, caches[0]) == say(fresh, PROMPT, caches[1])
    assert kept_lists(model, caches[0]) == kept_lists(fresh, caches[1])


def test_an_adapter_after_wrapping_is_an_error():
    model = GlassModel(tiny_model("llama"))
    for layer in model.dense.layers:
        layer.mlp.down_proj = LoRALinear.from_base(layer.mlp.down_proj)
    with pytest.raises(GlassError, match="adapter: fuse it"):
        say(model, PROMPT, model.make_cache())


def test_saving_writes_the_dense_models_names(tmp_path):
    model = GlassModel(tiny_model("llama"))
    model.save_weights(str(tmp_path / "weights.safetensors"))
    other = tiny_model("llama", seed=1)
    other.load_weights(str(tmp_path / "weights.safetensors"))
    assert mx.array_equal(other(mx.array([PROMPT])), model.dense(mx.array([PROMPT])))
    model.load_weights(str(tmp_path / "weights.safetensors"))
    again = GlassModel(tiny_model("llama", seed=2))
    again.update(model.parameters())
    assert mx.array_equal(again.dense(mx.array([PROMPT])), other(mx.array([PROMPT])))
