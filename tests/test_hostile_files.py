"""Files that anyone may have written and whose headers are huge or nested: one line, at once, with little memory."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from glass_mlx import GlassError, StatsError, stats
from glass_mlx.generate import main as generate
from glass_mlx.ranks.evidence import SplitEvidence
from glass_mlx.ranks.format import GlobalStatistics
from glass_mlx.ranks.lookup import find_statistics

MANY = ",".join(f'"layers.{i}.impact.rank":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(100_000))


def _sparse(path: Path) -> None:
    """A header of 50 MB, of zeros that take no room on the disk."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 50_000_000))
        file.truncate(60_000_000)


def _with_header(header: str):
    data = struct.pack("<Q", len(header)) + header.encode()
    return lambda path: path.write_bytes(data)


HOSTILE = {
    "50 MB": _sparse,
    "many tensors": _with_header("{" + MANY + "}"),
    "large metadata": _with_header(json.dumps({"__metadata__": {"sizes": "[" + "9," * 3_000_000 + "9]"}})),
    "nested": _with_header('{"a":' + "[" * 10**6 + "]" * 10**6 + "}"),
    "nested metadata": lambda path: path.write_bytes(save({"x": np.zeros(1)}, {"format_version": "1", **NESTED})),
}
NESTED = dict.fromkeys(("sizes", "state", "domains", "0.0.0"), "[" * 500_000)


@pytest.fixture(params=HOSTILE)
def hostile(request, tmp_path) -> Path:
    path = tmp_path / "a.safetensors"
    HOSTILE[request.param](path)
    return path


@pytest.fixture(autouse=True)
def quickly():
    tracemalloc.start()
    start = time.process_time()
    yield
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - start < 20 and most < 200 << 20


def test_ranks(hostile, invoke, tiny):
    with pytest.raises(StatsError, match="a.safetensors is not a usable ranks file"):
        GlobalStatistics.read(hostile)
    with pytest.raises(StatsError, match="a.safetensors is not a usable ranks file"):
        find_statistics(tiny[0], hostile)
    for command in ("show", "verify"):
        done = invoke(stats.main, command, hostile)
        assert done.code == 1 and done.err.count("\n") == 1 and len(done.err) < 500


def test_prompt_cache(hostile, invoke):
    done = invoke(generate, "--prompt-cache-file", hostile, "--prompt", "x")
    assert done.code == 1 and "is not a usable prompt cache" in done.err and done.err.count("\n") == 1


def test_partial_file(hostile, tiny):
    """What cannot be used is measured again."""
    empty = SplitEvidence.empty(tiny[0], 1)
    assert SplitEvidence.load(hostile, "", empty, 10) is empty


@pytest.mark.parametrize("content", ["[" * 100_000, " " * (17 << 20), '{"models": 3}', '{"models": [{"file": []}]}'])
def test_index(content, tiny, tmp_path, monkeypatch):
    (tmp_path / "index.json").write_text(content)
    monkeypatch.setattr("glass_mlx.ranks.lookup.STATS_DIR", tmp_path)
    try:
        assert find_statistics(tiny[0]) is None
    except GlassError as e:
        assert "is not an index of ranks files" in str(e) and len(str(e)) < 500
