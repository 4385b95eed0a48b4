"""Does GLASS work on this machine? Real runs of small models on MLX's default device, and what they find.

    python -m glass_mlx doctor

This is what to run first on a new machine, and what to paste into a bug report.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ._version import __version__
from .cli import add_verbose, run
from .evaluation.doctor_cases import FORMATS, SHIPPED, Case, make_case
from .evaluation.doctor_checks import CHECKS, check_wrap
from .evaluation.speed import measure

PROMPT_TOKENS, TOKENS, RUNS = 32, 20, 3


@dataclass
class Result:
    """What a check found.

    Attributes:
        name: of the check and, where it ran on several, the format of the weights: ``"slices 4-bit/64"``.
        ok: whether it holds.
        detail: what was found; of a failure what was expected and what was found, or the backend's error.
        seconds: that it took.
        traceback: of a failure.
    """

    name: str
    ok: bool
    detail: str
    seconds: float
    traceback: str = ""


@dataclass
class Report:
    """All that ``doctor`` says. ``times`` are milliseconds of the demo model, ``speeds`` tokens a second."""

    versions: dict[str, str]
    device: dict[str, Any]
    checks: list[Result] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    speeds: dict[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> list[Result]:
        return [result for result in self.checks if not result.ok]

    def as_json(self) -> dict[str, Any]:
        data = asdict(self) | {"ok": not self.failed}
        for check in data["checks"]:
            del check["traceback"]
        return data


def versions() -> dict[str, str]:
    """Of the packages that matter, Python and the system."""

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "unknown"

    packages = {name: installed(name) for name in ("mlx", "mlx-lm", "numpy")}
    system = f"macOS {platform.mac_ver()[0]}" if platform.mac_ver()[0] else f"{platform.system()} {platform.release()}"
    return {
        "glass_mlx": __version__,
        **packages,
        "python": platform.python_version(),
        "os": f"{system} {platform.machine()}",
    }


def device() -> dict[str, Any]:
    """MLX's default device: name, architecture, backend, sizes in bytes where they are known, else None."""
    try:
        info = dict(mx.device_info())
    except Exception:  # a backend that does not tell is no reason to check nothing
        info = {}
    memory = info.get("memory_size", info.get("total_memory"))
    if memory is None and hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "name": info.get("device_name", platform.processor() or "unknown"),
        "architecture": info.get("architecture", platform.machine()),
        "backend": backend(),
        "memory_bytes": memory,
        "working_set_bytes": info.get("max_recommended_working_set_size"),
    }


def backend() -> str:
    """``"metal"``, ``"cuda"`` or ``"cpu"``: what MLX computes on by default."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def attempt(name: str, check: Callable[[], str]) -> Result:
    """Run a check; whatever it raises is its failure."""
    start = time.perf_counter()
    try:
        ok, detail, trace = True, check(), ""
    except Exception as e:
        ok, detail, trace = False, reason(e), traceback.format_exc()
    return Result(name, ok, detail, time.perf_counter() - start, trace)


def reason(error: BaseException) -> str:
    """An error and what it came from, the first line of each."""
    line = (str(error).strip().splitlines() or [""])[0]
    if type(error).__name__ != "CheckFailed":
        line = f"{type(error).__name__}: {line}"
    return f"{line} ({reason(error.__cause__)})" if error.__cause__ else line


def checks() -> Iterator[tuple[str, str, Callable[[], list[Result]]]]:
    """Every check's name, what holds if it passes, and what runs it, on each format."""
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


def time_demo(report: Report) -> str:
    """Time prefill, selection and decoding of the demo model, dense and sparse in turn, into the report. Refreshes are
    left out: in an answer as short as this one they would count too much."""
    case = make_case(SHIPPED)
    check_wrap(case)
    prompt = mx.random.randint(3, case.dense.args.vocab_size, (PROMPT_TOKENS,), key=mx.random.key(0))
    dense, sparse = [], []
    for _ in range(RUNS + 1):  # the first one warms up
        dense.append(measure(case.dense, prompt, TOKENS, make_prompt_cache(case.dense)))
        sparse.append(measure(case.model, prompt, TOKENS, case.model.make_cache(density=0.5, refresh=0)))

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


def heading(report: Report) -> str:
    """Versions and device, for people."""
    v, d = report.versions, report.device
    sizes = [(d["memory_bytes"], "memory"), (d["working_set_bytes"], "recommended working set")]
    known = "".join(f", {size / 2**30:.1f} GiB {what}" for size, what in sizes if size)
    return (
        f"glass_mlx {v['glass_mlx']}, mlx {v['mlx']}, mlx-lm {v['mlx-lm']}, numpy {v['numpy']}, Python {v['python']}\n"
        f"{v['os']}\n"
        f"device  {d['name']} ({d['architecture']})\n"
        f"backend {d['backend']}{known}\n"
    )


def lines(name: str, holds: str, results: list[Result]) -> str:
    """What is shown of a check: a line if it holds on all formats, else one for each way in which it failed."""
    passed, failures = [r for r in results if r.ok], {}
    for result in results:
        if not result.ok:
            failures.setdefault(result.detail, []).append(result.name.removeprefix(name).strip())
    shown = []
    for detail, forms in failures.items():
        where = "all formats: " if 1 < len(forms) == len(results) else f"{', '.join(forms)}: " if forms[0] else ""
        shown.append(f"{name:10} FAILED  {where}{detail}")
    if passed or not results:
        where = f"{len(passed)} of {len(results)} formats: " if failures else ""
        seconds = f"{sum(r.seconds for r in results):6.2f} s"
        shown.append(f"{name:10} {'ok' if passed else '-':7} {where + holds if passed else 'not run':50} {seconds}")
    return "\n".join(shown)


def timings(report: Report) -> str:
    """Times and speeds of the demo model, for people."""
    t, s, d = report.times, report.speeds, report.device
    return (
        f"\ndemo model on {d['name']} ({d['backend']}), density 0.5, without refresh\n"
        f"prefill of {PROMPT_TOKENS} tokens {t['prefill_ms']:.1f} ms (dense {t['dense_prefill_ms']:.1f}), "
        f"select and compact {t['select_ms']:.1f} ms\n"
        f"decode a token in {t['decode_ms']:.2f} ms (dense {t['dense_decode_ms']:.2f}), "
        f"{s['sparse']:.0f} tokens/s (dense {s['dense']:.0f}): {s['sparse'] / s['dense']:.2f} times\n"
    )


def diagnose(show: Callable[..., None] = print, verbose: bool = False) -> Report:
    """Run all checks, then the timing, and show each as it ends.

    Args:
        show (callable): takes what ``print`` takes.
        verbose (bool): write the tracebacks of failed checks to stderr.
    """
    report = Report(versions(), device())
    show(heading(report), flush=True)
    for name, holds, check in [*checks(), ("speed", "timed", lambda: [attempt("speed", lambda: time_demo(report))])]:
        start = f"{name:10}"
        show(start, end="", flush=True)  # first: some errors of a GPU end the process, and then this is the last word
        results = check()
        report.checks += results
        show(lines(name, holds, results).removeprefix(start), flush=True)
        for trace in {r.detail: r.traceback for r in results if verbose and not r.ok}.values():
            print(trace, end="", file=sys.stderr, flush=True)
    if report.times:
        show(timings(report))
    if report.failed:
        show(f"{len(report.failed)} of {len(report.checks)} checks FAILED; please report all of the above as an issue")
    else:
        show(f"all {len(report.checks)} checks hold, on {', '.join(FORMATS)}")
    return report


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glass_mlx.doctor", description="Check on small models that GLASS works on this machine, and how fast."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_verbose(parser)
    return parser


def main() -> None:
    args = setup_arg_parser().parse_args()
    run(lambda: _doctor(args), args.verbose)


def _doctor(args: argparse.Namespace) -> None:
    if not args.verbose:
        logging.getLogger("glass_mlx").setLevel(logging.CRITICAL)  # the report has what it would say
    report = diagnose((lambda *_, **__: None) if args.json else print, args.verbose)
    if args.json:
        print(json.dumps(report.as_json()))
    if report.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
