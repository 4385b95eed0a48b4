"""Tests that a process killed while it writes a file (SIGKILL) leaves the old or the new version, whole."""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from random import Random

import mlx.core as mx
import numpy as np
import pytest
from conftest import examples
from global_statistics import same
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from apps.menubar.settings import Settings, load_settings, save_settings
from glass_mlx.files import write_atomically
from glass_mlx.ranks.evidence import SplitEvidence
from glass_mlx.ranks.format import GlobalStatistics, write_index

# What writes version 0 or 1 of a file, and what tells from the file which version it is; it raises if it is neither.
Writer = tuple[Callable[[int], None], Callable[[], int]]


@pytest.fixture
def statistics_file(ranks, tmp_path) -> Writer:
    path = tmp_path / "ranks.safetensors"
    versions = [replace(ranks, metadata=ranks.metadata | {"model": name}) for name in ("a", "b")]

    def read() -> int:
        found = GlobalStatistics.read(path)
        return next(i for i, version in enumerate(versions) if same(found, version))

    return lambda i: versions[i].write(path), read


@pytest.fixture
def partial_file(tmp_path) -> Writer:
    path = tmp_path / "ranks.safetensors.partial"
    sums = np.random.default_rng(0).random((2, 2, 3, 20_000))  # 2 MB
    rows = [[[[1] * (18 + 2 * i)]] * 3 for i in (0, 1)]
    versions = [SplitEvidence([20_000], sums / 40_000, [[9 + i] * 3] * 2, rows[i], 3, 3) for i in (0, 1)]
    empty = SplitEvidence([20_000], np.zeros_like(sums), [[0] * 3] * 2, [[]] * 3)

    def read() -> int:
        return [version.tokens for version in versions].index(SplitEvidence.load(path, "x", empty, 100).tokens)

    return lambda i: versions[i].save(path, "x"), read


@pytest.fixture
def prompt_cache(tmp_path, tiny) -> Writer:
    """mlx-lm writes it, to where ``write_atomically`` says. A killed child may not use MLX, so it copies the bytes."""
    path, sizes = tmp_path / "cache.safetensors", (300, 200)
    versions = []
    for size in sizes:
        cache = tiny[0].make_cache()
        mx.eval(tiny[0].prefill(mx.ones((1, size), mx.int32), cache))
        save_prompt_cache(str(tmp_path / "made.safetensors"), cache)
        versions.append((tmp_path / "made.safetensors").read_bytes())

    def read() -> int:
        return sizes.index(tiny[0].session(load_prompt_cache(str(path))).offset)

    return lambda i: write_atomically(path, lambda temporary: temporary.write_bytes(versions[i])), read


@pytest.fixture
def index_file(ranks, tmp_path) -> Writer:
    """The index of a directory in which a file comes and goes."""
    for i in range(12):
        ranks.write(tmp_path / f"{i}.safetensors")
    file, aside = tmp_path / "0.safetensors", tmp_path / "aside"

    def write(i: int) -> None:
        before, after = (aside, file) if i else (file, aside)
        if before.exists():
            before.rename(after)
        write_index(tmp_path)

    def read() -> int:
        return (11, 12).index(len(json.loads((tmp_path / "index.json").read_text())["models"]))

    return write, read


@pytest.fixture
def settings_file(tmp_path) -> Writer:
    path, versions = tmp_path / "settings.json", (Settings(density=0.25), Settings(density=0.75, port=0))

    def read() -> int:
        found, wrong = load_settings(path)
        assert not wrong
        return versions.index(found)

    return lambda i: save_settings(path, versions[i]), read


def killed_while(write: Callable[[int], None], after: float) -> None:
    """Fork a process that writes both versions in turn without end. So many seconds after the first, kill it."""
    ready, started = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for i in itertools.cycle((0, 1)):
                write(i)
                os.write(started, b".")
        finally:
            os._exit(1)
    try:
        assert select.select([ready], [], [], 60)[0], "it hangs"
        time.sleep(after)
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(ready)
        os.close(started)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "it ended by itself"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("kind", ["statistics_file", "partial_file", "prompt_cache", "index_file", "settings_file"])
def test_the_old_or_the_new_version(kind, request, tmp_path):
    write, read = request.getfixturevalue(kind)
    write(0)
    assert read() == 0
    random, found = Random(0), []
    for _ in range(request.config.getoption("--kills") or examples(2, 3)):
        killed_while(write, random.uniform(0, 0.05))
        found.append(read())
    print(f"{kind}: {len(found)} kills, {found.count(0)} old and {found.count(1)} new versions")
    write(1)  # what a killed process left is in nobody's way
    assert read() == 1
    left = list(tmp_path.glob(".*.tmp"))
    print(f"{kind}: {len(left)} temporary files left")


def test_a_write_in_place_would_be_found_out(tmp_path):
    """The test can fail: a plain write is caught half-way."""
    path, versions = tmp_path / "file", [bytes([i]) * 20_000_000 for i in (0, 1)]
    for _ in range(100):
        killed_while(lambda i: path.write_bytes(versions[i]), 0.01)
        if path.read_bytes() not in versions:
            return
    pytest.fail("never caught half-way")
