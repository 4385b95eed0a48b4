"""Simulated days of serving, to see whether the process stays as it is: ``python -m glass_mlx.evaluation.soak``.

Clients chat over several turns, complete texts, ask with seeds and verified, give up, and send what cannot be answered;
models are swapped, unloaded, and lack files; some prompts have up to 20,000 tokens. Every hundred requests the process
is measured, always after some on the same model. A figure is flat if its least-squares line grows over the last half of
the samples by at most 5 % of its mean, or by no more than ``_ALLOWED``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..loading import DEFAULT_MODEL, DEMO_PATH
from ..serving.engine import Engine, EngineOptions
from ..serving.errors import BadRequest, RequestError, UnknownModel
from ..serving.request import Chunk, PendingCompletion, Request
from .machine import machine, versions
from .tiny_models import tiny_config

FAMILIES = ("gemma3_text", "olmo2", "qwen3", "starcoder2", "llama")  # the first has sliding windows
_CONTEXT, _VOCABULARY, _WORDS = 32_768, 4096, "a ship sails over the sea to find some old town and its people".split()
_EVERY, _USERS, _TURNS, _LONGEST = 100, 8, 5, 20_000
# What a figure may grow by in any case: bytes, descriptors, threads, objects.
_ALLOWED = {"rss": 8 << 20, "active": 2 << 20, "cache": 2 << 20, "descriptors": 2, "threads": 1, "objects": 2000}
_KINDS = {
    "chat": 50,
    "completion": 18,
    "seed": 10,
    "verified": 8,
    "cancelled": 10,
    "long": 0.4,
    "unload": 0.5,
    "missing": 0.5,
    "unknown": 1,
    "empty": 1,
}


@dataclass(frozen=True)
class Sample:
    """The process after some requests: memory in bytes (resident, without what the C library keeps free, if it can be
    told to give that back; MLX's active, cached, and peak since the last sample), and how many descriptors, threads
    and Python objects there are."""

    requests: int
    seconds: float
    rss: int
    active: int
    cache: int
    peak: int
    descriptors: int
    threads: int
    objects: int

    @classmethod
    def take(cls, requests: int, seconds: float) -> Sample:
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):  # glibc keeps what long prompts needed: 70 MB were seen
            ctypes.CDLL(None).malloc_trim(0)
        memory = mx.get_active_memory(), mx.get_cache_memory(), mx.get_peak_memory()
        mx.reset_peak_memory()
        counts = len(os.listdir("/dev/fd")), threading.active_count(), len(gc.get_objects())
        return cls(requests, round(seconds, 1), _rss(), *memory, *counts)


def _rss() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())])) * 1024


def growth(samples: list[Sample]) -> dict[str, dict[str, Any]]:
    """For each figure its mean over the last half of the samples, its growth there, and whether that is flat."""
    half, found = samples[len(samples) // 2 :], {}
    for name, allowed in _ALLOWED.items():
        values = np.array([getattr(sample, name) for sample in half], float)
        slope = np.polyfit(np.arange(len(values)), values, 1)[0] if len(values) > 1 else 0.0
        grown, mean = slope * (len(values) - 1), values.mean()
        flat = bool(grown <= max(allowed, 0.05 * mean))
        found[name] = {"mean": round(mean), "growth": round(grown), "flat": flat}
    return found


def save_tiny_model(family: str, path: Path) -> Path:
    """Write a tiny random model of a family, with the demo's tokenizer and chat template, to a directory."""
    path.mkdir(parents=True)
    for file in DEMO_PATH.iterdir():
        if file.suffix != ".safetensors" and file.name not in ("config.json", "README.md"):
            shutil.copy(file, path)
    config = tiny_config(family) | {"vocab_size": _VOCABULARY, "max_position_embeddings": _CONTEXT}
    config |= {"bos_token_id": 1, "eos_token_id": 2}
    (path / "config.json").write_text(json.dumps(config))
    module = importlib.import_module(f"mlx_lm.models.{family}")
    weights = dict(tree_flatten(module.Model(module.ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    return path


class Traffic:
    """Clients of an engine.

    Attributes:
        model (str): what they ask for now.
        requests (int): how many they have sent.
        counts (Counter): what they did, by kind.
        failures (list[str]): answers that did not end as they should.
    """

    def __init__(self, engine: Engine, models: dict[str, Path], random: Random):
        self.engine, self.models, self.random = engine, models, random
        self.model = next(iter(models))
        self.requests = 0
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._chats: dict[tuple[str, int], list[dict[str, str]]] = {}

    def step(self) -> None:
        """One or a few requests of a kind."""
        kind = self.random.choices(list(_KINDS), _KINDS.values())[0]
        self.counts[kind] += 1
        try:
            getattr(self, f"_{kind}")()
        except Exception as e:
            self.failures.append(f"{kind} on {self.model}: {type(e).__name__}: {e}")

    def _text(self) -> str:
        return " ".join(self.random.choices(_WORDS, k=self.random.randint(2, 12)))

    def _submit(self, **fields: Any) -> PendingCompletion:
        self.requests += 1
        fields = {"model": self.model, "max_tokens": self.random.randint(2, 10), **fields}
        return self.engine.submit(Request(**fields))

    def _answer(self, pending: PendingCompletion, *finishes: str) -> list[Chunk]:
        chunks = list(pending)
        if chunks[-1].finish_reason not in (finishes or ("stop", "length")):
            raise RuntimeError(f"it finished with {chunks[-1].finish_reason}")
        return chunks

    def _chat(self, **fields: Any) -> None:
        """A turn of a few users at once."""
        asked = []
        for user in self.random.sample(range(_USERS), self.random.choice((1, 1, 2, 3))):
            messages = self._chats.setdefault((self.model, user), [])
            if len(messages) >= 2 * _TURNS:
                messages.clear()
            messages.append({"role": "user", "content": self._text()})
            asked.append((messages, self._submit(messages=list(messages), client=str(user), **fields)))
        for messages, pending in asked:
            text = "".join(chunk.text for chunk in self._answer(pending))
            messages.append({"role": "assistant", "content": text})

    def _completion(self) -> None:
        density = self.random.choice((None, 0.3, 1.0))
        options = {"temperature": self.random.choice((0.0, 1.0)), "density": density}
        self._answer(self._submit(prompt=self._text(), logprobs=True, top_logprobs=3, **options))

    def _seed(self) -> None:
        same = {"prompt": self._text(), "seed": self.random.getrandbits(64), "temperature": 1.0, "max_tokens": 4}
        first, second = (self._answer(self._submit(**same)) for _ in range(2))
        if [chunk.token for chunk in first] != [chunk.token for chunk in second]:
            raise RuntimeError("the seed did not decide the answer")

    def _verified(self) -> None:
        self._chat(verify=True)

    def _cancelled(self) -> None:
        pending = self._submit(prompt=self._text(), max_tokens=100)
        for _ in zip(range(self.random.randint(0, 8)), pending):
            pass
        pending.cancel()

    def _long(self) -> None:
        """A prompt that fills sliding windows, and two that go on from it."""
        longest = _LONGEST if self.model != DEFAULT_MODEL else 1500
        length = int(longest ** self.random.uniform(0.6, 1))  # most are much shorter
        prompt = self.random.choices(range(3, _VOCABULARY), k=length)
        for _ in range(3):
            chunks = self._answer(self._submit(prompt=list(prompt), client="long"))
            prompt += [chunk.token.id for chunk in chunks if chunk.token] + [5, 6]

    def _unload(self) -> None:
        self.engine.unload().result()

    def _missing(self) -> None:
        """A model whose weights are not there; afterwards they are again."""
        file = self.models[self.model] / "model.safetensors"
        if self.model == DEFAULT_MODEL:
            return
        self.engine.unload().result()
        hidden = file.rename(file.with_suffix(".hidden"))
        try:
            self._refused(UnknownModel, prompt="a ship")
        finally:
            hidden.rename(file)

    def _unknown(self) -> None:
        self._refused(UnknownModel, prompt="a ship", model="no-such-model")

    def _empty(self) -> None:
        self._refused(BadRequest, prompt=[])

    def _refused(self, error: type[RequestError], **fields: Any) -> None:
        try:
            list(self._submit(**fields))
        except error:
            return
        raise RuntimeError(f"no {error.__name__}")


def soak(
    requests: int,
    models: int = 6,
    seconds: float = float("inf"),
    every: int = _EVERY,
    seed: int = 0,
    progress: Callable[[Sample], None] = lambda sample: None,
) -> dict[str, Any]:
    """Serve simulated clients, and measure.

    Args:
        requests (int): how many.
        models (int): how many models, 1 to 6: the demo and tiny random ones.
        seconds (float): stop after this time.
        every (int): requests between samples.
        seed (int): of everything that is drawn.
        progress: called with every sample.

    Returns:
        dict: samples, growth, flat, counts by kind, failures, and the bytes that MLX holds after unloading.
    """
    start, random, samples = time.monotonic(), Random(seed), []
    with tempfile.TemporaryDirectory() as root:
        found = {DEFAULT_MODEL: DEMO_PATH}
        found |= {family: save_tiny_model(family, Path(root) / family) for family in FAMILIES[: models - 1]}
        options = EngineOptions(allow_paths=(Path(root),), max_conversations=6, max_cache_bytes=64 << 20)
        engine = Engine(options)
        try:
            traffic = Traffic(engine, found, random)
            while traffic.requests < requests and time.monotonic() - start < seconds:
                place = traffic.requests % every
                if place >= every // 2:  # before every sample the same model
                    traffic.model = list(found)[-1]
                elif random.random() < 8 / every:
                    traffic.model = random.choice(list(found))
                traffic.step()
                if traffic.requests % every < place:
                    samples.append(Sample.take(traffic.requests, time.monotonic() - start))
                    progress(samples[-1])
            engine.unload().result()
        finally:
            engine.close()
    grown = growth(samples) if samples else {}
    return {
        "requests": traffic.requests,
        "counts": dict(traffic.counts),
        "failures": traffic.failures,
        "flat": bool(grown) and all(figure["flat"] for figure in grown.values()),
        "growth": grown,
        "active_after_unloading": mx.get_active_memory(),
        "samples": [asdict(sample) for sample in samples],
    }


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m glass_mlx.evaluation.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000, metavar="N", help="how many (default: 10000)")
    parser.add_argument("--models", type=int, default=6, choices=range(1, 7), help="how many (default: 6)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")
    return parser


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    if args.requests < 2 * _EVERY:
        parser.error(f"--requests: at least {2 * _EVERY}, for two samples")
    logging.getLogger("glass_mlx").setLevel(logging.CRITICAL)  # failing loads are part of the day

    def progress(sample: Sample) -> None:
        print(json.dumps(asdict(sample)), file=sys.stderr, flush=True)

    result = soak(args.requests, args.models, 60 * args.minutes, seed=args.seed, progress=progress)
    print(json.dumps({"machine": machine(), "versions": versions(), **result}))
    sys.exit(0 if result["flat"] and not result["failures"] else 1)


if __name__ == "__main__":
    main()
