"""The models that ``conformance`` checks: the demo model as shipped, and its first layers in each weight format that
people use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm

from ..decoding.stream import stream_generate
from ..loading import DEMO_PATH, load_dense
from ..model.glass_model import GlassModel
from .shapes import activation_dtype

PROMPT = "The old house stood"
CONTINUATION = " when the morning came the boy"
TOKENS = 4

SHIPPED = "bfloat16"
LAYERS = 2  # of the demo model, in the other formats: a CPU takes its time, and a format does the same in every layer
# The demo model as it is, in another dtype, or quantised.
FORMATS: dict[str, mx.Dtype | dict[str, Any] | None] = {
    SHIPPED: None,
    "float32": mx.float32,
    "4-bit/64": {"bits": 4, "group_size": 64},
    "4-bit/32": {"bits": 4, "group_size": 32},
    "8-bit/64": {"bits": 8, "group_size": 64},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}


class CheckFailed(Exception):
    """Something does not hold. The message says what was expected and what was found."""


@dataclass
class Case:
    """The demo model in one format.

    Attributes:
        name: of the format.
        dense: the mlx-lm model.
        tokenizer: its tokenizer.
        glass: the wrapped model, once ``check_wrap`` has made it.
    """

    name: str
    dense: nn.Module
    tokenizer: Any
    glass: GlassModel | None = None

    @property
    def model(self) -> GlassModel:
        """The wrapped model."""
        if self.glass is None:
            raise CheckFailed("not run, because the check 'wrap' failed")
        return self.glass

    @cached_property
    def prompt(self) -> list[int]:
        """A prompt's tokens."""
        return self.tokenizer.encode(PROMPT)

    @cached_property
    def continuation(self) -> list[int]:
        """Tokens that follow the prompt: given, not generated, so that they are the same on every device."""
        return self.tokenizer.encode(CONTINUATION, add_special_tokens=False)

    @cached_property
    def greedy(self) -> list[int]:
        """The tokens that mlx-lm generates after the prompt."""
        responses = mlx_lm.stream_generate(self.dense, self.tokenizer, self.prompt, max_tokens=TOKENS)
        return [response.token for response in responses]

    @property
    def tolerance(self) -> float:
        """How far apart results may be that differ only by rounding, as a share of their norm."""
        return 1e-3 if self.dense.model.norm.weight.dtype == mx.float32 else 2e-2

    def answer(self, prompt: list[int] | None = None, n: int = TOKENS, **options: Any) -> list[int]:
        """The tokens that GLASS generates."""
        prompt = self.prompt if prompt is None else prompt
        return [r.token for r in stream_generate(self.model, self.tokenizer, prompt, n, **options)]

    def prefilled(self, **config: Any) -> list[Any]:
        """A prompt cache after the prompt, with neurons selected."""
        cache = self.model.make_cache(density=0.5, **config)
        mx.eval(self.model.prefill(mx.array([self.prompt]), cache))
        self.model.select(cache)
        return cache


def make_case(name: str) -> Case:
    """The demo model in one of ``FORMATS``, not yet wrapped; in all but the shipped one its first layers."""
    dense, tokenizer, _ = load_dense(DEMO_PATH)
    form = FORMATS[name]
    if form is not None:
        dense.model.layers = dense.model.layers[:LAYERS]
    if isinstance(form, dict):
        dense.set_dtype(activation_dtype())  # MLX's CPU backend sums quantised products in 16 bits, which is too coarse
        nn.quantize(dense, **form)
    elif form is not None:
        dense.set_dtype(form)
    mx.eval(dense.parameters())
    return Case(name, dense, tokenizer)
