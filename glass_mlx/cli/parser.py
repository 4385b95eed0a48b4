"""The parser of a command's options, and its help."""

from __future__ import annotations

import argparse
import re
from typing import Any

from .._version import __version__
from ..errors import printable
from ..hub.names import near_miss


class _Formatter(argparse.HelpFormatter):
    """Help that ends with the default, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, argparse.SUPPRESS, (), [], {}, "") or default is False or "default" in text:
            return text
        shown = ",".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{text} (default: {'on' if default is True else shown.replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """A command's options. ``--help`` says the defaults, and an error is a line after that of the usage."""

    def __init__(self, prog: str, **kwargs: Any):
        super().__init__(prog=prog, **{"formatter_class": _Formatter, **kwargs})
        if " " not in prog:  # not of a command's command
            self.add_argument("--version", action="version", version=f"glass_mlx {__version__}")

    def error(self, message: str) -> None:
        wrong = re.match(r"unrecognized arguments: (--[^ =]+)", message)
        close = near_miss(wrong[1], self._option_string_actions) if wrong else ""
        usage = f"usage: {self.prog} [options]; {self.prog} --help lists them"
        self.exit(2, f"{usage}\n{self.prog}: error: {printable(message)}{close and f'; {close}'}\n")
