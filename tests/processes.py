"""Processes of Python's in which commands and programs run, as a user starts them.

What commands need takes seconds to import. So one process imports it, once for all tests, and others are forked from
it: it evaluates nothing, and MLX has no threads before it does. A process that was forked runs its program and ends as
one that was started. Only what is imported comes sooner: a test that is about that, or about the very start, starts one
itself. There are always such tests of each command, too.

On a Mac nothing is forked: what Metal has opened does not survive it.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
_CAN_FORK = sys.platform == "linux"
# No command is among them: Python warns if the module that it is to run was imported before.
_NEEDED = """glass_mlx.serving.server glass_mlx.serving.operations glass_mlx.sharded_loading glass_mlx.terminal.loading
    mlx_lm.models.llama mlx_lm.models.qwen3_moe transformers.models.llama transformers.video_utils""".split()


def environment(*paths: Path, **variables: str) -> dict[str, str]:
    """The tests' environment with these variables, and with the package and these directories to import from."""
    found = os.pathsep.join(filter(None, [str(ROOT), *map(str, paths), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": found} | variables


class Forked:
    """A forked process, as :class:`subprocess.Popen` has it."""

    def __init__(self, args: list[str], cwd: Path, env: dict[str, str], files: list[int]):
        self._ended, lives = os.pipe()  # it holds the other end as long as it lives
        try:
            self.pid: int = _ask({"args": args, "cwd": str(cwd), "env": env}, [*files, lives])
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
    args: list[object], cwd: Path, env: dict[str, str], stdin: IO, stdout: IO, stderr: IO
) -> subprocess.Popen | Forked:
    """Start ``python *args`` with these files; its environment is exactly ``env``."""
    given, files = list(map(str, args)), (stdin, stdout, stderr)
    if _CAN_FORK:
        return Forked(given, cwd, env, [file.fileno() for file in files])
    return subprocess.Popen([sys.executable, *given], cwd=cwd, env=env, stdin=stdin, stdout=stdout, stderr=stderr)


@cache
def _server() -> socket.socket:
    """The connection to the process that forks."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno())]
        env = environment(Path(__file__).parent)
        process = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)

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
            answer = os.fork()
            if answer == 0:
                connection.close()
                return request, files
            for file in files:
                os.close(file)
        connection.send(str(answer).encode())


def _run(request: dict[str, Any], files: list[int]) -> None:
    """Run a program in this process as Python does in one of its own."""
    import mlx.core as mx
    from huggingface_hub import constants

    for i, file in enumerate(files[:3]):
        os.dup2(file, i)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    own = os.environ["PYTHONPATH"].split(os.pathsep)
    installed = [path for path in sys.path[1:] if path not in own]
    os.environ.clear()
    os.environ.update(request["env"])
    importlib.reload(constants)  # what it took from the environment
    mx.random.seed(time.time_ns())  # it drew one when it was imported
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
    for name in _NEEDED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    if forked := _forked(socket.socket(fileno=int(sys.argv[1]))):
        _run(*forked)
