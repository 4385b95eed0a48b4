"""What the user has chosen, in a JSON file that may also be edited by hand."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from platformdirs import user_config_path

from glass_mlx.errors import GlassError
from glass_mlx.files import write_atomically


@dataclass(frozen=True)
class Settings:
    """The user's choices.

    Attributes:
        model: the model that answers: ``demo``, an alias or a Hub repository.
        glass: whether to decode with some of the neurons only.
        density: with which share of them, if so.
        port: where the server listens, on this machine only.
        idle_minutes: after so many without a request the model is unloaded; 0 for never.
        start_server: whether the server starts with the app.
    """

    model: str = "demo"
    glass: bool = True
    density: float = 0.5
    port: int = 8080
    idle_minutes: float = 10
    start_server: bool = True

    @property
    def effective_density(self) -> float:
        """The density to decode with: 1 is dense."""
        return self.density if self.glass else 1.0


# For each setting, what its value must be, in words, and the test of it.
_VALID = {
    "model": ("a name", lambda v: isinstance(v, str) and 0 < len(v) <= 300),
    "glass": ("true or false", lambda v: isinstance(v, bool)),
    "density": ("above 0 and at most 1", lambda v: _is_number(v) and 0 < v <= 1),
    "port": ("from 0 to 65535", lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= 65535),
    "idle_minutes": ("0 or more", lambda v: _is_number(v) and 0 <= v < float("inf")),
    "start_server": ("true or false", lambda v: isinstance(v, bool)),
}


def settings_path() -> Path:
    """Where the settings are: ``~/Library/Application Support/glass_mlx/menubar.json`` on a Mac."""
    return user_config_path("glass_mlx") / "menubar.json"


def load_settings(path: Path) -> tuple[Settings, list[str]]:
    """Read the settings, whatever is in the file.

    Returns:
        tuple: the settings, and what was wrong with the file, in words. A file that is no JSON object is renamed, so
            that nothing is lost by saving the fresh settings.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("it holds no JSON object")
    except FileNotFoundError:
        return Settings(), []
    except OSError as e:
        return Settings(), [f"The settings cannot be read ({e.strerror}): using the defaults."]
    except (ValueError, RecursionError):  # no UTF-8, no JSON
        kept = path.with_name(f"{path.stem}.damaged-{time.strftime('%Y%m%d-%H%M%S')}{path.suffix}")
        try:
            path.replace(kept)
        except OSError as e:
            return Settings(), [f"The settings file is damaged and cannot be renamed ({e.strerror}): using defaults."]
        return Settings(), [f"The settings file was damaged: it is kept as {kept.name}, and these are fresh ones."]
    return _checked(data)


def save_settings(path: Path, settings: Settings) -> None:
    """Write the settings; the file is complete, or as it was before.

    Raises:
        GlassError: it cannot be written.
    """
    text = json.dumps(asdict(settings), indent=2) + "\n"
    try:
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except GlassError as e:
        reason = getattr(e.__cause__, "strerror", None) or e
        raise GlassError(f"The settings cannot be saved ({reason}): they hold until you quit.") from e


def _checked(data: dict[str, Any]) -> tuple[Settings, list[str]]:
    good, wrong = {}, []
    for field in fields(Settings):
        if field.name not in data:
            continue
        words, valid = _VALID[field.name]
        if valid(data[field.name]):
            good[field.name] = data[field.name]
        else:
            wrong.append(f'In the settings file, "{field.name}" must be {words}: using {field.default}.')
    return Settings(**good), wrong


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
