"""Tables of figures as text."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

_GAP = "  "


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> list[str]:
    """Lines of a table, aligned to the right. Where it is wider than the terminal, the columns that do not fit follow
    below, after the first ones again. Files and pipes have room for all.

    Args:
        heads: the columns' titles.
        rows: cells, as many as there are titles.
        names: how many of the first columns say what a row is of.
    """
    columns = list(zip(heads, *rows))
    widths = [max(map(len, column)) for column in columns]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else sum(widths) + len(_GAP) * len(widths)
    blocks: list[list[int]] = [[]]
    for i in range(names, len(columns)):
        used = [*range(names), *blocks[-1], i]
        if blocks[-1] and sum(widths[j] for j in used) + len(_GAP) * (len(used) - 1) > room:
            blocks.append([])
        blocks[-1].append(i)
    lines: list[str] = []
    for block in blocks:
        shown = [[column.rjust(widths[j]) for column in columns[j]] for j in (*range(names), *block)]
        lines += [*[""] * bool(lines), *(_GAP.join(cells).rstrip() for cells in zip(*shown))]
    return lines
