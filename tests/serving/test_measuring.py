"""Tests of measuring ranks in the engine, and of what its status says meanwhile."""

from __future__ import annotations

import time
from concurrent.futures import CancelledError
from types import SimpleNamespace

import httpx
import pytest
from global_statistics import same
from servers import serving
from test_engine import ENDLESS, ask, last

from glass_mlx import GlassError
from glass_mlx.ranks import measure
from glass_mlx.ranks.format import GlobalStatistics
from glass_mlx.ranks.lookup import cache_dir
from glass_mlx.serving.catalogue import Catalogue
from glass_mlx.serving.engine import Engine, EngineOptions
from glass_mlx.serving.errors import BadRequest
from glass_mlx.serving.measuring import Measurement, MeasuringStopped


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


@pytest.fixture
def engine(tiny_dir, small_steps):
    made = Engine(EngineOptions(model=str(tiny_dir), load={}))
    yield made
    made.close()


def watch(monkeypatch, then) -> None:
    """Do something after every step of a measurement."""
    real = Measurement._on_step

    def on_step(measurement, *step):
        real(measurement, *step)
        then(measurement)

    monkeypatch.setattr(Measurement, "_on_step", on_step)


def test_requests_go_first(engine, monkeypatch):
    """They are answered between two steps, whatever is measured, and the ranks are those of a measurement alone."""
    seen, answers = [], {}

    def ask_in_every_phase(measurement):
        status = engine.status()
        seen.append((status.state, measurement.progress, status.has_ranks))
        assert status.queued == 0  # answered in the last step
        if measurement.progress.phase not in answers:
            answers[measurement.progress.phase] = engine.submit(ask("Hello", max_tokens=2, temperature=1.0))

    watch(monkeypatch, ask_in_every_phase)
    future = engine.measure()
    assert engine.measure() is future  # it is one measurement
    with pytest.raises(BadRequest, match="are being measured"):
        engine.measure("demo")
    future.result(60)
    assert len(answers) == 4 and all(last(answer).finish_reason == "length" for answer in answers.values())
    assert {state for state, *_ in seen} == {"measuring"}
    for phase in answers:
        shares = [progress.share for _, progress, _ in seen if progress.phase == phase]
        assert max(shares) == 1 and len(set(shares)) > 1 or phase.startswith("quality")
    assert {(progress.refining, ranked) for _, progress, ranked in seen} == {(False, False), (True, True)}
    status = engine.load().result()
    assert (status.state, status.has_ranks, status.measuring) == ("ready", True, None)
    [file] = cache_dir().glob("*.safetensors")
    alone = engine.call(lambda *loaded: measure.build_ranks(*loaded, file.with_name("alone.safetensors")))
    assert same(*map(GlobalStatistics.read, (file, alone.result(60))))


def test_stopped_and_gone_on_with(engine, monkeypatch):
    def stop(measurement):
        if measurement.progress.tokens > 20:
            engine.stop_measuring()
            assert engine.status().measuring.stopping

    with monkeypatch.context() as patched:
        watch(patched, stop)
        with pytest.raises(MeasuringStopped):
            engine.measure().result(60)
    assert len(list(cache_dir().glob("*.read"))) == 1 and not engine.load().result().has_ranks
    engine.measure().result(60)
    assert engine.load().result().has_ranks


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
    answers = []
    watch(
        monkeypatch,
        lambda _: answers or answers.append(engine.submit(ask("Hello", model="demo", max_tokens=2))),
    )
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
    """Of a phase; what an earlier run has read took no time in this one."""
    now, model = [100.0], (SimpleNamespace(global_ranks=None), None)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    measurement = Measurement(Catalogue().resolve("demo"))
    left = []

    def build(*_, on_step, **__):
        for phase, done, seconds in (
            ("reading", 1000, 0),
            ("reading", 2000, 10),
            ("quality", 0, 5),
            ("quality", 10, 1),
        ):
            now[0] += seconds
            on_step(phase, done, 5000 if phase == "reading" else 40)
            left.append(measurement.progress.seconds_left)
        now[0] += 1
        left.append(measurement.progress.seconds_left)
        raise GlassError("enough")

    monkeypatch.setattr(measure, "build_ranks", build)
    assert measurement.run(lambda: model, lambda: True)
    assert left == [None, pytest.approx(30), None, pytest.approx(3), pytest.approx(2)]


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
