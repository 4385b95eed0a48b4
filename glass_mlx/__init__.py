"""Fast on-device LLM inference for Apple Silicon: mlx-lm models that decode on the FFN neurons a prompt calls for."""

import warnings

# Python says this of any package that imports a module also run with -m; here both copies are alike.
warnings.filterwarnings("ignore", "'glass_mlx.* found in sys.modules", RuntimeWarning)

from ._version import __version__
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
