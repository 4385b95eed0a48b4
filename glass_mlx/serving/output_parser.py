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

from .grammar import is_reasoning
from .request import Chunk

logger = logging.getLogger("glass_mlx")


class OutputParser:
    """Splits the text of one completion into chunks.

    Attributes:
        stopped (bool): whether the completion ends here: at a stop word, or after its one call. Ignore what follows.
        has_tool_calls (bool): whether the completion calls a tool.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: list[int],
        stop: tuple[str, ...] = (),
        tools: list | None = None,
        *,
        is_chat: bool = True,
        bare_call: bool = False,
        one_call: bool = False,
    ):
        """
        Args:
            tokenizer: mlx-lm's wrapper.
            prompt (list[int]): the tokens before the completion.
            stop (tuple[str, ...]): words that end the answer. Reasoning may contain them.
            tools (list, optional): what may be called; without any, no text is taken for a call.
            is_chat (bool): whether the text has sections; that of a continued text has none.
            bare_call (bool): whether the answer is one call as JSON, without markers.
            one_call (bool): whether the completion ends after its first call.
        """
        self._tools, self._one_call = tools, one_call or bare_call
        self._parse_call = json.loads if bare_call else lambda text: tokenizer.tool_parser(text, tools)
        self._call_markers = ("", "") if bare_call else (tokenizer.tool_call_start or "", tokenizer.tool_call_end or "")
        self._stop_state = TextStateMachine({"text": [(word, None) for word in stop]}).make_state("text")
        self._section_state = _sections(tokenizer, prompt, bool(tools), bare_call) if is_chat else _WHOLE
        self._section = self._section_state[0]
        self._call_text = ""
        self.stopped = self.has_tool_calls = False

    @property
    def is_reasoning(self) -> bool:
        """Whether the reasoning has not ended yet."""
        return self._section == "reasoning"

    def feed(self, text: str) -> Chunk:
        """Parse the next text. What could be the beginning of a marker or of a stop word is held back."""
        self._section_state, segments = TextStateMachine.split(self._section_state, text)
        return self._collect(segments)

    def finish(self) -> Chunk:
        """Parse what was held back, at the end of the completion."""
        self._section_state, rest, section = TextStateMachine.flush(self._section_state)
        chunk = self._collect([(section, rest)])
        content, calls = chunk.text, chunk.tool_calls
        if self._call_text and not self.stopped:
            unparsed, parsed = self._tool_calls(ended=False)
            content, calls = content + unparsed, calls + parsed
        if self._stop_state[0] is not None:
            content += TextStateMachine.flush(self._stop_state)[1]
        return Chunk(content, chunk.reasoning, calls)

    def _collect(self, segments: list[tuple[str, str]]) -> Chunk:
        """One chunk of segments (section, text). The text of a tool call is kept until the call ends."""
        content, reasoning, calls = "", "", ()
        for section, text in segments:
            if self.stopped:
                break
            left, self._section = self._section, section
            if left == "tool" and section != "tool" and self._tools:
                unparsed, parsed = self._tool_calls(ended=True)
                content, calls = content + unparsed, calls + parsed
                if self.stopped:
                    break
            if section == "tool" and self._tools:
                self._call_text += text
            elif section == "reasoning":
                reasoning += text
            else:
                content += self._until_stop(text)
        return Chunk(content, reasoning, calls)

    def _until_stop(self, text: str) -> str:
        """What of the answer's text comes before a stop word, as far as it is certain."""
        self._stop_state, segments = TextStateMachine.split(self._stop_state, text)
        self.stopped = self._stop_state[0] is None
        return "".join(text for _, text in segments)

    def _tool_calls(self, ended: bool) -> tuple[str, tuple[dict[str, Any], ...]]:
        """The calls in the collected text. If it cannot be parsed: the text as it came, and no calls."""
        text, self._call_text = self._call_text, ""
        try:
            parsed = self._parse_call(text)
            calls = tuple(_openai_call(c) for c in (parsed if isinstance(parsed, list) else [parsed]))
        except Exception as e:  # each model family has its own parser, and they raise all sorts of errors
            logger.warning("a tool call could not be parsed (%s): passed on as text", type(e).__name__)
            return self._until_stop(self._call_markers[0] + text + self._call_markers[1] * ended), ()
        self.has_tool_calls = True
        self.stopped = self._one_call
        return "", calls[:1] if self._one_call else calls


_WHOLE = TextStateMachine().make_state()


class _WithoutCalls:
    """A tokenizer whose texts have no tool calls."""

    has_tool_calling = False

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _sections(tokenizer: Any, prompt: list[int], tools: bool, bare_call: bool) -> tuple:
    """The state of the machine that tells sections apart, at the beginning of a completion."""
    reasoning = is_reasoning(tokenizer, prompt)
    if bare_call:
        transitions = {"reasoning": [(tokenizer.think_end, "tool")] if reasoning else [], "tool": []}
        return TextStateMachine(transitions).make_state("reasoning" if reasoning else "tool")
    machine = make_text_state_machine(tokenizer if tools else _WithoutCalls(tokenizer))
    return machine.make_state(tokenizer.response_initial_state or ("reasoning" if reasoning else "normal"))


def _openai_call(parsed: dict[str, Any]) -> dict[str, Any]:
    """A parsed call in OpenAI's format. Some models write the arguments as a string of JSON.

    Raises:
        Exception: it is no call: it lacks a name, say, or its arguments are no object.
    """
    arguments = parsed.get("arguments", {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are not an object")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    function = {"name": str(parsed["name"]), "arguments": text}
    return {"id": str(parsed.get("id") or f"call_{uuid.uuid4().hex}"), "type": "function", "function": function}
