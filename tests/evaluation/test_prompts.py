"""Tests of reading prompts."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from glass_mlx.errors import GlassError
from glass_mlx.evaluation.prompts import PROMPTS, read_prompts


def test_the_bundled_prompts_are_read_without_a_second_bos(demo):
    _, tokenizer = demo
    prompts = read_prompts(str(PROMPTS), tokenizer, None)
    assert len(prompts) == 32 and all(p.count(tokenizer.bos_token_id) == 1 for p in prompts)


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
