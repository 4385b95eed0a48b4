"""Writing files: complete, or left as they were. Reading what anyone may have written: no more than it should be."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import platform
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import GlassError

# The largest headers to read, in bytes: of a model's weights, the limit of the safetensors format; of the files of this
# package, which have some ten tensors for each layer.
_MAX_HEADER, SMALL_HEADER = 100_000_000, 4 << 20


def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is either complete or as it was before.

    A process that is killed meanwhile leaves a temporary file beside it. The next one that writes the same file removes
    it: its name has the machine and the process id, and only those of processes of this machine that have ended go.

    Args:
        path (str or Path): the file; missing directories are created.
        write (callable): writes the content to the temporary path that it is given.

    Raises:
        GlassError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{_prefix(path)}{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        write(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as e:
        raise GlassError(f"Cannot write {path}: {e}") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _prefix(path: Path) -> str:
    """How the names of a file's temporaries begin that this machine makes."""
    return f".{path.name}.{zlib.crc32(platform.node().encode()):08x}-"


def _sweep(path: Path) -> None:
    """Remove the temporaries that killed processes of this machine have left of a file."""
    for left in path.parent.glob(f"{glob.escape(_prefix(path))}*.tmp"):
        process = left.name.removeprefix(_prefix(path)).removesuffix(".tmp")
        if process.isdecimal() and not _runs(int(process)):
            with contextlib.suppress(OSError):
                left.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def read_json(path: Path, limit: int = 16 << 20) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: it is larger than ``limit`` bytes, or no JSON.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    try:
        return json.loads(data)
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e


def check_header(path: Path, limit: int = _MAX_HEADER) -> int:
    """The length in bytes of a safetensors file's header, from the file's first bytes. Parsing a header takes a hundred
    times its memory, so this comes first.

    Raises:
        ValueError: the header is larger than ``limit`` bytes, or than the file.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    if size < 8 or length > size - 8:
        raise ValueError(f"it ends after {size:,} bytes, within its header")
    if length > limit:
        raise ValueError(f"its header has {length:,} bytes; at most {limit:,} are read")
    return length


def check_complete(path: Path) -> None:
    """Check that a safetensors file is as long as its header says.

    Raises:
        ValueError: it is not, or has no such header.
        OSError: the file cannot be read.
    """
    length = check_header(path)
    with path.open("rb") as file:
        file.seek(8)
        header, size = file.read(length), os.fstat(file.fileno()).st_size
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as e:
        raise ValueError("it has no safetensors header") from e
    if size < expected:
        raise ValueError(f"it ends after {size:,} of {expected:,} bytes")
