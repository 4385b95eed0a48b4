"""Processes of Python's in which commands and programs run, as a user starts them.

What commands need takes seconds to import. So one process imports it, once for all tests, and others are forked from
it: it evaluates nothing, and MLX has no threads before it does. A process that was forked runs its program and ends as
one that was started. Only what is imported comes sooner: a test that is about that, or about the very start, starts one
itself, and so does one test of each command.

On a Mac nothing is forked: what Metal has opened does not survive it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import itertools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import mlx.core as mx

ROOT = Path(__file__).parents[1]
PATIENCE = 300  # seconds, for machines that are very busy
_CAN_FORK = sys.platform == "linux"
CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()  # only Linux can tell
_turns = itertools.count()
# What is imported before. No command, as Python warns if the module that it is to run is imported already; and nothing
# of ``glass_mlx.cli``, which changes how a process ends.
_NEEDED = """glass_mlx.serving.server glass_mlx.serving.operations glass_mlx.sharded_loading mlx_lm.models.llama
    mlx_lm.models.qwen3_moe transformers.models.llama transformers.video_utils llguidance.mlx""".split()


def environment(*paths: Path, **variables: str) -> dict[str, str]:
    """The tests' environment with these variables, and with the package and these directories to import from."""
    found = os.pathsep.join(filter(None, [str(ROOT), *map(str, paths), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": found} | variables


def keep_to_one_core(number: int, pid: int = 0) -> None:
    """Have a process, or this one, use one core only.

    MLX's thread and Python's hand each other many small pieces of work: where neither interrupts the other, nor wakes
    another core, that takes a quarter less processor time.
    """
    with contextlib.suppress(OSError):  # not every container lets a process choose
        os.sched_setaffinity(pid, {sorted(CORES)[number % len(CORES)]})
        os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0))


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """What this thread starts may run on any core."""
    own = os.sched_getaffinity(0) if CORES else CORES
    if own == CORES:
        yield
        return
    os.sched_setaffinity(0, CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


class Forked:
    """A forked process, as :class:`subprocess.Popen` has it."""

    def __init__(self, request: dict[str, Any], files: list[int]):
        self._ended, lives = os.pipe()  # it holds the other end as long as it lives
        try:
            self.pid: int = _ask(request, [*files, lives])
            if os.sched_getaffinity(0) != CORES:  # tests keep to one core (``conftest.py``)
                keep_to_one_core(next(_turns), self.pid)  # each to another one: some wait for each other
        finally:
            os.close(lives)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode if self._has_ended(0) else None

    def wait(self, timeout: float | None = None) -> int:
        if not self._has_ended(timeout):
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _has_ended(self, timeout: float | None) -> bool:
        if self.returncode is None and select.select([self._ended], [], [], timeout)[0]:
            self.returncode = os.waitstatus_to_exitcode(_ask({"wait": self.pid}))
            os.close(self._ended)
        return self.returncode is not None


def start(
    args: Iterable[object],
    cwd: Path,
    env: dict[str, str],
    files: tuple[IO, IO, IO],
    *,
    bare: bool = False,
    new: bool = False,
) -> subprocess.Popen | Forked:
    """Start ``python *args``.

    Args:
        args: as Python's, with ``-c`` or ``-m`` or a file at first.
        cwd (Path): where it runs.
        env (dict): its whole environment.
        files: standard input, output and error.
        bare (bool): it may be forked before anything is imported, as it needs little.
        new (bool): do not fork it.
    """
    given = list(map(str, args))
    if _CAN_FORK and not new:
        request = {"args": given, "cwd": str(cwd), "env": env, "bare": bare}
        return Forked(request, [file.fileno() for file in files])
    streams = dict(zip(("stdin", "stdout", "stderr"), files))
    # a process that was started in the background ignores Ctrl-C, and so do its children
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with all_cores():
        return subprocess.Popen([sys.executable, *given], cwd=cwd, env=env, preexec_fn=heeds, **streams)


@dataclass
class Ended:
    """How a process ended; without a code, what it has written by now."""

    code: int | None
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The errors that it told, without what MLX itself says."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@dataclass
class Running:
    """A process, and what it has written by now."""

    process: subprocess.Popen | Forked
    streams: list[IO]

    @property
    def so_far(self) -> Ended:
        return Ended(self.process.poll(), *(Path(stream.name).read_text() for stream in self.streams))

    def until(self, condition: Callable[[Ended], object]) -> Ended:
        """Wait until something is so, or it has ended."""
        deadline = time.monotonic() + PATIENCE
        while not condition(so_far := self.so_far) and so_far.code is None:
            assert time.monotonic() < deadline, so_far
            time.sleep(0.05)
        return so_far

    def ended(self) -> Ended:
        """Wait for it."""
        self.process.wait(PATIENCE)
        return self.so_far


@contextlib.contextmanager
def running(
    directory: Path, args: Iterable[object], env: dict[str, str], name: str = "", **how: bool
) -> Iterator[Running]:
    """Run ``python *args`` in a directory, as ``start`` does, and kill it in the end.

    What it writes is in the files "out" and "err" there, with this addition to their names. Its standard input has
    nothing and does not end, as under ``mlx.launch``.
    """
    with contextlib.ExitStack() as stack:
        never, other_end = os.pipe()
        stack.callback(os.close, other_end)
        stdin = stack.enter_context(os.fdopen(never))
        streams = [stack.enter_context((directory / f"{stream}{name}").open("w")) for stream in ("out", "err")]
        process = start(args, directory, env, (stdin, *streams), **how)
        try:
            yield Running(process, streams)
        finally:
            process.kill()
            process.wait()


def run(
    args: Iterable[object], cwd: Path, env: dict[str, str], stdin: str = "", timeout: float | None = None
) -> subprocess.CompletedProcess:
    """Run ``python *args`` to its end, as :func:`subprocess.run` does with text."""
    with TemporaryFile("w+") as given, TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        given.write(stdin)
        given.seek(0)
        process = start(args, cwd, env, (given, out, err))
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
            process.wait()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(args, code, out.read(), err.read())


@cache
def _server() -> socket.socket:
    """The connection to the process that forks."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno())]
        env = environment(Path(__file__).parent)
        nothing = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        with all_cores():
            process = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()], **nothing)

    def end():
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _ask(request: dict[str, Any], files: list[int] = ()) -> int:
    socket.send_fds(_server(), [json.dumps(request).encode()], files)
    answer = _server().recv(100)
    if not answer:
        raise RuntimeError("the process that others are forked from has ended; its output may say why")
    return int(answer)


# ---- The process that forks, and those that it becomes


def _forked(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Fork a process for each request; returns the request and its files there, and None in the end here."""
    while True:
        data, files, _, _ = socket.recv_fds(connection, 1 << 20, 4)
        if not data:
            return None
        request = json.loads(data)
        if "wait" in request:
            answer = os.waitpid(request["wait"], 0)[1]
        else:
            if not request["bare"]:
                _import_what_is_needed()
            answer = os.fork()
            if answer == 0:
                connection.close()
                return request, files
            for file in files:
                os.close(file)
        connection.send(str(answer).encode())


@cache
def _import_what_is_needed() -> None:
    for name in _NEEDED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def _run(request: dict[str, Any], files: list[int]) -> None:
    """Run a program in this process as Python does in one of its own."""
    for i, file in enumerate(files[:3]):
        os.dup2(file, i)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    own = os.environ["PYTHONPATH"].split(os.pathsep)
    installed = [path for path in sys.path[1:] if path not in own]
    os.environ.clear()
    os.environ.update(request["env"])
    if constants := sys.modules.get("huggingface_hub.constants"):
        importlib.reload(constants)  # they come from the environment
    mx.random.seed(time.time_ns())  # it had one, by the time when it was imported
    kind, *rest = request["args"]
    first = {"-c": "", "-m": os.getcwd()}.get(kind, os.path.dirname(os.path.abspath(kind)))
    sys.path[:] = [first, *os.environ.get("PYTHONPATH", "").split(os.pathsep), *installed]
    if kind == "-m":
        sys.argv[:] = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv[:] = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv[:] = request["args"]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests are who ends it
    if forked := _forked(socket.socket(fileno=int(sys.argv[1]))):
        _run(*forked)
