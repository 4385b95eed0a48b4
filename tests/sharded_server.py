"""What each process of the tests of shared servers does: it may generate as the command does, and serves. Some requests
make it fail: POISON in their prompt in all processes, as many rivals as WRONG in the first one only."""

from __future__ import annotations

import sys

import mlx.core as mx

from glass_mlx.generate import main as generate
from glass_mlx.model.glass_model import GlassModel
from glass_mlx.server import main as serve
from glass_mlx.serving.worker import Worker

PROMPT = "The old house stood"
POISON, WRONG = 3999, 3


def fail_where_asked() -> None:
    prefill, token = GlassModel.prefill, Worker.token

    def poisoned(self, inputs, *args, **options):
        if mx.any(inputs == POISON).item():
            raise RuntimeError("poison")
        return prefill(self, inputs, *args, **options)

    def wrong(self, id, logprob=0.0, top=()):
        if len(top) == WRONG:
            raise RuntimeError("wrong")
        return token(self, id, logprob, top)

    GlassModel.prefill, Worker.token = poisoned, wrong


if __name__ == "__main__":
    first, model, *options = sys.argv[1:]
    if first == "generate":
        asked = ["--prompt", PROMPT, "--ignore-chat-template", "--max-tokens", "8", "--json"]
        sys.argv[1:] = ["--model", model, *asked]
        generate()
    fail_where_asked()
    sys.argv[1:] = ["--model", model, "--port", "0", "--log-dir", ".", *options]
    serve()
