"""One app at a time: a second start asks the first to show itself."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from .settings import settings_path


class Instance:
    """The claim to be the only app. The system drops it when the process ends, however that happens.

    Attributes:
        is_first: whether no other app runs; also where that cannot be told, on a full disk, say.
    """

    def __init__(self, path: Path | None = None):
        """
        Args:
            path (Path, optional): the file to hold. Default: one beside the user's settings.
        """
        self.path = path or settings_path().with_suffix(".lock")
        self._file = self._open()
        self.is_first = self._hold()
        self._seen = self._touched()

    def call_first(self) -> None:
        """Ask the first app to show itself."""
        os.utime(self.path)

    def is_called(self) -> bool:
        """Whether another start has asked for this one since the last look."""
        seen, self._seen = self._seen, self._touched()
        return self._seen != seen

    def close(self) -> None:
        """Give up the claim."""
        if self._file is not None:
            self._file.close()

    def _open(self) -> IO | None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self.path.open("a")
        except OSError:
            return None

    def _hold(self) -> bool:
        if self._file is None:
            return True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            return not isinstance(e, BlockingIOError)  # some file systems have no locks
        return True

    def _touched(self) -> int:
        try:
            return os.stat(self.path).st_mtime_ns
        except OSError:
            return 0
