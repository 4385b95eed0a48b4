"""Tests of the log file."""

from __future__ import annotations

import logging
from logging.handlers import RotatingFileHandler

import pytest

from glass_mlx.serving.logs import LOGGERS, log_dir, log_to_file


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    before = {name: (list(logging.getLogger(name).handlers), logging.getLogger(name).level) for name in LOGGERS}
    yield
    for name, (handlers, level) in before.items():
        logger = logging.getLogger(name)
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers, logger.level = handlers, level
        logger.manager._clear_cache()


def test_the_platforms_directory():
    path = log_to_file()
    assert path == log_dir() / "server.log"
    logging.getLogger("glass_mlx").info("hello")
    assert "INFO glass_mlx: hello" in path.read_text()
    assert path.stat().st_mode & 0o077 == 0  # prompts may be in it


def test_once_is_enough(tmp_path):
    path = [log_to_file(directory=tmp_path / name) for name in "ab"][1]
    logging.getLogger("glass_mlx").info("hello")
    assert path.read_text().count("hello") == 1
    assert "hello" not in (tmp_path / "a" / "server.log").read_text()


def test_rotation(tmp_path):
    path = log_to_file(directory=tmp_path)
    for _ in range(45):
        logging.getLogger("glass_mlx").info("x" * 100_000)
    assert sorted(p.name for p in tmp_path.glob("server*")) == ["server.log", *(f"server.log.{i}" for i in (1, 2, 3))]
    assert path.stat().st_size <= 1_000_000
    assert all(file.stat().st_mode & 0o077 == 0 for file in tmp_path.iterdir())  # the files that rotation opens too


def test_control_characters_stay_out(tmp_path):
    path = log_to_file(directory=tmp_path)
    logging.getLogger("glass_mlx").info("model %s", "a\n2026-01-01 INFO glass_mlx: forged\x1b[2J")
    try:
        raise ValueError("b\x1b[31m")
    except ValueError:
        logging.getLogger("glass_mlx").exception("failed")
    text = path.read_text()
    assert "\x1b" not in text and "ValueError: b" in text
    assert [line for line in text.splitlines() if line.startswith("2026-01-01 INFO")] == []


def test_a_full_disk_is_quiet(tmp_path, monkeypatch, capsys):
    log_to_file(directory=tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    [handler] = [h for h in logging.getLogger("glass_mlx").handlers if isinstance(h, RotatingFileHandler)]
    monkeypatch.setattr(handler, "shouldRollover", full)
    logging.getLogger("glass_mlx").info("hello")
    assert capsys.readouterr().err == ""


def test_a_disk_that_fills_up(python, tmp_path):
    """The process goes on, says nothing of it to the end, and writes again when there is room."""
    code = """
import logging, resource, sys
from pathlib import Path
from glass_mlx.serving.logs import log_to_file
path = log_to_file(directory=Path(sys.argv[1]))
log = logging.getLogger("glass_mlx")
full, least = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, least))
for _ in range(500):
    log.info("x" * 1000)
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
assert path.stat().st_size <= 20_000
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (full, least))
    log.info("there is room")
print("done")
"""
    for room in ((), ("room",)):
        done = python("-c", code, tmp_path / "-".join(("log", *room)), *room)
        assert (done.code, done.out, done.err) == (0, "done\n", "")
    assert "there is room" in (tmp_path / "log-room" / "server.log").read_text()


def test_a_directory_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert log_to_file(directory=tmp_path / "file") is None
    assert "no log file" in caplog.text
