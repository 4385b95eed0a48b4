"""What makes an answer right, as functions of its text: no model is asked.

A question (``questions.py``) names its checks: ``{"says": ["Lyon"], "words": [1, 15]}``.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any

_FENCE = re.compile(r"```\w*\n(.*?)(?:```|\Z)", re.DOTALL)
_ITEM = re.compile(r"\s*(?:[-*•]|\d+[.)])\s+\S")


def begins(text: str, words: str) -> bool:
    """Whether the text begins with these words, in whatever case; a number at their end must end there."""
    return re.match(rf"\s*{re.escape(words)}(?!\d)", text, re.IGNORECASE) is not None


def says(text: str, spellings: list[str]) -> bool:
    """Whether one of the spellings is in the text, as whole words and in whatever case."""
    return any(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) for words in spellings)


def avoids(text: str, word: str) -> bool:
    """Whether the text says something without this word."""
    return bool(text.strip()) and not says(text, [word])


def upper(text: str, wanted: bool) -> bool:
    """Whether the text has letters, all of them capitals."""
    return text.isupper() == wanted


def items(text: str, count: int) -> bool:
    """Whether the text is a list of so many items, a line each, and nothing else."""
    lines = [line for line in text.splitlines() if line.strip()]
    return len(lines) == count and all(map(_ITEM.match, lines))


def words(text: str, limits: list[int]) -> bool:
    """Whether the number of words is within the limits, both included."""
    return limits[0] <= len(text.split()) <= limits[1]


def keys(text: str, names: list[str]) -> bool:
    """Whether the text is a JSON object with these keys and no others; it may be fenced as code."""
    try:
        found = json.loads(_code(text))
    except ValueError:
        return False
    return isinstance(found, dict) and set(found) == set(names)


def function(text: str, signature: str) -> bool:
    """Whether the text, or the first fenced code in it, is Python and defines this function: ``add(a, b)``."""
    try:
        parsed = ast.parse(_code(text))
    except (SyntaxError, ValueError):  # ValueError: null bytes
        return False
    wanted = ast.parse(f"def {signature}: pass").body[0]
    arguments = len(wanted.args.args)
    return any(
        isinstance(node, ast.FunctionDef) and node.name == wanted.name and len(node.args.args) == arguments
        for node in parsed.body
    )


def _code(text: str) -> str:
    """The first fenced code, or the whole text where nothing is fenced."""
    fenced = _FENCE.search(text)
    return (fenced[1] if fenced else text).strip()


CHECKS: dict[str, Callable[[str, Any], bool]] = {
    check.__name__: check for check in (begins, says, avoids, upper, items, words, keys, function)
}


def is_right(text: str, wanted: dict[str, Any]) -> bool:
    """Whether a text passes all the checks that ``wanted`` names, with their arguments."""
    return all(CHECKS[name](text, argument) for name, argument in wanted.items())
