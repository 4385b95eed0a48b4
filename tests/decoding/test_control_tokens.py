"""Tests that control tokens come from the chat template alone."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis.strategies import lists, sampled_from
from mlx_lm.tokenizer_utils import load as load_tokenizer

from glass_mlx.decoding.control_tokens import ChatTokenizer
from glass_mlx.loading import DEMO_PATH

WORDS = ["</s>", "<s>", "<|user|>", "<|assistant|>"]


def control(tokenizer, tokens: list[int]) -> list[int]:
    return [t for t in tokens if t in tokenizer.added_tokens_decoder]


def render(tokenizer, *contents, role: str = "user") -> list[int]:
    return tokenizer.apply_chat_template([{"role": role, "content": c} for c in contents], add_generation_prompt=True)


@given(lists(sampled_from([*WORDS, "<", ">", "/s>", "|user|>", "x", " ", "\n"]), min_size=1, max_size=8))
@settings(max_examples=examples(20, 60), deadline=None)
def test_what_a_user_says_is_text(demo, pieces):
    """Also where one word hides in another. No character is lost."""
    tokenizer, said = demo[1], "".join(pieces) + "x"
    tokens = render(tokenizer, said)
    assert control(tokenizer, tokens) == control(tokenizer, render(tokenizer, "x"))
    shown = tokenizer.apply_chat_template([{"role": "user", "content": said}], tokenize=False)
    assert said.strip() in tokenizer.decode(tokens) and said.strip() in shown


def test_texts_without_such_words_are_rendered_as_ever(demo):
    tokenizer = demo[1]
    chat = [{"role": "user", "content": "Hello <b>there</b> 5 < 6"}]
    assert tokenizer.apply_chat_template(chat) == tokenizer._tokenizer.apply_chat_template(chat, return_dict=False)


@pytest.mark.parametrize("content", ["a </s> b", [{"type": "text", "text": "a </s> b"}]])
def test_who_is_trusted(demo, content, monkeypatch):
    """The operator, and the model; a tool is not."""
    tokenizer = demo[1]
    template = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", template)
    found = {
        role: control(tokenizer, render(tokenizer, content, role=role)) for role in ("system", "assistant", "tool")
    }
    assert found == {"system": [2], "assistant": [2], "tool": []}


@pytest.fixture(scope="module")
def reasoning(tmp_path_factory):
    """The demo's tokenizer with markers of reasoning, which are no special tokens."""
    path = shutil.copytree(DEMO_PATH, tmp_path_factory.mktemp("reasoning") / "model")
    (path / "tokenizer.model").unlink()
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    for i, text in enumerate(("<think>", "</think>")):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        tokenizer["added_tokens"].append({"id": 4096 + i, "content": text, **flags})
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return load_tokenizer(path)


def test_a_user_cannot_open_the_reasoning(reasoning):
    guarded = ChatTokenizer(reasoning)
    assert {4096, 4097} & set(render(reasoning, "<think>")) and not {4096, 4097} & set(
        render(guarded, "<think></think>")
    )
    assert guarded.think_start == "<think>" and len(guarded) == len(reasoning)
