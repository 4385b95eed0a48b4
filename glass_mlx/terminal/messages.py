"""What the user types, or a file holds: one message after another."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory
from prompt_toolkit.output import create_output

from ..cli.values import text
from ..group import size

# Begins and ends a message of several lines.
FENCE = '"""'
PROMPT, MORE = ">> ", ".. "


def history_file() -> Path:
    """Where messages are kept between runs."""
    return user_state_path("glass_mlx") / "chat_history"


def messages(read_line: Callable[[str], str], interrupted: Callable[[], None] | None = None) -> Iterator[str]:
    """Messages until the input ends. A message is a line, or what stands between two ``\"\"\"``.

    Args:
        read_line (callable): reads a line, given the prompt to show; raises EOFError at the end.
        interrupted (callable, optional): called on Ctrl-C, after which the next message is read. Default: it is passed
            on.
    """
    while True:
        try:
            message = _message(read_line)
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted is None:
                raise
            interrupted()
            continue
        if message.strip():
            yield message.strip()


def _message(read_line: Callable[[str], str]) -> str:
    first = read_line(PROMPT)
    if not first.lstrip().startswith(FENCE):
        return first
    message = first.lstrip().removeprefix(FENCE)
    while FENCE not in message:
        try:
            message += "\n" + read_line(MORE)
        except EOFError:
            break
    return message.partition(FENCE)[0]


def line_reader() -> Callable[[str], str]:
    """Reads lines: on a terminal with editing, with what was typed in earlier runs, and with what is pasted as one
    line, however many it has; otherwise from standard input, without a prompt. ``mlx.launch`` passes on what is typed
    to every process, over terminals or not."""
    if not sys.stdin.isatty() or size() > 1:
        return _read_piped
    # On the terminal even where the answers go into a file.
    session: PromptSession[str] = PromptSession(history=_History(), output=create_output(always_prefer_tty=True))
    return lambda prompt: text(session.prompt(prompt))


class _History(FileHistory):
    """Of all runs, in a file that only its owner can read. Where it cannot be written, the chat goes on without."""

    def __init__(self):
        super().__init__(str(history_file()))

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            history_file().parent.mkdir(parents=True, exist_ok=True)
            history_file().touch(mode=0o600)
            super().store_string(text(string))

    def load_history_strings(self) -> list[str]:
        with contextlib.suppress(OSError):
            return list(super().load_history_strings())
        return []


def _read_piped(prompt: str) -> str:
    if size() > 1:
        print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")
