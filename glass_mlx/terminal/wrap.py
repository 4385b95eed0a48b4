"""Word wrap of a text that comes in pieces."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from rich.cells import cell_len


class WordWrap:
    """Breaks lines between words at the terminal's edge. A word is written when the next one begins; lines of code stay
    as they are, because they may be copied.

    Attributes:
        write: takes what is to be shown.
    """

    def __init__(self, write: Callable[[str], None]):
        self.write = write
        self._column, self._word, self._line, self._code = 0, "", "", False

    def add(self, text: str) -> None:
        """The text goes on."""
        for character in text:
            if character == "\n":
                self._end_line()
            elif character.isspace() or cell_len(character) > 1:  # between wide characters lines may break, too
                self._put_word()
                self._word = character
            else:
                self._word += character
        if self._code:
            self.flush()

    def flush(self) -> None:
        """The text has ended, or is to be seen so far."""
        self._put_word()

    def _end_line(self) -> None:
        self._put_word()
        self.write("\n")
        if self._line.lstrip().startswith("```"):
            self._code = not self._code
        self._column, self._line = 0, ""

    def _put_word(self) -> None:
        """Write the word with the space before it, or, where that does not fit, on a new line without the space."""
        word, width = self._word, shutil.get_terminal_size().columns
        self._line, self._word = self._line + word, ""
        if not self._code and self._column + cell_len(word) > width:
            word = word.lstrip()
            if not word:
                return
            if self._column:
                self.write("\n")
                self._column = 0
        if word:
            self.write(word)
            self._column = (self._column + cell_len(word) - 1) % width + 1  # the terminal breaks longer words
