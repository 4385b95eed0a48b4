"""Load a model as the engine serves it."""

from __future__ import annotations

from contextlib import ExitStack

import mlx.core as mx
from mlx_lm.generate import generation_stream, wired_limit

from ..decoding.stream import context_length
from ..loading import load
from ..model.memory import available_memory, default_limit
from .cache_store import ConversationStore
from .catalogue import Source
from .engine_options import EngineOptions
from .worker import Worker


def load_worker(source: Source, options: EngineOptions, held: ExitStack) -> Worker:
    """Load a model with its worker; ``held`` is closed when it is unloaded."""
    model, tokenizer = load(source.locate(), **vars(options.config), **options.load)
    context = context_length(model, tokenizer, model.make_cache())
    mx.set_cache_limit(available_memory() // 8)
    held.enter_context(wired_limit(model, [generation_stream]))  # else the weights may be paged out when idle
    kept = default_limit(model.dense) // 2 if options.max_cache_bytes is None else options.max_cache_bytes
    return Worker(
        model,
        tokenizer,
        ConversationStore(kept, options.max_conversations, options.kv.get("quantized_kv_start", 0)),
        options.template_args,
        min(options.max_prompt_tokens, context or options.max_prompt_tokens),
        options.prefill_step_size,
        options.kv,
        options.verify,
    )
