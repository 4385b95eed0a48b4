"""Tests of how a command's work ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from glass_mlx import GlassError
from glass_mlx.cli.running import run


def _raise(error):
    raise error


def test_run(invoke):
    done = invoke(lambda: run(lambda: print("fine")))
    assert (done.code, done.out, done.err) == (0, "fine\n", "")


def test_run_error(invoke):
    done = invoke(lambda: run(lambda: _raise(GlassError("what to do"))))
    assert (done.code, done.out, done.err) == (1, "", "error: what to do\n")


def test_an_error_of_the_backend_is_one_line(invoke):
    error = RuntimeError("[ScatterAxis::eval_gpu] Does not support int64\nat::once")
    done = invoke(lambda: run(lambda: _raise(error)))
    assert done.code == 1 and len(done.err.splitlines()) == 1
    assert "Does not support int64" in done.err and "glass_mlx doctor" in done.err
    with pytest.raises(RuntimeError):
        run(lambda: _raise(error), verbose=True)


def test_run_verbose():
    with pytest.raises(GlassError, match="what to do"):
        run(lambda: _raise(GlassError("what to do")), verbose=True)


def test_run_interrupted(invoke):
    done = invoke(lambda: run(lambda: _raise(KeyboardInterrupt())))
    assert (done.code, done.err) == (130, "")


def test_run_leaves_other_errors_alone():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_reader_gone():
    """As with ``| head``."""
    code = (
        "import sys; sys.modules['glass_mlx.loading'] = sys  # which takes seconds to import\n"
        "from glass_mlx.cli.running import run; run(lambda: [print('x' * 9999, flush=True) for _ in range(9999)])"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
