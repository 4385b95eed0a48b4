"""Tests of the tasks with exact answers."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from glass_mlx.evaluate import main
from glass_mlx.evaluation import exact
from glass_mlx.evaluation.questions import TASKS, Task, read_questions
from glass_mlx.evaluation.selectors import by_oracle, standard_selectors

RECALL = TASKS["recall"]


def short_questions(count: int) -> list[dict]:
    """Of all questions those with the shortest dialogues, of as many kinds."""
    questions = sorted(read_questions("recall"), key=lambda q: len(str(q["messages"])))
    of_kind = {q["kind"]: q for q in reversed(questions)}
    return sorted(of_kind.values(), key=questions.index)[:count]


def test_the_demo_model_recalls(demo):
    """Densely it mostly does, and the better the neurons, the more it keeps of that."""
    questions = read_questions("recall", 5)
    assert {q["kind"] for q in questions} == {"city", "date", "time", "name"}
    selectors = {"random": standard_selectors([])["random"], "oracle": by_oracle}
    done = []
    rows = exact.measure_task(*demo, Task(6), questions, selectors, [0.3], done.append)
    assert done == [5]
    accuracy = {name: row["accuracy"] for name, by_density in rows.items() for row in by_density.values()}
    assert accuracy["dense"] > 0.6
    assert accuracy["random"] < accuracy["oracle"] <= 1
    low, high = rows["dense"]["1"]["ci"]
    assert low < accuracy["dense"] < high
    assert rows["dense"]["1"]["against"] == {}
    loss = rows["random"]["0.3"]["against"]["dense"]
    assert loss["difference"] == accuracy["random"] - accuracy["dense"]
    assert loss["ci"][0] <= loss["difference"] <= loss["ci"][1] <= 0


def test_a_right_answer(demo):
    model, tokenizer = demo
    batch = exact.QuestionBatch(model, tokenizer, RECALL, short_questions(1))
    answer = batch.questions[0]["checks"]["begins"]
    for text, right in {f"{answer} it is.": True, "No.": False, f"Not {answer}": False}.items():
        said = [*batch.begin[0], *tokenizer.encode(text, add_special_tokens=False)]
        assert batch.marks([said]) == [right]
    said = tokenizer.encode(answer, add_special_tokens=False)
    assert batch.marks([[*batch.begin[0], tokenizer.eos_token_id, *said]]) == [False]


def test_an_answer_that_should_have_ended(demo):
    model, tokenizer = demo
    question = {"kind": "-", "messages": [{"role": "user", "content": "Hi"}], "begin": "", "checks": {"words": [1, 9]}}
    said = tokenizer.encode("One two three", add_special_tokens=False)
    ended = [*said, tokenizer.eos_token_id, *said, *said, *said]
    for whole, answer, right in [(True, ended, True), (True, said, False), (False, said, True)]:
        batch = exact.QuestionBatch(model, tokenizer, Task(99, whole), [question])
        assert batch.begin == [[]] and batch.marks([answer]) == [right]
    assert exact.QuestionBatch(model, tokenizer, Task(len(said), True), [question]).marks([ended]) == [False]


def test_the_beginning_is_decoded_sparsely(demo):
    """The prompt ends where the answer begins: without any neurons its first words lead nowhere."""
    model, tokenizer = demo
    batch = exact.QuestionBatch(model, tokenizer, RECALL, short_questions(2))
    for q, prompt, begin in zip(batch.questions, batch.prompts, batch.begin):
        assert tokenizer.decode(begin).strip() == q["begin"] and q["begin"] not in tokenizer.decode(prompt)
    nothing = [mx.zeros((2, block.size), mx.bool_) for block in model.blocks]
    assert not any(batch.marks(batch.answer(nothing)))


def test_differences_are_paired():
    """What changes from question to question alike for both does not widen the interval."""
    theirs = np.arange(60) % 2 == 0
    ours = theirs.copy()
    ours[:6:2] = False
    row = exact.summarise(ours, ["a", "b"] * 30, {"dense": theirs})
    assert row["accuracy"] == pytest.approx(27 / 60) and row["kinds"] == {"a": 0.9, "b": 0.0}
    loss = row["against"]["dense"]
    assert loss["difference"] == pytest.approx(-0.05)
    assert loss["ci"][1] - loss["ci"][0] < 0.15 < row["ci"][1] - row["ci"][0]


def test_tasks_by_command_line(invoke, tiny_dir, written, tmp_path):
    out = tmp_path / "exact.json"
    options = ["--model", tiny_dir, "--stats", written, "--exact", "recall,arithmetic", "--limit", 2, "--json", out]
    outcome = invoke(main, *options)
    assert outcome.code == 0, outcome.err
    assert "recall: 2 questions" in outcome.out and "arithmetic: 2 questions" in outcome.out
    result = json.loads(out.read_text())
    assert result["questions"] == {"recall": 2, "arithmetic": 2}
    for rows in result["exact"].values():
        assert set(rows) == {"dense", "griffin", "glass-i", "glass"} and 0 <= rows["glass"]["0.5"]["accuracy"] <= 1
        assert set(rows["glass"]["0.5"]["against"]) == {"dense", "griffin"}
        assert set(rows["griffin"]["0.5"]["against"]) == {"dense"}


def test_without_global_ranks(invoke, tiny_dir):
    outcome = invoke(main, "--model", tiny_dir, "--exact", "recall", "--limit", 1, "--json")
    assert outcome.code == 0, outcome.err
    assert set(json.loads(outcome.out)["exact"]["recall"]) == {"dense", "griffin", "glass"}


def test_an_unknown_task(invoke, tiny_dir):
    outcome = invoke(main, "--model", tiny_dir, "--exact", "recall,history")
    assert outcome.code == 2 and "'history' is not one of recall, facts" in outcome.err
