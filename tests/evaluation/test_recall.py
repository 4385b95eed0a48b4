"""Tests of the recall questions."""

from __future__ import annotations

import json

import mlx.core as mx

from glass_mlx.evaluate import main
from glass_mlx.evaluation import recall
from glass_mlx.evaluation.selectors import by_oracle, standard_selectors


def test_the_demo_model_recalls(demo, monkeypatch):
    """Densely it mostly does, and the better the neurons, the more it keeps of that."""
    monkeypatch.setattr(recall, "_TOKENS", 8)
    by_length = sorted(recall.read_questions(), key=lambda q: -len(str(q["messages"])))
    questions = list({q["kind"]: q for q in by_length}.values())  # the shortest of each kind
    assert {q["kind"] for q in questions} == {"city", "date", "time", "name"}
    selectors = {"random": standard_selectors([])["random"], "oracle": by_oracle}
    rows = recall.measure_recall(*demo, selectors, [0.5], questions)
    accuracy = {name: row["accuracy"] for name, by_density in rows.items() for row in by_density.values()}
    assert accuracy["dense"] > 0.6
    assert accuracy["random"] < accuracy["oracle"] <= 1
    for by_density in rows.values():
        for row in by_density.values():
            low, high = row["ci"]
            assert low <= row["accuracy"] <= high


def test_the_questions_hold_their_answers(demo):
    questions = recall.read_questions()
    for q in questions:
        assert any(q["answer"] in m["content"] for m in q["messages"] if m["role"] == "user")
        assert q["answer"] not in q["begin"]
    assert len({json.dumps(q) for q in questions}) == len(questions) == 96


def test_a_right_answer(demo):
    model, tokenizer = demo
    batch = recall.QuestionBatch(model, tokenizer, recall.read_questions(1))
    answers = {
        f"{batch.questions[0]['answer']} it is.": True,
        "No.": False,
        f"Not {batch.questions[0]['answer']}": False,
    }
    for text, right in answers.items():
        said = [*batch.begin[0], *tokenizer.encode(text, add_special_tokens=False)]
        assert batch.marks([said]) == [right]
    ended = [*batch.begin[0], tokenizer.eos_token_id, *tokenizer.encode(next(iter(answers)), add_special_tokens=False)]
    assert batch.marks([ended]) == [False]


def test_the_beginning_is_decoded_sparsely(demo):
    """The prompt ends where the answer begins: without any neurons its first words lead nowhere."""
    model, tokenizer = demo
    batch = recall.QuestionBatch(model, tokenizer, recall.read_questions(2))
    for q, prompt, begin in zip(batch.questions, batch.prompts, batch.begin):
        assert tokenizer.decode(begin).strip() == q["begin"] and q["begin"] not in tokenizer.decode(prompt)
    nothing = [mx.zeros((2, block.size), mx.bool_) for block in model.blocks]
    assert not any(batch.marks(batch.answer(nothing)))


def test_recall_by_command_line(invoke, tiny_dir, written, tmp_path):
    out = tmp_path / "recall.json"
    options = ["--model", tiny_dir, "--stats", written, "--recall", "--limit", 4, "--arms", "glass", "--json", out]
    outcome = invoke(main, *options)
    assert outcome.code == 0, outcome.err
    assert "tiny: 4 questions" in outcome.out and "griffin" not in outcome.out
    rows = json.loads(out.read_text())["recall"]
    assert set(rows) == {"dense", "glass"} and 0 <= rows["glass"]["0.5"]["accuracy"] <= 1
