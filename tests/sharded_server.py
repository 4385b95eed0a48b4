"""What each process of the tests of shared servers does: it may generate as the command does, and serves. Some requests
make it fail: POISON in their prompt in all processes, as many rivals as WRONG in the first one, the model LACKED
in the second one, which lacks it."""

from __future__ import annotations

import sys
from dataclasses import replace

import mlx.core as mx

from glass_mlx.generate import main as generate
from glass_mlx.group import rank
from glass_mlx.model.glass_model import GlassModel
from glass_mlx.server import main as serve
from glass_mlx.serving.catalogue import Catalogue
from glass_mlx.serving.errors import UnknownModel
from glass_mlx.serving.worker import Worker

PROMPT = "The old house stood"
TOKENS = 6  # of an answer: whoever waits for the other process takes up a core
POISON, WRONG, LACKED = 3999, 3, "lacked"


def fail_where_asked() -> None:
    prefill, token, resolve = GlassModel.prefill, Worker.token, Catalogue.resolve

    def poisoned(self, inputs, *args, **options):
        if mx.any(inputs == POISON).item():
            raise RuntimeError("poison")
        return prefill(self, inputs, *args, **options)

    def wrong(self, id, logprob=0.0, top=()):
        if len(top) == WRONG:
            raise RuntimeError("wrong")
        return token(self, id, logprob, top)

    def lacking(self, name):
        if name == LACKED and rank() == 1:
            raise UnknownModel("It is not here.")
        return replace(resolve(self, "demo" if name == LACKED else name), name=name)

    GlassModel.prefill, Worker.token, Catalogue.resolve = poisoned, wrong, lacking


if __name__ == "__main__":
    first, model, *options = sys.argv[1:]
    if first == "generate":
        asked = ["--prompt", PROMPT, "--ignore-chat-template", "--max-tokens", str(TOKENS), "--json"]
        sys.argv[1:] = ["--model", model, *asked]
        generate()
    fail_where_asked()
    sys.argv[1:] = ["--model", model, "--port", "0", "--log-dir", ".", *options]
    serve()
