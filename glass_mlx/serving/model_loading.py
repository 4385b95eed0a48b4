"""Load a model as the engine serves it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream, wired_limit

from .. import group
from ..loading import load
from ..model.glass_model import GlassModel
from ..model.memory import available_memory, default_limit
from ..sharded_loading import sharded_load
from .cache_store import ConversationStore
from .engine_options import EngineOptions

# What ``load`` takes for whole models only.
_WHOLE = ("adapter_path", "build", "low_memory")


def load_model(path: Path, options: EngineOptions, held: ExitStack) -> tuple[GlassModel, Any]:
    """Load a model, or this process's part of it, with its tokenizer; ``held`` is closed when it is unloaded."""
    if group.size() == 1:
        model, tokenizer = load(path, **vars(options.config), **options.load)
    else:
        known = {name: value for name, value in options.load.items() if name not in _WHOLE}
        way = {"pipeline_group" if options.pipeline else "tensor_group": mx.distributed.init()}
        model, tokenizer = sharded_load(path, **way, **vars(options.config), **known)
    mx.set_cache_limit(available_memory() // 8)
    held.enter_context(wired_limit(model, [generation_stream]))  # else the weights may be paged out when idle
    return model, tokenizer


def make_store(model: GlassModel, options: EngineOptions) -> ConversationStore:
    """An empty store of prompt caches for a model that is loaded."""
    kept = default_limit(model.dense) // 2 if options.max_cache_bytes is None else options.max_cache_bytes
    return ConversationStore(kept, options.max_conversations, options.kv.get("quantized_kv_start", 0))
