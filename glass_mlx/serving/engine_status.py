"""What the engine is doing, and what is known of its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import GlassError
from ..model.quality import QUALITIES, QualityPoint, density_for
from .measuring import Progress
from .request import Usage

if TYPE_CHECKING:
    from .worker import Worker


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a loaded model.

    Attributes:
        context_tokens: the longest prompt that it takes.
        density: what it decodes with unless a request says otherwise.
        densities: what densities cost it, ascending; empty where that was not measured.
        qualities: the density of each quality, where that was measured.
        group: the processes that share it, if any; figures of memory are of the first one.
    """

    context_tokens: int
    density: float
    densities: tuple[QualityPoint, ...] = ()
    qualities: dict[str, float] | None = None
    group: str = ""

    @classmethod
    def of(cls, worker: Worker) -> ModelFacts:
        """The facts of a worker's model."""
        points = worker.model.quality
        try:
            qualities = {quality: density_for(quality, points) for quality in QUALITIES}
        except GlassError:  # nothing was measured
            qualities = None
        whole = worker.model.part.whole if worker.model.part is not None else ""
        return cls(worker.max_prompt_tokens, worker.model.config.density, tuple(points), qualities, str(whole))


@dataclass(frozen=True)
class EngineStatus:
    """What the engine is doing.

    Attributes:
        state: "unloaded", "loading", "ready", "generating", "measuring", or "failed" if the last model could not be
            loaded.
        model: the model that is loaded or being loaded.
        has_ranks: whether it has global ranks.
        facts: what is known of the loaded model.
        measuring: the measurement of global ranks that is running, or goes on when nobody waits.
        tokens_per_second: speed of the present completion, or of the last one.
        queued: how many requests are waiting.
        place: how many answers come before that of the client who asks; None if it does not wait.
        memory_bytes: bytes that MLX holds in arrays.
        conversations, cache_bytes: how many conversations are kept, and their bytes.
        error: why loading or generating failed last; None once it has succeeded again.
        usage: what the last completion cost.
    """

    state: str
    model: str | None = None
    has_ranks: bool = False
    facts: ModelFacts | None = None
    measuring: Progress | None = None
    tokens_per_second: float = 0.0
    queued: int = 0
    place: int | None = None
    memory_bytes: int = 0
    conversations: int = 0
    cache_bytes: int = 0
    error: str | None = None
    usage: Usage | None = None
