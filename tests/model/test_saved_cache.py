"""Tests that mlx-lm's part of a prompt cache out of a file is checked before the model reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache, make_prompt_cache, save_prompt_cache
from safetensors.numpy import load_file, save_file

from glass_mlx import GlassModel
from glass_mlx.evaluation.tiny_models import tiny_config, tiny_model
from glass_mlx.model.saved_cache import UnusableCache, check_entries, read_prompt_cache

PROMPT = list(range(3, 23))  # fills tiny sliding windows


def filled(dense, max_kv_size: int | None = None) -> list:
    cache = make_prompt_cache(dense, max_kv_size)
    for tokens in (PROMPT, [8], [9]):
        mx.eval(dense(mx.array([tokens]), cache=cache))
    return cache


def saved(cache: list, path: Path) -> list:
    save_prompt_cache(str(path), cache)
    return read_prompt_cache(path)


@pytest.fixture(scope="module")
def dense():
    return tiny_model("llama")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "llama4", "falcon_h1", "mamba2", "deepseek_v32"])
def test_a_models_own_cache_is_sound(family, tmp_path):
    dense = tiny_model(family)
    found = check_entries(saved(filled(dense), tmp_path / "cache.safetensors"), dense)
    assert found == (None if family == "mamba2" else len(PROMPT) + 2, 1)


@pytest.mark.parametrize("prompt", [[], [5], PROMPT])
def test_other_forms_of_it_are_sound(prompt, tmp_path):
    """What options of mlx-lm make of it: quantised keys and values, and a window."""
    dense = llama.Model(llama.ModelArgs.from_dict(tiny_config("llama") | {"head_dim": 32}))
    for max_kv_size in (None, 8, 64):
        cache = make_prompt_cache(dense, max_kv_size)
        if prompt:
            mx.eval(dense(mx.array([prompt]), cache=cache))
        found = check_entries(saved(cache, tmp_path / "cache.safetensors") if prompt else cache, dense)
        assert found == (len(prompt), 1 if prompt else None)
        if prompt and max_kv_size is None:
            quantised = [entry.to_quantized(32, 4) for entry in cache]
            assert check_entries(saved(quantised, tmp_path / "cache.safetensors"), dense) == (len(prompt), 1)


def keys(change: Callable[[mx.array], mx.array]) -> Callable[[list], None]:
    return lambda cache: setattr(cache[0], "keys", change(cache[0].keys))


@pytest.mark.parametrize(
    "tamper",
    [
        keys(lambda k: k[:, :1]),
        keys(lambda k: k[..., :8]),
        keys(lambda k: k[:, :, :4]),
        keys(lambda k: k[0]),
        keys(lambda k: k.astype(mx.int32)),
        keys(lambda k: mx.concatenate([k, k])),
        keys(lambda k: None),
        keys(lambda k: k * float("nan")),
        keys(lambda k: k + 1e30),
        keys(lambda k: [k]),
        lambda cache: setattr(cache[0], "offset", 10**6),
        lambda cache: setattr(cache[0], "offset", -1),
        lambda cache: setattr(cache[0], "offset", 3.0),
        lambda cache: setattr(cache[0], "offset", 4),
        lambda cache: setattr(cache[1], "keys", None),
        lambda cache: cache.pop(),
        lambda cache: cache.append(KVCache()),
        lambda cache: cache.__setitem__(0, {}),
    ],
)
def test_damaged_entries_are_refused(dense, tamper):
    cache = filled(dense)
    tamper(cache)
    with pytest.raises(UnusableCache):
        check_entries(cache, dense)
    with pytest.raises(UnusableCache):
        GlassModel(dense).add_session(cache)


@pytest.mark.parametrize(
    ("name", "value"),
    [("_idx", 17), ("_idx", -1), ("max_size", 32), ("max_size", 0), ("keep", 99), ("keep", 2.0), ("offset", 3)],
)
def test_damaged_windows_are_refused(name, value):
    dense = tiny_model("gemma3_text")
    cache = filled(dense)
    window = next(entry for entry in cache if hasattr(entry, "_idx"))
    setattr(window, name, value)
    with pytest.raises(UnusableCache):
        check_entries(cache, dense)


@pytest.mark.parametrize("name", ["group_size", "bits"])
@pytest.mark.parametrize("value", [0, -4, 7, 32.0, 2**40, None])
def test_damaged_quantisation_is_refused(name, value):
    """MLX divides by zero, which ends the process."""
    dense = llama.Model(llama.ModelArgs.from_dict(tiny_config("llama") | {"head_dim": 32}))
    cache = [entry.to_quantized(32, 4) for entry in filled(dense)]
    setattr(cache[0], name, value)
    with pytest.raises(UnusableCache):
        check_entries(cache, dense)


def test_another_models_cache_is_refused(dense):
    for family in ("gpt2", "falcon_h1"):
        with pytest.raises(UnusableCache):
            check_entries(filled(tiny_model(family)), dense)


def test_an_index_is_not_believed(dense, tmp_path):
    """mlx-lm would make a list as long as it says."""
    path = tmp_path / "cache.safetensors"
    saved(filled(dense), path)
    tensors = load_file(path)
    save_file({**tensors, "99999999999.0": tensors["0.0"]}, path)
    with pytest.raises(UnusableCache, match="index"):
        read_prompt_cache(path)


@pytest.mark.parametrize("content", [None, b"", b"\x07" * 99, (2**62).to_bytes(8, "little") + b"{}"])
def test_what_is_no_prompt_cache(content, tmp_path):
    path = tmp_path / "cache.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnusableCache) as caught:
        read_prompt_cache(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200
