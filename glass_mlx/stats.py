"""Global ranks from the command line.

python -m glass_mlx.stats build --model demo             measure a model's ranks
python -m glass_mlx.stats list | show F | verify F --model M | diff A B | merge A B --out C | plot F --out F.png
python -m glass_mlx.stats upload F --repo owner/name     share them
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .cli import checks
from .cli.options import add_trust, add_verbose
from .cli.output import print_table, say
from .cli.parser import Parser
from .cli.running import run
from .cli.values import density, positive
from .core.importance import SIGNALS
from .errors import GlassError, StatsError, printable
from .hub.names import ALIASES, DEFAULT_MODEL
from .ranks.agreement import compare
from .ranks.amounts import DEFAULT_RANK, DEFAULT_STABLE_AT, DEFAULT_TOKENS
from .ranks.format import GlobalStatistics, merge, write_index
from .ranks.lookup import STATS_DIR, local_files

if TYPE_CHECKING:
    from .model.glass_model import GlassModel
    from .ranks.sources import Source

IDLE = {
    "build": (checks.Idle("stable_at", beside="all"), checks.Idle("temp seed", beside="text dataset")),
    "verify": (checks.Idle("trust_remote_code", without="model"),),
    "plot": (checks.Idle("prompt density", without="model"),),
}

_FILE = "a file, or a model that stats list names"


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = Parser("glass_mlx.stats", description="Measure, check, compare and share a model's global ranks.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, does: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(does=does, parser=command)
        add_verbose(command)
        return command

    _add_build_options(add("build", _build, "measure a model's ranks"))
    add("list", _list, "list the ranks on this machine")
    show = add("show", _show, "show a file's metadata")
    show.add_argument("file", help=_FILE)
    verify = add("verify", _verify, "check a file, and whether it belongs to a model")
    verify.add_argument("file", help=_FILE)
    verify.add_argument("--model", help="the model that it should belong to")
    add_trust(verify)
    diff = add("diff", _diff, "compare two files, per layer")
    diff.add_argument("files", nargs=2, metavar="file", help=_FILE)
    diff.add_argument("--density", type=density, default=0.5, help="share of the neurons to compare")
    diff.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    merge = add("merge", _merge, "merge files of one model that were measured on different kinds of text")
    merge.add_argument("files", nargs="+", metavar="file", help=_FILE)
    merge.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    plot = add("plot", _plot, "draw how concentrated importance is, per layer")
    plot.add_argument("file", help=_FILE)
    plot.add_argument("--out", type=Path, required=True, help="the PNG to write")
    plot.add_argument("--model", help="also draw how a prompt's own ranks overlap with these")
    plot.add_argument("--prompt", help="the prompt for that (default: the bundled ones)")
    plot.add_argument("--density", type=density, default=0.5, help="share of the neurons to compare")
    share = add("upload", _upload, "upload files to a Hub repository")
    share.add_argument("files", nargs="+", metavar="file", help=f"{_FILE}, or a directory of files")
    share.add_argument("--repo", required=True, help="owner/name")
    share.add_argument("--private", action="store_true", help="make a new repository private")
    share.add_argument("--license", default="other", help="licence named on the card (default: %(default)s)")
    index = add("index", _index, "write the index.json of a directory of ranks files")
    index.add_argument("directory", type=Path, nargs="?", default=STATS_DIR, help="(default: the package's own)")
    return parser


def _add_build_options(build: argparse.ArgumentParser) -> None:
    build.add_argument(
        "--model",
        required=True,
        help="an alias, a Hub repository or a directory; with --into several, separated by commas, or all (aliases)",
    )
    where = build.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, help="the .safetensors file to write (default: in the user's cache)")
    where.add_argument("--into", type=Path, metavar="DIR", help="measure several models, each into a file in DIR")
    build.add_argument("--tokens", type=positive, default=DEFAULT_TOKENS, help="read at most this many tokens")
    build.add_argument(
        "--stable-at",
        type=density,
        default=DEFAULT_STABLE_AT,
        metavar="E",
        help="stop when choosing by half of the text is this efficient: the energy that must be dropped, as a share of "
        "what is (default: %(default)s)",
    )
    build.add_argument("--all", action="store_true", help="read all --tokens, however stable the ranks are")
    build.add_argument(
        "--sequences", type=positive, default=32, help="sequences in a batch; the first batches have fewer"
    )
    build.add_argument("--length", type=positive, default=256, help="longest sequence in tokens")
    build.add_argument(
        "--response-rank",
        type=int,
        default=DEFAULT_RANK,
        metavar="R",
        help="rank of what predicts the dropped neurons; 0: predict nothing (default: %(default)s)",
    )
    build.add_argument("--temp", type=float, default=1.0, help="sampling temperature")
    build.add_argument("--seed", type=int, default=0, help="seed of the random numbers")
    given = build.add_mutually_exclusive_group()
    given.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="let the model only answer an empty message, or only continue its BOS token (default: both in turn, if it "
        "has a chat template)",
    )
    given.add_argument("--text", type=Path, metavar="FILE", help="read this text, rather than what the model writes")
    given.add_argument("--dataset", type=Path, metavar="FILE", help='read JSON lines with "text" or "messages"')
    add_trust(build)


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    for option in ("temp", "seed", "response_rank"):
        if not getattr(args, option, 0) >= 0:
            parser.error(f"--{option.replace('_', '-')} must not be negative")
    checks.check_together(args.parser, args, IDLE.get(args.command, ()))
    run(lambda: args.does(args), args.verbose)


def _load(args: argparse.Namespace, name: str | None = None) -> tuple[GlassModel, Any]:
    from .loading import load  # only here: it takes seconds to import

    return load(name or args.model, stats=False, trust_remote_code=getattr(args, "trust_remote_code", False))


def _build(args: argparse.Namespace) -> None:
    if args.into is None:
        _build_one(args, args.model, args.out)
    else:
        _build_several(args)


def _build_one(args: argparse.Namespace, name: str, out: Path | None) -> None:
    from .ranks.measure import build_ranks

    model, tokenizer = _load(args, name)
    source = _source(args, model, tokenizer)
    shown = DEFAULT_MODEL if name == DEFAULT_MODEL else None
    stable_at = None if args.all else args.stable_at
    out = build_ranks(model, tokenizer, out, source, args.tokens, stable_at, shown, args.response_rank)
    statistics = GlobalStatistics.read(out)
    tokens = statistics.metadata["tokens"]
    say(f"{out}: {len(statistics.sizes)} FFN layers, {tokens} tokens, {_stability(statistics)}")


def _build_several(args: argparse.Namespace) -> None:
    """Measure one model after the other. What is there already is not measured again, and what fails does not stop the
    others; so the same command goes on after an interruption."""
    import mlx.core as mx

    names, failed = list(ALIASES) if args.model == "all" else args.model.split(","), []
    args.into.mkdir(parents=True, exist_ok=True)
    for name in names:
        out = args.into / f"{Path(name).name}.safetensors"
        if out.exists():
            say(f"{out}: there already")
            continue
        try:
            _build_one(args, name, out)
        except GlassError as e:
            failed.append(name)
            say(f"{name}: not measured: {e}")
        gc.collect()  # the model, before the next one is loaded
        mx.clear_cache()
    say(f"{args.into}: {write_index(args.into)} models; python -m glass_mlx.stats upload {args.into} --repo OWNER/NAME")
    if failed:
        raise GlassError(f"Not measured: {', '.join(failed)}. The same command tries them again.")


def _source(args: argparse.Namespace, model: GlassModel, tokenizer: Any) -> Source:
    """The token sequences that the options ask for."""
    from .ranks.sources import dataset_rows, given_sequences, null_prompt, text_rows

    file = args.text or args.dataset
    if file is None:
        return null_prompt(model, tokenizer, args.sequences, args.length, args.temp, args.seed, args.chat)
    text = _read_text(file)
    if args.text is not None:
        rows = text_rows(text, tokenizer, args.length)
    else:
        rows = dataset_rows([line for line in text.splitlines() if line.strip()], tokenizer, args.length)
    settings = {"file": file.name, "length": args.length}
    return given_sequences("text" if args.text is not None else "dataset", rows, args.sequences, settings)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise GlassError(f"Cannot read {path}: {e}") from e


def _stability(statistics: GlobalStatistics) -> str:
    try:
        s = json.loads(statistics.metadata["stability"])
        overlap, correlation = s["overlap"], s["correlation"]
        stable = f"{s['efficiency']:.1%} stable, " if "efficiency" in s else ""  # not in older files
        return f"{stable}halves agree on {overlap:.1%} of the better neurons, rank correlation {correlation:.3f}"
    except (KeyError, ValueError, TypeError):
        return "stability unknown"


def _find(name: str) -> Path:
    """A ranks file by its path or by the model's name."""
    if Path(name).is_file():
        return Path(name)
    names = {name, ALIASES.get(name, name)}
    for _, path in local_files():
        try:
            metadata = GlobalStatistics.read(path).metadata
        except StatsError:
            continue
        if names & {metadata.get("model"), metadata.get("original"), path.stem}:
            return path
    raise GlassError(
        f"There is no ranks file {name}, nor one on this machine for a model of that name: stats list lists them."
    )


def _list(args: argparse.Namespace) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("model", "layers", "neurons", "method", "tokens", "where", "file")
    for place, path in local_files():
        try:
            statistics = GlobalStatistics.read(path)
        except StatsError as e:
            table.add_row("unreadable", "", "", escape(str(e).split(": ")[-1]), "", place, escape(printable(path.name)))
            continue
        m, sizes = statistics.metadata, statistics.sizes
        row = (m.get("model", ""), len(sizes), f"{sum(sizes):,}", m.get("method", ""), m.get("tokens", ""))
        table.add_row(*(escape(str(cell)) for cell in row), place, escape(printable(path.name)))
    print_table(table)


def _show(args: argparse.Namespace) -> None:
    path = _find(args.file)
    statistics = GlobalStatistics.read(path)
    say(path)
    for key, value in sorted(statistics.metadata.items()):
        say(f"  {key:16} {value if len(value) < 160 else value[:157] + '...'}")


def _merge(args: argparse.Namespace) -> None:
    merged = merge([GlobalStatistics.read(_find(name)) for name in args.files])
    merged.write(args.out)
    say(f"{args.out}: {', '.join(merged.domain_names)}")


def _verify(args: argparse.Namespace) -> None:
    path = _find(args.file)
    statistics = GlobalStatistics.read(path)
    if args.model is None:
        model = statistics.metadata.get("model", "an unnamed model")
        say(f"{path}: sound; {len(statistics.sizes)} FFN layers; for {model}")
        return
    statistics.check(_load(args)[0])
    say(f"{path}: sound, and fits {args.model}")


def _diff(args: argparse.Namespace) -> None:
    a, b = (GlobalStatistics.read(_find(name)) for name in args.files)
    if a.sizes != b.sizes:
        raise GlassError(f"The files are for models of different shapes: {_shape(a)} and {_shape(b)}.")
    layers = [
        {
            signal: compare(np.array(a.energies[signal][i]), np.array(b.energies[signal][i]), args.density)
            for signal in SIGNALS
        }
        for i in range(len(a.sizes))
    ]
    if args.json:
        print(json.dumps({"density": args.density, "layers": layers}))
        return
    from rich.table import Table

    heads = [f"{signal} {what}" for signal in SIGNALS for what in ("correlation", "overlap")]
    table = Table("layer", *heads)
    for i, layer in enumerate(layers):
        table.add_row(str(i), *(f"{layer[s][w]:.3f}" for s in SIGNALS for w in ("correlation", "overlap")))
    print_table(table)
    say(f"overlap of the best {args.density:.0%} of the neurons; chance is {args.density:.2f}")


def _shape(statistics: GlobalStatistics) -> str:
    sizes = statistics.sizes
    return f"{len(sizes)} layers of {sizes[0] if sizes else 0} neurons"


def _plot(args: argparse.Namespace) -> None:
    from .evaluation.names import DEFAULT_PROMPTS
    from .evaluation.overlap import prompt_overlaps  # only here: the other commands need no evaluation
    from .evaluation.plot import plot_ranks
    from .evaluation.prompts import read_prompts

    statistics = GlobalStatistics.read(_find(args.file))
    overlaps = None
    if args.model is not None:
        model, tokenizer = _load(args)
        statistics.check(model)
        prompts = [tokenizer.encode(args.prompt)] if args.prompt else read_prompts(DEFAULT_PROMPTS, tokenizer)
        overlaps = prompt_overlaps(model, prompts, statistics, args.density)
    plot_ranks(statistics, args.out, overlaps, args.density)
    say(args.out)


def _upload(args: argparse.Namespace) -> None:
    from .ranks.share import upload

    for name in args.files:
        found = sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else [_find(name)]
        if not found:
            raise GlassError(f"{name} has no ranks files.")
        for file in found:
            say(upload(file, args.repo, private=args.private, license=args.license))


def _index(args: argparse.Namespace) -> None:
    if not args.directory.is_dir():
        raise GlassError(f"{args.directory} is not a directory: give one with ranks files.")
    say(f"{args.directory / 'index.json'}: {write_index(args.directory)} models")


if __name__ == "__main__":
    main()
