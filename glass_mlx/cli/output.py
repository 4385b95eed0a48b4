"""Results, tables and lines for people, and JSON."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import printable_lines
from ..files import write_atomically

if TYPE_CHECKING:
    from rich.table import Table


def print_result(result: dict[str, Any], table: Callable[[dict[str, Any]], str], json_file: str | None) -> None:
    """Print a result as a table and write it to a JSON file if one is given; ``-`` prints JSON and nothing else."""
    if json_file == "-":
        print(json.dumps(result))
        return
    if json_file is not None:
        write_atomically(json_file, lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
    say(table(result))


def print_table(table: Table) -> None:
    """Print a table, no wider than the terminal; files and pipes have room for whole names."""
    from rich.console import Console

    for column in table.columns:
        column.overflow = "fold"  # names are seen in whole
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def say(text: object) -> None:
    """Print what may have come out of anyone's file or request; lines that a terminal has no room for end between
    words, and go on where they began."""
    lines = printable_lines(str(text)).split("\n")
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        lines = [part for line in lines for part in ([line] if len(line) <= width else _folded(line, width))]
    print(*lines, sep="\n", flush=True)


def _folded(line: str, width: int) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
