"""How neurons are chosen: the settings of a model and of each conversation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np

from ..core.importance import SIGNALS
from ..errors import GlassError

LAYER_BUDGETS = ("measured", "uniform")
EXPERTS = ("sparse", "dense")
# Settings of earlier versions that programs may still name; they change nothing. ``refresh`` read an answer in the
# making again: for the same time, a higher density is nearer to the dense model (evaluation/README.md).
RETIRED = ("refresh",)


@dataclass(frozen=True)
class GlassConfig:
    """How neurons are chosen.

    Attributes:
        density: share of the FFN neurons to keep, in (0, 1]; 1 decodes with the model's own weights.
        global_weight: weight of the model's global ranks against the prompt's in rank fusion, in [0, 1], which is
            GLASS's own form; or ``"auto"``: choose by the energy that is expected after the prompt (``core/prior.py``).
        signal: ``"impact"`` (activation times output-weight norm) or ``"activation"``.
        layer_budgets: ``"measured"``: each block gets neurons by how sensitive the model is to it, where the
            statistics say so (``core/layer_budgets.py``); ``"uniform"``: the same share of every block.
        compensation: predict what the dropped neurons would add (``core/compensation.py``); without it they add
            nothing, as in GLASS's and GRIFFIN's own form.
        experts: ``"sparse"``: the density holds for routed experts too; ``"dense"``: they keep all neurons.
    """

    density: float = 0.5
    global_weight: float | str = "auto"
    signal: str = "impact"
    layer_budgets: str = "measured"
    compensation: bool = True
    experts: str = "sparse"

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, np.generic):  # NumPy's numbers are as good as Python's, but no JSON
                object.__setattr__(self, name, value.item())
        if not _is_number(self.density) or not 0 < self.density <= 1:
            raise GlassError(f"density must be above 0 and at most 1, not {self.density!r}.")
        w = self.global_weight
        if w != "auto" and (not _is_number(w) or not 0 <= w <= 1):
            raise GlassError(f'global_weight must be "auto" or between 0 and 1, not {w!r}.')
        if self.signal not in SIGNALS:
            raise GlassError(f"signal must be one of {', '.join(SIGNALS)}, not {self.signal!r}.")
        if self.layer_budgets not in LAYER_BUDGETS:
            raise GlassError(f"layer_budgets must be one of {', '.join(LAYER_BUDGETS)}, not {self.layer_budgets!r}.")
        if self.experts not in EXPERTS:
            raise GlassError(f"experts must be one of {', '.join(EXPERTS)}, not {self.experts!r}.")
        if not isinstance(self.compensation, bool):
            raise GlassError(f"compensation must be True or False, not {self.compensation!r}.")

    def updated(self, **changes: Any) -> GlassConfig:
        """A copy with the given fields changed; None leaves a field as it is."""
        return replace(self, **{k: v for k, v in changes.items() if v is not None and k not in RETIRED})


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
