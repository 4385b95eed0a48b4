"""Measuring a model's global ranks on the engine's thread, between the answers to requests, which go first."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from ..ranks import measure
from ..ranks.amounts import DEFAULT_STABLE_AT, DEFAULT_TOKENS, FIRST_STABLE_AT
from ..ranks.bars import READING
from ..ranks.format import GlobalStatistics
from .catalogue import Source


@dataclass(frozen=True)
class Progress:
    """How far a measurement is.

    Attributes:
        model: whose ranks are measured.
        phase: what is being done; empty before it has begun.
        tokens: how many tokens were read.
        share: how much of the phase is done, from 0 to 1, as far as is known: reading ends when the ranks are stable.
        seconds_left: time until the phase ends; None while it is not known.
        refining: whether the model has ranks already, by fewer tokens.
        stopping: whether it ends at its next step.
    """

    model: str
    phase: str = ""
    tokens: int = 0
    share: float = 0.0
    seconds_left: float | None = None
    refining: bool = False
    stopping: bool = False


class MeasuringStopped(Exception):
    """A measurement was stopped. What was read is kept for the next one."""


class _Interrupted(Exception):
    """Somebody waits for something that it cannot wait with."""


class Measurement:
    """A measurement of one model's ranks, which goes on whenever nobody waits for an answer. The model gets its ranks
    as soon as they are worth it, and better ones in the end.

    Attributes:
        source: the model.
        future: ends with the measurement.
        begun: whether it has run.
    """

    def __init__(self, source: Source):
        self.source = source
        self.future: Future[None] = Future()
        self.begun = False
        self._goals = [FIRST_STABLE_AT, DEFAULT_STABLE_AT]
        self._progress = Progress(source.id)
        self._first: tuple[str, float, int] | None = None  # of this run: the phase, when, and how much was done
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

    def run(self, load: Callable[[], tuple[Any, Any]], give_way: Callable[[], bool]) -> bool:
        """Measure until the end, or until something has to go first. Errors end it too: they are the future's.

        Args:
            load (callable): returns the model, which gets its ranks, and its tokenizer.
            give_way (callable): called between two steps; answers whoever waits for the model, and returns False if
                something else is waited for.

        Returns:
            bool: whether it has ended; if not, the next run goes on with what was read.
        """
        first_run, self.begun, self._first = not self.begun, True, None
        self._give_way = give_way
        try:
            self._check()
            model, tokenizer = load()
            if first_run and model.global_ranks is not None:
                self._goals = []
            while self._goals:
                self._measure(model, tokenizer, self._goals[0])
                self._goals.pop(0)
        except _Interrupted:
            return False
        except BaseException as e:
            self.future.set_exception(e)
        else:
            self.future.set_result(None)
        return True

    def _measure(self, model: Any, tokenizer: Any, stable_at: float) -> None:
        file = measure.build_ranks(model, tokenizer, stable_at=stable_at, on_step=self._on_step)
        GlobalStatistics.read(file).use_in(model)
        self._progress = replace(self._progress, refining=True)

    def _check(self) -> None:
        if self._progress.stopping:
            raise MeasuringStopped

    def _on_step(self, phase: str, done: int, total: int) -> None:
        """Note how far a phase is, and let others go first. The rate is this run's: what an earlier one has read took
        no time now."""
        self._last = now = time.monotonic()
        if self._first is None or self._first[0] != phase:
            self._first = phase, now, done
        _, started, before = self._first
        known = phase != READING or total < DEFAULT_TOKENS  # how many tokens will do shows after the first batches
        left = (total - done) * (now - started) / (done - before) if known and done > before else None
        tokens = done if phase == READING else self._progress.tokens
        share = min(1.0, done / max(1, total))
        self._progress = replace(self._progress, phase=phase, tokens=tokens, share=share, seconds_left=left)
        self._check()
        if not self._give_way():
            raise _Interrupted
