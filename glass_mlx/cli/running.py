"""A command's work: its errors are one line, and Ctrl-C ends it without a word."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from ..errors import GlassError, printable
from ..group import perform
from ..serving.logs import OneLineFormatter


@contextlib.contextmanager
def _quiet_interrupts() -> Iterator[None]:
    """Ctrl-C ends the process without a word, whatever it is at: code that is being imported may not pass it on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def log_to_stderr() -> None:
    """Log warnings to standard error, a line each, unless logging is set up already."""
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(OneLineFormatter("[%(levelname)s] %(message)s"))
    logging.basicConfig(handlers=[to_stderr])


def run(command: Callable[[], None], verbose: bool = False) -> None:
    """Run a command line's work: a GlassError, or an error of MLX's backend, ends it with one line and exit code 1."""
    log_to_stderr()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show, or has not sent as text, is replaced
            stream.reconfigure(errors="replace")
    with _quiet_interrupts():
        from .. import loading  # noqa: F401  and with it mlx-lm, which takes seconds
    try:
        perform(command)
    except (GlassError, RuntimeError) as e:
        if verbose:
            raise
        if isinstance(e, GlassError):
            sys.exit(f"error: {e}")
        reason = printable((str(e).splitlines() or [type(e).__name__])[0])  # what MLX's backend cannot do
        sys.exit(f"error: MLX: {reason}. See what works here with: python -m glass_mlx doctor")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
