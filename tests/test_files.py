"""Tests of writing files completely or not at all, and of reading no more of a file than it should have."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import save

from glass_mlx import GlassError, files
from glass_mlx.files import check_complete, check_header, read_json, write_atomically

# Writes half of the file, says so, and waits to be killed.
SLOW = """
import sys, time
from pathlib import Path
from glass_mlx.files import write_atomically
def write(path):
    path.write_text("half")
    print("writing", flush=True)
    time.sleep(600)
write_atomically(Path(sys.argv[1]), write)
"""


@pytest.fixture
def slow():
    """Start processes that write a file for ever; killed in the end."""
    started = []

    def slow(path) -> subprocess.Popen:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen([sys.executable, "-c", SLOW, path], env=env, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline().strip() == "writing"
        return started[-1]

    yield slow
    for process in started:
        process.kill()
        process.communicate()


def text(content: str):
    return lambda path: path.write_text(content)


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_killed_in_the_middle(slow, tmp_path):
    path = tmp_path / "[a]*.txt"
    path.write_text("before")
    for _ in range(2):
        process = slow(path)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert path.read_text() == "before" and len(names(tmp_path)) == 2  # the second has swept the first's
    write_atomically(path, text("after"))
    assert path.read_text() == "after" and names(tmp_path) == [path.name]


def test_temporaries_of_running_processes_stay(slow, tmp_path):
    path = tmp_path / "a.txt"
    slow(path)
    write_atomically(path, text("mine"))
    assert path.read_text() == "mine" and len(names(tmp_path)) == 2


def test_only_what_is_ours_is_swept(tmp_path, monkeypatch):
    """Of this file and this machine."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path = tmp_path / "a"
    prefix = files._prefix(path)
    monkeypatch.setattr(files.platform, "node", lambda: "elsewhere")
    other = files._prefix(path)
    monkeypatch.undo()
    stay = [f"{other}{dead.pid}.tmp", f".ab{prefix[2:]}{dead.pid}.tmp", f"{prefix}x.tmp", f"{prefix}.tmp", "a.tmp"]
    for name in (*stay, f"{prefix}{dead.pid}.tmp", f"{prefix}{2**70}.tmp"):
        (tmp_path / name).touch()
    write_atomically(path, text("a"))
    assert names(tmp_path) == sorted([*stay, f"{prefix}{2**70}.tmp", "a"])


def test_a_write_that_fails(tmp_path):
    (tmp_path / "a").write_text("before")

    def fail(path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(GlassError, match="Cannot write .*No space left"):
        write_atomically(tmp_path / "a", fail)
    assert (tmp_path / "a").read_text() == "before" and names(tmp_path) == ["a"]


@pytest.mark.parametrize(("content", "told"), [("{", "Expecting"), ("[" * 10**5, "deep"), (" " * 101, "more than 100")])
def test_json(tmp_path, content, told):
    (tmp_path / "a").write_text(content)
    with pytest.raises(ValueError, match=told):
        read_json(tmp_path / "a", 100 if told.startswith("more") else 2**20)
    (tmp_path / "a").write_text("[1]")
    assert read_json(tmp_path / "a", 3) == [1]


def header(length: int, data: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + data


@pytest.mark.parametrize(
    ("content", "told"),
    [
        *((b"", "ends after 0 bytes"), (b"1234567", "ends after 7 bytes"), (header(9, b"{}"), "within its header")),
        *((header(2**63, b"{}"), "within its header"), (header(2, b"[]"), "no safetensors header")),
        *((header(2, b"{x"), "no safetensors header"), (header(8, b'{"a": 3}'), "no safetensors header")),
        (header(200_000, b"[" * 200_000), "no safetensors header"),
        (save({"x": np.zeros(100)})[:-1], "of"),
    ],
)
def test_tensors(tmp_path, content, told):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=told):
        check_complete(tmp_path / "a")
    (tmp_path / "a").write_bytes(save({"x": np.zeros(100)}, metadata={"a": json.dumps([])}))
    check_complete(tmp_path / "a")
    with pytest.raises(ValueError, match="at most 20 are read"):
        check_header(tmp_path / "a", 20)
