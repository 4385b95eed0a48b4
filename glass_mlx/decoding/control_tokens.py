"""Control tokens come from the chat template alone: their words in what a user or a tool says are text."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

# A noncharacter of Unicode, which no text has. It is put into a word, and its tokens are taken out again.
_BREAK = "\ufdd0"
_TRUSTED = ("system", "developer", "assistant")


class ChatTokenizer(TokenizerWrapper):
    """mlx-lm's tokenizer, which keeps users and tools from closing their turn and opening another one."""

    def __init__(self, tokenizer: TokenizerWrapper):
        vars(self).update(vars(tokenizer))

    def apply_chat_template(self, messages: Any, *args: Any, tokenize: bool = True, **kwargs: Any) -> Any:
        """Render messages as mlx-lm's wrapper does.

        Args:
            messages (list[dict]): the chat.
            tokenize (bool): whether to return tokens. Only there text can be told from control tokens.
            args, kwargs: as in transformers' function of this name.
        """
        broken = [_with_content(m, self._break) for m in messages] if tokenize and _is_chat(messages) else messages
        if broken == messages or not self._tokenizer.is_fast:
            return super().apply_chat_template(messages, *args, tokenize=tokenize, **kwargs)
        text = super().apply_chat_template(broken, *args, tokenize=False, **kwargs)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(encoded["input_ids"], encoded["offset_mapping"])
        return [token for token, (start, end) in spans if set(text[start:end]) != {_BREAK}]

    def _break(self, text: str) -> str:
        while (broken := self._words.sub(lambda found: found[0][0] + _BREAK + found[0][1:], text)) != text:
            text = broken  # what is left may be a word again
        return text

    @cached_property
    def _words(self) -> re.Pattern[str]:
        """The words of all control tokens, and the markers of messages, reasoning and tool calls."""
        added = self._tokenizer.added_tokens_decoder
        marks = template_tokens(self, super().apply_chat_template)
        words = [token.content for id, token in added.items() if token.special or id in marks]
        words += [self.think_start, self.think_end, self.tool_call_start, self.tool_call_end, *self.structural_markers]
        longest_first = sorted({word for word in words if word and len(word) > 1}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def template_tokens(tokenizer: Any, render: Callable[..., list[int]]) -> set[int]:
    """The added tokens by which a chat template tells messages apart.

    Args:
        tokenizer: the template's.
        render (callable): renders messages, with the arguments of ``apply_chat_template``.
    """
    chat = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    try:
        added = tokenizer.added_tokens_decoder
        return {t for t in render(chat, add_generation_prompt=True) if str(added.get(t, "")).strip()}
    except Exception:  # templates raise all sorts of errors
        return set()


def _is_chat(messages: Any) -> bool:
    return isinstance(messages, list) and all(isinstance(message, dict) for message in messages)


def _with_content(message: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A message with changed text, unless its author is trusted."""
    content = message.get("content")
    if message.get("role") in _TRUSTED or not isinstance(content, str | list):
        return message
    if isinstance(content, str):
        return {**message, "content": change(content)}
    parts = [{**p, "text": change(p["text"])} if isinstance(p, dict) and "text" in p else p for p in content]
    return {**message, "content": parts}
