"""Which mlx-lm model families GLASS covers, found by trying.

    python -m glass_mlx.families

Builds a tiny random model of every family in the installed mlx-lm, looks for FFN blocks and checks each kind of them.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict

import mlx.core as mx

from .cli.options import add_verbose
from .cli.output import say
from .cli.parser import Parser
from .cli.running import run
from .hub.names import near_miss


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = Parser("glass_mlx.families", description="List the model families that GLASS covers.")
    parser.add_argument("names", nargs="*", help="only these families (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    add_verbose(parser)
    return parser


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    from .hub.model_files import model_types  # only now: it takes seconds to import

    known = model_types()
    for name in args.names:
        if name not in known:
            close = near_miss(name, known)
            parser.error(f"mlx-lm has no model family {name!r}{close and f'; {close}'}")
    run(lambda: _print(args.names or known, args.json), args.verbose)


def _print(names: list[str], as_json: bool) -> None:
    from .evaluation.coverage import survey

    mx.disable_compile()  # on a CPU, compiling costs more than it saves in one small call
    logging.getLogger("glass_mlx").setLevel(logging.ERROR)  # the table includes what would be warned of
    families = []
    if not as_json:
        say(_line("family", "works", "projections", "FFNs"))
    for name in names:
        family = survey(name)
        families.append(family)
        if not as_json:
            say(_line(name, "yes" if family.covered else "-", family.projections, family.ffns))
            if family.note:
                say(f"    {family.note}")
    if as_json:
        print(json.dumps([asdict(f) for f in families], indent=2))
    else:
        print(f"\n{sum(f.covered for f in families)} of {len(families)} families covered")


def _line(family: str, works: str, projections: str, ffns: str) -> str:
    return f"{family:21} {works:5} {projections:29} {ffns}".rstrip()


if __name__ == "__main__":
    main()
