"""Does GLASS work on this machine? Real runs of small models on MLX's default device, and what they find.

    python -m glass_mlx doctor

Run this first on a new machine, and paste its output into a bug report.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from .cli.options import add_verbose
from .cli.parser import Parser
from .cli.running import run

if TYPE_CHECKING:
    from .evaluation.diagnosis import Report, Result


def diagnose(show: Callable[..., None] = print, verbose: bool = False) -> Report:
    """Run all checks, then the timing, and show each as it ends.

    Args:
        show (callable): prints; it takes what ``print`` takes.
        verbose (bool): write the tracebacks of failed checks to stderr.
    """
    from .evaluation.conformance_cases import FORMATS  # only now: it takes seconds to import
    from .evaluation.diagnosis import Report, steps

    report = Report()
    show(heading(report), flush=True)
    for name, holds, run_step in steps(report):
        start = f"{name:10}"
        show(start, end="", flush=True)  # first, because some errors of a GPU end the process: this names the culprit
        results = run_step()
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


def heading(report: Report) -> str:
    """Versions and device as text."""
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
    """A check as text: one line if it holds on all formats, else one for each way in which it failed."""
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
    """Times and speeds of the demo model as text."""
    from .evaluation.diagnosis import PROMPT_TOKENS

    t, s, d = report.times, report.speeds, report.device
    return (
        f"\ndemo model on {d['name']} ({d['backend']}), density 0.5\n"
        f"prefill of {PROMPT_TOKENS} tokens {t['prefill_ms']:.1f} ms (dense {t['dense_prefill_ms']:.1f}), "
        f"select and compact {t['select_ms']:.1f} ms\n"
        f"decode a token in {t['decode_ms']:.2f} ms (dense {t['dense_decode_ms']:.2f}), "
        f"{s['sparse']:.0f} tokens/s (dense {s['dense']:.0f}): {s['sparse'] / s['dense']:.2f} times\n"
    )


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "glass_mlx.doctor", description="Check with small models that GLASS works on this machine, and how fast it is."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_verbose(parser)
    return parser


def main() -> None:
    args = setup_arg_parser().parse_args()
    run(lambda: _doctor(args), args.verbose)


def _doctor(args: argparse.Namespace) -> None:
    if not args.verbose:
        logging.getLogger("glass_mlx").setLevel(logging.CRITICAL)  # the report includes what would be logged
    report = diagnose((lambda *_, **__: None) if args.json else print, args.verbose)
    if args.json:
        print(json.dumps(report.as_json()))
    if report.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
