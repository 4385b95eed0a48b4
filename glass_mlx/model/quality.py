"""What densities cost a model, and the density for a wanted quality. ``ranks/quality.py`` measures it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import GlassError

# The largest KL in nats that a quality may cost: about what quantising to 8, 4 and 3 bits costs the models that it was
# measured on (evaluation/README.md).
QUALITIES = {"high": 0.002, "balanced": 0.06, "fast": 0.28}


@dataclass(frozen=True)
class QualityPoint:
    """What a density costs.

    Attributes:
        density: share of the neurons kept.
        kl: KL(dense || sparse) in nats per token.
        agreement: share of the tokens that both models find the most likely.
    """

    density: float
    kl: float
    agreement: float


def density_for(quality: str, points: list[QualityPoint]) -> float:
    """The smallest density whose KL is at most what a quality may cost; log KL is linear between measured densities.

    Raises:
        GlassError: there is no such quality, or nothing was measured.
    """
    if quality not in QUALITIES:
        raise GlassError(f"quality must be one of {', '.join(QUALITIES)}, not {quality!r}.")
    if not points:
        raise GlassError(
            "The quality of this model's densities is not known: give a density, or measure it with "
            "python -m glass_mlx.stats build. Where there are routed experts it is known if they are sparse."
        )
    limit = QUALITIES[quality]
    if min(p.kl for p in points) > limit:
        return 1.0
    better = [p for i, p in enumerate(points) if all(p.kl < before.kl for before in points[:i])]
    logs = -np.log(np.maximum([p.kl for p in better], 1e-9))
    return round(float(np.interp(-np.log(limit), logs, [p.density for p in better])), 2)


def costs_more_than(quality: str, density: float, points: list[QualityPoint]) -> bool:
    """Whether a density is known to cost more than a quality may."""
    return bool(points) and density < density_for(quality, points)


def agreement_at(density: float, points: list[QualityPoint]) -> float | None:
    """How often the sparse model's most likely token is the dense one's at a density; None if it is not known."""
    if density == 1:
        return 1.0
    if not points or density < points[0].density:
        return None
    densities, agreements = ([*(getattr(p, name) for p in points), 1.0] for name in ("density", "agreement"))
    return float(np.interp(density, densities, agreements))
