"""Tests that a session out of a file is checked before its numbers are used: it is sound, refused in words, or its
neurons are chosen again."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import ArraysCache, load_prompt_cache, save_prompt_cache

from glass_mlx import GlassError, GlassModel
from glass_mlx.evaluation.tiny_models import tiny_model
from glass_mlx.model.saved_session import restore

PROMPT, ANSWER = [3, 14, 15, 9, 26], [8, 97, 9]
HEADER, EVIDENCE, PENDING, KEPT = 1, 2, 3, 4  # places in the saved entry


@pytest.fixture(scope="module")
def model() -> GlassModel:
    return GlassModel(tiny_model("llama"))


@pytest.fixture(scope="module")
def file(model, tmp_path_factory) -> Path:
    """A conversation with everything in it: evidence, tokens to be read again, kept neurons."""
    cache = model.make_cache()
    mx.eval(model.prefill(mx.array([PROMPT]), cache))
    model.select(cache)
    for token in ANSWER:
        mx.eval(model.decode(mx.array([[token]]), cache))
    path = tmp_path_factory.mktemp("cache") / "cache.safetensors"
    save_prompt_cache(str(path), cache)
    return path


def loaded(file: Path) -> tuple[list, list]:
    """The prompt cache, and the values of its last entry, to be tampered with."""
    cache = load_prompt_cache(str(file))
    return cache, cache[-1].cache


def use(model: GlassModel, cache: list) -> mx.array:
    """Decode a token and prefill two more."""
    model.select(cache)
    mx.eval(model.decode(mx.array([[5]]), cache))
    logits = model.prefill(mx.array([[7, 8]]), cache)
    mx.eval(logits)
    return logits


def test_what_was_saved_can_be_used(model, file):
    cache, values = loaded(file)
    assert model.session(cache).kept is not None and values[PENDING].tolist() == [ANSWER]
    assert use(model, cache).shape[1] == 2


@pytest.mark.parametrize(
    "tamper",
    [
        lambda kept: kept + kept.shape[0],
        lambda kept: kept.astype(mx.int64) + 2**31,
        lambda kept: kept - kept.shape[0],
        lambda kept: kept[::-1],
        lambda kept: mx.concatenate([kept[:1], kept[:-1]]),
        lambda kept: kept[:-1],
        lambda kept: kept[None],
        lambda kept: kept.astype(mx.float32),
        lambda kept: mx.full(kept.shape, 2**31 - 1, mx.int32),
    ],
)
def test_neurons_that_cannot_be_kept_are_chosen_again(model, file, tamper):
    sound, _ = loaded(file)
    cache, values = loaded(file)
    values[KEPT] = tamper(values[KEPT])
    session = model.session(cache)
    assert session.kept is None
    sound = model.session(sound)
    model.select(cache)
    assert all(map(mx.array_equal, session.kept, sound.kept))
    assert use(model, cache).shape[1] == 2


@pytest.mark.parametrize(
    ("place", "tamper"),
    [
        (PENDING, lambda tokens: tokens + 1_000_000),
        (PENDING, lambda tokens: tokens - 1_000),
        (PENDING, lambda tokens: tokens[0]),
        (PENDING, lambda tokens: tokens.T),
        (PENDING, lambda tokens: mx.zeros((1, 10**4), mx.int32)),
        (PENDING, lambda tokens: tokens.astype(mx.float32)),
        (EVIDENCE, lambda energy: -energy),
        (EVIDENCE, lambda energy: energy * float("nan")),
        (EVIDENCE, lambda energy: energy[:-1]),
        (EVIDENCE, lambda energy: energy[None]),
        (EVIDENCE, lambda energy: energy.astype(mx.float16)),
        (EVIDENCE, lambda energy: "energy"),
        (EVIDENCE, lambda energy: energy + 3e38),
        (HEADER, lambda header: header[:-5]),
        (HEADER, lambda header: "[]"),
        (HEADER, lambda header: "[" * 100_000),
        (HEADER, lambda header: header.replace('"offset": 8', '"offset": 800')),
        (HEADER, lambda header: header.replace('"offset": 8', '"offset": -8')),
        (HEADER, lambda header: header.replace('"density": 0.5', '"density": 5')),
        (HEADER, lambda header: header.replace('"density"', '"density\\u001b[31m"')),
        (0, lambda version: "glass_mlx session 2"),
        (0, lambda version: "glass_mlx session 99"),
    ],
)
def test_what_is_damaged_is_refused(model, file, place, tamper):
    cache, values = loaded(file)
    values[place] = tamper(values[place])
    with pytest.raises(GlassError, match="prompt cache cannot be used") as caught:
        model.session(cache)
    assert len(str(caught.value)) < 200 and str(caught.value).isprintable()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(deadline=None, max_examples=examples(20, 80), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_header_is_sound_or_refused(model, file, data):
    cache, values = loaded(file)
    header = json.loads(values[HEADER])
    key = data.draw(st.sampled_from(sorted(header)))
    if isinstance(header[key], dict) and data.draw(st.booleans()):
        header[key][data.draw(st.sampled_from(sorted(header[key])))] = data.draw(json_values)
    else:
        header[key] = data.draw(json_values)
    values[HEADER] = json.dumps(header)
    try:
        model.session(cache)
    except GlassError as e:
        assert str(e).isprintable()
        return
    assert use(model, cache).shape[1] == 2


def test_another_models_session_is_refused(file):
    other = GlassModel(tiny_model("gpt2"))
    cache, _ = loaded(file)
    with pytest.raises(GlassError, match="another model"):
        other.session(cache)


def test_a_cache_of_several_sequences(model, tmp_path):
    cache = model.make_cache()
    mx.eval(model.prefill(mx.array([PROMPT] * 3), cache))
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert mx.array_equal(model.session(loaded).energy, model.session(cache).energy)


def test_values_that_are_no_list(model, file):
    cache, values = loaded(file)
    cache[-1].cache = dict(enumerate(values[1:], 1))
    with pytest.raises(GlassError, match="no session"):
        model.session(cache)
    with pytest.raises(GlassError, match="prompt cache cannot be used"):
        model.add_session(cache)


def test_other_entries_are_none_of_its_business():
    entry = ArraysCache(1)
    entry[0] = mx.zeros((1,))
    assert restore(entry) is None and restore(copy.copy(np.zeros(3))) is None
