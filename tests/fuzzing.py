"""Runs damaged files through the package in processes of their own, so that whatever happens is found out.

A target is a file that the package reads, and what a user would then do with it. For every seed one of these comes out:

    used          it was read, and all numbers that came of it are sound
    refused       the package's own error, one line
    unsound: ...  numbers that are not, or are out of range
    raised: ...   any other exception
    crashed       the process ended, or hung
"""

from __future__ import annotations

import contextlib
import itertools
import json
import operator
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import processes
from mlx_lm.models import llama
from mlx_lm.models.cache import save_prompt_cache
from mutations import mutate

from glass_mlx import GlassError, GlassModel
from glass_mlx.core.importance import SIGNALS
from glass_mlx.evaluation.tiny_models import tiny_config, tiny_model
from glass_mlx.model.saved_cache import read_prompt_cache
from glass_mlx.model.session import Phase
from glass_mlx.ranks.format import GlobalStatistics, index_entry, merge
from glass_mlx.ranks.measure import measure_statistics
from glass_mlx.ranks.sources import given_sequences

_LIMIT = 20  # seconds for a case
_MEMORY = 8 << 30  # bytes of address space for the process
_PROMPT = [int(n) for n in np.random.default_rng(0).integers(0, 100, 20)]


class Unsound(Exception):
    """A number that came out is none, or is out of range."""


def _check(*arrays: mx.array) -> None:
    for array in arrays:
        if not mx.all(mx.isfinite(array)).item():
            raise Unsound("values that are not finite")


def _check_choice(model: GlassModel, cache: list) -> None:
    for block, kept in zip(model.blocks, map(np.array, model.kept_neurons(cache).values())):
        if not (np.diff(kept) > 0).all() or kept[0] < 0 or kept[-1] >= block.size:
            raise Unsound("kept neurons out of order or range")
    if not 0 <= model.global_weight(model.session(cache)) <= 1:
        raise Unsound("a global weight out of range")


def _converse(model: GlassModel, cache: list) -> None:
    """A few steps of an answer, another prompt, and an answer to it."""
    for phase, tokens in ((Phase.DECODE, [5]), (Phase.DECODE, [6]), (Phase.PREFILL, [7, 8]), (Phase.DECODE, [9])):
        _check(model.run_phase(phase, mx.array([tokens]), cache))
        if phase is Phase.DECODE:
            _check_choice(model, cache)


def _cache_target(folder: Path, dense: nn.Module, quantised: bool = False) -> tuple[bytes, Callable[[Path], None]]:
    """A saved conversation with all that can be in one: evidence, tokens to be read again, kept neurons."""
    model = GlassModel(dense)
    order = [mx.arange(1, block.size + 1, dtype=mx.int64) for block in model.blocks]
    model.set_global_ranks(dict.fromkeys(SIGNALS, order))
    cache = model.make_cache()
    mx.eval(model.prefill(mx.array([_PROMPT]), cache))
    for token in (3, 14, 15):
        mx.eval(model.run_phase(Phase.DECODE, mx.array([[token]]), cache))
    if quantised:
        cache = [*(entry.to_quantized(32, 8) for entry in cache[:-1]), cache[-1]]
    save_prompt_cache(str(folder / "cache.safetensors"), cache)
    return (folder / "cache.safetensors").read_bytes(), lambda path: _converse(
        model, model.add_session(read_prompt_cache(path))
    )


def _wide_heads() -> nn.Module:
    """A model whose keys can be quantised."""
    return llama.Model(llama.ModelArgs.from_dict(tiny_config("llama") | {"head_dim": 32}))


def _texts() -> list[list[int]]:
    return [_PROMPT[i : i + 5] for i in range(0, 16, 2)]


def _ranks_target(folder: Path) -> tuple[bytes, Callable[[Path], None]]:
    """A file of global ranks: its model decodes with them, and they are merged with others and listed."""
    model = GlassModel(tiny_model("llama"))
    source = given_sequences("text", _texts(), 4)
    good = measure_statistics(model, source, stable_at=None)
    merge([good, good]).write(folder / "ranks.safetensors")

    def use(path: Path) -> None:
        statistics = GlobalStatistics.read(path).check(model)
        statistics.use_in(model)
        index = json.dumps(index_entry("x.safetensors", statistics.metadata))
        if not index.isprintable() or not all(map(str.isprintable, statistics.domain_names)):
            raise Unsound("text that is not printable")
        cache = model.make_cache()
        _check(model.prefill(mx.array([_PROMPT]), cache))
        _converse(model, cache)
        merge([statistics, good]).write(folder / "merged.safetensors")
        GlobalStatistics.read(folder / "merged.safetensors").check(model)

    return (folder / "ranks.safetensors").read_bytes(), use


def _partial_target(folder: Path) -> tuple[bytes, Callable[[Path], None]]:
    """What an interrupted measurement left: measuring goes on from there, or from the beginning."""
    model = GlassModel(tiny_model("llama"))
    source = given_sequences("text", _texts(), 4)
    left = folder / "left.partial"
    measure_statistics(model, source, 10, stable_at=None, partial=left)

    def use(path: Path) -> None:
        measured = measure_statistics(model, source, stable_at=None, partial=path)
        _check(*(energy for signal in SIGNALS for energy in measured.domains[signal]))
        _check(mx.array(measured.sensitivity))
        measured.write(folder / "measured.safetensors")
        GlobalStatistics.read(folder / "measured.safetensors").check(model)
        json.loads(measured.metadata["stability_history"], parse_constant=_no_number)

    return left.read_bytes(), use


def _no_number(text: str) -> None:
    raise Unsound(f"{text} in JSON")


TARGETS: dict[str, Callable[[Path], tuple[bytes, Callable[[Path], None]]]] = {
    "cache": lambda folder: _cache_target(folder, tiny_model("llama")),
    "sliding cache": lambda folder: _cache_target(folder, tiny_model("gemma3_text")),
    "hybrid cache": lambda folder: _cache_target(folder, tiny_model("falcon_h1")),
    "quantised cache": lambda folder: _cache_target(folder, _wide_heads(), quantised=True),
    "ranks": _ranks_target,
    "partial": _partial_target,
}


def fuzz(targets: list[str], cases: int, log: Path) -> dict[tuple[str, int], str]:
    """Run the seeds 0 to ``cases`` - 1 of each target; returns the outcome of each, by target and seed."""
    outcomes: dict[tuple[str, int], str] = {}
    left = [(target, seed) for target in targets for seed in range(cases)]
    while left:
        log.write_text("")
        environment = processes.environment(Path(__file__).parent)
        done = processes.run([__file__, log], log.parent, environment, json.dumps(left))
        lines = list(map(json.loads, log.read_text().splitlines()))
        if not lines:
            raise RuntimeError(done.stderr)
        outcomes |= {(target, seed): outcome for target, seed, outcome in lines}
        left = [case for case in left if case not in outcomes]
    return outcomes


def outcome(data: bytes, use: Callable[[Path], None], file: Path) -> str:
    """What using a file with this content does."""
    file.write_bytes(data)
    try:
        use(file)
    except GlassError as e:
        return "refused" if str(e).isprintable() and len(str(e)) < 400 else f"unsound: message {str(e)[:80]!r}"
    except Unsound as e:
        return f"unsound: {e}"
    except Exception as e:
        return f"raised: {type(e).__name__}: {str(e)[:120]}"
    return "used"


def _limit_memory() -> None:
    with contextlib.suppress(ValueError, OSError):  # not everywhere
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(log: str) -> None:
    mx.disable_compile()
    _limit_memory()
    with tempfile.TemporaryDirectory() as folder, Path(log).open("a") as lines:
        file = Path(folder) / "file.safetensors"
        for target, group in itertools.groupby(json.load(sys.stdin), operator.itemgetter(0)):
            good, use = TARGETS[target](Path(folder))
            if (found := outcome(good, use, file)) != "used":
                raise SystemExit(f"the sound file of {target}: {found}")
            for _, seed in group:
                print(json.dumps([target, seed, "crashed"]), file=lines, flush=True)
                signal.alarm(_LIMIT)
                found = outcome(mutate(good, seed), use, file)
                signal.alarm(0)
                print(json.dumps([target, seed, found]), file=lines, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
