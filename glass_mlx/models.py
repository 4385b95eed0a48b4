"""Models on this machine: what is downloaded, what fits, and what has global ranks.

python -m glass_mlx.models                       the models in the Hub cache
python -m glass_mlx.models list --all | show qwen3-4b | pull qwen3-4b | rm qwen3-4b
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .cli.options import add_verbose
from .cli.output import print_table, say
from .cli.parser import Parser
from .cli.running import run
from .errors import GlassError, printable
from .hub.names import ALIASES, DEFAULT_MODEL, repository_of

_MODEL = "an alias, a Hub repository or a directory"


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = Parser("glass_mlx.models", description="Models on this machine. Without a command: list.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, does: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(does=does)
        add_verbose(command)
        return command

    listed = add("list", _list, "list the downloaded models: their size, whether they fit, whether they have ranks")
    listed.add_argument("--all", action="store_true", help="also list the aliases of models that are not downloaded")
    listed.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    pull = add("pull", _pull, "download a model, or the rest of it")
    pull.add_argument("model", help="an alias or a Hub repository")
    pull.add_argument("--revision", help="a branch, a tag or a commit hash")
    remove = add("rm", _remove, "remove downloaded models from the Hub cache")
    remove.add_argument("models", nargs="+", metavar="model", help="an alias or a Hub repository")
    remove.add_argument("--yes", "-y", action="store_true", help="do not ask")
    show = add("show", _show, "show what is known about a model without loading it")
    show.add_argument("model", help=_MODEL)
    return parser


def main() -> None:
    given = sys.argv[1:]
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help", "--version")):
        given = ["list", *given]
    args = setup_arg_parser().parse_args(given)
    run(lambda: args.does(args), args.verbose)


def _list(args: argparse.Namespace) -> None:
    from .downloads import downloaded_models

    models = downloaded_models()
    known = {model.repo for model in models}
    missing = {alias: repo for alias, repo in ALIASES.items() if args.all and repo not in known}
    if args.json:
        absent = [{"id": alias, "repo": repo, "downloaded": False} for alias, repo in missing.items()]
        print(json.dumps([model.as_json() for model in models] + absent))
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table("model", "size", "fits", "ranks", "note")
    for model in models:
        row = (model.id, model.size, model.fit, "yes" if model.ranks else "no", model.problem or "")
        table.add_row(*(escape(printable(cell)) for cell in row))
    for alias in missing:
        table.add_row(alias, "", "", "", "not downloaded")
    print_table(table)
    if not args.all:
        say("glass_mlx.models list --all also lists what can be downloaded by a short name.")


def _show(args: argparse.Namespace) -> None:
    from .downloads import find_model

    for name, value in find_model(args.model).details().items():
        say(f"{name:14} {value}")


def _pull(args: argparse.Namespace) -> None:
    from .downloads import check_room, find_model
    from .loading import resolve_model

    if args.model == DEFAULT_MODEL:
        raise GlassError(f"{DEFAULT_MODEL} comes with the package: there is nothing to download.")
    size = check_room(repository_of(args.model), args.revision)
    if size is not None:
        say(f"{args.model}: {size} to download")
    say(resolve_model(args.model, args.revision))
    model = find_model(args.model)
    say(f"{model.size}; fits this machine: {model.fit}; global ranks: {'yes' if model.ranks else 'no'}")


def _remove(args: argparse.Namespace) -> None:
    from .downloads import removal

    strategy, names = removal(args.models)
    what = f"{', '.join(names)} ({strategy.expected_freed_size_str})"
    if not args.yes:
        if not sys.stdin.isatty():
            raise GlassError(f"Not removed: {what}. Without a terminal to ask on, --yes is needed.")
        if input(f"remove {printable(what)}? [y/N] ").strip().lower() not in ("y", "yes"):
            say("nothing was removed")
            return
    strategy.execute()
    say(f"removed {what}")


if __name__ == "__main__":
    main()
