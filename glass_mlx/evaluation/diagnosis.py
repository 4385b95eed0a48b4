"""A diagnosis of this machine: all conformance checks and a timing of the demo model, as a report.

Real runs of small models on MLX's default device; ``doctor`` is its command line.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from .conformance import CHECKS, check_wrap
from .conformance_cases import FORMATS, SHIPPED, Case, CheckFailed, make_case
from .machine import device, versions
from .speed import time_run

# The timing: tokens of the prompt, tokens to generate, and runs after a warm-up.
PROMPT_TOKENS, TOKENS, RUNS = 32, 20, 3


@dataclass
class Result:
    """What a check found.

    Attributes:
        name: of the check and, if it ran on several, the weight format: ``"slices 4-bit/64"``.
        ok: whether it holds.
        detail: what was found; for a failure what was expected and found, or the backend's error.
        seconds: how long it took.
        traceback: of a failure.
    """

    name: str
    ok: bool
    detail: str
    seconds: float
    traceback: str = ""


@dataclass
class Report:
    """Everything that was found. ``times`` are milliseconds of the demo model, ``speeds`` tokens per second."""

    versions: dict[str, str] = field(default_factory=versions)
    device: dict[str, Any] = field(default_factory=device)
    checks: list[Result] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    speeds: dict[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> list[Result]:
        """The checks that do not hold."""
        return [result for result in self.checks if not result.ok]

    def as_json(self) -> dict[str, Any]:
        """The report for ``doctor --json``, without tracebacks."""
        data = asdict(self) | {"ok": not self.failed}
        for check in data["checks"]:
            del check["traceback"]
        return data


def steps(report: Report) -> Iterator[tuple[str, str, Callable[[], list[Result]]]]:
    """Every step of a diagnosis, the timing last: its name, what holds if it succeeds, and what runs it.

    Running a step gives its results, one for each weight format; the timing also writes into the report.
    """
    cases: dict[str, Case] = {}

    def convert() -> list[Result]:
        def make(form: str) -> str:
            cases[form] = make_case(form)
            return "made from the demo model"

        return [attempt(f"formats {form}", partial(make, form)) for form in FORMATS]

    def on(name: str, check: Callable[[Case], str], forms: Iterable[str]) -> list[Result]:
        made = [form for form in forms if form in cases]
        return [attempt(f"{name} {form}", partial(check, cases[form])) for form in made]

    yield "formats", "the demo model, converted", convert
    for name, (check, holds, forms) in CHECKS.items():
        yield name, holds, partial(on, name, check, forms)
    yield "speed", "timed", lambda: [attempt("speed", lambda: time_demo(report))]


def attempt(name: str, check: Callable[[], str]) -> Result:
    """Run a check. Whatever it raises is its failure."""
    start = time.perf_counter()
    try:
        ok, detail, trace = True, check(), ""
    except Exception as e:
        ok, detail, trace = False, reason(e), traceback.format_exc()
    return Result(name, ok, detail, time.perf_counter() - start, trace)


def reason(error: BaseException) -> str:
    """An error and its causes, the first line of each."""
    line = (str(error).strip().splitlines() or [""])[0]
    if not isinstance(error, CheckFailed):
        line = f"{type(error).__name__}: {line}"
    return f"{line} ({reason(error.__cause__)})" if error.__cause__ else line


def time_demo(report: Report) -> str:
    """Time prefill, selection and decoding of the demo model, dense and sparse in turn, into the report."""
    case = make_case(SHIPPED)
    check_wrap(case)
    prompt = mx.random.randint(3, case.dense.args.vocab_size, (PROMPT_TOKENS,), key=mx.random.key(0))
    dense, sparse = [], []
    for _ in range(RUNS + 1):  # the first one warms up
        dense.append(time_run(case.dense, prompt, TOKENS, make_prompt_cache(case.dense)))
        sparse.append(time_run(case.model, prompt, TOKENS, case.model.make_cache(density=0.5)))

    def median(runs: list[dict], key: str) -> float:
        return statistics.median(run[key] for run in runs[1:])

    report.times = {
        "prefill_ms": 1e3 * median(sparse, "prompt_seconds"),
        "select_ms": 1e3 * median(sparse, "select_seconds"),
        "decode_ms": 1e3 * median(sparse, "step_seconds"),
        "dense_prefill_ms": 1e3 * median(dense, "prompt_seconds"),
        "dense_decode_ms": 1e3 * median(dense, "step_seconds"),
    }
    report.speeds = {
        "prefill": PROMPT_TOKENS / median(sparse, "prompt_seconds"),
        "dense": 1 / median(dense, "step_seconds"),
        "sparse": 1 / median(sparse, "step_seconds"),
    }
    return f"medians of {RUNS} runs"
