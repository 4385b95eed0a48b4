"""A model's directory, looked at before anything is loaded: is it a text model of mlx-lm's, and is all of it there?"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_lm.utils import MODEL_ARCHITECTURE_REMAPPING, MODEL_REMAPPING

from ..errors import GlassError
from ..files import check_complete, read_json

WEIGHTS, INDEX = "model*.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"(model.*)-(\d{5})-of-(\d{5})\.safetensors")


@functools.cache
def model_types() -> list[str]:
    """Names of the modules of ``mlx_lm.models`` with a ``Model`` and a ``ModelArgs``. None of them is imported."""
    folder = Path(importlib.util.find_spec("mlx_lm.models").submodule_search_locations[0])
    # solar_open imports its Model from another family.
    defined = r"^(?:class {0}\b|from \S+ import [^(\n]*\b{0}\b)"
    found = [re.compile(defined.format(name), re.M) for name in ("Model", "ModelArgs")]
    sources = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    return sorted(name for name, text in sources.items() if all(f.search(text) for f in found))


def problem(path: Path) -> str | None:
    """Why a directory is not a whole text model of mlx-lm's, to follow the directory's name; None if it is one. Only
    its config and its files' names are read."""
    try:
        config = read_json(path / "config.json")
    except FileNotFoundError:
        return "is not a model directory: it has no config.json"
    except (OSError, ValueError) as e:
        return f"has no usable config.json ({e})"
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        return "is not a text model: its config.json has no model_type"
    if not _is_known(config):
        return f"is of the type {config['model_type'][:50]!r}, which mlx-lm does not have"
    return _missing(path)


def check_model(path: Path) -> None:
    """Check that a directory holds a whole text model of mlx-lm's.

    Raises:
        GlassError: it does not; the message names the first file that is missing or cut short.
    """
    if (reason := problem(path)) is not None:
        raise GlassError(f"{path} {reason}.")
    for file in sorted(path.glob(WEIGHTS)):
        try:
            check_complete(file)
        except (OSError, ValueError) as e:
            raise GlassError(f"{file} is damaged: {e}. Download or convert the model again.") from e


def _is_known(config: dict[str, Any]) -> bool:
    """Whether mlx-lm has a config's type, or the model brings its own code."""
    kind, names = config["model_type"], config.get("architectures")
    names = names if isinstance(names, list) else [names]
    remapped = [MODEL_ARCHITECTURE_REMAPPING.get((kind, str(name))) for name in names]
    kinds = {MODEL_REMAPPING.get(kind, kind), *remapped}
    return "model_file" in config or bool(kinds & set(model_types()))


def _missing(path: Path) -> str | None:
    """What is missing of a model's weights."""
    there = {file.name for file in path.glob(WEIGHTS) if file.is_file()}  # a broken link is none
    if not there:
        return f"has no weights: no {WEIGHTS}"
    lacking = sorted(set(_expected(path, there)) - there)
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        return f"is not complete: {lacking[0]}{more} is missing"
    return None


def _expected(path: Path, there: set[str]) -> Iterator[str]:
    """The names of the weights' files: those that say how many of them there are, and those in the index. An index
    that knows nothing of a file that is there is another conversion's."""
    for name in there:
        if (match := _SHARD.fullmatch(name)) is not None:
            stem, _, count = match.groups()
            yield from (f"{stem}-{i:05}-of-{count}.safetensors" for i in range(1, int(count) + 1))
    try:
        names = set(read_json(path / INDEX, 64 << 20)["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return  # mlx-lm does not need it
    if there <= names:
        yield from (name for name in names if isinstance(name, str))
