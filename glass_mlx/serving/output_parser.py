"""Parses a completion as it is generated: stop words end it; reasoning and tool calls are separated from the text.

The markers are those that mlx-lm's tokenizer wrapper knows for the model. ``TextStateMachine`` and
``make_text_state_machine`` are what mlx-lm's own server uses. They are not documented, so only this file uses them.
"""

from __future__ import annotations

import json
import logging
import uuid
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine

from .request import Chunk

logger = logging.getLogger("glass_mlx")


class OutputParser:
    """Splits the text of one completion into chunks.

    Attributes:
        stopped (bool): whether a stop word was found. Ignore everything after it.
        has_tool_calls (bool): whether the completion calls a tool.
    """

    def __init__(self, tokenizer: Any, prompt: list[int], stop: tuple[str, ...] = (), tools: list | None = None):
        self._parse_tool_call, self._tools = tokenizer.tool_parser, tools
        self._call_markers = (tokenizer.tool_call_start or "", tokenizer.tool_call_end or "")
        self._stop_state = TextStateMachine({"text": [(word, None) for word in stop]}).make_state("text")
        self._section = "normal"
        if tokenizer.has_thinking and tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt):
            self._section = "reasoning"  # the chat template has opened it
        self._section = tokenizer.response_initial_state or self._section
        self._section_state = make_text_state_machine(tokenizer).make_state(self._section)
        self._call_text = ""
        self.stopped = self.has_tool_calls = False

    def feed(self, text: str) -> Chunk:
        """Parse the next text. What could be the beginning of a marker or of a stop word is held back."""
        self._stop_state, segments = TextStateMachine.split(self._stop_state, text)
        self.stopped = self._stop_state[0] is None
        return self._parse("".join(t for _, t in segments))

    def finish(self) -> Chunk:
        """Parse what was held back, at the end of the completion."""
        rest = ""
        if not self.stopped:
            self._stop_state, rest, _ = TextStateMachine.flush(self._stop_state)
        chunk = self._parse(rest)
        self._section_state, rest, section = TextStateMachine.flush(self._section_state)
        if section == "tool":
            self._call_text += rest
            rest = ""
        last = self._collect([(section, rest)])
        unparsed, calls = self._tool_calls() if self._call_text else ("", ())
        return Chunk(
            chunk.text + last.text + unparsed,
            chunk.reasoning + last.reasoning,
            chunk.tool_calls + last.tool_calls + calls,
        )

    def _parse(self, text: str) -> Chunk:
        self._section_state, segments = TextStateMachine.split(self._section_state, text)
        return self._collect(segments)

    def _collect(self, segments: list[tuple[str, str]]) -> Chunk:
        """One chunk of segments (section, text). The text of a tool call is kept until the call ends."""
        content, reasoning, calls = "", "", ()
        for section, text in segments:
            if self._section == "tool" and section != "tool":
                unparsed, parsed = self._tool_calls()
                content, calls = content + unparsed, calls + parsed
            self._section = section
            if section == "tool":
                self._call_text += text
            elif section == "reasoning":
                reasoning += text
            else:
                content += text
        return Chunk(content, reasoning, calls)

    def _tool_calls(self) -> tuple[str, tuple[dict[str, Any], ...]]:
        """The calls in the collected text. If it cannot be parsed: the text as it came, and no calls."""
        text, self._call_text = self._call_text, ""
        try:
            parsed = self._parse_tool_call(text, self._tools)
            calls = tuple(_openai_call(c) for c in (parsed if isinstance(parsed, list) else [parsed]))
        except Exception as e:  # each model family has its own parser, and they raise all sorts of errors
            logger.warning("a tool call could not be parsed (%s): passed on as text", type(e).__name__)
            return self._call_markers[0] + text + self._call_markers[1], ()
        self.has_tool_calls = True
        return "", calls


def _openai_call(parsed: dict[str, Any]) -> dict[str, Any]:
    """A parsed call in OpenAI's format."""
    function = {"name": str(parsed["name"]), "arguments": json.dumps(parsed.get("arguments", {}), ensure_ascii=False)}
    return {"id": str(parsed.get("id") or f"call_{uuid.uuid4().hex}"), "type": "function", "function": function}
