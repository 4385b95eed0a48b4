"""The log file, in the platform's directory for logs, with rotation."""

from __future__ import annotations

import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path

from platformdirs import user_log_path

LOGGERS = ("glass_mlx", "uvicorn")
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


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
        handler = RotatingFileHandler(path, maxBytes=1_000_000, backupCount=3, encoding="utf-8")
    except OSError as e:
        logging.getLogger("glass_mlx").warning("no log file: %s cannot be written (%s)", path, e.strerror)
        return None
    path.chmod(0o600)
    handler.setFormatter(logging.Formatter(_FORMAT))
    for logger in map(logging.getLogger, LOGGERS):
        for old in [h for h in logger.handlers if isinstance(h, RotatingFileHandler)]:
            logger.removeHandler(old)
            old.close()
        logger.addHandler(handler)
        logger.setLevel(level if logger.name == "glass_mlx" or level == "DEBUG" else "WARNING")
    return path
