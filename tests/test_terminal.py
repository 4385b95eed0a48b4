"""Tests of what stands between the chat and the terminal: messages of one line or several, history, word wrap."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from glass_mlx.terminal import messages as module
from glass_mlx.terminal.messages import FENCE, history_file, line_reader, messages
from glass_mlx.terminal.wrap import WordWrap


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


def read(*lines: str) -> list[str]:
    """The messages in lines of input."""
    typed = iter(lines)

    def read_line(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    return list(messages(read_line))


@pytest.mark.parametrize(
    "lines, expected",
    [
        (["a", "", "  ", " b "], ["a", "b"]),
        ([f"{FENCE}a", "", "  b", FENCE, "c"], ["a\n\n  b", "c"]),
        ([FENCE, "a", f"b{FENCE}"], ["a\nb"]),
        ([f"{FENCE}one line{FENCE}"], ["one line"]),
        ([f"say {FENCE} to me"], [f"say {FENCE} to me"]),
        ([FENCE, FENCE, "b"], ["b"]),
        ([FENCE, "a", "and no end"], ["a\nand no end"]),
        ([], []),
    ],
)
def test_messages(lines, expected):
    assert read(*lines) == expected


def test_interrupts_at_the_prompt():
    """They end what is being typed, or, where nobody types, everything."""
    typed, noted = [f"{FENCE}a", KeyboardInterrupt(), "b", EOFError()], []

    def read_line(prompt: str) -> str:
        item = typed.pop(0)
        if isinstance(item, BaseException):
            raise item
        return item

    assert list(messages(read_line, lambda: noted.append(1))) == ["b"] and noted == [1]
    typed[:] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        list(messages(read_line))


@pytest.fixture
def typing(monkeypatch, tmp_path):
    """Types bytes at a terminal, and returns the messages; the history is a file of the test's own."""
    monkeypatch.setattr(module, "user_state_path", lambda name: tmp_path / "state")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)

    def typing(sent: str) -> list[str]:
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            monkeypatch.setattr(module, "create_output", lambda **_: DummyOutput())
            pipe.send_bytes(sent.encode(errors="surrogateescape"))
            return list(messages(line_reader()))

    return typing


END, UP = "\x04", "\x1b[A"


def test_a_paste_is_one_message(typing):
    assert typing(f"\x1b[200~one\ntwo\r\nthree\x1b[201~\rfour\r{END}") == ["one\ntwo\nthree", "four"]


def test_history_between_runs(typing):
    """It comes back, with several lines too, in a file that nobody else can read; bytes that are no text do no harm."""
    assert typing(f"first\r\x1b[200~a\nb\x1b[201~\rcaf\udce9\r{END}") == ["first", "a\nb", "caf\ufffd"]
    assert history_file().stat().st_mode & 0o077 == 0
    assert typing(f"{UP}{UP}\r{END}") == ["a\nb"]


@pytest.mark.parametrize("damage", ["a directory", "unreadable", "no directory"])
def test_without_a_history(typing, damage):
    if damage == "a directory":
        history_file().mkdir(parents=True)
    elif damage == "no directory":
        history_file().parent.write_text("")
    else:
        history_file().parent.mkdir()
        history_file().write_bytes(b"+\xff\xfe\x00\n# \n+" * 9)
    assert typing(f"x\r{END}") == ["x"]


def wrapped(pieces: list[str], width: int, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    shown: list[str] = []
    wrap = WordWrap(shown.append)
    for piece in pieces:
        wrap.add(piece)
    wrap.flush()
    return "".join(shown)


@pytest.mark.parametrize(
    "pieces, expected",
    [
        (["The quick", " bro", "wn fox"], "The quick\nbrown fox"),
        (["exactly te", " x"], "exactly te\nx"),
        (["a" * 25, " b"], "a" * 25 + " b"),
        (["one\ntwo ", "three four"], "one\ntwo three\nfour"),
        (["日本語日本語"], "日本語日本\n語"),
        (["```\nx = 1 + 2 + 3 + 4\n``", "`\nand so it goes"], "```\nx = 1 + 2 + 3 + 4\n```\nand so it\ngoes"),
        ([], ""),
    ],
)
def test_word_wrap(pieces, expected, monkeypatch):
    assert wrapped(pieces, 10, monkeypatch) == expected


@given(st.lists(st.text(alphabet="ab \n字`")), st.integers(2, 9))
def test_word_wrap_changes_spaces_only(pieces, width):
    with pytest.MonkeyPatch.context() as patch:
        shown = wrapped(pieces, width, patch)
    text = "".join(pieces)
    assert shown.replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(" ", "")
    if "```" not in text:
        words_fit = all(len(word.encode("gbk")) <= width for word in text.replace("字", " 字").split())
        assert not words_fit or all(len(line.encode("gbk")) <= width for line in shown.split("\n"))


CODE = """
import importlib, sys
main = importlib.import_module(f"glass_mlx.{sys.argv.pop()}").main
print("ready")
main()
"""


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_interrupted_while_it_starts(command):
    """No traceback, whatever is being imported."""
    started = subprocess.Popen(
        [sys.executable, "-c", CODE, command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with started:
        assert started.stdout.readline()
        time.sleep(0.3)  # it is at importing mlx-lm now
        started.send_signal(signal.SIGINT)
        _, said = started.communicate(timeout=120)
    assert started.returncode in (130, -signal.SIGINT) and said == b""
