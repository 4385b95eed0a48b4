"""Writing files: complete, or left as they were."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import GlassError


def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is either complete or as it was before.

    Args:
        path (str or Path): the file; missing directories are created.
        write (callable): writes the content to the temporary path that it is given.

    Raises:
        GlassError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as e:
        raise GlassError(f"Cannot write {path}: {e}") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
