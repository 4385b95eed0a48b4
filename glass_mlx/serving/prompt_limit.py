"""Refuses prompts that are too long from their length, before they wait for the engine or hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..decoding.prompt import check_template_args, render
from ..errors import GlassError
from .errors import BadRequest
from .request import Request

# A long text is encoded in pieces of so many characters, up to the first one too many: no other thread runs meanwhile.
# At a cut a few tokens more may come out than in the whole; so many are not counted.
_PIECE, _SLACK = 1 << 14, 64


@dataclass(frozen=True)
class PromptLimit:
    """How long prompts may be.

    Attributes:
        max_tokens: longer prompts are refused.
        tokenizer: the model's; None while it is not loaded, when only prompts of tokens are refused.
        template_args: default arguments of its chat template.
    """

    max_tokens: int
    tokenizer: Any = None
    template_args: dict[str, Any] | None = None

    def check(self, request: Request) -> None:
        """Refuse a request whose prompt cannot fit. It may be called from any thread: encoding changes nothing of the
        tokenizer. Whether a prompt fits that is not refused is known when it is encoded in whole.

        Raises:
            BadRequest: the prompt is too long, or the chat template rejects it.
        """
        if isinstance(request.prompt, list):
            self.refuse_above(len(request.prompt))
        elif self.tokenizer is not None and _characters([request.prompt, request.messages]) > self.max_tokens:
            counted, text = 0, self._text(request)
            for start in range(0, len(text), _PIECE):
                piece = self.tokenizer.encode(text[start : start + _PIECE], add_special_tokens=False)
                counted += max(0, len(piece) - _SLACK)
                self.refuse_above(counted, "more than ")

    def refuse_above(self, tokens: int, about: str = "") -> None:
        """Refuse a prompt of so many tokens if that is too many."""
        if tokens > self.max_tokens:
            raise BadRequest(f"The prompt has {about}{tokens:,} tokens; at most {self.max_tokens:,} are allowed.")

    def options(self, request: Request) -> dict[str, Any]:
        """The arguments of the chat template for a request.

        Raises:
            BadRequest: one is not the client's to set.
        """
        try:
            args = check_template_args({**(self.template_args or {}), **request.template_args})
        except GlassError as e:
            raise BadRequest(str(e), "chat_template_kwargs") from e
        if request.continue_final_message:  # not every renderer knows the word
            args["continue_final_message"] = True
        return {**args, "add_generation_prompt": request.add_generation_prompt, "tools": request.tools}

    def render(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        """A chat in the model's template, as tokens or, with ``tokenize=False``, as text.

        Raises:
            BadRequest: the model has no template, or it rejects the chat.
        """
        if not self.tokenizer.has_chat_template:
            raise BadRequest("This model has no chat template, so it cannot chat; use /v1/completions.")
        try:
            return render(self.tokenizer, messages, **options)
        except GlassError as e:
            raise BadRequest(str(e)) from e
        except Exception as e:  # templates raise all sorts of errors where messages lack what they take for granted
            raise BadRequest(f"The model's chat template rejects this conversation ({type(e).__name__}).") from e

    def _text(self, request: Request) -> str:
        if request.messages is None:
            return request.prompt or ""
        return self.render(request.messages, **self.options(request), tokenize=False)


def _characters(value: Any) -> int:
    """How many characters the texts in a JSON value have."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str) else 0
