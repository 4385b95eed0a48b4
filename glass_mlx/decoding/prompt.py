"""Tokens of a prompt: of a text, or of messages in the model's chat template."""

from __future__ import annotations

import inspect
from typing import Any

import mlx.nn as nn
from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper
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


class ContinuingTokenizer(TokenizerWrapper):
    """A tokenizer whose detokenizers go on with a text, where others begin one and drop its leading space."""

    def __init__(self, tokenizer: TokenizerWrapper, before: list[int]):
        """
        Args:
            tokenizer (TokenizerWrapper): the model's.
            before (list[int]): the last tokens of the text so far.
        """
        vars(self).update(vars(tokenizer))
        self._before = before

    @property
    def detokenizer(self) -> StreamingDetokenizer:
        detokenizer = super().detokenizer
        for token in self._before:
            detokenizer.add_token(token)
        _ = detokenizer.last_segment  # reading it takes it off
        return detokenizer


def context_length(model: nn.Module, tokenizer: Any) -> int | None:
    """How many tokens a model can read and write at most, as its config says, or else its tokenizer's.

    Returns:
        int | None: the number; None if neither says one.
    """
    args = getattr(model, "args", None)
    text = getattr(args, "text_config", None)
    for config in (text if isinstance(text, dict) else {}, vars(args) if hasattr(args, "__dict__") else {}):
        length = config.get("max_position_embeddings")
        if isinstance(length, int) and length > 0:
            return max(length, _scaled_context(config, length))
    length = getattr(tokenizer, "model_max_length", None)
    return length if isinstance(length, int) and 0 < length < _NO_LIMIT else None


_NO_LIMIT = 10**9  # tokenizers without a limit say 1e30


def _scaled_context(config: dict[str, Any], length: int) -> int:
    """The context that scaled rotary embeddings reach; 0 if they are not scaled."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings") or length
    return int(factor * original) if isinstance(factor, int | float) and isinstance(original, int | float) else 0


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
