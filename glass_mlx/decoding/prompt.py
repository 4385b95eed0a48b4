"""Tokens of a prompt: of a text, or of messages in the model's chat template."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx_lm  # noqa: F401  first: it silences advice of transformers
import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import GlassError

# A text, its tokens, or messages for the chat template.
Prompt = str | mx.array | Sequence[int] | Sequence[dict[str, Any]]

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


def as_tokens(tokenizer: Any, prompt: Prompt) -> mx.array:
    """A prompt's tokens [n], int32.

    Args:
        tokenizer: mlx-lm's or transformers'.
        prompt: a text, tokens, or the messages of a chat.

    Raises:
        GlassError: it is none of these, or there are several.
    """
    if isinstance(prompt, str):
        prompt = encode(tokenizer, prompt)
    elif isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], dict):
        if not getattr(tokenizer, "has_chat_template", getattr(tokenizer, "chat_template", None)):
            raise GlassError("This model has no chat template: give a text or tokens, not messages.")
        prompt = render(tokenizer, list(prompt), add_generation_prompt=True)
    if isinstance(prompt, mx.array) and prompt.ndim == 1 and mx.issubdtype(prompt.dtype, mx.integer):
        return prompt
    try:
        tokens = np.asarray(prompt)
    except (ValueError, TypeError):  # rows of unequal length, say
        tokens = np.array(None)
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise GlassError(
            "A prompt is a text, one list of token ids, or one list of messages; "
            f"this is {_kind(prompt)}. Answer several prompts one after the other."
        )
    return mx.array(tokens.astype(np.int32))


def _kind(prompt: Any) -> str:
    if hasattr(prompt, "shape"):
        return f"an array {tuple(prompt.shape)} of {prompt.dtype}"
    inside = f" of {type(prompt[0]).__name__!r}" if isinstance(prompt, (list, tuple)) and prompt else ""
    return f"{type(prompt).__name__!r}{inside}"


def render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> Any:
    """Tokens of messages in the chat template.

    Raises:
        GlassError: the template rejects the messages, for example a system prompt.
    """
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as e:
        raise GlassError(f"The model's chat template rejects this conversation: {e}") from e
