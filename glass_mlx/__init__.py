"""Fast on-device LLM inference for Apple Silicon: mlx-lm models that decode on the FFN neurons a prompt calls for."""

import sys
from types import ModuleType

from ._version import __version__
from .decoding import stream
from .decoding.stream import GenerationResponse, generate, stream_generate
from .errors import GlassError, StatsError
from .loading import load, wrap
from .model.config import GlassConfig
from .model.glass_model import GlassModel

__all__ = [
    "GenerationResponse",
    "GlassConfig",
    "GlassError",
    "GlassModel",
    "StatsError",
    "__version__",
    "generate",
    "load",
    "stream_generate",
    "wrap",
]


class _Package(ModuleType):
    """Keeps ``glass_mlx.generate`` the function: importing the command of that name would put its module there."""

    generate = property(lambda self: stream.generate, lambda self, value: None)


sys.modules[__name__].__class__ = _Package
