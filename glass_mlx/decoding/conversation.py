"""Conversations with a model: a prompt cache that knows its tokens, and a chat on top of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from ..errors import GlassError
from ..model.glass_model import GlassModel
from ..model.session import Session
from .prompt import render
from .stream import GenerationResponse, context_length, stream_generate

# A prompt leaves one part in so many of the context to the answer, if it can by leaving out messages.
_ROOM = 4


@dataclass(eq=False)
class CachedConversation:
    """A prompt cache and the tokens in it, so that a prompt pays only for what is new.

    Use it in this order: find the common prefix with the new prompt, cut the cache to it, generate from the rest of the
    prompt, and settle.

    Attributes:
        tokens (list[int]): the tokens in the cache, as of the last ``cut`` or ``settle``.
        cache (list): the prompt cache, whose last element is the session.
    """

    tokens: list[int]
    cache: list[Any]

    @property
    def session(self) -> Session:
        return self.cache[-1]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.cache)

    def common_prefix(self, prompt: list[int]) -> int:
        """How many tokens a prompt shares with the cache from the first on. The prompt's last token is not counted: it
        is always read, because the next token follows from it."""
        for i, (ours, theirs) in enumerate(zip(self.tokens, prompt[:-1])):
            if ours != theirs:
                return i
        return min(len(self.tokens), max(0, len(prompt) - 1))

    def cut(self, length: int) -> bool:
        """Go back to the first ``length`` tokens. Returns whether the cache can; if not, it is of no further use."""
        surplus = self.session.offset - length
        if surplus and not (can_trim_prompt_cache(self.cache) and trim_prompt_cache(self.cache, surplus) == surplus):
            return False
        self.tokens = self.tokens[:length]
        return True

    def settle(self, tokens: list[int]) -> bool:
        """Note what the cache holds after generating, which may have ended anywhere.

        Args:
            tokens (list[int]): the whole prompt and the generated tokens, of which the cache holds the beginning.

        Returns:
            bool: whether these tokens account for everything in the cache.
        """
        self.tokens = tokens[: self.session.offset]
        return len(self.tokens) == self.session.offset


class Conversation(CachedConversation):
    """A chat: messages, and the prompt cache that holds what the model has read of them.

    Every turn renders all messages with the chat template and feeds the model what its cache does not hold yet. Some
    templates rewrite earlier messages (those of thinking models drop the reasoning); then the cache is cut to the
    common prefix.

    Attributes:
        messages (list[dict]): ``{"role", "content"}``, answers included.
        left_out (int): how many of the first messages the last answer was given without, because the conversation is
            longer than the model's context.
    """

    def __init__(
        self,
        model: GlassModel,
        tokenizer: Any,
        system_prompt: str | None = None,
        max_kv_size: int | None = None,
    ):
        """
        Args:
            model (GlassModel): the model.
            tokenizer: its tokenizer, with a chat template.
            system_prompt (str, optional): the first message.
            max_kv_size (int, optional): the size of the KV cache, as in mlx-lm.

        Raises:
            GlassError: the model has no chat template.
        """
        if not tokenizer.has_chat_template:
            raise GlassError(
                "This model has no chat template, so it cannot chat; "
                "use python -m glass_mlx.generate, which continues text."
            )
        super().__init__([], model.make_cache(max_kv_size))
        self.model, self.tokenizer, self.max_kv_size = model, tokenizer, max_kv_size
        self.system_prompt = system_prompt
        self._reset_messages()

    def reset(self) -> None:
        """Forget everything except the system prompt and the session's configuration."""
        self._reset_messages()
        self._reset_cache()

    def reply(self, text: str, **options: Any) -> Iterator[GenerationResponse]:
        """Answer a message. If the caller stops early, the answer up to there is kept.

        Args:
            text (str): the user's message.
            options: options of :func:`glass_mlx.stream_generate`.

        Yields:
            GenerationResponse: the answer, token by token.

        Raises:
            GlassError: the chat template rejects the conversation, or an option is out of range.
        """
        self.left_out, prompt = self._fitting([*self.messages, {"role": "user", "content": text}])
        if not self.cut(self.common_prefix(prompt)):
            self._reset_cache()
        answer, generated = "", []
        new = prompt[len(self.tokens) :]
        stream = stream_generate(self.model, self.tokenizer, new, prompt_cache=self.cache, **options)
        self.messages.append({"role": "user", "content": text})
        try:
            for response in stream:
                answer += response.text
                generated.append(response.token)
                yield response
        except KeyboardInterrupt:
            if len({entry.offset for entry in self.cache if hasattr(entry, "offset")}) > 1:
                self._reset_cache()  # it came between two layers
            raise
        finally:
            stream.close()
            self.settle([*prompt, *generated])
            self.messages.append({"role": "assistant", "content": answer})

    def answer_again(self, **options: Any) -> Iterator[GenerationResponse]:
        """Answer the last message again, with a new cache. The conversation itself stays as it is.

        Args:
            options: options of :func:`glass_mlx.stream_generate`, such as ``density``.

        Yields:
            GenerationResponse: the answer, token by token.

        Raises:
            GlassError: no message has been sent yet, or an option is out of range.
        """
        last = max((i for i, m in enumerate(self.messages) if m["role"] == "user"), default=None)
        if last is None:
            raise GlassError("There is no message to answer yet.")
        self.left_out, prompt = self._fitting(self.messages[: last + 1])
        yield from stream_generate(self.model, self.tokenizer, prompt, max_kv_size=self.max_kv_size, **options)

    def _fitting(self, messages: list[dict[str, str]]) -> tuple[int, list[int]]:
        """The prompt of a conversation, without the first exchanges if an answer would have too little room after all
        of them; and how many messages are left out. What the system is told stays, and so does the last message."""
        system, rest = [m for m in messages if m["role"] == "system"], [m for m in messages if m["role"] != "system"]
        context = context_length(self.model, self.tokenizer, self.cache)
        for left_out in range(0, len(rest), 2):
            prompt = render(self.tokenizer, [*system, *rest[left_out:]], add_generation_prompt=True)
            if context is None or len(prompt) <= context - context // _ROOM:
                break
        return left_out, prompt

    def _reset_messages(self) -> None:
        self.left_out = 0
        self.messages: list[dict[str, str]] = []
        if self.system_prompt is not None:
            self.messages.append({"role": "system", "content": self.system_prompt})

    def _reset_cache(self) -> None:
        self.tokens, self.cache = [], self.model.make_cache(self.max_kv_size, **vars(self.session.config))
