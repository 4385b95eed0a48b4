"""Tests of the doctor: what it says where all is well, and where something is not."""

from __future__ import annotations

import json
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import pytest

from glass_mlx import doctor
from glass_mlx.evaluation import conformance as checks
from glass_mlx.evaluation import conformance_cases as cases
from glass_mlx.evaluation import diagnosis
from glass_mlx.model import blocks as ffn
from glass_mlx.model.session import Session

FEW = ("bfloat16", "4-bit/64")


@pytest.fixture(scope="module")
def run(request) -> Iterator[tuple[diagnosis.Report, str]]:
    """A whole run, and the screen; on all formats with --thorough."""
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        for number, few in {"PROMPT_TOKENS": 8, "TOKENS": 5, "RUNS": 1}.items():
            patch.setattr(diagnosis, number, few)
        for name in () if request.config.getoption("--thorough") else cases.FORMATS.keys() - FEW:
            patch.delitem(cases.FORMATS, name)
        report = doctor.diagnose(lambda text, end="\n", **_: shown.append(text + end))
        yield report, "".join(shown)


@pytest.fixture
def quick(monkeypatch):
    """Two formats only, and no timing."""

    def quick(*names: str) -> None:
        for name in cases.FORMATS.keys() - FEW:
            monkeypatch.delitem(cases.FORMATS, name)
        monkeypatch.setattr(diagnosis, "time_demo", lambda report: "not timed")
        for name in checks.CHECKS.keys() - names:
            monkeypatch.delitem(checks.CHECKS, name)

    return quick


def test_all_is_well(run):
    report, screen = run
    assert [check.detail for check in report.failed] == []
    named = {check.name for check in report.checks}
    for name, (_, _, forms) in checks.CHECKS.items():
        assert {f"{name} {form}" for form in forms} <= named
    assert len(named) == len(report.checks)
    assert screen.splitlines()[-1].startswith(f"all {len(report.checks)} checks hold")


def test_one_screen(run):
    report, screen = run
    lines = screen.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    for text in (*report.versions.values(), report.device["name"], report.device["backend"], *checks.CHECKS):
        assert text in screen


def test_json(run, invoke, monkeypatch):
    report, _ = run
    monkeypatch.setattr(doctor, "diagnose", lambda *_: report)
    done = invoke(doctor.main, "--json")
    assert (done.code, done.err) == (0, "")
    data = json.loads(done.out)
    assert data.keys() == {"versions", "device", "checks", "times", "speeds", "ok"} and data["ok"] is True
    assert data["versions"].keys() == {"glass_mlx", "mlx", "mlx-lm", "numpy", "python", "os"}
    assert data["device"].keys() == {"name", "architecture", "backend", "memory_bytes", "working_set_bytes"}
    assert all(check.keys() == {"name", "ok", "detail", "seconds"} for check in data["checks"])
    assert {"prefill_ms", "select_ms", "decode_ms"} < data["times"].keys()
    assert data["speeds"].keys() == {"prefill", "dense", "sparse"}
    assert all(value > 0 for value in (*data["times"].values(), *data["speeds"].values()))


def status(out: str) -> dict[str, str]:
    """What the screen says of each check: "ok", "FAILED" or "-"."""
    names = ("formats", *checks.CHECKS, "speed")
    found = {}
    for line in out.splitlines():
        for name in names:
            if line.startswith(f"{name} "):
                found.setdefault(name, line[len(name) :].split()[0])
    return found


def test_what_the_backend_cannot_do(invoke, quick, monkeypatch):
    """The backend's own words are shown; what does not need it is still checked."""
    quick("mlx-lm", "slices", "ranks", "wrap", "selection")

    def refuse(*_, **__):
        raise RuntimeError("[ScatterAxis::eval_gpu] Does not support int64\nmore")

    monkeypatch.setattr(mx, "put_along_axis", refuse)
    done = invoke(doctor.main)
    failed = {"ranks": "FAILED", "wrap": "FAILED", "selection": "FAILED"}
    assert done.code == 1
    assert status(done.out) == {"formats": "ok", "mlx-lm": "ok", "slices": "ok", **failed, "speed": "ok"}
    line = next(line for line in done.out.splitlines() if line.startswith("ranks"))
    assert line.endswith("FAILED  bfloat16: RuntimeError: [ScatterAxis::eval_gpu] Does not support int64")
    assert "Traceback" not in done.out + done.err


def test_wrong_columns(invoke, quick, monkeypatch):
    quick("slices", "ranks", "wrap", "density 1")
    right = ffn.slice_columns
    monkeypatch.setattr(ffn, "slice_columns", lambda linear, columns: right(linear, columns[::-1]))
    done = invoke(doctor.main, "--verbose")
    assert done.code == 1
    found = status(done.out)
    assert (found["slices"], found["ranks"], found["speed"]) == ("FAILED", "ok", "ok")
    assert "bfloat16: layer 0, down_proj: expected equal weights, found" in done.out
    assert "in check_slices" in done.err and "CheckFailed" in done.err
    # GLASS sees it as well, and does without these blocks
    assert (found["wrap"], found["density 1"]) == ("FAILED", "FAILED")
    assert "not run, because the check 'wrap' failed" in done.out


def test_a_failure_in_json(invoke, quick, monkeypatch):
    quick("ranks")
    monkeypatch.setattr(checks, "rank", lambda energy: mx.arange(1, energy.size + 1))
    done = invoke(doctor.main, "--json")
    data = json.loads(done.out)
    assert (done.code, done.err, data["ok"]) == (1, "", False)
    (failed,) = [check for check in data["checks"] if not check["ok"]]
    assert failed["name"] == "ranks bfloat16" and failed["detail"].startswith("expected NumPy's ranks, found ")


def test_a_format_that_cannot_be_made(invoke, quick, monkeypatch):
    quick("slices")

    def refuse(*_, **__):
        raise ValueError("[quantize] Not on this device.")

    monkeypatch.setattr(nn, "quantize", refuse)
    out = invoke(doctor.main).out
    assert "formats    FAILED  4-bit/64: ValueError: [quantize] Not on this device." in out
    assert "1 of 2 formats" in out and status(out)["slices"] == "ok"


@pytest.fixture(scope="module")
def case() -> cases.Case:
    made = cases.make_case("bfloat16")
    checks.check_wrap(made)
    return made


@pytest.mark.parametrize(
    ("check", "broken", "what"),
    [
        ("density 1", "decode", "token 2: expected"),
        ("sparse", "decode", "relative error"),
        ("reread", "_take_pending", "expected evidence of"),
        ("saved", "_find_session", "has no session"),
    ],
)
def test_each_check_can_fail(case, monkeypatch, check, broken, what):
    """A model that decodes on other weights, never reads again, or forgets its session."""
    own = getattr(type(case.model), broken)
    replacements = {
        "decode": lambda model, *args, **kwargs: own(model, *args, **kwargs)[..., ::-1],
        "_take_pending": lambda *_: None,
        "_find_session": lambda _, cache: cache[-1] if isinstance(cache[-1], Session) else None,
    }
    monkeypatch.setattr(type(case.model), broken, replacements[broken])
    result = diagnosis.attempt(check, lambda: checks.CHECKS[check][0](case))
    assert not result.ok and what in result.detail


def test_verified_tokens_may_differ_at_a_tie_only(case, monkeypatch):
    prompt = case.prompt
    logits = case.dense(mx.array([prompt]))[0, -1]
    second = int(mx.argsort(logits)[-2])
    monkeypatch.setattr(case, "answer", lambda **_: [second], raising=False)
    assert "expected a relative error" in diagnosis.attempt("verified", lambda: checks.check_verified(case)).detail
    monkeypatch.setattr(cases.Case, "tolerance", 1.0)
    assert checks.check_verified(case) == "1 tokens, some at ties"


def test_an_error_in_the_engine_is_told(case, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("There is no Stream(gpu, 1) in current thread.")

    monkeypatch.setattr("glass_mlx.serving.model_loading.load", broken)
    result = diagnosis.attempt("thread", lambda: checks.check_thread(case))
    assert result.detail.endswith("(RuntimeError: There is no Stream(gpu, 1) in current thread.)")


def test_usage_error(invoke):
    done = invoke(doctor.main, "--model", "demo")
    assert done.code == 2 and done.out == ""
    assert done.err.splitlines()[-1] == "glass_mlx.doctor: error: unrecognized arguments: --model demo"
