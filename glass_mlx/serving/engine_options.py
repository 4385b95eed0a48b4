"""How an engine serves."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..loading import DEFAULT_MODEL
from ..model.config import GlassConfig


@dataclass(frozen=True)
class EngineOptions:
    """How to serve.

    Attributes:
        model: what ``default_model`` stands for. It is loaded at the first request for it.
        config: how neurons are chosen, for requests that do not set it.
        verify: ``verify`` and its options of :func:`glass_mlx.stream_generate`, for requests that do not set it.
        load: further arguments of :func:`glass_mlx.load`.
        pipeline: where several processes share a model, whether each has some of the layers, not a part of each.
        template_args: default arguments of the chat template.
        allow_paths: directories whose models requests may name.
        allow_download: whether a requested model that is not in the Hub cache is downloaded.
        max_queue: how many requests may wait. More are refused.
        max_prompt_tokens: longer prompts are refused.
        max_cache_bytes, max_conversations: limits of what is kept of past conversations. The least recently used goes
            first. By default a quarter of the memory that the model leaves.
        idle_timeout: seconds without a request until the model is unloaded; None for never.
        prefill_step_size: prompt tokens that are read in one call, at most. The next turn may read one call again.
        kv: mlx-lm's ``kv_bits``, ``kv_group_size`` and ``quantized_kv_start``, to quantise the KV cache.
    """

    model: str = DEFAULT_MODEL
    config: GlassConfig = GlassConfig()
    verify: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    pipeline: bool = False
    template_args: dict[str, Any] = field(default_factory=dict)
    allow_paths: tuple[Path, ...] = ()
    allow_download: bool = False
    max_queue: int = 64
    max_prompt_tokens: int = 131_072
    max_cache_bytes: int | None = None
    max_conversations: int = 10
    idle_timeout: float | None = 600.0
    prefill_step_size: int = 512
    kv: dict[str, int] = field(default_factory=dict)
