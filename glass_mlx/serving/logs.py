"""The log file, in the platform's directory for logs, with rotation."""

from __future__ import annotations

import logging
import os
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from platformdirs import user_log_path

from ..errors import printable

LOGGERS = ("glass_mlx", "uvicorn")
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class OneLineFormatter(logging.Formatter):
    """A record's message on one line. Text out of a request or a file must not pass for another record, and terminals
    obey control characters."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(printable(line) for line in super().formatException(ei).splitlines())


class _PrivateFile(RotatingFileHandler):
    """A rotated log that only its owner can read, and that is silent where the disk is full."""

    def _open(self) -> Any:
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=_private)

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def log_dir() -> Path:
    """The directory of the logs: ``~/Library/Logs/glass_mlx`` on a Mac."""
    return user_log_path("glass_mlx")


def log_to_file(name: str = "server.log", directory: Path | None = None, level: str = "INFO") -> Path | None:
    """Write this process's log to a file of at most 1 MB, keeping three older ones.

    Returns:
        Path | None: the file; None if it cannot be written, in which case there is no log.
    """
    path = (directory or log_dir()) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _PrivateFile(path, maxBytes=1_000_000, backupCount=3, encoding="utf-8")
    except OSError as e:
        logging.getLogger("glass_mlx").warning("no log file: %s cannot be written (%s)", path, e.strerror)
        return None
    path.chmod(0o600)  # it may have been there already
    handler.setFormatter(OneLineFormatter(_FORMAT))
    for logger in map(logging.getLogger, LOGGERS):
        for old in [h for h in logger.handlers if isinstance(h, RotatingFileHandler)]:
            logger.removeHandler(old)
            old.close()
        logger.addHandler(handler)
        logger.setLevel(level if logger.name == "glass_mlx" or level == "DEBUG" else "WARNING")
    return path
