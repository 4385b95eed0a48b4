"""What each process of the tests of sharded models does: it writes what it saw to ``rank-N.json`` of a directory."""

from __future__ import annotations

import faulthandler
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from glass_mlx.benchmark import main as benchmark
from glass_mlx.decoding import speculative
from glass_mlx.decoding.conversation import Conversation
from glass_mlx.decoding.sampling import make_sampler
from glass_mlx.decoding.stream import stream_generate
from glass_mlx.errors import GlassError
from glass_mlx.generate import main as generate
from glass_mlx.group import perform, rank, together
from glass_mlx.model.glass_model import GlassModel
from glass_mlx.sharded_loading import sharded_load

PROMPT = [1, 17, 2047, 305, 9, 1200, 4000, 88, 731, 256, 12, 3333]
NEXT = 77
COUNT = 5  # tokens that each way to decode generates: whoever waits for the other process takes up a core
# Ways to choose neurons.
CHOICES = {
    "default": {},
    "uncompensated": {"compensation": False},
    "published": {
        "global_weight": 0.5,
        "signal": "activation",
        "layer_budgets": "uniform",
        "compensation": False,
    },
}


def tokens(model: GlassModel, tokenizer: Any, count: int = COUNT, **options: Any) -> list[int]:
    """What a model generates."""
    return [r.token for r in stream_generate(model, tokenizer, PROMPT, count, **options)]


def one_step(model: GlassModel, choice: dict[str, Any]) -> dict[str, Any]:
    """The neurons that are kept after the prompt, and the logits that a token decoded on them gives."""
    cache = model.make_cache(density=0.5, **choice)
    model.prefill(mx.array([PROMPT]), cache)
    model.select(cache)
    kept = {path: neurons.tolist() for path, neurons in model.kept_neurons(cache).items()}
    logits = model.decode(mx.array([[NEXT]]), cache)[0, -1]
    return {"kept": kept, "logits": logits.astype(mx.float32).tolist()}


def in_turns(model: GlassModel) -> list[float]:
    """Two conversations in turns; sums of their logits."""
    caches = [model.make_cache(density=0.5) for _ in range(2)]
    for i, cache in enumerate(caches):
        model.prefill(mx.array([PROMPT[i:]]), cache)
    said = []
    for step in range(2):
        for cache in caches:
            model.select(cache)
            said.append(mx.sum(mx.abs(model.decode(mx.array([[step + 5]]), cache))).item())
    return said


def look_at(model: GlassModel, tokenizer: Any, verified: int = COUNT) -> dict[str, Any]:
    """What one model does, with as many verified tokens."""
    response = list(stream_generate(model, tokenizer, PROMPT, 2))[-1]
    seen = {
        "sizes": {block.path: block.size for block in model.blocks},
        "left_dense": model.left_dense,
        "found": model.global_ranks is not None,
        "described": [response.kept_neurons, response.total_neurons, response.group],
        "dense": tokens(model, tokenizer, density=1.0),
        "verified": tokens(model, tokenizer, verified, verify=True),
        "drafted": tokens(model, tokenizer, verify=True, draft_tokens=3),
        "sampled": tokens(model, tokenizer, verify=True, sampler=make_sampler(1.0)),
        "steps": {name: one_step(model, choice) for name, choice in CHOICES.items()},
    }
    if rank() == 1:
        model.memory.limit = 0
    return seen | {"turns": in_turns(model)}


def talk(model: GlassModel, tokenizer: Any) -> list[str]:
    """A conversation whose answers are read again."""
    conversation = Conversation(model, tokenizer)
    for message in ("Tell me of the sea.", "And of ships?"):
        list(conversation.reply(message, max_tokens=3))
    conversation.read_ahead()
    list(conversation.reply("And then?", max_tokens=3))
    return [message["content"] for message in conversation.messages]


def refusals(model: GlassModel) -> list[str]:
    said = []
    for refused in (model.let_go_of_dense_weights, lambda: sharded_load("nothing")):
        try:
            refused()
        except GlassError as e:
            said.append(str(e))
    return said


def work(directory: Path) -> None:
    group = mx.distributed.init()
    if rank() == 1:  # a machine that is faster
        speculative.time = SimpleNamespace(perf_counter=lambda: time.perf_counter() / 5)
    seen: dict[str, Any] = {}
    for name in ("plain", "quantised", "moe"):
        model, tokenizer = sharded_load(directory / name, tensor_group=group)
        seen[name] = look_at(model, tokenizer, 24 if name == "plain" else COUNT)  # enough to draft as speed tells
        if name == "plain":
            seen |= {"talk": talk(model, tokenizer), "refusals": refusals(model)}
    model, tokenizer = sharded_load(directory / "moe", pipeline_group=group)
    seen["pipeline"] = look_at(model, tokenizer)
    (directory / f"rank-{rank()}.json").write_text(json.dumps(seen))


def command(main: Any, *args: object) -> None:
    sys.argv = ["program", *map(str, args)]
    main()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(240, exit=True)  # processes that wait for each other for ever say where
    where = Path(sys.argv[1])
    command(generate, "--model", where / "plain", "--prompt", "x", "--max-tokens", 5, "--json")
    measured = ("--density", 0.5, "--prompt-tokens", 8, "--generation-tokens", 4, "--num-trials", 1, "--json", "-")
    command(benchmark, "--model", where / "plain", *measured)
    perform(together(lambda: work(where)))
