"""The names that models go by."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from ..errors import GlassError

DEFAULT_MODEL = "demo"
DEMO_PATH = Path(__file__).parents[1] / "demo" / "model"

# Short names of models that people run on a Mac.
ALIASES = {
    "mistral-7b": "mlx-community/Mistral-7B-Instruct-v0.3-4bit",
    "ministral-8b": "mlx-community/Ministral-8B-Instruct-2410-4bit",
    "llama-3.1-8b": "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit",
    "llama-3.2-1b": "mlx-community/Llama-3.2-1B-Instruct-4bit",
    "llama-3.2-3b": "mlx-community/Llama-3.2-3B-Instruct-4bit",
    "qwen2.5-7b": "mlx-community/Qwen2.5-7B-Instruct-4bit",
    "qwen3-0.6b": "mlx-community/Qwen3-0.6B-4bit",
    "qwen3-1.7b": "mlx-community/Qwen3-1.7B-4bit",
    "qwen3-4b": "mlx-community/Qwen3-4B-4bit",
    "qwen3-8b": "mlx-community/Qwen3-8B-4bit",
    "qwen3-14b": "mlx-community/Qwen3-14B-4bit",
    "gemma-2-2b": "mlx-community/gemma-2-2b-it-4bit",
    "gemma-3-1b": "mlx-community/gemma-3-1b-it-4bit",
    "gemma-3-4b": "mlx-community/gemma-3-4b-it-4bit",
    "gemma-3-12b": "mlx-community/gemma-3-12b-it-4bit",
    "phi-3.5-mini": "mlx-community/Phi-3.5-mini-instruct-4bit",
    "phi-4": "mlx-community/phi-4-4bit",
    "smollm3-3b": "mlx-community/SmolLM3-3B-4bit",
}


def repository_of(name: str) -> str:
    """The Hub repository that an alias stands for, or that is named itself.

    Raises:
        GlassError: it is neither.
    """
    repo = ALIASES.get(name, name)
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        close = near_miss(name, (DEFAULT_MODEL, *ALIASES))
        raise GlassError(
            f"Unknown model {name!r}: {close or 'give a directory, a Hub repository or an alias (mistral-7b).'} "
            "All aliases: python -m glass_mlx.models list --all"
        )
    return repo


def near_miss(name: str, known: Iterable[str]) -> str:
    """ "did you mean X?" with the known names that a mistyped one is like; empty if there are none."""
    by_lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=2, cutoff=0.75)
    return f"did you mean {' or '.join(by_lower[other] for other in close)}?" if close else ""
