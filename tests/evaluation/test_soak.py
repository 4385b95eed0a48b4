"""Tests of the soak: its clients do what they should, and its verdict tells a leak from a steady process."""

from __future__ import annotations

import logging
from random import Random

import pytest

from glass_mlx.evaluation import soak
from glass_mlx.evaluation.soak import Sample, Traffic, growth, save_tiny_model
from glass_mlx.serving.engine import Engine, EngineOptions


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


def samples(count: int, **figures) -> list[Sample]:
    """Samples whose figures are given as functions of their number."""
    steady = dict.fromkeys(("seconds", "rss", "active", "cache", "peak", "descriptors", "threads", "objects"), 10**6)
    return [Sample(requests=i, **steady | {name: f(i) for name, f in figures.items()}) for i in range(count)]


def test_a_steady_process_is_flat():
    found = growth(samples(40, rss=lambda i: 10**8 + i % 2 * 10**7, objects=lambda i: 80_000 + i % 3))
    assert all(figure["flat"] for figure in found.values()) and found["rss"]["mean"] == 105 * 10**6


def test_what_grows_in_the_beginning_only_is_flat():
    assert growth(samples(40, rss=lambda i: 10**7 * min(i, 19)))["rss"] == {
        "mean": 19 * 10**7,
        "growth": 0,
        "flat": True,
    }


@pytest.mark.parametrize(
    ("name", "leak"),
    [("rss", 10**7), ("active", 10**6), ("cache", 10**6), ("descriptors", 1), ("threads", 1), ("objects", 10**4)],
)
def test_a_leak_is_not_flat(name, leak):
    found = growth(samples(40, **{name: lambda i: 10 + i * leak}))
    assert [figure for figure, verdict in found.items() if not verdict["flat"]] == [name]
    assert found[name]["growth"] == 19 * leak


@pytest.fixture(scope="module")
def traffic(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    engine = Engine(EngineOptions(allow_paths=(root,)))
    yield Traffic(engine, {"gemma3_text": save_tiny_model("gemma3_text", root / "gemma3_text")}, Random(0))
    engine.close()


@pytest.mark.parametrize("kind", soak._KINDS)
def test_every_kind_of_request(traffic, kind, monkeypatch):
    logging.getLogger("glass_mlx").setLevel(logging.CRITICAL)
    monkeypatch.setattr(soak, "_LONGEST", 200)  # the window has 16 tokens
    monkeypatch.setattr(soak, "_KINDS", {kind: 1})
    before = traffic.requests
    traffic.step()
    assert traffic.counts[kind] == 1 and not traffic.failures
    assert (traffic.requests > before) == (kind != "unload")


def test_a_failure_is_noted(traffic, monkeypatch):
    monkeypatch.setattr(soak, "_KINDS", {"chat": 1})
    monkeypatch.setattr(traffic, "model", "no-such-model")
    traffic.step()
    assert len(traffic.failures) == 1 and "UnknownModel" in traffic.failures.pop()


def test_a_short_soak():
    logging.getLogger("glass_mlx").setLevel(logging.CRITICAL)
    seen = []
    found = soak.soak(12, models=2, every=4, progress=seen.append)
    assert found["requests"] >= 12 and len(found["samples"]) == len(seen) >= 3 and not found["failures"]
    assert found["growth"].keys() == {"rss", "active", "cache", "descriptors", "threads", "objects"}
    assert found["flat"] == all(figure["flat"] for figure in found["growth"].values())
    assert [sample.requests for sample in seen] == sorted(sample.requests for sample in seen)


def test_usage(invoke):
    done = invoke(soak.main, "--requests", 5)
    assert done.code == 2 and "at least" in done.err
