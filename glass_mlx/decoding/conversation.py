"""A conversation with a model: the messages, and a prompt cache that each turn only adds to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from ..errors import GlassError
from ..model.glass_model import GlassModel
from .prompt import render
from .stream import GenerationResponse, stream_generate


class Conversation:
    """Messages and the prompt cache that holds what the model has read of them.

    Every turn renders all messages through the chat template and feeds the model what its cache does not
    hold yet. Where a template rewrites the past (as those of thinking models do), the cache is trimmed to the
    common prefix.

    Attributes:
        messages (list[dict]): ``{"role", "content"}``, the answers included.
        cache (list): the prompt cache, whose last element is the session.
        tokens (list[int]): the tokens in the cache.
    """

    def __init__(
        self,
        model: GlassModel,
        tokenizer: Any,
        system_prompt: str | None = None,
        max_kv_size: int | None = None,
    ):
        if not tokenizer.has_chat_template:
            raise GlassError(
                "This model has no chat template, so it cannot chat; "
                "use python -m glass_mlx.generate, which continues text."
            )
        self.model, self.tokenizer, self.max_kv_size = model, tokenizer, max_kv_size
        self.system_prompt = system_prompt
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt and the session's configuration."""
        config = vars(self.session.config) if hasattr(self, "cache") else {}
        self.messages: list[dict[str, str]] = []
        if self.system_prompt is not None:
            self.messages.append({"role": "system", "content": self.system_prompt})
        self._new_cache(config)

    @property
    def session(self):
        return self.model.session(self.cache)

    def reply(self, text: str, **options: Any) -> Iterator[GenerationResponse]:
        """Answer a message. The answer as far as it was read is kept when the caller stops early.

        Args:
            text (str): the user's message.
            options: of :func:`glass_mlx.stream_generate`.

        Yields:
            GenerationResponse: pieces of the answer.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = render(self.tokenizer, messages, add_generation_prompt=True)
        self.messages = messages
        new = prompt[self._reuse(prompt) :]
        answer, generated = "", []
        stream = stream_generate(self.model, self.tokenizer, new, prompt_cache=self.cache, **options)
        try:
            for response in stream:
                answer += response.text
                generated.append(response.token)
                yield response
        except KeyboardInterrupt:
            if len({entry.offset for entry in self.cache if hasattr(entry, "offset")}) > 1:
                self._new_cache(vars(self.session.config))  # it came between two layers
            raise
        finally:
            stream.close()
            # what was prefilled or decoded is in the cache, even if it was cut short
            self.tokens = [*prompt, *generated][: self.session.offset]
            self.messages.append({"role": "assistant", "content": answer})

    def _reuse(self, prompt: list[int]) -> int:
        """Make the cache a proper prefix of the prompt; returns the number of tokens in it."""
        common = 0
        for ours, theirs in zip(self.tokens, prompt[:-1]):
            if ours != theirs:
                break
            common += 1
        surplus = self.session.offset - common
        if surplus and not (can_trim_prompt_cache(self.cache) and trim_prompt_cache(self.cache, surplus) == surplus):
            self._new_cache(vars(self.session.config))
            common = 0
        self.tokens = prompt[:common]
        return common

    def _new_cache(self, config: dict[str, Any]) -> None:
        self.cache = self.model.make_cache(self.max_kv_size, **config)
        self.tokens: list[int] = []
