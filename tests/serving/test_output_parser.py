"""Tests of parsing a completion: stop words, reasoning, tool calls. The text comes in parts of any size."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from mlx_lm.tool_parsers import json_tools

from glass_mlx.serving.output_parser import OutputParser
from glass_mlx.serving.request import Chunk

TOOLS = [{"type": "function", "function": {"name": "weather"}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


def tokenizer(thinking: bool = True, tools: bool = True) -> SimpleNamespace:
    """What the parser needs of mlx-lm's tokenizer wrapper, whose own attributes these are."""
    return SimpleNamespace(
        has_thinking=thinking,
        think_start="<think>",
        think_end="</think>",
        rfind_think_start=lambda tokens: len(tokens) - 1 - tokens[::-1].index(7) if 7 in tokens else -1,
        rfind_think_end=lambda tokens: len(tokens) - 1 - tokens[::-1].index(8) if 8 in tokens else -1,
        has_tool_calling=tools,
        tool_call_start=json_tools.tool_call_start if tools else None,
        tool_call_end=json_tools.tool_call_end if tools else None,
        tool_parser=json_tools.parse_tool_call if tools else None,
        structural_markers=(),
        response_transitions={},
        response_initial_state=None,
    )


def read(text: str, size: int, stop=(), prompt=(1,), given=TOOLS, options=None, **kind) -> tuple[Chunk, OutputParser]:
    parser = OutputParser(tokenizer(**kind), list(prompt), tuple(stop), given, **(options or {}))
    said, thought, calls = "", "", ()
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    for part in parts:
        got = parser.feed(part)
        said, thought, calls = said + got.text, thought + got.reasoning, calls + got.tool_calls
        if parser.stopped:
            break
    got = parser.finish()
    return Chunk(said + got.text, thought + got.reasoning, calls + got.tool_calls), parser


sizes = pytest.mark.parametrize("size", [1, 3, 1000])


@sizes
@pytest.mark.parametrize(
    "text, stop, said",
    [
        ("one two three", (), "one two three"),
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two"), "one "),
        ("one two three", ("four",), "one two three"),
        ("one two thr", ("three",), "one two thr"),  # held back, and given at the end
        ("aaab", ("ab",), "aa"),
        ("äöü€", ("€",), "äöü"),
    ],
)
def test_stop_words(size, text, stop, said):
    chunk, parser = read(text, size, stop)
    assert chunk.text == said
    assert parser.stopped == (said != text)


def test_what_may_become_a_stop_word_is_held_back():
    parser = OutputParser(tokenizer(), [1], ("STOP",))
    assert [parser.feed(c).text for c in "a STx"] == ["a", " ", "", "", "STx"]


@sizes
def test_reasoning(size):
    chunk, _ = read("<think>let me see</think>four", size)
    assert (chunk.reasoning, chunk.text) == ("let me see", "four")


@sizes
def test_reasoning_that_the_template_began(size):
    chunk, _ = read("let me see</think>four", size, prompt=(1, 8, 7))
    assert (chunk.reasoning, chunk.text) == ("let me see", "four")
    assert read("four", size, prompt=(1, 7, 8))[0].text == "four"


@sizes
def test_reasoning_cut_short(size):
    chunk, parser = read("<think>let me <", size)
    assert (chunk.reasoning, chunk.text, parser.is_reasoning) == ("let me <", "", True)


@sizes
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("ended", [True, False])
def test_tool_calls(size, count, ended):
    """The last one's end marker may be missing."""
    text = "I ask. " + CALL * count
    chunk, parser = read(text if ended else text.removesuffix("</tool_call>"), size)
    assert chunk.text == "I ask. " and parser.has_tool_calls
    assert [call["function"]["name"] for call in chunk.tool_calls] == ["weather"] * count
    assert json.loads(chunk.tool_calls[0]["function"]["arguments"]) == {"city": "Ulm"}
    assert len({call["id"] for call in chunk.tool_calls}) == count


@sizes
@pytest.mark.parametrize("stop, thought, said", [("two", "one two three", "four two"), ("four", "one two three", "")])
def test_stop_words_are_those_of_the_answer(size, stop, thought, said):
    chunk, parser = read("<think>one two three</think>four two", size, (stop,))
    assert (chunk.reasoning, chunk.text) == (thought, said.removesuffix(stop)) and parser.stopped


@sizes
def test_without_tools_nothing_is_a_call(size):
    chunk, parser = read(f"I ask. {CALL}!", size, given=None)
    assert chunk.text == f"I ask. {CALL}!" and not chunk.tool_calls and not parser.has_tool_calls


@sizes
def test_a_continued_text_has_no_sections(size):
    text = f"<think>hm</think>{CALL}"
    chunk, _ = read(text, size, options={"is_chat": False})
    assert (chunk.text, chunk.reasoning, chunk.tool_calls) == (text, "", ())


@sizes
def test_a_call_without_markers(size):
    """It may come after reasoning that the template began."""
    call = CALL.splitlines()[1]
    for text, prompt, thought in ((call, (1,), ""), (f"hm</think>{call}", (1, 8, 7), "hm")):
        chunk, parser = read(text, size, prompt=prompt, options={"bare_call": True})
        assert (chunk.text, chunk.reasoning) == ("", thought) and parser.has_tool_calls
        assert chunk.tool_calls[0]["function"]["name"] == "weather"
    assert read(call[:-3], size, options={"bare_call": True})[0].text == call[:-3]


@sizes
def test_one_call_is_enough(size):
    chunk, parser = read(f"{CALL}{CALL} more", size, options={"one_call": True})
    assert len(chunk.tool_calls) == 1 and parser.stopped and chunk.text == ""


@pytest.mark.parametrize("arguments", ['"{\\"city\\": \\"Ulm\\"}"', '{"city": "Ulm"}'])
def test_arguments_come_out_once(arguments):
    """Some models write them as a string."""
    chunk, _ = read(f'<tool_call>{{"name": "weather", "arguments": {arguments}}}</tool_call>', 5)
    assert json.loads(chunk.tool_calls[0]["function"]["arguments"]) == {"city": "Ulm"}


def test_no_marker_is_invented():
    """What is cut off within a call that cannot be read is passed on as it is."""
    assert read("Well. <tool_call>{broken", 3)[0].text == "Well. <tool_call>{broken"


@sizes
@pytest.mark.parametrize("inner", ["{broken", "[1]", "{}", '"text"', '{"name": "f", "arguments": [1]}'])
def test_a_broken_tool_call_is_passed_on_as_text(size, inner):
    text = f"<tool_call>{inner}</tool_call>done"
    chunk, parser = read(text, size)
    assert chunk.tool_calls == () and not parser.has_tool_calls
    assert chunk.text == text


def test_a_model_without_markers():
    chunk, _ = read(f"<think>{CALL}", 2, thinking=False, tools=False)
    assert chunk.text == f"<think>{CALL}"


def test_the_real_tokenizer(demo):
    """The attributes are there: this fails if mlx-lm renames them."""
    parser = OutputParser(demo[1], [1, 2], ("x",))
    assert parser.feed("axb").text == "a"
    assert parser.stopped
