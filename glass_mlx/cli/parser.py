"""The parser of a command's options, and its help."""

from __future__ import annotations

import argparse
import re
import shlex
from itertools import chain
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
        meant = self._meant(message)
        usage = f"usage: {self.prog} [options]; {self.prog} --help lists them"
        self.exit(2, f"{usage}\n{self.prog}: error: {printable(message + (meant and f'; {meant}'))}\n")

    def _meant(self, message: str) -> str:
        """What may have been meant by an argument that an error message of argparse is about; empty if nothing is."""
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            return near_miss(choice[1], re.findall(r"[^', ]+", choice[2]))
        if not (wrong := re.match(r"unrecognized arguments: (.+)", message)):
            return ""
        if wrong[1].startswith("-"):
            return near_miss(re.split("[ =]", wrong[1])[0], self._options())
        taking = [option for option in ("--prompt", "--model") if option in self._options()]
        return f"did you mean {taking[0]} {shlex.quote(wrong[1].partition(' -')[0])}?" if taking else ""

    def _options(self) -> set[str]:
        """The names of all options, those of a command's commands too."""
        below = (a.choices.values() for a in self._actions if isinstance(a, argparse._SubParsersAction))
        return {*self._option_string_actions, *(name for p in chain(*below) for name in p._option_string_actions)}
