"""Measuring a model's global ranks on the engine's thread, in turns with requests, which go first."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from ..ranks import measure
from ..ranks.format import GlobalStatistics
from .catalogue import Source


@dataclass(frozen=True)
class Progress:
    """How far a measurement is.

    Attributes:
        model: whose ranks are measured.
        tokens, most_tokens: how many tokens were read, and how many will be at most: it ends when the ranks are stable.
        seconds_left: time until all would be read; None while it is not known.
        stopping: whether it ends at its next step.
    """

    model: str
    tokens: int = 0
    most_tokens: int = measure.DEFAULT_TOKENS
    seconds_left: float | None = None
    stopping: bool = False

    @property
    def share(self) -> float:
        """How much of the most tokens was read, from 0 to 1."""
        return min(1.0, self.tokens / self.most_tokens)


class MeasuringStopped(Exception):
    """A measurement was stopped. What was measured is kept for the next one."""


class _Interrupted(Exception):
    """Somebody waits for the engine."""


class Measurement:
    """A measurement of one model's ranks, which goes on whenever nobody waits for an answer.

    Attributes:
        source: the model.
        future: ends with the measurement.
        begun: whether it has run.
    """

    def __init__(self, source: Source):
        self.source = source
        self.future: Future[None] = Future()
        self.begun = False
        self._progress = Progress(source.id)
        self._first: tuple[float, int] | None = None  # when in this run, and how many tokens were read by then
        self._last = 0.0

    @property
    def progress(self) -> Progress:
        """How far it is now."""
        left = self._progress.seconds_left
        since = time.monotonic() - self._last
        return self._progress if left is None else replace(self._progress, seconds_left=max(0.0, left - since))

    def stop(self) -> None:
        """End the measurement at its next step."""
        self._progress = replace(self._progress, stopping=True)

    def may_go_on(self, loaded: Source | None) -> bool:
        """Whether it may go on where a model is loaded: not while another one is in use, once it has begun."""
        ready = not self.begun or self._progress.stopping
        return ready or loaded is None or loaded.key == self.source.key

    def run(self, load: Callable[[], tuple[Any, Any]], is_awaited: Callable[[], bool]) -> bool:
        """Measure until the end, or until somebody waits. Errors end it too: they are the future's.

        Args:
            load (callable): returns the model, which gets its ranks in the end, and its tokenizer.
            is_awaited (callable): asked between two steps whether somebody waits for the engine.

        Returns:
            bool: whether it has ended; if not, the next run goes on from there.
        """
        self.begun, self._first = True, None
        try:
            self._check()
            model, tokenizer = load()
            if model.global_ranks is None:
                self._measure(model, tokenizer, is_awaited)
        except _Interrupted:
            return False
        except BaseException as e:
            self.future.set_exception(e)
        else:
            self.future.set_result(None)
        return True

    def _measure(self, model: Any, tokenizer: Any, is_awaited: Callable[[], bool]) -> None:
        source = measure.null_prompt(model, tokenizer)

        def batch(number: int) -> list[list[int]]:
            self._check()
            if is_awaited():
                raise _Interrupted
            rows = source.batch(number)
            self._check()
            return rows

        file = measure.build_ranks(model, tokenizer, source=replace(source, batch=batch), on_tokens=self._on_tokens)
        GlobalStatistics.read(file).use_in(model)

    def _check(self) -> None:
        if self._progress.stopping:
            raise MeasuringStopped

    def _on_tokens(self, tokens: int) -> None:
        """Note how many tokens were read. The rate is this run's: what an earlier one has read took no time now."""
        self._last = now = time.monotonic()
        self._first = self._first or (now, tokens)
        most, left = self._progress.most_tokens, self._progress.seconds_left
        started, before = self._first
        if tokens > before:
            left = (most - tokens) * (now - started) / (tokens - before)
        self._progress = replace(self._progress, tokens=min(tokens, most), seconds_left=left)
