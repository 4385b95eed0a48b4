"""How long a text a model was made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..files import read_json

# What configurations call it.
_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
# Ways to scale positions by a factor that the number above does not include, unless the original one is given.
_SCALED = ("linear", "dynamic", "yarn")


def context_length(config: dict[str, Any]) -> int | None:
    """The longest text, prompt and answer, in tokens that a model's configuration allows; None if it says nothing."""
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else config
    lengths = [config[name] for name in _NAMES if _is_positive(config.get(name))]
    if not lengths:
        return None
    length = int(lengths[0])
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(scaling, dict) or not _is_positive(factor := scaling.get("factor")):
        return length
    original = scaling.get("original_max_position_embeddings")
    if _is_positive(original):
        return max(length, int(original * factor))
    return int(length * factor) if scaling.get("rope_type", scaling.get("type")) in _SCALED else length


def context_of(dense: nn.Module, path: Path | None) -> int | None:
    """The context length of a loaded model. What its directory's configuration does not name, mlx-lm has made up."""
    args = vars(dense.args) if hasattr(dense, "args") else {}
    try:
        named = args if path is None else read_json(path / "config.json")
        return context_length({key: args.get(key, value) for key, value in named.items()})
    except (OSError, ValueError, AttributeError):
        return None


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 2**40
