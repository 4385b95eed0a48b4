"""Errors that a user can act on; the command lines print them as one line."""


def printable(text: str) -> str:
    """Text as one line that a terminal or a log can show: it may come out of anyone's file or request, and a
    terminal obeys control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def printable_lines(text: str) -> str:
    """The same with its lines and tabs, and the joiners that some scripts and emoji need: for tables and answers."""
    return "".join(c if c.isprintable() or c in "\n\t\u200c\u200d" else " " for c in text)


class GlassError(Exception):
    """Something the user asked for cannot be done; the message says what is wrong and what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())


class StatsError(GlassError):
    """A file of global statistics is damaged or belongs to another model."""
