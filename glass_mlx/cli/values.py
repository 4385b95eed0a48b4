"""What options may be: parsers of values, whose errors argparse reports."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ..errors import GlassError
from ..model.config import GlassConfig


def density(text: str) -> float:
    """Parse a density; argparse reports the error."""
    try:
        return GlassConfig(density=float(text)).density
    except (GlassError, ValueError) as e:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1") from e


def global_weight(text: str) -> float | str:
    """Parse a global weight; argparse reports the error."""
    try:
        return GlassConfig(global_weight=text if text == "auto" else float(text)).global_weight
    except (GlassError, ValueError) as e:
        raise argparse.ArgumentTypeError(f'{text!r} is neither "auto" nor a number from 0 to 1') from e


def list_of(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """What parses several values with commas between them."""
    return lambda text: [parse(part) for part in text.split(",")]


def positive(text: str) -> int:
    """Parse a positive integer; argparse reports the error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """A parser of one of these names; argparse reports the error."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(names)}")
        return text

    return parse


def text(argument: str) -> str:
    """A text from the command line, in which bytes that this machine does not read as text are replaced."""
    return argument.encode(errors="surrogateescape").decode(errors="replace")


def template_args(text: str) -> dict[str, Any]:
    """Parse arguments of the chat template, a JSON object; argparse reports the error."""
    from ..decoding.prompt import check_template_args

    try:
        args = json.loads(text or "{}")
        if not isinstance(args, dict):
            raise ValueError("not an object")
        return check_template_args(args)
    except GlassError as e:
        raise argparse.ArgumentTypeError(str(e).rstrip(".")) from e
    except (ValueError, RecursionError) as e:
        raise argparse.ArgumentTypeError(f"{text[:100]!r} is not a JSON object: {e}") from e


def adapter_directory(text: str) -> str:
    """Parse the path of an adapter; argparse reports the error."""
    missing = [name for name in ("adapter_config.json", "adapters.safetensors") if not Path(text, name).is_file()]
    if missing:
        raise argparse.ArgumentTypeError(f"{text!r} has no {missing[0]}: give the directory of an adapter")
    return text


def memory_size(text: str) -> int:
    """Parse a size in bytes, such as 500MB or 2GB; argparse reports the error."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 2GB")
    thousand = 1024 if match[3] else 1000
    return int(float(match[1]) * thousand ** " kmgt".index(match[2].lower() or " "))
