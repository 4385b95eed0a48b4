"""Tests of what the command lines share, and of the names they go by."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

from glass_mlx import GlassError, __main__, __version__, cli

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
MODULES = [script.partition(":")[0] for script in SCRIPTS.values()]


def _raise(error):
    raise error


@pytest.mark.parametrize("text, value", [("0.5", 0.5), ("1", 1.0), ("1e-3", 1e-3)])
def test_density(text, value):
    assert cli.density(text) == value


@pytest.mark.parametrize("text", ["0", "-1", "1.01", "nan", "inf", "abc", ""])
def test_bad_density(text):
    with pytest.raises(argparse.ArgumentTypeError, match="above 0"):
        cli.density(text)


@pytest.mark.parametrize("text, value", [("auto", "auto"), ("0", 0.0), ("1", 1.0)])
def test_global_weight(text, value):
    assert cli.global_weight(text) == value


@pytest.mark.parametrize("text", ["-0.1", "1.01", "nan", "Auto", ""])
def test_bad_global_weight(text):
    with pytest.raises(argparse.ArgumentTypeError, match="neither"):
        cli.global_weight(text)


@pytest.mark.parametrize(
    "text, value", [("0", 0), ("123", 123), ("500MB", 500_000_000), ("1.5 gb", 1_500_000_000), ("2GiB", 2 * 2**30)]
)
def test_memory_size(text, value):
    assert cli.memory_size(text) == value


@pytest.mark.parametrize("text", ["", "-1", "GB", "1PB", "1e9", "nan"])
def test_bad_memory_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="500MB"):
        cli.memory_size(text)


def test_run(invoke):
    done = invoke(lambda: cli.run(lambda: print("fine")))
    assert (done.code, done.out, done.err) == (0, "fine\n", "")


def test_run_error(invoke):
    done = invoke(lambda: cli.run(lambda: _raise(GlassError("what to do"))))
    assert (done.code, done.out, done.err) == (1, "", "error: what to do\n")


def test_an_error_of_the_backend_is_one_line(invoke):
    error = RuntimeError("[ScatterAxis::eval_gpu] Does not support int64\nat::once")
    done = invoke(lambda: cli.run(lambda: _raise(error)))
    assert done.code == 1 and len(done.err.splitlines()) == 1
    assert "Does not support int64" in done.err and "glass_mlx doctor" in done.err
    with pytest.raises(RuntimeError):
        cli.run(lambda: _raise(error), verbose=True)


def test_run_verbose():
    with pytest.raises(GlassError, match="what to do"):
        cli.run(lambda: _raise(GlassError("what to do")), verbose=True)


def test_run_interrupted(invoke):
    done = invoke(lambda: cli.run(lambda: _raise(KeyboardInterrupt())))
    assert (done.code, done.err) == (130, "")


def test_run_leaves_other_errors_alone():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0)


def test_reader_gone():
    """As with ``| head``."""
    code = (
        "import sys; sys.modules['glass_mlx.loading'] = sys  # which takes seconds to import\n"
        "from glass_mlx.cli import run; run(lambda: [print('x' * 9999, flush=True) for _ in range(9999)])"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


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


@pytest.mark.parametrize("build", [True, False])
def test_build_option(build):
    parser = argparse.ArgumentParser()
    cli.add_glass_options(parser, build=build)
    options = {"": build, "--build": True, "--no-build": False}
    assert [parser.parse_args(o.split()).build for o in options] == list(options.values())


def test_dispatch(invoke):
    assert invoke(__main__.main).out.startswith("usage: glass_mlx {chat,generate")
    done = invoke(__main__.main, "chant")
    assert done.code == 2 and done.out == ""
    assert "no command 'chant'" in done.err and "did you mean chat?" in done.err
    for arguments in ((), ("--help",), ("-h",)):
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
            if action.help and default not in (None, argparse.SUPPRESS, (), [], "") and default is not False:
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


def test_what_is_mistyped_is_said_at_once(python):
    """Nothing that takes seconds to import is imported for it."""
    names = ("__main__", "chat", "generate", "models", "stats", "doctor", "families")
    mistyped = (
        "import importlib, sys; sys.argv = ['x', '--nope']\n"
        f"for name in {names}:\n"
        "    try: importlib.import_module(f'glass_mlx.{name}').main()\n"
        "    except SystemExit as e: assert e.code == 2\n"
        "print(*sys.modules)"
    )
    done = python("-c", mistyped)
    assert done.code == 0 and done.err.count("error: ") == len(names) and done.err.count("\n") <= 3 * len(names)
    assert not {"mlx_lm", "transformers", "prompt_toolkit", "rich.table"} & set(done.out.split())


def test_python_m(python_m):
    done = python_m("glass_mlx", "generate", "--density", "2")
    assert done.code == 2
    assert "--density" in done.err.splitlines()[-1]
