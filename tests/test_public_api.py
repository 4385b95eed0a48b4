"""What users rely on, held against a snapshot: the public names with their signatures, and every command's options.

``pytest tests/test_public_api.py --update-snapshots`` writes ``public_api.txt`` anew: the diff is what users will see.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from mlx_lm.chat import setup_arg_parser as chat_parser
from mlx_lm.generate import setup_arg_parser as generate_parser

import glass_mlx
from glass_mlx.__main__ import COMMANDS

SNAPSHOT = Path(__file__).with_name("public_api.txt")
# Their options are mlx-lm's too, which may get new ones with any release.
MLX_LM_PARSERS = {"chat": chat_parser, "generate": generate_parser}


def public_api() -> str:
    sections = [_section("glass_mlx", (line for name in glass_mlx.__all__ for line in _public_name(name)))]
    for command in sorted(COMMANDS):
        parser = importlib.import_module(f"glass_mlx.{command}").setup_arg_parser()
        theirs = set(_options(MLX_LM_PARSERS[command]())) if command in MLX_LM_PARSERS else set()
        options = [option for option in _options(parser) if option not in theirs]
        sections.append(
            _section(f"python -m glass_mlx.{command}", [*options, *["and mlx-lm's options"] * bool(theirs)])
        )
    return "\n".join(sections)


def _section(title: str, lines: Iterator[str] | list[str]) -> str:
    return "\n".join([title, *(f"    {line}" for line in lines), ""])


def _public_name(name: str) -> list[str]:
    value = getattr(glass_mlx, name)
    if not callable(value):
        return [name]  # a version changes with every release
    if not inspect.isclass(value):
        return [name + _signature(value)]
    bases = ", ".join(base.__name__ for base in value.__bases__)
    if issubclass(value, Exception):
        return [f"class {name}({bases})"]
    return [f"class {name}{_signature(value)}: {bases}", *(f"    {member}" for member in _members(value))]


def _members(owner: type) -> list[str]:
    """A class's own public methods and properties."""
    members = []
    for name, value in sorted(vars(owner).items()):
        if name.startswith("_") and name != "__call__":
            continue
        if inspect.isfunction(value):
            members.append(name + _signature(value))
        elif isinstance(value, classmethod | staticmethod):
            members.append(f"{type(value).__name__} {name}{_signature(value.__func__)}")
        elif isinstance(value, property):
            members.append(name + (", can be set" if value.fset else ""))
    return members


def _signature(function: Any) -> str:
    """Names, kinds and defaults; annotations are for type checkers."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _options(parser: argparse.ArgumentParser) -> list[str]:
    lines = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                lines += [f"{name} {line}" for line in _options(sub)]
        elif not isinstance(action, argparse._HelpAction):
            lines.append(_option(parser, action))
    return sorted(lines)


def _option(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    parts = [" ".join(action.option_strings) or action.dest]
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        parts.append("flag")
    elif action.nargs is not None:
        parts.append(f"nargs {action.nargs}")
    if action.choices is not None:
        parts.append("one of " + ", ".join(map(str, action.choices)))
    default = parser.get_default(action.dest)
    if default not in (None, argparse.SUPPRESS):
        parts.append(f"default {json.dumps(default, default=str)}".replace(f"{ROOT}/", ""))
    return "; ".join([*parts, *["required"] * (action.required and bool(action.option_strings))])


def test_the_public_api(request):
    now = public_api()
    if request.config.getoption("--update-snapshots"):
        SNAPSHOT.write_text(now, encoding="utf-8")
    before = SNAPSHOT.read_text(encoding="utf-8")
    diff = "\n".join(difflib.unified_diff(before.splitlines(), now.splitlines(), "public_api.txt", "now", lineterm=""))
    if diff:
        pytest.fail(
            f"What users see has changed; if it should, run pytest with --update-snapshots.\n{diff}", pytrace=False
        )


def test_a_changed_option_is_seen():
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?")
    commands = parser.add_subparsers()
    build = commands.add_parser("build")
    build.add_argument("--tokens", "-t", type=int, default=7)
    build.add_argument("--kind", choices=["a", "b"], required=True)
    build.add_argument("--deep", action="store_true")
    assert _options(parser) == [
        "build --deep; flag; default false",
        "build --kind; one of a, b; required",
        "build --tokens -t; default 7",
        "file; nargs ?",
    ]


CODE = """
import sys, time
started = time.perf_counter()
import glass_mlx
print(time.perf_counter() - started, *(name for name in sys.modules if name.startswith("glass_mlx")))
"""


def test_the_import_is_small(python):
    """No command line comes with ``import glass_mlx``, nor what only commands need."""
    done = python("-c", CODE)
    assert done.code == 0, done.err
    seconds, *names = done.out.split()
    print(f"import glass_mlx: {float(seconds):.2f} s")
    commands = {f"glass_mlx.{name}" for name in (*COMMANDS, "cli")}
    assert not commands & set(names)
    assert not [name for name in names if name.startswith(("glass_mlx.serving", "glass_mlx.evaluation"))]
