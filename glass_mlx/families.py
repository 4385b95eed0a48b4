"""Which mlx-lm model families GLASS covers, found by trying.

    python -m glass_mlx.families

Builds a tiny random model of every family in the installed mlx-lm, looks for FFN blocks and checks each kind.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict, dataclass

import mlx.core as mx

from .cli import add_verbose, run
from .errors import GlassError
from .evaluation.tiny_models import Unbuildable, model_types, tiny_model
from .model.glass_model import GlassModel


@dataclass
class Family:
    """One model family of mlx-lm.

    Attributes:
        name: its module in mlx-lm, which is its ``model_type``.
        covered: whether at least one kind of its FFN blocks decodes sparsely.
        projections: names of these blocks' projections, such as ``gate_proj+up_proj/down_proj``.
        note: what stays dense and why.
    """

    name: str
    covered: bool
    projections: str = ""
    note: str = ""


def survey(name: str) -> Family:
    """Try one family on a tiny random model."""
    try:
        model = GlassModel(tiny_model(name))
    except Unbuildable as e:
        return Family(name, False, note=f"not tried: {e}")
    except GlassError as e:
        return Family(name, False, note=str(e).split(". Use it")[0].removeprefix(f"{name} "))
    except Exception as e:  # a family of a newer mlx-lm, say: the others are still worth listing
        return Family(name, False, note=f"not tried: {type(e).__name__}: {e}".splitlines()[0])
    kinds = {f"{'+'.join(b.inputs)}/{b.output}": None for b in model.blocks}
    notes = {f"{path}: {reason}": None for path, reason in model.left_dense.items()}
    return Family(name, True, ", ".join(kinds), "; ".join(list(notes)[:1]))


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glass_mlx.families", description="List the model families that GLASS covers."
    )
    parser.add_argument("names", nargs="*", help="only these families (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    add_verbose(parser)
    return parser


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    known = model_types()
    for name in args.names:
        if name not in known:
            parser.error(f"mlx-lm has no model family {name!r}")
    run(lambda: _print(args.names or known, args.json), args.verbose)


def _print(names: list[str], as_json: bool) -> None:
    mx.disable_compile()  # on a CPU, compiling costs more than it saves for one small call
    logging.getLogger("glass_mlx").setLevel(logging.ERROR)  # the table has what it would warn of
    families = []
    if not as_json:
        print(f"{'family':22} covered  {'projections':30} note")
    for name in names:
        family = survey(name)
        families.append(family)
        if not as_json:
            mark = "yes" if family.covered else "-"
            print(f"{name:22} {mark:7}  {family.projections:30} {family.note}".rstrip(), flush=True)
    if as_json:
        print(json.dumps([asdict(f) for f in families], indent=2))
    else:
        print(f"\n{sum(f.covered for f in families)} of {len(families)} families covered")


if __name__ == "__main__":
    main()
