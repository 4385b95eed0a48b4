"""The user's settings, in a JSON file that may also be edited by hand."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from platformdirs import user_config_path

from glass_mlx.errors import GlassError
from glass_mlx.files import write_atomically
from glass_mlx.model.quality import QUALITIES


@dataclass(frozen=True)
class Settings:
    """The user's settings.

    Attributes:
        model: the model that answers: ``demo``, an alias or a Hub repository.
        glass: whether to decode with only some of the neurons.
        density: the share of the neurons to decode with if ``glass`` is on.
        quality: "high", "balanced" or "fast": instead of a density, where that was measured for the model; "" for none.
        port: where the server listens, for this machine only.
        idle_minutes: minutes without a request until the model is unloaded; 0 for never.
        start_server: whether the server starts with the app.
    """

    model: str = "demo"
    glass: bool = True
    density: float = 0.5
    quality: str = ""
    port: int = 8080
    idle_minutes: float = 10
    start_server: bool = True


# For each setting what its value must be, and a test of it.
_VALID = {
    "model": ("a name", lambda v: isinstance(v, str) and 0 < len(v) <= 300),
    "glass": ("true or false", lambda v: isinstance(v, bool)),
    "density": ("above 0 and at most 1", lambda v: _is_number(v) and 0 < v <= 1),
    "quality": ("high, balanced, fast or empty", lambda v: v in ("", *QUALITIES)),
    "port": ("from 0 to 65535", lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= 65535),
    "idle_minutes": ("0 or more", lambda v: _is_number(v) and 0 <= v < float("inf")),
    "start_server": ("true or false", lambda v: isinstance(v, bool)),
}


def settings_path() -> Path:
    """The settings file: ``~/Library/Application Support/glass_mlx/menubar.json`` on a Mac."""
    return user_config_path("glass_mlx") / "menubar.json"


def load_settings(path: Path) -> tuple[Settings, list[str]]:
    """Read the settings, whatever is in the file.

    Returns:
        tuple: the settings, and messages about what is wrong with the file. A file that is not a JSON object is
            renamed, so that saving new settings does not overwrite it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        return Settings(), []
    except OSError as e:
        return Settings(), [f"The settings cannot be read ({e.strerror}). Using the defaults."]
    except (ValueError, RecursionError):  # not UTF-8, or not JSON
        kept = path.with_name(f"{path.stem}.damaged-{time.strftime('%Y%m%d-%H%M%S')}{path.suffix}")
        try:
            path.replace(kept)
        except OSError as e:
            return Settings(), [
                f"The settings file is damaged and cannot be renamed ({e.strerror}). Using the defaults."
            ]
        return Settings(), [f"The settings file was damaged. It is kept as {kept.name}. Using the defaults."]
    return _checked(data)


def save_settings(path: Path, settings: Settings) -> None:
    """Write the settings. If that fails, the file stays as it was.

    Raises:
        GlassError: the file cannot be written.
    """
    text = json.dumps(asdict(settings), indent=2) + "\n"
    try:
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except GlassError as e:
        reason = getattr(e.__cause__, "strerror", None) or e
        raise GlassError(f"The settings cannot be saved ({reason}). They are kept until you quit.") from e


def _checked(data: dict[str, Any]) -> tuple[Settings, list[str]]:
    good, wrong = {}, []
    for field in fields(Settings):
        if field.name not in data:
            continue
        requirement, valid = _VALID[field.name]
        if valid(data[field.name]):
            good[field.name] = data[field.name]
        else:
            wrong.append(f'In the settings file, "{field.name}" must be {requirement}. Using {field.default}.')
    return Settings(**good), wrong


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
