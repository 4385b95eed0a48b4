"""Tokens of a prompt: of a text, and of a conversation by the model's chat template."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from ..errors import GlassError


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of a prompt by mlx-lm's rule: BOS is added unless the text begins with it."""
    bos = tokenizer.bos_token
    return tokenizer.encode(prompt, add_special_tokens=bos is None or not prompt.startswith(bos))


def render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> Any:
    """Tokens of a conversation by the chat template; templates refuse some, a system prompt say."""
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as e:
        raise GlassError(f"The model's chat template does not take this conversation: {e}") from e
