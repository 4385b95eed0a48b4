"""How much memory answering takes, predicted before the first prompt, against what the device has."""

from __future__ import annotations

from dataclasses import dataclass

from ..model.glass_model import GlassModel
from ..model.memory import available_memory, model_bytes
from .costs import cache_bytes

# Tokens in the prompt cache, and in one call of a prefill, that a plan is for.
CONTEXT, STEP = 4096, 512


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a model takes while it answers.

    Attributes:
        model: its weights.
        ffn: of these, the dense FFN weights that are not needed while decoding.
        compact: the compact weights of a conversation.
        cache: its prompt cache.
        prefill: what a call of the prefill computes with; an estimate.
        context: how many tokens are in the cache.
        available: what the device has: on Apple's GPU its recommended working set, elsewhere the machine's memory.
        low_memory: whether the dense FFN weights are let go of while decoding.
        making: compact weights that are there before the first dense ones are let go of.
    """

    model: int
    ffn: int
    compact: int
    cache: int
    prefill: int
    context: int
    available: int
    low_memory: bool = False
    making: int = 0

    @property
    def needed(self) -> int:
        """The most at any time. Other conversations' compact weights give way (``SessionMemory``)."""
        least = self.making if self.low_memory else 0
        return max(self.decoding, self.model + self.cache + max(self.prefill, least))

    @property
    def decoding(self) -> int:
        """What is held while an answer is decoded."""
        return self.model + self.cache + self.compact - (self.ffn if self.low_memory else 0)

    @property
    def fits(self) -> bool:
        return self.needed <= self.available

    def __str__(self) -> str:
        sizes = f"model {_gb(self.model)}, compact weights {_gb(self.compact)}, cache {_gb(self.cache)}"
        return (
            f"{sizes} at {self.context:,} tokens, prefill {_gb(self.prefill)}: needs {_gb(self.needed)} of "
            f"{_gb(self.available)}{' with --low-memory' if self.low_memory else ''}"
        )


def plan_memory(model: GlassModel, context: int | None = None, density: float | None = None) -> MemoryPlan:
    """The memory plan of a model.

    Args:
        model (GlassModel): the model.
        context (int, optional): tokens in the prompt cache. Default: ``CONTEXT``, or the model's context if shorter.
        density (float, optional): default: the model's own.
    """
    context = context or min(CONTEXT, model.context_length or CONTEXT)
    density = model.config.density if density is None else density
    sparse = [(block, k) for block, k in zip(model.blocks, model.kept_counts(density)) if k < block.size]
    sizes = [block.compact_bytes(k) for block, k in sparse]
    compact, ffn = (sum(kind) for kind in zip(*sizes)) if sizes else (0, 0)
    making = max((size for size, _ in sizes), default=0)
    # per token: gate, up, their product and the hidden vector; the latter once more in float32, and its square; and
    # about a dozen vectors around attention
    widest = max(model.blocks, key=lambda block: block.width * block.active)
    neurons = widest.width * widest.active
    token = neurons * (4 * widest.dtype.size + 8) + 12 * widest.input_size * widest.dtype.size
    cache = cache_bytes(model, context)
    available = available_memory()
    dense, prefill = model_bytes(model.dense), STEP * token
    return MemoryPlan(dense, ffn, compact, cache, prefill, context, available, model.low_memory, making)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2g} GB"
