"""Tokens of a prompt: of a text, or of messages in the model's chat template."""

from __future__ import annotations

import inspect
from typing import Any

import mlx_lm  # noqa: F401  first: it silences advice of transformers
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import GlassError

# Parameters of rendering itself: they are not the user's to set. Documents are, for templates that show them.
RESERVED = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {"documents"}


def check_template_args(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a chat template that a user has set, if they are not those of rendering itself.

    Raises:
        GlassError: one is.
    """
    taken = sorted(RESERVED & args.keys())
    if taken:
        raise GlassError(f"The chat template's argument {taken[0]!r} cannot be set.")
    return args


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of a text, by mlx-lm's rule: BOS is added unless the text begins with it."""
    bos = tokenizer.bos_token
    return tokenizer.encode(prompt, add_special_tokens=bos is None or not prompt.startswith(bos))


def render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> Any:
    """Tokens of messages in the chat template.

    Raises:
        GlassError: the template rejects the messages, for example a system prompt.
    """
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as e:
        raise GlassError(f"The model's chat template rejects this conversation: {e}") from e
