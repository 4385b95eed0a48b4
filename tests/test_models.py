"""Tests of the command that lists, downloads and removes models."""

from __future__ import annotations

import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import constants

from glass_mlx import models
from glass_mlx.loading import ALIASES
from glass_mlx.ranks.lookup import cache_dir

ALIAS, REPO = "qwen3-0.6b", ALIASES["qwen3-0.6b"]


@pytest.fixture
def run(invoke):
    return partial(invoke, models.main)


@pytest.fixture
def cached(tiny_dir):
    """Puts the random model into the Hub cache under a name."""

    def cached(repo: str = REPO, commit: str = "0123456789abcdef" * 2 + "01234567") -> Path:
        folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
        path = shutil.copytree(tiny_dir, folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        return path

    return cached


def listed(run) -> dict[str, dict]:
    done = run("list", "--json")
    assert done.code == 0
    return {model["id"]: model for model in json.loads(done.out)}


def test_list(run, cached, written):
    assert listed(run).keys() == {"demo"} and listed(run)["demo"]["ranks"]
    cached()
    (cached("me/half", "1" * 40) / "model.safetensors").unlink()
    found = listed(run)
    assert found.keys() == {"demo", ALIAS, "me/half"}
    assert (found[ALIAS]["repo"], found[ALIAS]["problem"], found[ALIAS]["ranks"]) == (REPO, None, False)
    assert found[ALIAS]["fits"] == "fits" and found[ALIAS]["bytes"] > 1000
    assert "has no weights" in found["me/half"]["problem"]
    table = run().out
    assert all(name in table for name in found) and "llama-3.2-1b" not in table
    assert "llama-3.2-1b" in run("list", "--all").out


def test_ranks_are_found_by_name(run, cached, ranks):
    cached()
    ranks.metadata["model"] = REPO
    ranks.write(cache_dir() / "x.safetensors")
    ranks.metadata["model"] = "tiny"
    assert listed(run)[ALIAS]["ranks"]
    (cache_dir() / "x.safetensors").write_bytes(b"rubbish")
    assert not listed(run)[ALIAS]["ranks"]


def test_tables_fit_a_terminal(run, cached, monkeypatch):
    cached("mlx-community/a-model-with-a-name-that-is-much-longer-than-most-names-of-models-are-4bit")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert max(map(len, re.sub(r"\x1b\[\d*m", "", run("list", "--all").out).splitlines())) <= 80


@pytest.mark.parametrize("name", [ALIAS, REPO])
def test_show(run, cached, name):
    path = cached()
    done = run("show", name)
    assert done.code == 0 and str(path) in done.out and "llama" in done.out
    assert run("show", path).out.count("\n") >= done.out.count("\n") - 1


@pytest.mark.parametrize("command", [("show",), ("rm", "--yes")])
@pytest.mark.parametrize("name, close", [("qwen3-0.6", "did you mean qwen3-0.6b"), ("x/y", "models lists")])
def test_unknown(run, cached, command, name, close):
    cached("a/b")
    done = run(*command, name)
    assert (done.code, done.out) == (1, "") and done.err.count("\n") == 1
    assert name in done.err and close in done.err


def test_remove(run, cached, monkeypatch):
    """All that is cached of a model, and nothing else; on a terminal it asks first."""
    kept, path = cached("a/b"), cached()
    cached(REPO, "2" * 40)
    assert "--yes" in run("rm", ALIAS).err and path.exists()
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: "")
    assert run("rm", ALIAS).code == 0 and path.exists()
    assert run("rm", ALIAS, "-y").code == 0
    assert listed(run).keys() == {"demo", "a/b"} and kept.exists() and not path.parent.parent.exists()
    assert "comes with the package" in run("rm", "demo", "-y").err
    assert "pull qwen3-4b" in run("show", "qwen3-4b").err and "did you mean qwen3-4b" in run("show", "qwen3-4n").err


def test_pull(run, tiny_dir, monkeypatch):
    with HubServer() as hub:
        hub.use(monkeypatch)
        hub.repo(REPO, {path.name: path.read_bytes() for path in tiny_dir.iterdir()})
        done = run("pull", ALIAS)
        assert done.code == 0 and "to download" in done.out and "fits this machine: fits" in done.out
        assert listed(run)[ALIAS]["problem"] is None
        assert "to download" not in run("pull", ALIAS).out
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
        hub.repo("me/other", {path.name: path.read_bytes() for path in tiny_dir.iterdir()})
        assert "are free on the disk" in run("pull", "me/other").err
        assert "no repository" in run("pull", "me/nothing").err


@pytest.mark.parametrize("name", [ALIAS, "demo", "nonsense"])
def test_pull_without_a_network(run, name):
    done = run("pull", name)
    assert (done.code, done.out) == (1, "") and done.err.startswith("error: ") and done.err.count("\n") == 1
