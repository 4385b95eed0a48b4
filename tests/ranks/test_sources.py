"""Tests of where the tokens come from that global statistics are measured on."""

from __future__ import annotations

import json
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import pytest

import glass_mlx
from glass_mlx import GlassError
from glass_mlx.ranks import sources
from glass_mlx.ranks.sources import Source, dataset_rows, given_sequences, null_prompt, text_rows, user_turn


def small(model, tokenizer, **options) -> Source:
    return null_prompt(model, tokenizer, **{"sequences": 4, "length": 8, **options})


@pytest.fixture(params=["batched", "one by one"])
def caches(request, monkeypatch):
    """Caches that mlx-lm can batch, and such as it cannot."""
    if request.param == "one by one":
        monkeypatch.setattr(sources, "make_prompt_cache", lambda model: [SimpleNamespace()])
        monkeypatch.setattr(sources, "batch_generate", None)


@pytest.fixture
def tokenizer(tiny_dir):
    """A tokenizer of the test's own."""
    return glass_mlx.load(tiny_dir, stats=False)[1]


def test_mlx_lm_gives_token_ids(tiny):
    """What null_prompt needs of mlx-lm. Should this fail, its batch() must read them elsewhere."""
    out = mlx_lm.batch_generate(tiny[0].dense, tiny[1], [[1], [1]], max_tokens=3, return_token_ids=True)
    assert len(out.token_ids) == 2
    assert all(len(ids) <= 3 and all(isinstance(i, int) for i in ids) for ids in out.token_ids)


def test_null_prompt(tiny, caches):
    source = small(*tiny)
    first, second = source.batch(0), source.batch(1)
    assert source.domains == ("null prompt", "chat null prompt", "own conversation")
    assert source.batch(0) == first != second
    assert [len(source.batch(number)) for number in (0, 1, 2, 3, 6)] == [2, 2, 2, 4, 4]
    start = tiny[1].apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True)
    for row, begin in [(row, [1]) for row in first] + [(row, start) for row in second]:
        assert row[: len(begin)] == begin and 2 not in row and len(row) <= len(begin) + 8
    assert len({tuple(row) for row in first + second}) == 4


def test_own_conversation(tiny, caches):
    """A message that the model writes as the user, as the template frames it, and its answer."""
    source, tokenizer = small(*tiny, length=16), tiny[1]
    rows = source.batch(2)
    assert rows == source.batch(2) != small(*tiny, length=16, seed=1).batch(2)
    before, after = user_turn(tokenizer)
    for text in ("Hello", "47 of them?"):
        framed = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        assert framed[: len(before)] == before and framed[-len(after) :] == after
    for row in rows:
        end = next(i for i in range(len(before), len(row)) if row[i : i + len(after)] == after)
        assert row[: len(before)] == before and end - len(before) <= 4
        assert 0 < len(row) - end - len(after) <= 12


def test_a_message_ends_where_the_template_ends_it(tiny, monkeypatch):
    """Not every family ends a user's message with an end token."""
    before, after = user_turn(tiny[1])
    monkeypatch.setattr(sources, "_sample", lambda model, tokenizer, prompts, *_: [[7, 8, *after, 9]] * len(prompts))
    assert small(*tiny).batch(2) == [[*before, 7, 8, *after, 7, 8, *after, 9]] * 2


def test_no_frame_no_conversation(tiny, model_copy):
    (model_copy / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    domains = small(tiny[0], glass_mlx.load(model_copy, stats=False)[1]).domains
    assert domains == ("null prompt", "chat null prompt")


@pytest.mark.parametrize("every", [1, 3])
def test_end_token_ends_a_sequence(tiny, tokenizer, caches, every):
    tokenizer.eos_token_ids = set(range(0, 4096, every))
    rows = small(tiny[0], tokenizer, length=20).batch(3)
    assert len(rows) == 4 and min(map(len, rows)) < 21
    assert not any(token in tokenizer.eos_token_ids for row in rows for token in row[1:])


def test_temperature(tiny, caches):
    [first, *others] = small(*tiny, temperature=0).batch(0)
    assert len(first) > 1 and all(row == first for row in others)


def test_random_state_stays(tiny, caches):
    mx.random.seed(7)
    expected = mx.random.uniform(shape=(3,)).tolist()
    mx.random.seed(7)
    small(*tiny).batch(0)
    assert mx.random.uniform(shape=(3,)).tolist() == expected


def test_without_a_chat_template_bos_alone(tiny, model_copy):
    (model_copy / "chat_template.jinja").unlink()
    assert small(tiny[0], glass_mlx.load(model_copy, stats=False)[1]).domains == ("null prompt",)
    assert small(*tiny, chat=False).domains == ("null prompt",)


def test_chat(tiny, caches):
    source = small(*tiny, chat=True)
    start = tiny[1].apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True)
    assert source.domains == ("chat null prompt", "own conversation")
    for row in source.batch(0):
        assert row[: len(start)] == start and len(start) < len(row) <= len(start) + 8


@pytest.mark.parametrize("template", [None, "{{ raise_exception('say something') }}"])
def test_chat_refused(tiny, model_copy, template):
    file = model_copy / "chat_template.jinja"
    file.write_text(template) if template else file.unlink()
    tokenizer = glass_mlx.load(model_copy, stats=False)[1]
    with pytest.raises(GlassError, match="leave out --chat"):
        small(tiny[0], tokenizer, chat=True)


def test_no_bos(tiny, tokenizer):
    """A family without BOS begins with its end token."""
    no_bos = SimpleNamespace(bos_token_id=None, eos_token_id=2, encode=tokenizer.encode)
    assert text_rows("a b", no_bos, 99)[0][0] == 2


def test_text_rows(tokenizer):
    text = "The old house stood at the end of the street. " * 3
    ids = tokenizer.encode(text, add_special_tokens=False)
    rows = text_rows(text, tokenizer, 10)
    assert [token for row in rows for token in row[1:]] == ids
    assert all(row[0] == 1 for row in rows) and {len(row) for row in rows[:-1]} == {11}
    assert text_rows("", tokenizer, 10) == []


def test_dataset_rows(tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    items = [{"text": "a b c"}, {"prompt": "a b", "completion": " c"}, {"messages": messages}, {"text": "a " * 99}]
    rows = dataset_rows([json.dumps(item) for item in items], tokenizer, 40)
    assert rows[0] == rows[1] == [1, *tokenizer.encode("a b c", add_special_tokens=False)]
    assert rows[2] == tokenizer.apply_chat_template(messages)[:41]
    assert len(rows[3]) == 41


@pytest.mark.parametrize("line", ["{", "3", "[]", '"text"', "{}", '{"text": 3}', '{"prompt": "a"}', '{"messages": 3}'])
def test_bad_dataset_line(tokenizer, line):
    with pytest.raises(GlassError, match='Line 2 of the data set has no "text"'):
        dataset_rows(['{"text": "fine"}', line], tokenizer, 9)


def test_given_sequences(rows):
    source = given_sequences("text", rows, 3, {"file": "x.txt"})
    assert [source.batch(n) for n in range(4)] == [rows[:2], rows[2:5], rows[5:], []]
    assert source.settings["file"] == "x.txt"
    assert source.settings["digest"] != given_sequences("text", rows[1:], 3).settings["digest"]
