"""Tests of what all commands have, and of the names they go by."""

from __future__ import annotations

import argparse
import importlib
import sys
import tomllib

import pytest
from conftest import ROOT

from glass_mlx import __main__, __version__

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
MODULES = [script.partition(":")[0] for script in SCRIPTS.values()]


@pytest.mark.parametrize("module", MODULES)
def test_help(invoke, module):
    module = importlib.import_module(module)
    done = invoke(module.main, "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("usage: glass_mlx")


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__main__")])
def test_script_names(module):
    name = module.rpartition(".")[2]
    assert SCRIPTS[f"glass_mlx.{name}"] == f"{module}:main"
    assert importlib.import_module(module).setup_arg_parser().prog == module
    assert name in __main__.COMMANDS


def test_commands_are_all_scripts():
    assert {f"glass_mlx.{name}" for name in __main__.COMMANDS} == set(MODULES) - {"glass_mlx.__main__"}


@pytest.mark.parametrize(
    "name", ["chat", "generate", "stats", "evaluate", "benchmark", "tradeoff", "families", "doctor"]
)
def test_commands(invoke, name):
    """Each is there by its short name and as a script."""
    assert f"glass_mlx.{name}" in SCRIPTS
    done = invoke(__main__.main, name, "--help")
    assert (done.code, done.err) == (0, "") and done.out.startswith(f"usage: glass_mlx.{name} ")


def test_dispatch(invoke):
    assert invoke(__main__.main).out.startswith("usage: glass_mlx COMMAND")
    done = invoke(__main__.main, "chant")
    assert done.code == 2 and done.out == ""
    assert "no command 'chant'" in done.err and "did you mean chat?" in done.err
    for arguments in ((), ("--help",), ("-h",), ("help",)):
        lines = invoke(__main__.main, *arguments).out.splitlines()
        for name, does in __main__.COMMANDS.items():
            assert [line for line in lines if line.split()[:1] == [name] and does in line and len(line) <= 80]


def test_dispatch_passes_arguments_on(invoke, monkeypatch):
    seen = []
    monkeypatch.setattr("glass_mlx.stats.main", lambda: seen.extend(sys.argv))
    invoke(__main__.main, "stats", "build", "--model", "demo")
    assert seen == ["glass_mlx stats", "build", "--model", "demo"]


@pytest.mark.parametrize("module", MODULES)
def test_version(invoke, module):
    done = invoke(importlib.import_module(module).main, "--version")
    assert (done.code, done.out, done.err) == (0, f"glass_mlx {__version__}\n", "")


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__main__")])
def test_usage_errors_are_short(invoke, module):
    """However many options there are; and a mistyped one is told."""
    done = invoke(importlib.import_module(module).main, "--versoin", "\x1b[2J")
    assert (done.code, done.out) == (2, "") and 1 <= done.err.count("\n") <= 3 and "\x1b" not in done.err
    if "unrecognized" in done.err:
        assert "did you mean --version" in done.err


def _parsers():
    for module in (m for m in MODULES if not m.endswith("__main__")):
        parser = importlib.import_module(module).setup_arg_parser()
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices.values()


def test_help_says_the_defaults(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for parser in _parsers():
        text = parser.format_help()
        assert max(map(len, text.splitlines())) <= 80
        for action in parser._actions:
            default = action.default
            if action.help and default not in (None, argparse.SUPPRESS, (), [], {}, "") and default is not False:
                said = parser._get_formatter()._expand_help(action)
                assert "default" in said or str(default) in said, (parser.prog, said)


@pytest.mark.parametrize("name", ["chat", "generate"])
def test_mlx_lms_options(name):
    """All are taken, as mlx-lm takes them; the help is this package's own."""
    theirs = importlib.import_module(f"mlx_lm.{name}").setup_arg_parser()
    ours = importlib.import_module(f"glass_mlx.{name}").setup_arg_parser()
    known = {option: action for action in ours._actions for option in action.option_strings}
    for action in theirs._actions:
        for option in action.option_strings:
            mine = known[option]
            assert (mine.dest, mine.nargs, mine.choices) == (action.dest, action.nargs, action.choices), option
            assert mine.default == action.default or option in ("--model", "--verbose"), option
            if action.type not in (None, str):
                assert mine.type("3") == action.type("3"), option


# Whatever takes long to import.
HEAVY = set("mlx_lm transformers huggingface_hub httpx starlette uvicorn pydantic matplotlib".split())
HEAVY |= {"prompt_toolkit", "rich.table", "llguidance", "tqdm"}
MISTYPED = """
import contextlib, importlib, io, sys
for name in {names}:
    for option in ("--help", "--nope"):
        sys.argv = [name, option]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            importlib.import_module(f"glass_mlx.{{name}}").main()
    print(name, *sys.modules)
"""


def test_help_and_errors_of_usage_come_at_once(python):
    """Nothing that takes long to import is imported for them."""
    done = python("-c", MISTYPED.format(names=["__main__", *__main__.COMMANDS]))
    assert done.err.count("error: ") == 1 + len(__main__.COMMANDS), done.err
    assert [line.split()[0] for line in done.out.splitlines()] == ["__main__", *__main__.COMMANDS]
    for line in done.out.splitlines():
        name, *imported = line.split()
        assert not HEAVY & set(imported), name


def test_python_m(python_m):
    done = python_m("glass_mlx", "generate", "--density", "2")
    assert done.code == 2
    assert "--density" in done.err.splitlines()[-1]
