"""Tests of tasks: the recall questions, and lm-evaluation-harness where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys

import mlx.core as mx
import pytest

from glass_mlx.decoding.stream import generate
from glass_mlx.errors import GlassError
from glass_mlx.evaluate import main
from glass_mlx.evaluation import lm_eval_tasks as tasks
from glass_mlx.evaluation import recall
from glass_mlx.evaluation.selectors import by_oracle, standard_selectors
from glass_mlx.model.config import GlassConfig

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed (glass_mlx[eval])"
)

YAML = """
task: fruit
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
"""


@pytest.fixture
def fruit(tmp_path, tiny, monkeypatch):
    """A local task, of which the random model knows every second answer."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    model, tokenizer = tiny

    def fruit(kind="generate_until"):
        docs = []
        for i, question in enumerate(["apples", "pears", "plums", "figs"]):
            messages = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            answer = generate(model, tokenizer, prompt, max_tokens=6, density=1.0).split(".")[0]
            docs.append({"question": question, "answer": answer if i % 2 else "no fruit"})
        (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        (tmp_path / "fruit.yaml").write_text(YAML.format(file=tmp_path / "docs.jsonl", kind=kind))
        return tmp_path

    return fruit


@needs_lm_eval
def test_a_local_task(fruit, tiny):
    configs = {"dense": {1.0: GlassConfig(1.0)}, "griffin": {0.1: GlassConfig(0.1, 0.0, "activation")}}
    rows = tasks.run_tasks(*tiny, ["fruit"], configs, str(fruit()))
    assert rows["dense"]["1"]["fruit"]["exact_match,none"] == 0.5 and rows["dense"]["1"]["fruit"]["samples"] == 4
    assert set(rows["griffin"]) == {"0.1"}
    assert rows["griffin"]["0.1"]["fruit"]["exact_match,none"] <= 0.5


@needs_lm_eval
def test_a_task_by_command_line(fruit, invoke, tiny_dir):
    options = ["--model", tiny_dir, "--tasks", "fruit", "--include-path", fruit(), "--limit", 2, "--density", 0.9]
    outcome = invoke(main, *options)
    assert outcome.code == 0, outcome.err
    assert "fruit: 2 questions" in outcome.out and "glass" in outcome.out
    outcome = invoke(main, *options, "--json")
    assert set(json.loads(outcome.out.splitlines()[-1])["tasks"]) == {"dense", "griffin", "glass"}


@needs_lm_eval
def test_tasks_that_cannot_be_run(fruit, tiny):
    configs = tasks.standard_configs([0.5])
    with pytest.raises(GlassError, match="no task 'vegetables'"):
        tasks.run_tasks(*tiny, ["vegetables"], configs)
    with pytest.raises(GlassError, match="Only generation tasks"):
        tasks.run_tasks(*tiny, ["fruit"], configs, str(fruit("loglikelihood")))


def test_without_lm_eval(invoke, tiny_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    outcome = invoke(main, "--model", tiny_dir, "--tasks", "gsm8k")
    assert outcome.code == 1
    assert "glass_mlx[eval]" in outcome.err.splitlines()[-1]


def test_the_demo_model_recalls(demo):
    """Densely it mostly does, and the better the neurons, the more it keeps of that."""
    questions = recall.read_questions(8)
    assert {q["kind"] for q in questions} == {"city", "date", "time", "name"}
    selectors = {"random": standard_selectors([])["random"], "oracle": by_oracle}
    rows = recall.measure_recall(*demo, selectors, [0.5], questions)
    accuracy = {name: row["accuracy"] for name, by_density in rows.items() for row in by_density.values()}
    assert accuracy["dense"] > 0.6
    assert accuracy["random"] < accuracy["oracle"] <= 1
    low, high = rows["dense"]["1"]["ci"]
    assert low < accuracy["dense"] < high


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
