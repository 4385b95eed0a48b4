"""Tests of models' directories: what is no text model, lacks files or has short ones is told in one line, not listed,
and completed where the Hub can be reached."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import ROOT
from hub_server import HubServer
from huggingface_hub import constants

from glass_mlx import GlassError, load, loading
from glass_mlx.hub.model_files import INDEX, check_model, model_types, problem
from glass_mlx.loading import DEMO_PATH, resolve_model
from glass_mlx.serving.catalogue import Catalogue
from glass_mlx.serving.errors import UnknownModel

REPO = "owner/sharded"


def shard(i: int, of: int = 3) -> str:
    return f"model-{i:05}-of-{of:05}.safetensors"


@pytest.fixture
def sharded(model_copy) -> Path:
    """The random model in three shards with an index."""
    weights = list(mx.load(str(model_copy / "model.safetensors")).items())
    (model_copy / "model.safetensors").unlink()
    index = {}
    for i in (1, 2, 3):
        part = dict(weights[i - 1 :: 3])
        mx.save_safetensors(str(model_copy / shard(i)), part, metadata={"format": "mlx"})
        index |= dict.fromkeys(part, shard(i))
    (model_copy / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return model_copy


def refused(path: Path) -> str:
    """The one line that loading a directory ends with."""
    with pytest.raises(GlassError) as caught:
        load(path, stats=False)
    return str(caught.value)


def listed(path: Path) -> bool:
    """Whether a server lists a directory's model and would load it; it does both or neither."""
    catalogue = Catalogue(allow_paths=(path.parent,))
    is_listed = path.name in [model.id for model in catalogue.models()]
    if not is_listed:
        with pytest.raises(UnknownModel):
            catalogue.resolve(path.name)
    return is_listed


def test_model_types():
    names = model_types()
    assert len(names) > 100
    assert names == sorted(set(names))
    assert {"llama", "lfm2-vl", "nemotron-nas", "lille-130m", "solar_open"} <= set(names)
    assert not {"base", "cache", "switch_layers"} & set(names)


def test_a_whole_model(sharded):
    assert problem(sharded) is None and problem(DEMO_PATH) is None
    assert load(sharded, stats=False)
    assert listed(sharded)


@pytest.mark.parametrize(
    ("gone", "named"), [((2,), shard(2)), ((3,), shard(3)), ((1, 3), f"{shard(1)} and 1 more"), ((1, 2, 3), "weights")]
)
@pytest.mark.parametrize("index", [True, False])
def test_missing_shards(sharded, gone, named, index):
    for i in gone:
        (sharded / shard(i)).unlink()
    if not index:
        (sharded / INDEX).unlink()
    assert named in refused(sharded)
    assert not listed(sharded)


def test_a_shard_whose_link_is_broken(sharded):
    (sharded / shard(2)).unlink()
    (sharded / shard(2)).symlink_to("../blobs/0123")
    assert shard(2) in refused(sharded) and not listed(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_an_index_that_says_nothing(sharded, text):
    """mlx-lm does without it."""
    (sharded / INDEX).write_text(text)
    assert problem(sharded) is None


def test_an_index_of_another_conversion(model_copy):
    (model_copy / INDEX).write_text(json.dumps({"weight_map": {"a": shard(1), "b": shard(2)}}))
    assert problem(model_copy) is None


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_short_shard(sharded, keep):
    data = (sharded / shard(2)).read_bytes()
    (sharded / shard(2)).write_bytes(data[:keep])
    message = refused(sharded)
    assert shard(2) in message and f"{len(data[:keep]):,}" in message and "\n" not in message


def test_a_model_in_one_file_that_is_short(model_copy):
    file = model_copy / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(GlassError, match=f"model.safetensors is damaged: it ends after {size - 4:,} of {size:,} bytes"):
        check_model(model_copy)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, "has no config.json"),
        ("", "no usable config.json"),
        ("[" * 100_000, "nested too deeply"),
        ("3", "no model_type"),
        ("{}", "no model_type"),
        ('{"model_type": null}', "no model_type"),
        ('{"model_type": "bert"}', "'bert', which mlx-lm does not have"),
        ('{"model_type": "cache"}', "'cache', which mlx-lm does not have"),
        ('{"model_type": "../llama"}', "'../llama', which mlx-lm does not have"),
        ('{"model_type": "os", "architectures": 3}', "'os', which"),
        ('{"model_type": "os", "architectures": [3, null]}', "'os', which"),
    ],
)
def test_no_text_model(model_copy, config, told):
    (model_copy / "config.json").unlink()
    if config is not None:
        (model_copy / "config.json").write_text(config)
    assert told in refused(model_copy)
    assert not listed(model_copy)


def test_code_that_exits(model_copy):
    """mlx-lm's olmo ends the process where a package is missing; not ours."""
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps(config | {"model_type": "olmo"}))
    assert "mlx-lm cannot load" in refused(model_copy)


@pytest.fixture
def hub(sharded, monkeypatch):
    """A Hub that has the sharded model."""
    with HubServer() as server:
        server.use(monkeypatch)
        server.repo(REPO, {file.name: file.read_bytes() for file in sharded.iterdir()})
        yield server


def test_a_download_that_was_cut_short(hub, monkeypatch):
    """It is no model yet, and the next load completes it."""
    hub.fail("GET /cdn/", times=100, status=404)
    with pytest.raises(GlassError):
        resolve_model(REPO)
    assert [model.id for model in Catalogue().models()] == ["demo"]
    with pytest.raises(UnknownModel, match="hf download"):
        Catalogue().resolve(REPO)
    hub.faults.clear()
    path = resolve_model(REPO)
    assert problem(path) is None and REPO in [model.id for model in Catalogue().models()]
    [lost] = [file for file in path.iterdir() if file.name == shard(2)]
    lost.unlink()
    assert REPO not in [model.id for model in Catalogue().models()]
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(GlassError, match=f"{REPO} is not in the local cache and HF_HUB_OFFLINE is set"):
            load(REPO, stats=False)
        assert not Catalogue(REPO).models()[0].downloaded
    assert Catalogue(allow_download=True).resolve(REPO).locate() == path  # as a server does at a request
    assert lost.is_file() and REPO in [model.id for model in Catalogue().models()]


def test_what_the_cache_has_of_a_model(sharded, monkeypatch):
    """Where huggingface_hub takes a part for the whole."""
    (sharded / shard(2)).unlink()
    monkeypatch.setattr(loading, "snapshot_download", lambda *args, **options: sharded)
    with pytest.raises(GlassError, match=rf"{REPO} .* is not complete: {shard(2)} is missing.*go online"):
        load(REPO, stats=False)


def test_nothing_of_a_package_is_needed_to_look():
    """Only names and texts of mlx-lm's models are read: some exit, and others take seconds to import."""
    assert "import_module" not in (ROOT / "glass_mlx" / "hub" / "model_files.py").read_text()
