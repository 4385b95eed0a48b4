"""Tests of what the READMEs say: links, pictures, anchors, commands, options, extras and imports exist."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from glass_mlx.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CHANGES = ROOT / "glass_mlx/CHANGELOG.md"  # it also names what is gone
PAGES = [
    README,
    ROOT / ".github/CONTRIBUTING.md",
    *(p for d in ("glass_mlx", "apps", "stats") for p in ROOT.glob(f"{d}/**/*.md")),
]
CURRENT = [page for page in PAGES if page != CHANGES]
OF_OTHERS = {"--adhoc-sign", "--no-metal-rules", "--thorough", "--window"}  # briefcase's, the tests', the app's

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")


def by_path(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def fences(page: Path, language: str) -> list[str]:
    return [text for kind, text in _FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def shell_commands(page: Path) -> Iterator[list[str]]:
    """The commands of the page's shell blocks, split into words."""
    for block in fences(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"\s&&\s", line):
                if words := shlex.split(command, comments=True):
                    yield words


def glass_command(words: list[str]) -> tuple[str, list[str]] | None:
    """The module and the arguments of ``python -m glass_mlx.chat ...`` or ``python -m glass_mlx chat ...``."""
    if len(words) < 3 or not words[0].endswith("python") or words[1] != "-m":
        return None
    module, *arguments = words[2:]
    if module == "glass_mlx" and arguments:
        module, *arguments = f"glass_mlx.{arguments[0]}", *arguments[1:]
    return (module, arguments) if module.startswith("glass_mlx.") else None


@cache
def parser_of(module: str) -> argparse.ArgumentParser:
    return importlib.import_module(module).setup_arg_parser()


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """All options, also those of subcommands."""
    options = {option for action in parser._actions for option in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            options.update(*(options_of(command) for command in action.choices.values()))
    return options


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_a_front_door():
    assert len(README.read_text(encoding="utf-8").splitlines()) < 200


@by_path(PAGES)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@by_path(CURRENT)
def test_commands(page):
    for module, arguments in filter(None, map(glass_command, shell_commands(page))):
        assert module.removeprefix("glass_mlx.") in (*COMMANDS, "demo.train", "evaluation.from_gguf", "evaluation.soak")
        try:
            parser_of(module).parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{module} does not take {arguments}")


@by_path(CURRENT)
def test_options(page):
    """In running text: of the command that stands before them, or else of any."""
    known = {name: options_of(parser_of(f"glass_mlx.{name}")) for name in COMMANDS}
    for code in _CODE.findall(prose(page)):
        command = glass_command(code.split())
        own = known[command[0].removeprefix("glass_mlx.")] if command else set().union(*known.values(), OF_OTHERS)
        assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", code)) <= own, code


@by_path(PAGES)
def test_extras(page):
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extras in re.findall(r"pip install (?:-e )?'(?:\.|glass_mlx)\[([\w,]+)\]'", page.read_text(encoding="utf-8")):
        assert set(extras.split(",")) <= known.keys()


@by_path(PAGES)
def test_python(page):
    for block in fences(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("glass_mlx"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_two_commands_are_what_ci_runs():
    chat, tests = ([shlex.split(step) for step in block.split("&&")] for block in fences(README, "sh")[:2])
    assert chat[0] == tests[0] == ["python3", "-m", "venv", ".venv"]
    assert chat[1:] == [[".venv/bin/pip", "install", "."], [".venv/bin/python", "-m", "glass_mlx.chat"]]
    assert tests[1:] == [[".venv/bin/pip", "install", ".[test]"], [".venv/bin/python", "-m", "pytest"]]
    script = (ROOT / ".ci/run").read_text().replace("$venv", ".venv")
    run = [shlex.split(line, comments=True) for line in script.splitlines() if ".venv" in line]
    assert tests[0] in run
    installed = [word for words in run if words[:2] == tests[1][:2] for word in words]
    assert any(re.fullmatch(r"\.\[(\w+,)*test(,\w+)*\]", word) for word in installed)
    assert any(words[:3] == tests[2] for words in run)
