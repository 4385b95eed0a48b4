"""Launch at login for an app that runs from a checkout, by a LaunchAgent: a file that macOS reads at login."""

from __future__ import annotations

import plistlib
import sys
from pathlib import Path

APP_ID = "io.github.glass-mlx.menubar"


def agent_path() -> Path:
    """The path of the LaunchAgent."""
    return Path.home() / "Library" / "LaunchAgents" / f"{APP_ID}.plist"


def agent() -> dict:
    """The LaunchAgent: it runs this interpreter, from this checkout."""
    return {
        "Label": APP_ID,
        "ProgramArguments": [sys.executable, "-m", __package__],
        "WorkingDirectory": str(Path(__file__).parents[__package__.count(".") + 1]),
        "RunAtLoad": True,
        "LimitLoadToSessionType": "Aqua",  # where there is a menu bar
        "ProcessType": "Interactive",
    }


def is_agent() -> bool:
    """Whether the app starts at login."""
    return agent_path().is_file()


def set_agent(on: bool) -> None:
    """Write the LaunchAgent, or remove it. Nothing starts or stops now.

    Raises:
        OSError: the directory cannot be written.
    """
    path = agent_path()
    if not on:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(plistlib.dumps(agent()))
