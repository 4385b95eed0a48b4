"""How neurons are chosen: the settings of a model and of each conversation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..core.importance import SIGNALS
from ..errors import GlassError

ALLOCATIONS = ("measured", "uniform")


@dataclass(frozen=True)
class GlassConfig:
    """How neurons are chosen.

    Attributes:
        density: share of the FFN neurons to keep, in (0, 1]; 1 decodes with the model's own weights.
        global_weight: ``"auto"``: by what is expected after the prompt (``prior``); or the weight of the model's global
            ranks against the prompt's in rank fusion, in [0, 1]: GLASS's own form.
        signal: ``"impact"`` (activation times output-weight norm) or ``"activation"``.
        refresh: how often what was said is read again densely while an answer goes on, which repairs its keys and
            values in the cache, adds it to the evidence and chooses the neurons again: every so many tokens; 0: only
            with the next prompt; ``"auto"``: every 16 tokens, and as making compact weights costs more than reading,
            neurons are chosen only after 32, 96, 224, 352, ...
        allocation: ``"measured"``: blocks get their neurons by how sensitive the model is to each
            (``allocation``), where the ranks file says it; ``"uniform"``: the same share of every block.
    """

    density: float = 0.5
    global_weight: float | str = "auto"
    signal: str = "impact"
    refresh: int | str = 0
    allocation: str = "measured"

    def __post_init__(self):
        if not _is_number(self.density) or not 0 < self.density <= 1:
            raise GlassError(f"density must be above 0 and at most 1, not {self.density!r}.")
        w = self.global_weight
        if w != "auto" and (not _is_number(w) or not 0 <= w <= 1):
            raise GlassError(f'global_weight must be "auto" or between 0 and 1, not {w!r}.')
        if self.signal not in SIGNALS:
            raise GlassError(f"signal must be one of {', '.join(SIGNALS)}, not {self.signal!r}.")
        r = self.refresh
        if r != "auto" and (not isinstance(r, int) or isinstance(r, bool) or r < 0):
            raise GlassError(f'refresh must be "auto", 0 or a number of tokens, not {r!r}.')
        if self.allocation not in ALLOCATIONS:
            raise GlassError(f"allocation must be one of {', '.join(ALLOCATIONS)}, not {self.allocation!r}.")

    def updated(self, **changes: Any) -> GlassConfig:
        """A copy with the given fields changed; None leaves a field as it is."""
        return replace(self, **{k: v for k, v in changes.items() if v is not None})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
