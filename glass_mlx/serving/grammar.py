"""Answers of a given form: JSON of a schema, and calls of given tools. A grammar masks what cannot come next.

The grammars are llguidance's: wheels of 3 MB for macOS and Linux without dependencies, with limits on the size of a
schema and on the work for a token. (Of its like, xgrammar needs torch, and outlines-core compiles a schema for the
whole vocabulary first.) It is imported when the first request needs it.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import BadRequest
from .request import Request

# Models write a space or a line break before JSON, and between its parts; without a limit some would never end.
_LEAD = r"/[ \n]{0,2}/"
_BETWEEN = r"[ \n\t\r]{1,40}"
_PROBE = '{"name": "f", "arguments": {"x": 1}}'


class Grammars:
    """Makes the grammars of answers for one model's tokenizer."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @cached_property
    def writes_calls_as_json(self) -> bool:
        """Whether the model's own form of tool calls is JSON between two markers."""
        tokenizer = self.tokenizer
        if not (tokenizer.tool_call_start and tokenizer.tool_call_end):
            return False
        try:
            return tokenizer.tool_parser(_PROBE, None) == json.loads(_PROBE)
        except Exception:  # each model family has its own parser, and they raise all sorts of errors
            return False

    def forces_bare_call(self, request: Request) -> bool:
        """Whether the answer is a call without markers, because the model has none, or another form than JSON."""
        return bool(request.forced_tools) and not self.writes_calls_as_json

    def processor(self, request: Request, prompt: list[int]) -> GrammarProcessor | None:
        """A logits processor for the answer to a request; None if the answer may be anything.

        Raises:
            BadRequest: a schema is invalid, contradictory or too large, or it is to be kept strictly and says what
                cannot be enforced; or the library is missing.
        """
        rules = self._rules(request)
        if rules is None:
            return None
        grammar = "\n".join(["%llguidance {}", *rules])
        limits = self._library.LLParserLimits(verbose_errors=False)
        matcher = self._library.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        what = "response_format" if request.schema is not None and not request.forced_tools else "tools"
        if matcher.is_error() or not self._can_begin(matcher):
            reason = _reason(matcher) if matcher.is_error() else "nothing is of this form."
            raise BadRequest(f"{what}: the schema cannot be used: {reason}", what)
        return GrammarProcessor(matcher, self.tokenizer, prompt, what)

    def _can_begin(self, matcher: Any) -> bool:
        """Whether an answer can have more than the white space before it."""
        first = np.flatnonzero(_tokens(matcher.compute_bitmask()))
        return any(self._vocabulary.decode_bytes([token]).strip() for token in first.tolist())

    @cached_property
    def _library(self) -> Any:
        try:
            import llguidance
        except ModuleNotFoundError as e:
            raise BadRequest(
                "Structured output needs llguidance where the server runs: pip install 'glass_mlx[server]'."
            ) from e
        return llguidance

    @cached_property
    def _vocabulary(self) -> Any:
        """The tokenizer in llguidance's form; for a large vocabulary it takes seconds to make."""
        slices = self._library.LLTokenizer.json_slices()
        from llguidance.hf import from_tokenizer  # needs what _library has imported

        try:
            ends = sorted(self.tokenizer.eos_token_ids)
            return from_tokenizer(self.tokenizer._tokenizer, eos_token=ends, slices=slices)
        except ValueError as e:
            raise BadRequest("Structured output needs a fast tokenizer, which this model has not.") from e

    def _rules(self, request: Request) -> list[str] | None:
        """The grammar of a request's answer, in llguidance's variant of Lark; None if the answer may be anything."""
        tools, marked = [tool["function"] for tool in request.tools or ()], self.writes_calls_as_json
        if request.forced_tools:
            tools = [tool for tool in tools if tool["name"] in request.forced_tools]
        calls = [f"call: {' | '.join(map(_call, tools))}"] if tools else []
        if tools and marked:
            begin, end = self._marker(self.tokenizer.tool_call_start), self._marker(self.tokenizer.tool_call_end)
            calls += [f"marked: {begin} rest", f"rest: {_LEAD} call {_LEAD} {end}"]
        if request.forced_tools:
            return [f"start: {_LEAD} {'marked' if marked else 'call'}", *calls]
        if request.schema is not None:
            answer = f"answer: %json {_options(request.schema, request.strict_schema)}"
            if tools and marked:
                return [f"start: {_LEAD} (answer | marked)", answer, *calls]
            return [f"start: {_LEAD} answer", answer]
        if marked and any(tool.get("strict") for tool in tools):
            lazy = "" if begin.startswith("<[") else "[lazy]"  # the text ends where the marker is first found
            return ["start: (said rest)* TEXT", f"said{lazy}: TEXT {begin}", r"TEXT: /(.|\n)*/", *calls]
        return None

    def _marker(self, text: str) -> str:
        """A marker as a symbol: the token that stands for it, if it is a control token, or else its characters."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        is_control = len(tokens) == 1 and self._vocabulary.is_special_token(tokens[0])
        return f"<[{tokens[0]}]>" if is_control else json.dumps(text)


class GrammarProcessor:
    """A logits processor, in mlx-lm's sense, for one answer.

    Reasoning may be anything; the grammar holds from where it ends. The tokens seen so far may be others than in the
    last call: drafts are taken back.

    Attributes:
        warnings (list[str]): what of the schema is not enforced.
    """

    def __init__(self, matcher: Any, tokenizer: Any, prompt: list[int], field: str):
        self._matcher, self._tokenizer, self._field = matcher, tokenizer, field
        self._ends = frozenset(tokenizer.eos_token_ids)
        self._followed: list[int] = []  # what the matcher has consumed
        self._before: int | None = None  # tokens of the prompt that processors are shown
        self._reasons = is_reasoning(tokenizer, prompt)
        self.warnings = [_line(warning) for warning in matcher.get_grammar_warnings()]

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Mask logits [1, vocabulary] that follow tokens [n]."""
        if self._before is None:
            self._before = tokens.size
        said = tokens[self._before :].tolist()
        begin = self._answer_begins(said)
        if begin is None:
            return logits
        self._follow(said[begin:])
        mask = self._allowed(logits.shape[-1])
        if not said and self._tokenizer.has_thinking and len(self._tokenizer.think_start_tokens) == 1:
            mask[self._tokenizer.think_start_tokens[0]] = True
        if not mask.any():
            reason = _reason(self._matcher) if self._matcher.is_error() else "this model has no token for it."
            raise BadRequest(f"{self._field}: an answer of this form cannot go on: {reason}", self._field)
        return mx.where(mx.array(mask), logits, mx.array(-mx.inf, logits.dtype))

    def _answer_begins(self, said: list[int]) -> int | None:
        """Where the answer begins; None while the model is reasoning."""
        tokenizer = self._tokenizer
        if not self._reasons and not (tokenizer.has_thinking and said[:1] == list(tokenizer.think_start_tokens)):
            return 0
        end = tokenizer.find_think_end(said)
        return None if end < 0 else end + len(tokenizer.think_end_tokens)

    def _follow(self, answer: list[int]) -> None:
        """Bring the matcher to where the answer is."""
        end = next((i for i, token in enumerate(answer) if token in self._ends), len(answer))
        answer, known = answer[:end], self._followed
        common = next((i for i, (a, b) in enumerate(zip(answer, known)) if a != b), min(len(answer), len(known)))
        if common < len(known):
            self._matcher.rollback(len(known) - common)
        self._matcher.consume_tokens(answer[common:])
        self._followed = answer

    def _allowed(self, size: int) -> np.ndarray:
        """Which tokens may come next, bool [size]."""
        allowed = np.zeros(size, bool)
        complete = self._matcher.is_accepting()  # asked first: at a dead end the mask says so, too
        if not self._matcher.is_stopped():
            known = _tokens(self._matcher.compute_bitmask())[:size]
            allowed[: known.size] = known
        allowed[[end for end in self._ends if end < size]] = complete
        return allowed


def is_reasoning(tokenizer: Any, prompt: list[int]) -> bool:
    """Whether a prompt ends within reasoning, because the chat template has opened it."""
    return tokenizer.has_thinking and tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt)


def _tokens(bitmask: bytes) -> np.ndarray:
    """Which tokens a mask lets through, bool [vocabulary or a little more]."""
    return np.unpackbits(np.frombuffer(bitmask, np.uint8), bitorder="little").view(bool)


def _call(function: dict[str, Any]) -> str:
    """The rule of a call of a function. One that says nothing of its parameters takes none."""
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    begin = f'{{"name": {json.dumps(function["name"])}, "arguments": '
    return f'{json.dumps(begin)} %json {_options(schema, bool(function.get("strict")))} "}}"'


def _options(schema: dict[str, Any], strict: bool) -> str:
    """A schema with llguidance's options. Unless it is strict, what cannot be enforced is left out."""
    options = {"whitespace_pattern": _BETWEEN, "coerce_one_of": True, "lenient": not strict}
    return json.dumps({**(schema if _composes(schema) else _closed(schema)), "x-guidance": options})


# Where a schema has schemas by name, where it has values that look like schemas, and what says which keys may come.
_NAMED = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
_VALUES = ("enum", "const", "default", "examples", "required")
_OPEN = {"additionalProperties", "unevaluatedProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf"}


def _closed(schema: Any) -> Any:
    """A schema whose objects have the properties that it lists and no others, unless it says something of others.

    By the standard they may have any, which nobody means who describes an answer; a weak model would never end.
    """
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            closed[key] = {name: _closed(item) for name, item in value.items()}
        else:
            closed[key] = value if key in _VALUES else _closed(value)
    return {"additionalProperties": False, **closed} if "properties" in schema and not _OPEN & schema.keys() else closed


def _composes(schema: Any) -> bool:
    """Whether objects are composed of several schemas, each of which lists a part of their properties."""
    if isinstance(schema, dict):
        parts = schema.get("allOf")
        return (isinstance(parts, list) and len(parts) > 1) or any(map(_composes, schema.values()))
    return isinstance(schema, list) and any(map(_composes, schema))


def _reason(matcher: Any) -> str:
    """The library's reason in a line, without its position in a grammar that the client has not seen."""
    return _line(matcher.get_error())


def _line(text: str) -> str:
    first = (text.splitlines() or [""])[0]
    return first.rpartition("failed to compile JSON schema: ")[2][:200].rstrip(". ") + "."
