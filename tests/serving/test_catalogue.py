"""Tests of which models may be asked for by which names."""

from __future__ import annotations

import os
import shutil

import pytest
from huggingface_hub import constants

from glass_mlx.loading import ALIASES, DEMO_PATH
from glass_mlx.serving.catalogue import Catalogue
from glass_mlx.serving.errors import UnknownModel

REPO = "mlx-community/Qwen3-4B-4bit"

TRAVERSALS = [
    *("..", "../..", "../secret", "demo/../../secret", "./secret", "/etc", "//etc", "~", "~root", "~/secret"),
    *("..\\secret", "%2e%2e/secret", "a/../../secret", "owner/..", "../owner", ".", "/", "\\", "a" * 5000),
    *("secret\0", "\0", "secret/config.json", "models--a--b", "a/b/c", "--x/y", "http://x/y", "file:///etc", " demo"),
]


@pytest.fixture
def root(tmp_path, tiny_dir):
    """A directory with models; beside it, one that is not to be served."""
    for name in ("models/small", "models/owner/small", "secret"):
        shutil.copytree(tiny_dir, tmp_path / name)
    return tmp_path / "models"


@pytest.fixture
def cached(tiny_dir):
    """A repository in the Hub cache."""
    folder = os.path.join(constants.HF_HUB_CACHE, "models--" + REPO.replace("/", "--"))
    shutil.copytree(tiny_dir, f"{folder}/snapshots/0123456789abcdef0123456789abcdef01234567")
    os.makedirs(f"{folder}/refs")
    with open(f"{folder}/refs/main", "w") as file:
        file.write("0123456789abcdef0123456789abcdef01234567")


def test_the_demo():
    for name in ("demo", "default_model", ""):
        assert Catalogue().resolve(name).locate() == DEMO_PATH
    assert [model.id for model in Catalogue().models()] == ["demo"]


@pytest.mark.few(18)
@pytest.mark.parametrize("name", TRAVERSALS)
@pytest.mark.parametrize("allow", [False, True])
def test_no_name_is_a_path(name, allow, root, monkeypatch):
    monkeypatch.chdir(root.parent)
    with pytest.raises(UnknownModel) as e:
        Catalogue(allow_paths=(root,) if allow else ()).resolve(name)
    assert str(root.parent) not in str(e.value)


def _link(root, what: str) -> None:
    """Make ``root / "link"`` a model of which this leads out of the root."""
    secret = root.parent / "secret"
    if what == "directory":
        (root / "link").symlink_to(secret)
    elif what == "directory above":
        (root / "owner2").symlink_to(root.parent)
        (root / "link").symlink_to("owner2/secret")
    else:
        shutil.copytree(secret, root / "link")
        (root / "link" / what).unlink()
        (root / "link" / what).symlink_to(secret / what)


@pytest.mark.parametrize("what", ["directory", "directory above", "config.json", "model.safetensors", "tokenizer.json"])
def test_links_out_of_an_allowed_directory(root, what):
    """Such a model is neither listed nor loaded."""
    _link(root, what)
    catalogue = Catalogue(allow_paths=(root,))
    assert {model.id for model in catalogue.models()} == {"demo", "small", "owner/small"}
    for name in ("link", str(root / "link"), "owner2/secret"):
        with pytest.raises(UnknownModel):
            catalogue.resolve(name)


def test_links_within_an_allowed_directory(root):
    """As in a Hub cache, whose files are links to blobs beside them."""
    (root / "blobs").mkdir()
    file = (root / "small" / "model.safetensors").rename(root / "blobs" / "0123")
    (root / "small" / "model.safetensors").symlink_to("../blobs/0123")
    (root / "link").symlink_to("small")
    catalogue = Catalogue(allow_paths=(root,))
    assert {"small", "link"} <= {model.id for model in catalogue.models()} and file.is_file()
    assert catalogue.resolve("link").key == catalogue.resolve("small").key


@pytest.mark.parametrize("name", ["small", "owner/small"])
def test_below_an_allowed_directory(root, name):
    catalogue = Catalogue(allow_paths=(root,))
    assert catalogue.resolve(name).locate() == root / name
    assert catalogue.resolve(str(root / name)).locate() == root / name
    assert name in [model.id for model in catalogue.models()]
    with pytest.raises(UnknownModel):
        Catalogue().resolve(str(root / name))


def test_the_operators_directory_by_its_last_part(root):
    catalogue = Catalogue(str(root / "small"))
    for name in ("default_model", "small"):
        source = catalogue.resolve(name)
        assert (source.id, source.locate()) == ("small", root / "small")
    assert [model.id for model in catalogue.models()] == ["small", "demo"]
    assert catalogue.models()[0].size_bytes > 0


def test_a_cached_repository(cached):
    catalogue = Catalogue()
    alias = next(a for a, repo in ALIASES.items() if repo == REPO)
    sources = [catalogue.resolve(name) for name in (REPO, alias)]
    assert sources[0].key == sources[1].key
    assert all((source.locate() / "config.json").is_file() for source in sources)
    models = {model.id: model for model in catalogue.models()}
    assert set(models) == {"demo", alias, REPO}
    assert models[REPO].size_bytes == models[alias].size_bytes > 0


def test_a_cached_repository_without_weights(cached):
    for path, _, files in os.walk(constants.HF_HUB_CACHE):
        for file in files:
            if file.endswith(".safetensors"):
                os.remove(os.path.join(path, file))
    with pytest.raises(UnknownModel, match="not in the Hub cache"):
        Catalogue().resolve(REPO)
    assert [model.id for model in Catalogue().models()] == ["demo"]


def test_downloads_only_where_allowed():
    with pytest.raises(UnknownModel, match="not in the Hub cache.*hf download owner/name.*--allow-download"):
        Catalogue().resolve("owner/name")
    assert Catalogue(allow_download=True).resolve("owner/name").id == "owner/name"
    listed = {model.id: model.downloaded for model in Catalogue(allow_download=True).models()}
    assert listed["qwen3-4b"] is False and listed["demo"]


def test_a_directory_is_not_taken_for_a_repository(root, monkeypatch):
    """As ``load`` would, of the directory that the server happens to run in."""
    monkeypatch.chdir(root)
    with pytest.raises(UnknownModel, match="also a directory"):
        Catalogue(allow_download=True).resolve("owner/small").locate()
