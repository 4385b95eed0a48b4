"""Processes that share a model, as ``mlx.launch`` starts them: MLX's ring on free ports of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT

# What MLX says where somebody else took a port meanwhile.
_TAKEN = ("Couldn't bind", "Can't bind", "Couldn't listen", "Address already in use")
_PATIENCE = 300  # seconds, for machines that are very busy


@dataclass
class Ended:
    """How a process of the group ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The errors that it told, without what MLX itself says."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def launch(directory: Path, *args: object, count: int = 2, **env: str) -> list[Ended]:
    """Run ``python *args`` in as many processes, which find each other; returns how each has ended, by rank."""
    for _ in range(5):
        ended = _launch(directory, list(map(str, args)), count, env)
        if not any(sign in process.err for process in ended for sign in _TAKEN):
            break
    return ended


def _launch(directory: Path, args: list[str], count: int, env: dict[str, str]) -> list[Ended]:
    hosts = directory / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]))
    paths = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": paths, "MLX_HOSTFILE": str(hosts)} | env
    with contextlib.ExitStack() as stack:
        started = []
        for rank in range(count):
            streams = {name: stack.enter_context((directory / f"{name}-{rank}").open("w+")) for name in ("out", "err")}
            process = subprocess.Popen(
                [sys.executable, *args],
                cwd=directory,
                env=env | {"MLX_RANK": str(rank)},
                stdin=subprocess.PIPE,  # it never ends, as under mlx.launch
                stdout=streams["out"],
                stderr=streams["err"],
            )
            stack.callback(_end, process)
            started.append((process, streams))
        for process, _ in started:
            process.wait(_PATIENCE)
        return [Ended(process.returncode, *map(_read, streams.values())) for process, streams in started]


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdin.close()


def _read(stream) -> str:
    stream.seek(0)
    return stream.read()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
