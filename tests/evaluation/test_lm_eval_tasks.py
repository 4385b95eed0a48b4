"""Tests of tasks of lm-evaluation-harness, where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from glass_mlx.decoding.stream import generate
from glass_mlx.errors import GlassError
from glass_mlx.evaluate import main
from glass_mlx.evaluation import lm_eval_tasks as tasks
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
