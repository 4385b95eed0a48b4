"""The bundled tasks with exact answers, and their questions.

``recall`` is a conversation in which the user names a city, a date, a time or a place, and the beginning of an answer
whose next words are that name; in ``arithmetic`` the next word is a number. ``facts`` asks for what a paragraph says,
``instructions`` for an answer of a certain form, ``code`` for a function in Python.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """How the questions of a task are answered.

    Attributes:
        tokens (int): of an answer after its beginning, at most.
        whole (bool): whether an answer that has not ended by then is wrong.
    """

    tokens: int
    whole: bool = False


TASKS = {
    "recall": Task(16),
    "facts": Task(24),
    "arithmetic": Task(8),
    "instructions": Task(80, whole=True),
    "code": Task(128),
}


def read_questions(task: str, limit: int | None = None) -> list[dict[str, Any]]:
    """A task's questions, each with ``kind``, ``messages``, ``begin`` (of the answer) and ``checks``; at most
    ``limit``, of every kind."""
    lines = Path(__file__).with_name(f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [{"begin": "", **json.loads(line)} for line in lines]
    return questions[:: max(1, len(questions) // limit)][:limit] if limit else questions
