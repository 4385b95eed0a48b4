"""Processes that share a model, as ``mlx.launch`` starts them: MLX's ring on free ports of this machine."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from processes import PATIENCE, Ended, Running, environment, running

# What MLX says where somebody else took a port meanwhile.
_TAKEN = ("Couldn't bind", "Can't bind", "Couldn't listen", "Address already in use")


def launch(directory: Path, *args: object, **options: Any) -> list[Ended]:
    """Run ``python *args`` in as many processes, which find each other; returns how each has ended, by rank."""
    with launched(directory, *args, until=lambda first: False, **options) as processes:
        return [process.ended() for process in processes]


@contextlib.contextmanager
def launched(
    directory: Path, *args: object, until: Callable[[Ended], object], count: int = 2, bare: bool = False, **env: str
) -> Iterator[list[Running]]:
    """The same while they run. They have started when ``until`` says so of the first one, or one has ended. They are
    ``bare`` as :func:`processes.running` says."""
    for attempt in range(5):
        with _started(directory, args, count, bare, env) as processes:
            deadline = time.monotonic() + PATIENCE
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
        ranks = [env | {"MLX_RANK": str(rank)} for rank in range(count)]
        yield [stack.enter_context(running(directory, args, own, f"-{i}", bare=bare)) for i, own in enumerate(ranks)]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
