"""Tests of tables of figures as text."""

from __future__ import annotations

import sys

from glass_mlx.evaluation.tables import text_table

HEADS = ("", "density", *(f"figure {n}" for n in range(9)))
ROWS = [["dense", "1", *(f"{n}.5" for n in range(9))], ["sparse", "0.5", *"abcdefghi"]]


def test_files_have_room():
    lines = text_table(HEADS, ROWS, names=2)
    assert [line.split() for line in lines[1:]] == ROWS and len({len(line) for line in lines}) == 1


def test_what_does_not_fit_follows_below(monkeypatch):
    """No cell is lost or cut, and each row has its names."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for width in (80, 40, 5):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = text_table(HEADS, ROWS, names=2)
        assert width == 5 or max(map(len, lines)) <= width
        blocks = [block.splitlines() for block in "\n".join(lines).split("\n\n")]
        for row in (0, 1):
            cells = [block[1 + row].split() for block in blocks]
            assert all(names[:2] == ROWS[row][:2] for names in cells)
            assert [cell for names in cells for cell in names[2:]] == ROWS[row][2:]
