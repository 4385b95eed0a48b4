"""Fast on-device LLM inference for Apple Silicon: mlx-lm models that decode on the FFN neurons a prompt calls for."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .decoding.stream import GenerationResponse, generate, stream_generate
    from .errors import GlassError, StatsError
    from .loading import load, wrap
    from .model.config import GlassConfig
    from .model.glass_model import GlassModel
    from .sharded_loading import sharded_load

__all__ = [
    "GenerationResponse",
    "GlassConfig",
    "GlassError",
    "GlassModel",
    "StatsError",
    "__version__",
    "generate",
    "load",
    "sharded_load",
    "stream_generate",
    "wrap",
]

# Where these are. mlx-lm takes seconds to import, and a command line that is mistyped need not wait for it.
_HOMES = {
    **dict.fromkeys(("GenerationResponse", "generate", "stream_generate"), "decoding.stream"),
    **dict.fromkeys(("GlassError", "StatsError"), "errors"),
    **dict.fromkeys(("load", "wrap"), "loading"),
    "GlassConfig": "model.config",
    "GlassModel": "model.glass_model",
    "sharded_load": "sharded_loading",
}


class _Package(ModuleType):
    """Imports the public names, and the modules, when they are used."""

    def __getattr__(self, name: str) -> Any:
        if name in _HOMES:
            return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        if not name.startswith("_"):
            try:
                return importlib.import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as e:
                if e.name != f"{__name__}.{name}":
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})

    # It stays the function: importing the command of that name would put its module there.
    generate = property(lambda self: self.__getattr__("generate"), lambda self, value: None)


sys.modules[__name__].__class__ = _Package
