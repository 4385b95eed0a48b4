"""Tests of reading prompts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from glass_mlx.errors import GlassError
from glass_mlx.evaluation import prompts
from glass_mlx.evaluation.names import DEFAULT_PROMPTS, PROMPT_SETS
from glass_mlx.evaluation.prompts import read_prompts


def test_the_bundled_prompts_are_read_without_a_second_bos(demo):
    _, tokenizer = demo
    prompts = read_prompts(DEFAULT_PROMPTS, tokenizer, None)
    assert len(prompts) == 32 and all(p.count(tokenizer.bos_token_id) == 1 for p in prompts)


def test_the_bundled_sets(demo):
    _, tokenizer = demo
    sets = {name: read_prompts(name, tokenizer) for name in PROMPT_SETS}
    assert {name: len(prompts) for name, prompts in sets.items()} == {"prose": 20, "dialogue": 12, "chats": 40}
    assert read_prompts("chats,prose", tokenizer) == sets["chats"] + sets["prose"]
    assert read_prompts(DEFAULT_PROMPTS, tokenizer, 21) == sets["prose"] + sets["dialogue"][:1]
    with pytest.raises(GlassError, match="prose,poems.* the bundled sets are prose, dialogue, chats"):
        read_prompts("prose,poems", tokenizer)


def test_the_chats_are_of_many_lengths_and_all_different():
    lines = (Path(prompts.__file__).with_name("chats.jsonl")).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["messages"][0]["content"] for line in lines]
    words = sorted(len(text.split()) for text in texts)
    assert words[0] < 9 and words[-1] > 100 and len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    "line", ["{", "3", "[]", "{}", '{"text": 3}', '{"messages": [3]}', '{"messages": [{"role": "user"}]}']
)
def test_bad_prompts(tmp_path, demo, line):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(GlassError, match='bad.jsonl:2 has no "text" and no "messages"'):
        read_prompts(str(file), demo[1], None)


def test_prompts_by_template(tmp_path, demo, tiny_dir):
    messages = [{"role": "user", "content": "Hello"}]
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n\n" + json.dumps({"text": "Once"}))
    tokenizer = demo[1]
    [chat, text] = read_prompts(str(file), tokenizer, None)
    assert chat == tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert text == tokenizer.encode("Once")
    without = SimpleNamespace(has_chat_template=False, encode=list)
    assert read_prompts(str(file), without, 1) == [list("Hello\n\n")]
