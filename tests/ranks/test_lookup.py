"""Tests of where global ranks are found: a given file, stats/, the user's cache, a Hub repository."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from hub_server import HubServer
from huggingface_hub import constants
from platformdirs import user_cache_path

import glass_mlx
from glass_mlx import GlassError, StatsError, wrap
from glass_mlx.ranks import lookup
from glass_mlx.ranks.format import GlobalStatistics, index_entry, write_index
from glass_mlx.ranks.identity import fingerprint, fingerprints
from glass_mlx.ranks.lookup import cache_dir, cached_file, find_statistics

REPO = "me/ranks"


@pytest.fixture
def stats_dir(tmp_path, monkeypatch) -> Path:
    """An empty stats/."""
    path = tmp_path / "stats"
    path.mkdir()
    monkeypatch.setattr(lookup, "STATS_DIR", path)
    return path


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as server:
        server.use(monkeypatch)
        yield server


@pytest.fixture
def labelled(ranks, tmp_path):
    """Write the random model's ranks under a name of their own."""

    def labelled(name: str, path: Path | None = None, **metadata) -> Path:
        path = path or tmp_path / f"{name}.safetensors"
        replace(ranks, metadata=ranks.metadata | {"model": name, **metadata}).write(path)
        return path

    return labelled


@pytest.fixture
def repo(hub, labelled):
    """A repository of the ranks, whose index may say something else."""

    def repo(name: str = "hub", **entry):
        path = labelled(name)
        entry = index_entry("x.safetensors", GlobalStatistics.read(path).metadata) | entry
        index = json.dumps({"format_version": "1", "models": [entry]})
        return hub.repo(REPO, {"index.json": index.encode(), "x.safetensors": path.read_bytes()})

    return repo


def test_order(tiny, stats_dir, labelled, repo):
    """Each place is looked in only where those before it have nothing."""
    model, explicit = tiny[0], labelled("explicit")
    repo("hub")
    labelled("stats", stats_dir / "x.safetensors")
    write_index(stats_dir)
    labelled("cache", cached_file(model))

    def found(*arguments) -> str:
        return find_statistics(model, *arguments).metadata["model"]

    assert found(explicit, REPO) == "explicit"
    assert found(None, REPO) == found(True) == found() == "stats"
    (stats_dir / "index.json").unlink()
    assert found(None, REPO) == "cache"
    cached_file(model).unlink()
    assert found(None, REPO) == "hub"
    assert find_statistics(model) is None
    assert find_statistics(model, False, REPO) is None


def test_explicit_file_is_not_replaced_by_another(tiny, stats_dir, labelled, tmp_path):
    labelled("cache", cached_file(tiny[0]))
    with pytest.raises(StatsError, match="no ranks file"):
        find_statistics(tiny[0], tmp_path / "missing.safetensors")
    with pytest.raises(StatsError, match="weights differ"):
        find_statistics(tiny[0], labelled("other", fingerprint="0" * 32))


# stats/


@pytest.mark.parametrize("original, found", [("owner/tiny", "base"), ("owner/other", None), ("", None)])
def test_ranks_of_the_model_that_it_is_a_conversion_of(tiny, stats_dir, labelled, tmp_path, original, found):
    """Where there are none made from these very weights."""
    path = tmp_path / "models--me--tiny-4bit" / "snapshots" / "abc"
    path.mkdir(parents=True)
    (path / "README.md").write_text("---\nbase_model: owner/tiny\n---\n")
    model = wrap(tiny[0].dense, stats=False, path=path)
    labelled("base", stats_dir / "a.safetensors", fingerprint="0" * 32, original=original)
    write_index(stats_dir)
    ranks = find_statistics(model)
    assert (ranks and ranks.metadata["model"]) == found
    labelled("own", stats_dir / "b.safetensors")
    write_index(stats_dir)
    assert find_statistics(model).metadata["model"] == "own"


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", '{"models": [{}]}', '{"models": 3}', '{"models": ["x"]}', DEEP]
)
def test_damaged_index(tiny, stats_dir, text):
    (stats_dir / "index.json").write_text(text)
    with pytest.raises(StatsError, match="index.json") as caught:
        find_statistics(tiny[0])
    assert "\n" not in str(caught.value)


PATHS = ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "./x.safetensors", "x.bin", "", "..", 3, None]


@pytest.mark.parametrize("file", PATHS)
def test_index_that_names_paths(tiny, stats_dir, labelled, file):
    """Its files lie beside it; whatever else it names is not looked at."""
    labelled("outside")
    labelled("below", stats_dir / "sub" / "x.safetensors")
    entry = {"file": file, "fingerprint": fingerprint(tiny[0])}
    (stats_dir / "index.json").write_text(json.dumps({"models": [entry]}))
    assert find_statistics(tiny[0]) is None


# The cache


def test_cache_dir(monkeypatch, cache_root):
    assert cache_dir() == cache_root / "glass_cache_dir"
    for value in (None, ""):
        monkeypatch.setenv("GLASS_CACHE_DIR", value) if value is not None else monkeypatch.delenv("GLASS_CACHE_DIR")
        assert cache_dir() == user_cache_path("glass_mlx")


def test_cached_file(tiny, demo):
    assert cached_file(tiny[0]).parent == cache_dir()
    assert cached_file(tiny[0]).name == f"{fingerprint(tiny[0])}.safetensors" != cached_file(demo[0]).name
    assert not cache_dir().exists()  # looking makes nothing


def test_files_of_older_versions_are_found(tiny, stats_dir, labelled):
    """In the cache and by an index."""
    older = fingerprints(tiny[0])[1]
    labelled("cache", cache_dir() / f"{older}.safetensors", fingerprint=older)
    assert find_statistics(tiny[0]).metadata["model"] == "cache"
    labelled("stats", stats_dir / "x.safetensors", fingerprint=older)
    write_index(stats_dir)
    assert find_statistics(tiny[0]).metadata["model"] == "stats"


@pytest.mark.parametrize("damage", ["cut", "other model"])
def test_damaged_cache_file(tiny, stats_dir, labelled, caplog, damage):
    path = labelled("cache", cached_file(tiny[0]), fingerprint="0" * 32)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    assert find_statistics(tiny[0]) is None
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "ignored the cached ranks: " in record.message and "\n" not in record.message


# A Hub repository


def load(tiny_dir, **options):
    return glass_mlx.load(tiny_dir, **options)[0].global_ranks


@pytest.fixture
def is_ranks(ranks):
    return lambda got: got is not None and all(map(mx.array_equal, got["impact"], ranks.ranks["impact"]))


def test_download(tiny_dir, hub, repo, monkeypatch, is_ranks, caplog):
    """As a user does it; afterwards, offline too."""
    made = repo()
    assert is_ranks(load(tiny_dir, stats_repo=REPO))
    sent = len(hub.requests)
    assert hub.sent("GET /cdn/") > 0
    assert is_ranks(load(tiny_dir, stats_repo=f"{REPO}@{made.refs['main']}"))
    assert len(hub.requests) == sent  # a pinned commit needs no request
    monkeypatch.setenv("GLASS_STATS_REPO", REPO)
    assert is_ranks(load(tiny_dir))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert is_ranks(load(tiny_dir)) and is_ranks(load(tiny_dir, stats_repo=REPO))
    assert not caplog.records


def test_pinned_revision(tiny_dir, repo, is_ranks, caplog):
    """The ranks are there only in the first commit."""
    made = repo()
    made.refs["v1"] = made.refs["main"]
    made.commit({"index.json": b'{"format_version": "1", "models": []}'})
    assert load(tiny_dir, stats_repo=REPO) is None and len(caplog.records) == 1
    assert is_ranks(load(tiny_dir, stats_repo=f"{REPO}@v1"))
    with pytest.raises(GlassError, match="no revision 'v2'"):
        load(tiny_dir, stats_repo=f"{REPO}@v2")


def test_offline(tiny_dir, monkeypatch, caplog):
    """The environment's repository is not waited for; one that was asked for is."""
    monkeypatch.setenv("GLASS_STATS_REPO", REPO)
    assert load(tiny_dir) is None
    assert (
        "no ranks from GLASS_STATS_REPO: index.json of me/ranks is not in the local cache" in caplog.records[0].message
    )
    with pytest.raises(GlassError, match="not in the local cache"):
        load(tiny_dir, stats_repo=REPO)
    assert load(tiny_dir, stats=False, stats_repo=REPO) is None


@pytest.mark.parametrize("name", ["nonsense", "a/b/c", "", "no/where"])
def test_no_such_repository(tiny_dir, hub, monkeypatch, caplog, name):
    monkeypatch.setenv("GLASS_STATS_REPO", name)
    assert load(tiny_dir) is None and len(caplog.records) == 1 + bool(name)
    if name:
        with pytest.raises(GlassError):
            load(tiny_dir, stats_repo=name)


@pytest.mark.parametrize("file", [file for file in PATHS if file])
def test_index_from_the_hub_that_names_paths(tiny_dir, hub, repo, file):
    repo(file=file)
    assert load(tiny_dir, stats_repo=REPO) is None
    assert [path for _, path, *_ in hub.requests if "index.json" not in path] == []


@pytest.mark.parametrize("name", ["impostor", "damaged"])
def test_wrong_file_from_the_hub(tiny_dir, hub, repo, labelled, name, monkeypatch, caplog):
    """The index says that it fits; what the file says counts."""
    path = labelled(name, fingerprint="0" * 32)
    repo().commit({"x.safetensors": path.read_bytes() if name == "impostor" else b"\x80\x04K\x01."})
    with pytest.raises(StatsError, match="weights differ" if name == "impostor" else "not a usable ranks file"):
        load(tiny_dir, stats_repo=REPO)
    monkeypatch.setenv("GLASS_STATS_REPO", REPO)
    assert load(tiny_dir) is None and len(caplog.records) == 2


def test_failed_download(tiny_dir, hub, repo, is_ranks):
    """It is told, and the next try succeeds."""
    repo()
    hub.fail("x.safetensors", status=404)
    with pytest.raises(GlassError, match="x.safetensors"):
        load(tiny_dir, stats_repo=REPO)
    hub.fail("GET /cdn/", flip=500)
    with pytest.raises(GlassError, match="damaged on its way"):
        load(tiny_dir, stats_repo=REPO)
    assert is_ranks(load(tiny_dir, stats_repo=REPO))
