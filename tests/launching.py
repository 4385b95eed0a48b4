"""Processes that share a model, as ``mlx.launch`` starts them: MLX's ring on free ports of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from processes import Forked, environment, start

# What MLX says where somebody else took a port meanwhile.
_TAKEN = ("Couldn't bind", "Can't bind", "Couldn't listen", "Address already in use")
_PATIENCE = 300  # seconds, for machines that are very busy


@dataclass
class Ended:
    """How a process of the group ended; without a code, what it has written by now."""

    code: int | None
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The errors that it told, without what MLX itself says."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@dataclass
class Running:
    """A process of the group, and what it has written by now."""

    process: subprocess.Popen | Forked
    streams: list[IO[str]]

    @property
    def so_far(self) -> Ended:
        return Ended(self.process.poll(), *map(_read, self.streams))

    def ended(self) -> Ended:
        """Wait for it."""
        self.process.wait(_PATIENCE)
        return self.so_far


def launch(directory: Path, *args: object, **options: Any) -> list[Ended]:
    """Run ``python *args`` in as many processes, which find each other; returns how each has ended, by rank."""
    with launched(directory, *args, until=lambda first: False, **options) as processes:
        return [process.ended() for process in processes]


@contextlib.contextmanager
def launched(
    directory: Path, *args: object, until: Callable[[Ended], object], count: int = 2, bare: bool = False, **env: str
) -> Iterator[list[Running]]:
    """The same while they run. They have started when ``until`` says so of the first one, or one has ended. They are
    ``bare`` as :func:`processes.start` says."""
    for attempt in range(5):
        with _started(directory, args, count, bare, env) as processes:
            deadline = time.monotonic() + _PATIENCE
            while not until(processes[0].so_far) and all(process.so_far.code is None for process in processes):
                assert time.monotonic() < deadline, [process.so_far for process in processes]
                time.sleep(0.05)
            taken = any(sign in process.so_far.err for process in processes for sign in _TAKEN)
            if not taken or attempt == 4:
                yield processes
                return


@contextlib.contextmanager
def _started(
    directory: Path, args: tuple[object, ...], count: int, bare: bool, env: dict[str, str]
) -> Iterator[list[Running]]:
    hosts = directory / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]))
    env = environment(Path(__file__).parent, MLX_HOSTFILE=str(hosts), **env)
    with contextlib.ExitStack() as stack:
        never, open_end = os.pipe()  # standard input never ends, as under mlx.launch
        stack.callback(os.close, open_end)
        stdin = stack.enter_context(os.fdopen(never))
        started = []
        for rank in range(count):
            streams = [stack.enter_context((directory / f"{name}-{rank}").open("w+")) for name in ("out", "err")]
            process = start(args, directory, env | {"MLX_RANK": str(rank)}, (stdin, *streams), bare)
            stack.callback(_end, process)
            started.append(Running(process, streams))
        yield started


def _end(process: subprocess.Popen | Forked) -> None:
    process.kill()
    process.wait()


def _read(stream: IO[str]) -> str:
    return Path(stream.name).read_text()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
