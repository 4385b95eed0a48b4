"""Tests of what is printed for people."""

from __future__ import annotations

import re
import sys

from rich.table import Table

from glass_mlx.cli.output import print_result, print_table, say

PROSE = "  what a terminal has no room for goes on in the next line, where it began, " * 3


def on_a_terminal(monkeypatch):
    """What is printed from here on goes to one of 30 columns."""
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


def test_long_lines_end_between_words(monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    say(f"short\n\n{PROSE}\n/a/path/that/is/longer/than/the/terminal is kept")
    first, blank, *lines = capsys.readouterr().out.splitlines()
    assert (first, blank) == ("short", "")
    prose = lines[: lines.index("/a/path/that/is/longer/than/the/terminal")]
    assert len(prose) > 2 and all(len(line) <= 30 and line.startswith("  ") for line in prose)
    assert " ".join(prose).split() == PROSE.split()


def test_files_get_lines_as_they_are(capsys):
    say(PROSE)
    assert capsys.readouterr().out == f"{PROSE}\n"


def test_a_table_fits_the_terminal(monkeypatch, capsys):
    """Names are broken, but not cut."""
    on_a_terminal(monkeypatch)
    table = Table("model", "file")
    table.add_row("a-model-of-some-name", "a-file-of-the-same-name.safetensors")
    print_table(table)
    lines = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 30
    cells = [line[1:-1].split("│") for line in lines if line.startswith("│")]
    assert ["".join(part.strip() for part in column) for column in zip(*cells)] == [
        "a-model-of-some-name",
        "a-file-of-the-same-name.safetensors",
    ]


def test_results_as_json_are_not_folded(monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    print_result({"a": PROSE}, str, "-")
    assert len(capsys.readouterr().out.splitlines()) == 1
