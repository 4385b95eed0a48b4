"""The prompts that fidelity is measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..decoding.prompt import render
from ..errors import GlassError
from ..ranks.sources import start_tokens
from .names import PROMPT_SETS

# How often the null prompt is read where no number is given.
_NULL_PROMPTS = 32


def read_prompts(source: str, tokenizer: Any, count: int | None = None) -> list[list[int]]:
    """Read the prompts of a file or of bundled sets.

    Args:
        source (str): of ``names.PROMPT_SETS``, with commas between them; or a ``.jsonl`` file with ``{"text": ...}`` or
            ``{"messages": [...]}`` in each line, or another file with a text in each line; or ``null`` for the BOS
            token alone, 32 times.
        tokenizer: renders messages by its chat template; without one, their contents are joined.
        count (int, optional): only the first ``count`` prompts.

    Returns:
        list[list[int]]: the tokens of each prompt.

    Raises:
        GlassError: the file cannot be read, is empty, or has a line without text or messages.
    """
    if source == "null":
        return [start_tokens(tokenizer)] * (count or _NULL_PROMPTS)
    names = source.split(",")
    files = [str(Path(__file__).with_name(f"{n}.jsonl")) for n in names] if set(names) <= set(PROMPT_SETS) else [source]
    return [tokens for file in files for tokens in _read(file, tokenizer)][:count]


def _read(file: str, tokenizer: Any) -> list[list[int]]:
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise GlassError(f"Cannot read prompts from {file}: {e}; the bundled sets are {', '.join(PROMPT_SETS)}.") from e
    if not lines:
        raise GlassError(f"{file} has no prompts: give a file with a text in each line.")
    if not file.endswith(".jsonl"):
        return [tokenizer.encode(line) for line in lines]
    return [_encode(line, f"{file}:{number}", tokenizer) for number, line in enumerate(lines, 1)]


def _encode(line: str, place: str, tokenizer: Any) -> list[int]:
    """The tokens of a JSON line; ``place`` is for error messages."""
    try:
        item = json.loads(line)
        messages = item.get("messages")
        text = item["text"] if messages is None else "\n\n".join([*(m["content"] for m in messages), ""])
        if messages is None or not tokenizer.has_chat_template:
            return list(tokenizer.encode(text))
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise GlassError(f'{place} has no "text" and no "messages": give one of them.') from e
    return list(render(tokenizer, messages, add_generation_prompt=True))
