"""Chat with a model in the terminal.

python -m glass_mlx.chat --model mistral-7b
"""

from __future__ import annotations

import argparse

from .cli import checks
from .cli.options import add_generation_options, add_glass_options, add_verbose, add_verify_options
from .cli.parser import Parser
from .cli.running import run
from .group import PIPELINE, together

IDLE = (
    *checks.GLASS,
    checks.DENSE,
    checks.Idle("build", beside="dense global_weight=0"),
    checks.Idle(f"{checks.CHOICE} verify draft_tokens", beside="dense", until="/density chooses another"),
    checks.VERIFY,
    *checks.SAMPLING,
)


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's options for chat, and GLASS's."""
    parser = Parser(
        "glass_mlx.chat",
        description="Chat with a model that decodes with only the FFN neurons that your prompt calls for.",
    )
    add_generation_options(parser, max_tokens=256, seed=0)
    parser.add_argument("--pipeline", action="store_true", help=PIPELINE)
    add_glass_options(parser, build=False)
    add_verify_options(parser)
    add_verbose(parser)
    return parser


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    checks.check_numbers(parser, args)
    checks.check_together(parser, args, IDLE)
    run(together(lambda: _chat(args)), args.verbose)


def _chat(args: argparse.Namespace) -> None:
    from .terminal.chat import Chat  # only now: it takes seconds to import

    Chat(args).loop()


if __name__ == "__main__":
    main()
