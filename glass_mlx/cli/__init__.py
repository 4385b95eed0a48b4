"""What the command lines share.

Nothing that takes long to import is imported before the options are parsed: what is mistyped is said at once.
"""

from __future__ import annotations

import sys
from typing import Any


def _excepthook(kind: type[BaseException], *error: Any) -> None:
    """Python's, but for Ctrl-C in the first moments, before ``run``: it ends the process without a traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, *error)


sys.excepthook = _excepthook
