"""Tasks with exact answers, for models whose perplexity hides what is lost.

The model answers the questions (``questions.py``) by itself with the most likely tokens, and rules tell whether an
answer is right (``checks.py``).

A selector sees only the conversation before it chooses: the beginning of an answer is decoded sparsely too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ..core.compensation import Sums
from ..decoding.prompt import render
from ..errors import GlassError
from ..model.glass_model import GlassModel
from .checks import is_right
from .free_running import PromptBatch
from .intervals import interval
from .questions import Task
from .selectors import Selector, is_compensated
from .tables import text_table
from .teacher_forcing import TextBatch, as_masks, collect_evidence

# Questions that are answered together.
_BATCH = 32


def measure_task(
    model: GlassModel,
    tokenizer: Any,
    task: Task,
    questions: list[dict[str, Any]],
    selectors: dict[str, Selector],
    densities: list[float],
    progress: Callable[[int], None] = lambda questions: None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """The share of questions that the model answers correctly on each selector's neurons.

    Args:
        model (GlassModel): the model.
        tokenizer: its tokenizer, with a chat template.
        task (Task): how its questions are answered.
        questions (list): of :func:`read_questions`.
        selectors (dict): functions that choose neurons, by name.
        densities (list[float]): to measure each selector at.
        progress: called with the number of questions done since the last call.

    Returns:
        dict: for each selector, ``dense`` included, and each density the figures of :func:`summarise`.

    Raises:
        GlassError: the model has no chat template, or one that rejects the conversations.
    """
    if not tokenizer.has_chat_template:
        raise GlassError("This model has no chat template, but the questions are conversations: use another model.")
    right: dict[str, dict[float, list[bool]]] = {"dense": {1.0: []}}
    right |= {name: {d: [] for d in densities} for name in selectors}
    for first in range(0, len(questions), _BATCH):
        batch = QuestionBatch(model, tokenizer, task, questions[first : first + _BATCH])
        dense = batch.answer()
        right["dense"][1.0] += batch.marks(dense)
        evidence, _ = collect_evidence(model, TextBatch(batch.prompts, dense))
        evidence.first = first
        for evidence.density in densities:
            for name, selector in selectors.items():
                masks = as_masks(model, selector(evidence))
                sums = evidence.sums if is_compensated(selector) else None
                right[name][evidence.density] += batch.marks(batch.answer(masks, sums))
        progress(len(batch.prompts))
    marks = {name: {d: np.array(r) for d, r in rows.items()} for name, rows in right.items()}
    kinds = [q["kind"] for q in questions]
    return {
        name: {f"{d:g}": summarise(r, kinds, _rivals(marks, name, d)) for d, r in rows.items()}
        for name, rows in marks.items()
    }


class QuestionBatch:
    """Questions that are answered together.

    Attributes:
        prompts (list[list[int]]): the tokens of each conversation, up to where its answer begins.
        begin (list[list[int]]): the tokens of each answer's beginning.
    """

    def __init__(self, model: GlassModel, tokenizer: Any, task: Task, questions: list[dict[str, Any]]):
        self.tokenizer, self.task, self.questions = tokenizer, task, questions
        self.prompts, self.begin = map(list, zip(*(_tokens(tokenizer, q) for q in questions)))
        self._read = PromptBatch(model, self.prompts)

    def answer(self, masks: list[mx.array] | None = None, sums: list[Sums] | None = None) -> list[list[int]]:
        """The most likely answers, with their beginnings, decoded on the neurons of the masks [B, F]; with the prompts'
        sums, the others are predicted."""
        tokens = max(map(len, self.begin)) + self.task.tokens
        return self._read.sample(tokens, 0, masks, self.begin, sums)

    def marks(self, answers: list[list[int]]) -> list[bool]:
        """Whether each answer is right."""
        texts = (self._text(begin, answer) for begin, answer in zip(self.begin, answers))
        return [text is not None and is_right(text, q["checks"]) for q, text in zip(self.questions, texts)]

    def _text(self, begin: list[int], answer: list[int]) -> str | None:
        """What follows the beginning of an answer, or None if it should have ended."""
        rest = answer[len(begin) :][: self.task.tokens]
        ends = [i for i, token in enumerate(rest) if token in self.tokenizer.eos_token_ids]
        if self.task.whole and not ends:
            return None
        return self.tokenizer.decode(rest[: ends[0]] if ends else rest)


def _tokens(tokenizer: Any, question: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The tokens of a question's conversation, and those of the answer's beginning."""
    prompt = list(render(tokenizer, question["messages"], add_generation_prompt=True))
    if not question["begin"]:
        return prompt, []
    messages = [*question["messages"], {"role": "assistant", "content": question["begin"]}]
    whole = list(render(tokenizer, messages, continue_final_message=True))
    if whole[: len(prompt)] != prompt:  # the template inserts something of its own before an answer
        return prompt, tokenizer.encode(question["begin"], add_special_tokens=False)
    return prompt, whole[len(prompt) :]


def _rivals(marks: dict[str, dict[float, np.ndarray]], name: str, density: float) -> dict[str, np.ndarray]:
    """What a selector is compared with, question by question: the dense model, and GRIFFIN at the same density."""
    if name == "dense":
        return {}
    griffin = marks.get("griffin", {}) if name != "griffin" else {}
    return {"dense": marks["dense"][1.0], **({"griffin": griffin[density]} if griffin else {})}


def summarise(right: np.ndarray, kinds: list[str], rivals: dict[str, np.ndarray]) -> dict[str, Any]:
    """A selector's answers in figures.

    Args:
        right (np.ndarray): which questions were answered correctly, [questions] bool.
        kinds (list[str]): the questions' kinds.
        rivals (dict): the same as ``right``, for what it is compared with.

    Returns:
        dict: ``accuracy``, its 95 % interval ``ci`` over questions, ``kinds``: the accuracy by kind of question, and
        ``against``: for each rival the ``difference`` in accuracy (positive is better) with its paired ``ci``.
    """
    by_kind = {kind: float(right[[k == kind for k in kinds]].mean()) for kind in dict.fromkeys(kinds)}
    against = {}
    for name, theirs in rivals.items():
        differences = right.astype(float) - theirs
        against[name] = {"difference": float(differences.mean()), "ci": interval(differences)}
    return {"accuracy": float(right.mean()), "ci": interval(right), "kinds": by_kind, "against": against}


def table(result: dict[str, Any]) -> str:
    """The result of ``evaluate --exact --json`` as text: for each task the accuracy by selector and density."""
    lines = [f"{result['model']}; [95 % interval], of differences paired"]
    for task, rows in result["exact"].items():
        kinds = list(rows["dense"]["1"]["kinds"])
        lines += ["", f"{task}: {result['questions'][task]} questions"]
        cells = []
        for name, by_density in rows.items():
            for density, row in by_density.items():
                by_kind = [f"{row['kinds'][kind]:.0%}" for kind in kinds]
                right = _with_interval(row["accuracy"], row["ci"], ".1%")
                versus = [_difference(row["against"].get(rival)) for rival in ("dense", "griffin")]
                cells.append([name, density, right, *versus, *by_kind])
        lines += text_table(("", "density", "right", "- dense", "- griffin", *kinds), cells, names=2)
    return "\n".join(lines)


def _difference(against: dict[str, Any] | None) -> str:
    return "" if against is None else _with_interval(against["difference"], against["ci"], "+.1%")


def _with_interval(value: float, ci: list[float], form: str) -> str:
    return f"{value:{form}} [{ci[0]:{form}}, {ci[1]:{form}}]"
