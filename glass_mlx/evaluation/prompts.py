"""The prompts that fidelity is measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..decoding.prompt import render
from ..errors import GlassError
from ..ranks.sources import start_tokens

PROMPTS = Path(__file__).parent / "prompts.jsonl"


def read_prompts(source: str, tokenizer: Any, count: int | None) -> list[list[int]]:
    """Tokens of the prompts of a file, or for ``null`` of the BOS token alone, 32 times.

    A ``.jsonl`` file holds ``{"text": ...}`` or ``{"messages": [...]}`` in each line, another file one text a line.
    Models without a chat template are given what the messages say.
    """
    if source == "null":
        return [start_tokens(tokenizer)] * (count or 32)
    try:
        lines = [line.strip() for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise GlassError(f"Cannot read prompts from {source}: {e}") from e
    if not lines:
        raise GlassError(f"{source} has no prompts.")
    if not source.endswith(".jsonl"):
        return [tokenizer.encode(line) for line in lines[:count]]
    return [_prompt(line, f"{source}:{number}", tokenizer) for number, line in enumerate(lines[:count], 1)]


def _prompt(line: str, place: str, tokenizer: Any) -> list[int]:
    try:
        item = json.loads(line)
        messages = item.get("messages")
        text = item["text"] if messages is None else "\n\n".join([*(m["content"] for m in messages), ""])
        if messages is None or not tokenizer.has_chat_template:
            return list(tokenizer.encode(text))
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise GlassError(f'{place} has no "text" and no "messages".') from e
    return list(render(tokenizer, messages, add_generation_prompt=True))
