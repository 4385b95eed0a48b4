"""Runs a directory of mlx-lm's own tests with GlassModels in the place of its models, or as they are.

A test file runs in a process of its own, so that one that takes the process with it is found out, and leaves a line for
each test. Every model that a test loads or makes is wrapped. Tests load models from the Hub; here they get the demo
model, whatever they ask for. Where that makes a test fail, it fails with plain mlx-lm, too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import processes

FILES = ("test_prompt_cache", "test_generate", "test_server", "test_models")
PLAIN = "plain"
_LIMIT, _LIMIT_FILE = 600, 7200  # seconds for a test and for a file
_LARGEST = 1 << 30  # bytes; tests make larger models too, and never evaluate them, but wrapping does


class Outcome(NamedTuple):
    """How a test ended: "passed", "failed", "skipped", or "crashed" if its process ended or hung in it; the last line
    of its error; and the models in it that could not be wrapped, with the reasons."""

    outcome: str
    why: str = ""
    left: tuple[str, ...] = ()


def run(directory: Path, density: float | None, log: Path) -> dict[str, Outcome]:
    """Run the files of a directory that are in ``FILES``.

    Args:
        directory (Path): mlx-lm's tests.
        density (float, optional): of the GlassModels; None runs plain mlx-lm.
        log (Path): a file for what the processes report.

    Returns:
        dict: for each test and subtest its outcome.
    """
    log.write_text("")
    for file in FILES:
        if (directory / f"{file}.py").is_file():
            while not _run_file(directory, file, density, log):  # a test ended the process: on with the next
                pass
    lines = map(json.loads, log.read_text().splitlines())
    return {line["test"]: Outcome(line["outcome"], line["why"], tuple(line["left"])) for line in lines}


def _run_file(directory: Path, file: str, density: float | None, log: Path) -> bool:
    """Run the tests of a file that are not in the log yet; returns whether that came to its end."""
    environment = processes.environment(HF_HUB_OFFLINE="1")
    arguments = [__file__, directory, file, PLAIN if density is None else density, log]
    before = log.stat().st_size
    try:
        done = processes.run(arguments, directory, environment, timeout=_LIMIT_FILE)
    except subprocess.TimeoutExpired:
        return True
    return done.returncode == 0 or log.stat().st_size == before


def differences(plain: dict[str, Outcome], ours: dict[str, Outcome]) -> dict[str, str]:
    """What does not end as it does with plain mlx-lm: {test: how}."""
    missing, found = Outcome("not run"), {}
    for test in sorted(plain.keys() | ours.keys()):
        before, now = plain.get(test, missing), ours.get(test, missing)
        if before.outcome != now.outcome:
            found[test] = f"{before.outcome} with mlx-lm, {now.outcome} here: {now.why}"
    return found


class _Log(unittest.TestResult):
    """Writes every outcome down at once. Of several lines for a test the last one counts."""

    def __init__(self, log: Path, left: list[str]):
        super().__init__()
        self._log, self._left, self._ended = log, left, False

    def startTest(self, test: unittest.TestCase) -> None:
        self._left.clear()
        self._write(test, "crashed")
        signal.alarm(_LIMIT)

    def stopTest(self, test: unittest.TestCase) -> None:
        signal.alarm(0)
        if not self._ended:
            self._write(test, "failed", "a subtest failed")

    def addSuccess(self, test: unittest.TestCase) -> None:
        self._write(test, "passed")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self._write(test, "skipped", reason)

    def addError(self, test: unittest.TestCase, error: tuple) -> None:
        self._write(test, "failed", f"{error[0].__name__}: {error[1]}")

    addFailure = addError

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, error: tuple | None) -> None:
        if error is None:
            self._write(subtest, "passed")
        else:
            self.addError(subtest, error)
        self._ended = False

    def _write(self, test: unittest.TestCase, outcome: str, why: str = "") -> None:
        self._ended = outcome != "crashed"
        why = " ".join(why.split())[:200]
        line = {"test": test.id(), "outcome": outcome, "why": why, "left": self._left}
        with self._log.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _substitute(density: float | None, left: list[str]) -> None:
    """Have mlx-lm load the demo model only and, with a density, wrap what tests load or make.

    Args:
        density (float, optional): of the GlassModels.
        left (list[str]): receives what cannot be wrapped, and why.
    """
    import mlx.core as mx
    import mlx.nn as nn
    import mlx_lm

    from glass_mlx import GlassError, wrap
    from glass_mlx.loading import DEMO_PATH
    from glass_mlx.model.memory import model_bytes

    mx.disable_compile()
    original = mlx_lm.utils.load

    def load(*_: Any, **options: Any) -> tuple:
        model, *rest = original(str(DEMO_PATH), **options)
        return (model if density is None else wrap(model, density=density, experts="sparse", path=DEMO_PATH), *rest)

    def new(kind: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        """As ``Model(...)``; where a test is the caller, its model comes wrapped."""
        model = dict.__new__(kind)
        is_model = kind.__name__ == "Model" and kind.__module__.startswith("mlx_lm.models.")
        if not is_model or not sys._getframe(1).f_globals["__name__"].startswith("test_"):
            return model
        model.__init__(*args, **kwargs)
        if hasattr(model, "_dummy_tokenizer_ids"):
            # phi3small masks tokens above 100256, for a test's vocabulary a write out of bounds once it is evaluated.
            model._dummy_tokenizer_ids = mx.array([], dtype=mx.int32)
        try:
            if model_bytes(model) > _LARGEST:
                raise GlassError("too large to be evaluated here")
            return wrap(model, density=density, experts="sparse", stats=False)
        except GlassError as e:
            left.append(f"{kind.__module__.rpartition('.')[2]}: {e}")
            return model

    mlx_lm.load = mlx_lm.utils.load = load
    if density is not None:
        nn.Module.__new__ = new


def _timed_out(*_: Any) -> None:
    raise TimeoutError(f"took more than {_LIMIT} s")


def _tests(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for test in suite:
        yield from _tests(test) if isinstance(test, unittest.TestSuite) else [test]


def main(directory: str, file: str, density: str, log: str) -> None:
    sys.path.insert(0, directory)
    left: list[str] = []
    _substitute(None if density == PLAIN else float(density), left)
    signal.signal(signal.SIGALRM, _timed_out)
    seen = {json.loads(line)["test"] for line in Path(log).read_text().splitlines()}
    tests = unittest.defaultTestLoader.loadTestsFromName(file)
    unittest.TestSuite(test for test in _tests(tests) if test.id() not in seen).run(_Log(Path(log), left))
    os._exit(0)  # whatever threads a test left


if __name__ == "__main__":
    main(*sys.argv[1:])
