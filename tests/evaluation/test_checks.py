"""Tests of the rules that tell right answers from wrong ones."""

from __future__ import annotations

import ast

import pytest

from glass_mlx.evaluation.checks import CHECKS, is_right
from glass_mlx.evaluation.questions import TASKS, read_questions

CASES = [  # check, argument, right answers, wrong answers
    ("begins", "Santa Rosa", ["Santa Rosa.", " santa rosa, of course"], ["In Santa Rosa", "Santa", ""]),
    ("begins", "May 5", ["May 5.", " may 5th"], ["May 54", "on May 5"]),
    ("begins", "5", ["5", " 5.", "5 apples"], ["54", "= 5", "five", "-5"]),
    ("says", ["7", "seven"], ["It is 7.", "Seven!", "7"], ["It is 17.", "70", "seventy", "7a", ""]),
    ("says", ["May 3rd"], ["on May 3rd."], ["on May 3", "on May 4th"]),
    ("avoids", "hot", ["The sun is a hotplate.", "Bright."], ["It is Hot.", "hot", " "]),
    ("upper", True, ["ROME.", "GOOD NIGHT, ANN!"], ["Rome", "ROMe", "123", ""]),
    (
        "items",
        2,
        ["1. a\n2. b", "- a\n\n• b\n", "1) a\n2) b"],
        ["1. a", "a\nb", "1.\n2. b", "So:\n- a\n- b"],
    ),
    ("words", [1, 2], ["one", "one two"], ["", "one two three"]),
    (
        "keys",
        ["name", "age"],
        ['{"age": 3, "name": "Tom"}', '```json\n{"name": "", "age": null}\n```', 'So:\n```\n{"name":1,"age":2}\n```'],
        ['{"name": "Tom"}', '{"name": 1, "age": 2, "more": 3}', '["name", "age"]', "{'name': 1, 'age': 2}", "{", ""],
    ),
    (
        "function",
        "add(a, b)",
        [
            "def add(a, b):\n    return a + b",
            "Here:\n```python\ndef add(x, y=1):\n  return x\n```\nIt adds.",
            "```\ndef add(a, b): 0",
        ],
        [
            "def add(a, b):\n    return a +",
            "def add(a): 0",
            "def sum(a, b): 0",
            "add(a, b)",
            "Sure! def add(a, b): 0",
            "\0",
        ],
    ),
]


@pytest.mark.parametrize(("name", "argument", "right", "wrong"), CASES)
def test_each_check_knows_right_from_wrong(name, argument, right, wrong):
    for text in right:
        assert CHECKS[name](text, argument), text
    for text in wrong:
        assert not CHECKS[name](text, argument), text


def test_every_check_is_tested():
    assert {case[0] for case in CASES} == CHECKS.keys()


def test_all_the_checks_that_are_named_must_hold():
    wanted = {"says": ["Lyon"], "words": [1, 3]}
    assert is_right("In Lyon.", wanted)
    assert not is_right("In Paris.", wanted) and not is_right("It was found in Lyon.", wanted)


@pytest.mark.parametrize("task", TASKS)
def test_the_bundled_questions_can_be_checked(task):
    """Their checks exist, take their arguments, and no question is right or wrong whatever is answered."""
    questions = read_questions(task)
    assert len(questions) >= 40
    asked = {repr((q["messages"], q["begin"])) for q in questions}
    assert len(asked) == len(questions)
    for question in questions:
        assert question["checks"] and question["checks"].keys() <= CHECKS.keys()
        assert not is_right("", question["checks"])


@pytest.mark.parametrize("task", ["facts", "recall"])
def test_the_answer_is_in_the_question(task):
    for question in read_questions(task):
        text = " ".join(m["content"] for m in question["messages"] if m["role"] == "user")
        wanted = question["checks"]
        answers = wanted.get("says") or [wanted["begins"]]
        assert any(CHECKS["says"](text, [answer]) for answer in answers), question
        assert not any(answer in question["begin"] for answer in answers)


def test_the_sums_are_right():
    """What the questions of arithmetic ask for, worked out from their words."""
    for question in read_questions("arithmetic"):
        if question["kind"] != "story":
            expression = question["messages"][0]["content"].removeprefix("What is ").rstrip("?").replace("times", "*")
            a, sign, b = expression.split()
            expected = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
            assert question["checks"] == {"begins": str(expected)}


def test_the_functions_asked_for_are_named_in_the_questions():
    for question in read_questions("code"):
        signature = question["checks"]["function"]
        assert f"`{signature}`" in question["messages"][0]["content"]
        ast.parse(f"def {signature}: pass")
