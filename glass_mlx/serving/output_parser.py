"""Reads an answer as it is generated: stop words end it, and reasoning and tool calls are told from the text.

The markers are those that mlx-lm's tokenizer wrapper knows of the model. ``TextStateMachine`` and
``make_text_state_machine`` are what mlx-lm's own server uses; they are not documented, so only this file uses them.
"""

from __future__ import annotations

import json
import logging
import uuid
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine

from .request import Piece

logger = logging.getLogger("glass_mlx")


class Reader:
    """Splits one answer's text into pieces.

    Attributes:
        stopped (bool): a stop word was found; nothing that comes after it counts.
        called (bool): the answer has a tool call.
    """

    def __init__(self, tokenizer: Any, prompt: list[int], stop: tuple[str, ...] = (), tools: list | None = None):
        self._parser, self._tools = tokenizer.tool_parser, tools
        self._marks = (tokenizer.tool_call_start or "", tokenizer.tool_call_end or "")
        self._stops = TextStateMachine({"text": [(word, None) for word in stop]}).make_state("text")
        self._state = "normal"
        if tokenizer.has_thinking and tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt):
            self._state = "reasoning"  # the template has begun the thought already
        self._state = tokenizer.response_initial_state or self._state
        self._parts = make_text_state_machine(tokenizer).make_state(self._state)
        self._call = ""
        self.stopped = self.called = False

    def feed(self, text: str) -> Piece:
        """The next piece of text; what could be the beginning of a marker or a stop word is held back."""
        self._stops, segments = TextStateMachine.split(self._stops, text)
        self.stopped = self._stops[0] is None
        return self._sort("".join(t for _, t in segments))

    def finish(self) -> Piece:
        """What was held back, at the end of the answer."""
        rest = ""
        if not self.stopped:
            self._stops, rest, _ = TextStateMachine.flush(self._stops)
        piece = self._sort(rest)
        self._parts, rest, state = TextStateMachine.flush(self._parts)
        if state == "tool":
            self._call += rest
            rest = ""
        last = self._gather([(state, rest)])
        broken, calls = self._calls() if self._call else ("", ())
        return Piece(
            piece.text + last.text + broken,
            piece.reasoning + last.reasoning,
            piece.tool_calls + last.tool_calls + calls,
        )

    def _sort(self, text: str) -> Piece:
        self._parts, segments = TextStateMachine.split(self._parts, text)
        return self._gather(segments)

    def _gather(self, segments: list[tuple[str, str]]) -> Piece:
        said, reasoning, calls = "", "", ()
        for state, text in segments:
            if self._state == "tool" and state != "tool":
                broken, made = self._calls()
                said, calls = said + broken, calls + made
            self._state = state
            if state == "tool":
                self._call += text
            elif state == "reasoning":
                reasoning += text
            else:
                said += text
        return Piece(said, reasoning, calls)

    def _calls(self) -> tuple[str, tuple[dict[str, Any], ...]]:
        """The calls in the collected text; or the text, as it came, where there are none."""
        text, self._call = self._call, ""
        try:
            parsed = self._parser(text, self._tools)
            calls = tuple(_call(c) for c in (parsed if isinstance(parsed, list) else [parsed]))
        except Exception as e:  # the parsers are one per model family, and raise what they please
            logger.warning("a tool call could not be parsed (%s): passed on as text", type(e).__name__)
            return self._marks[0] + text + self._marks[1], ()
        self.called = True
        return "", calls


def _call(parsed: dict[str, Any]) -> dict[str, Any]:
    """A parsed call in OpenAI's form."""
    function = {"name": str(parsed["name"]), "arguments": json.dumps(parsed.get("arguments", {}), ensure_ascii=False)}
    return {"id": str(parsed.get("id") or f"call_{uuid.uuid4().hex}"), "type": "function", "function": function}
