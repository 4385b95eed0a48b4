"""Does an answer repeat what the user said? A task with exact answers, for models whose perplexity hides such losses.

A question is a conversation in which the user names a city, a date, a time or a place, and the beginning of an answer
whose next words are that name. The model continues by itself with the most likely tokens. The beginning is decoded
sparsely too: a selector sees only the conversation before it chooses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..decoding.prompt import render
from ..errors import GlassError
from ..model.glass_model import GlassModel
from .free_running import sample_continuations
from .intervals import interval
from .selectors import Selector
from .teacher_forcing import TextBatch, as_masks, collect_evidence

QUESTIONS = Path(__file__).parent / "recall.jsonl"

# Tokens of an answer after its beginning, and questions that are answered together.
_TOKENS = 16
_BATCH = 32


def read_questions(limit: int | None = None) -> list[dict[str, Any]]:
    """The questions, each with ``kind``, ``messages``, ``begin`` and ``answer``; at most ``limit``, of every kind."""
    questions = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    return questions[:: max(1, len(questions) // limit)][:limit] if limit else questions


def measure_recall(
    model: GlassModel,
    tokenizer: Any,
    selectors: dict[str, Selector],
    densities: list[float],
    questions: list[dict[str, Any]],
) -> dict[str, dict[str, dict[str, Any]]]:
    """The share of questions that the model answers correctly on each selector's neurons.

    Returns:
        dict: for each selector, ``dense`` included, and each density ``accuracy``, its 95 % interval ``ci`` over
        questions, and ``kinds``: the accuracy by kind of question.

    Raises:
        GlassError: the model has no chat template, or one that rejects the conversations.
    """
    if not tokenizer.has_chat_template:
        raise GlassError("This model has no chat template, but the questions are conversations: use another model.")
    right: dict[str, dict[float, list[bool]]] = {"dense": {1.0: []}}
    right |= {name: {d: [] for d in densities} for name in selectors}
    for first in range(0, len(questions), _BATCH):
        batch = QuestionBatch(model, tokenizer, questions[first : first + _BATCH])
        dense = batch.answer()
        right["dense"][1.0] += batch.marks(dense)
        evidence, _ = collect_evidence(model, TextBatch(batch.prompts, dense))
        evidence.first = first
        for evidence.density in densities:
            for name, selector in selectors.items():
                masks = as_masks(model, selector(evidence))
                right[name][evidence.density] += batch.marks(batch.answer(masks))
    kinds = [q["kind"] for q in questions]
    return {name: {f"{d:g}": _summary(np.array(r), kinds) for d, r in rows.items()} for name, rows in right.items()}


class QuestionBatch:
    """Questions that are answered together.

    Attributes:
        prompts (list[list[int]]): the tokens of each conversation, up to where its answer begins.
        begin (list[list[int]]): the tokens of each answer's beginning.
    """

    def __init__(self, model: GlassModel, tokenizer: Any, questions: list[dict[str, Any]]):
        self.model, self.tokenizer, self.questions = model, tokenizer, questions
        self.prompts, self.begin = map(list, zip(*(_tokens(tokenizer, q) for q in questions)))

    def answer(self, masks: list[mx.array] | None = None) -> list[list[int]]:
        """The most likely answers, with their beginnings, decoded on the neurons of the masks [B, F]."""
        tokens = max(map(len, self.begin)) + _TOKENS
        return sample_continuations(self.model, self.prompts, tokens, 0, masks, self.begin)

    def marks(self, answers: list[list[int]]) -> list[bool]:
        """Whether each answer goes on with the expected words."""
        return [self._is_right(*row) for row in zip(self.questions, self.begin, answers)]

    def _is_right(self, question: dict[str, Any], begin: list[int], answer: list[int]) -> bool:
        rest = answer[len(begin) :][:_TOKENS]
        ends = [i for i, token in enumerate(rest) if token in self.tokenizer.eos_token_ids]
        text = self.tokenizer.decode(rest[: ends[0]] if ends else rest)
        return text.strip().lower().startswith(question["answer"].lower())


def _tokens(tokenizer: Any, question: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The tokens of a question's conversation, and those of the answer's beginning."""
    prompt = list(render(tokenizer, question["messages"], add_generation_prompt=True))
    messages = [*question["messages"], {"role": "assistant", "content": question["begin"]}]
    whole = list(render(tokenizer, messages, continue_final_message=True))
    if whole[: len(prompt)] != prompt:  # the template inserts something of its own before an answer
        return prompt, tokenizer.encode(question["begin"], add_special_tokens=False)
    return prompt, whole[len(prompt) :]


def _summary(right: np.ndarray, kinds: list[str]) -> dict[str, Any]:
    by_kind = {kind: float(right[[k == kind for k in kinds]].mean()) for kind in dict.fromkeys(kinds)}
    return {"accuracy": float(right.mean()), "ci": interval(right), "kinds": by_kind}


def table(result: dict[str, Any]) -> str:
    """The result of ``evaluate --recall --json`` as text: accuracy by selector and density."""
    rows = result["recall"]
    kinds = list(rows["dense"]["1"]["kinds"])
    heads = "".join(f" {kind:>7}" for kind in kinds)
    lines = [f"{result['model']}: {result['questions']} questions", ""]
    lines.append(f"{'':>14} {'density':>8} {'right':>7} {'95 % interval':>15}{heads}")
    for name, by_density in rows.items():
        for density, row in by_density.items():
            low, high = row["ci"]
            cells = "".join(f" {row['kinds'][kind]:7.0%}" for kind in kinds)
            lines.append(f"{name:>14} {density:>8} {row['accuracy']:7.1%} [{low:6.1%}, {high:6.1%}]{cells}")
    return "\n".join(lines)
