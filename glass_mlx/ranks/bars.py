"""Progress bars of measuring, one for each of its phases."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tqdm import tqdm

READING = "reading"


class Bars:
    """Shows how far measuring is. Rates and times left are of this run: what an earlier one has kept is in the bar, but
    not in its rate. A context manager, which closes the last bar.

    Attributes:
        kept (int): tokens that an interrupted run would keep.
    """

    def __init__(self, stable_at: float | None, on_step: Callable[[str, int, int], None]):
        """
        Args:
            stable_at (float, optional): reading ends when two halves agree that much.
            on_step (callable): told the phase, how much of it is done and of how much, whenever that changes.
        """
        self._goal = "" if stable_at is None else f" of {stable_at:.0%}"
        self._on_step, self._name, self._done, self._total, self.kept = on_step, "", 0, 0, 0
        self._bar: tqdm | None = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def phase(self, name: str, done: int, total: int) -> None:
        """So much of a phase is done. The first call, at its start, says what there was before this run."""
        if name != self._name:
            self.__exit__()
            unit = "tok" if name == READING else "it"
            options = {"initial": done, "unit": unit, "smoothing": 0, "file": sys.stderr, "disable": None}
            self._bar = tqdm(total=total, desc=name, dynamic_ncols=True, **options)
            self._name, self._done, self._total, self.kept = name, done, total, done if name == READING else self.kept
        self._bar.total = self._total = total
        self._move(min(done, total))

    def sampled(self, tokens: int) -> None:
        """The model has generated so many tokens more; they are read when their batch is complete."""
        if self._name == READING:
            self._move(min(self._done + tokens, self._total))

    def read(self, done: int, stability: dict[str, float]) -> None:
        """So many tokens have been read in all, and are kept."""
        self.kept = done
        self._move(min(done, self._total))
        self._bar.set_postfix_str(f"stable {stability['efficiency']:.1%}{self._goal}")

    def _move(self, done: int) -> None:
        self._bar.update(done - self._done)
        self._done = done
        self._on_step(self._name, done, self._total)
