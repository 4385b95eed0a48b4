"""Tests of measuring ranks in the engine, and of what its status says meanwhile."""

from __future__ import annotations

import time
from concurrent.futures import CancelledError

import httpx
import pytest
from servers import serving
from test_engine import ENDLESS, ask, last

from glass_mlx import GlassError
from glass_mlx.ranks import measure
from glass_mlx.ranks.lookup import cache_dir
from glass_mlx.serving.catalogue import Catalogue
from glass_mlx.serving.engine import Engine, EngineOptions
from glass_mlx.serving.errors import BadRequest
from glass_mlx.serving.measuring import Measurement, MeasuringStopped


@pytest.fixture
def engine(tiny_dir, small_steps):
    made = Engine(EngineOptions(model=str(tiny_dir), load={}))
    yield made
    made.close()


def test_requests_go_first(engine, monkeypatch):
    """A measurement goes on after each of them, from where it was, and the model has its ranks in the end."""
    seen, answers, real = [], [], Measurement._on_tokens

    def on_tokens(measurement, tokens):
        real(measurement, tokens)
        status = engine.status()
        seen.append((status.state, measurement.progress.tokens, status.usage))
        if len(answers) < 2:  # it is answered before the next step
            answers.append(engine.submit(ask("Hello", max_tokens=2)))

    monkeypatch.setattr(Measurement, "_on_tokens", on_tokens)
    future = engine.measure()
    assert engine.measure() is future  # it is one measurement
    with pytest.raises(BadRequest, match="are being measured"):
        engine.measure("demo")
    future.result(60)
    assert [last(answer).finish_reason for answer in answers] == ["length"] * 2
    assert {state for state, _, _ in seen} == {"measuring"}
    tokens = [tokens for _, tokens, _ in seen]
    assert tokens == sorted(tokens) and len(set(tokens)) > 3
    assert seen[0][2] is None and seen[-1][2] is not None  # answered long before the end
    status = engine.load().result()
    assert (status.state, status.has_ranks, status.measuring) == ("ready", True, None)


def test_stopped_and_gone_on_with(engine, monkeypatch):
    real = Measurement._on_tokens

    def stop(measurement, tokens):
        real(measurement, tokens)
        if tokens > 20:
            engine.stop_measuring()
            assert engine.status().measuring.stopping

    monkeypatch.setattr(Measurement, "_on_tokens", stop)
    with pytest.raises(MeasuringStopped):
        engine.measure().result(60)
    assert len(list(cache_dir().glob("*.partial"))) == 1 and not engine.load().result().has_ranks
    monkeypatch.setattr(Measurement, "_on_tokens", real)
    engine.measure().result(60)
    assert not list(cache_dir().glob("*.partial"))


def test_failures_end_it(engine, monkeypatch):
    def full(*args, **options):
        raise GlassError("no space left")

    monkeypatch.setattr(measure, "build_ranks", full)
    with pytest.raises(GlassError, match="no space"):
        engine.measure().result(60)
    assert engine.load().result().measuring is None
    future = engine.measure()
    engine.close()
    with pytest.raises((GlassError, CancelledError)):
        future.result(60)


def test_waits_while_another_model_is_in_use(engine, monkeypatch):
    real = Measurement._on_tokens

    def on_tokens(measurement, tokens):
        real(measurement, tokens)
        if not answers:
            answers.append(engine.submit(ask("Hello", model="demo", max_tokens=2)))

    answers = []
    monkeypatch.setattr(Measurement, "_on_tokens", on_tokens)
    future = engine.measure()
    while not answers:
        assert not future.done()
        time.sleep(0.01)
    assert last(answers[0]).finish_reason == "length"
    assert engine.load("demo").result().measuring is not None  # demo stays loaded
    engine.stop_measuring()
    with pytest.raises(MeasuringStopped):
        future.result(60)
    assert engine.status().model == "demo"


def test_time_left(monkeypatch):
    """What an earlier run has read took no time in this one."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    measurement = Measurement(Catalogue().resolve("demo"))
    most = measurement.progress.most_tokens
    measurement._on_tokens(1000)
    assert measurement.progress.seconds_left is None
    now[0] += 10
    measurement._on_tokens(2000)
    assert measurement.progress.seconds_left == pytest.approx((most - 2000) / 100)
    now[0] += 50
    assert measurement.progress.seconds_left == pytest.approx((most - 2000) / 100 - 50)


def test_place_in_the_queue(tiny_dir):
    engine = Engine(EngineOptions(model=str(tiny_dir), load={"stats": False}))
    try:
        answer = engine.submit(ask("Hello", client="a", max_tokens=ENDLESS))
        next(iter(answer))
        others = [engine.submit(ask("Hello", client=client, max_tokens=1)) for client in ("b", "c", "b")]
        assert [engine.status(client).place for client in "abcd"] == [None, 1, 2, None]
        for pending in (*others, answer):
            pending.cancel()
    finally:
        engine.close()


def test_over_http(tiny_dir, small_steps):
    with serving(model=str(tiny_dir)) as server, httpx.Client(base_url=server.url) as http:
        assert http.get("/v1/status", params={"user": "me"}).json()["place"] is None
        assert http.post("/v1/measure", params={"model": "nothing/there"}).status_code == 404
        http.post("/v1/measure").raise_for_status()
        assert http.delete("/v1/measure").json()["measuring"]["stopping"] is True
