"""What must hold on any device: the checks of ``doctor``. Each returns what it found, or raises."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from ..core.compensation import SHRINKAGE, Response
from ..core.importance import dense_weight
from ..core.ranking import kept_count, rank, select
from ..core.slicing import UNIT, ScatterLinear
from ..decoding.stream import generate
from ..loading import DEMO_PATH, wrap
from ..model.blocks import Block, hooked, run_with, watching_inputs
from ..model.session import Phase
from ..ranks.format import GlobalStatistics
from ..ranks.lookup import STATS_DIR
from ..serving.engine import Engine
from ..serving.request import Request
from .conformance_cases import FORMATS, LAYERS, SHIPPED, TOKENS, Case, CheckFailed

MESSAGES = [{"role": "user", "content": "I want to find a restaurant in San Jose."}]


def distance(a: mx.array, b: mx.array) -> float:
    """||a - b|| / ||b||, in float32."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return (mx.linalg.norm((a - b).reshape(-1)) / mx.linalg.norm(b.reshape(-1))).item()


def _same_tokens(found: list[int], expected: list[int]) -> str:
    for i, (a, b) in enumerate(zip(found, expected)):
        if a != b:
            raise CheckFailed(f"token {i + 1}: expected {b}, found {a}")
    if len(found) != len(expected):
        raise CheckFailed(f"expected {len(expected)} tokens, found {len(found)}")
    return f"{len(found)} tokens"


def _near(what: str, found: float, limit: float) -> None:
    if not found <= limit:  # NaN is not
        raise CheckFailed(f"{what}: expected a relative error of at most {limit:.1g}, found {found:.2g}")


def _differs(what: str, found: float, limit: float) -> None:
    if not found > limit:
        raise CheckFailed(f"{what}: expected a relative difference above {limit:.1g}, found {found:.2g}")


def check_mlx_lm(case: Case) -> str:
    """The model runs in mlx-lm alone. If it does not, GLASS is not the reason."""
    logits = case.dense(mx.array([case.prompt]))
    if not mx.all(mx.isfinite(logits)).item():
        raise CheckFailed("the dense model's logits: expected finite numbers, found others")
    return f"{len(case.greedy)} tokens"


def check_slices(case: Case) -> str:
    """Compact projections hold the kept rows and columns to the bit."""
    rng = np.random.default_rng(0)
    for i, layer in enumerate(case.dense.layers):
        size = case.dense.args.intermediate_size
        block = Block(f"layer {i}", layer.mlp, ("gate_proj", "up_proj"), "down_proj", size)
        neurons = np.arange(size).reshape(-1, UNIT if block.group > 1 else 1)
        some = np.sort(rng.choice(len(neurons), len(neurons) // 2, replace=False))
        kept = mx.array(neurons[some].reshape(-1).astype(np.int32))
        for name, compact in block.compact(kept).items():
            weight = dense_weight(layer.mlp[name])
            if isinstance(compact, ScatterLinear):  # not sliced: the hidden values are scattered instead
                _check_scatter(f"{block.path}, {name}", compact, kept, size)
                continue
            expected = weight[:, kept] if name == block.output else weight[kept]
            found = dense_weight(compact)
            if found.shape != expected.shape:
                raise CheckFailed(f"{block.path}, {name}: expected {expected.shape}, found {found.shape}")
            if wrong := mx.sum(found != expected).item():
                raise CheckFailed(f"{block.path}, {name}: expected equal weights, found {wrong} of {found.size} others")
    return f"{len(case.dense.layers)} blocks"


def _check_scatter(where: str, compact: ScatterLinear, kept: mx.array, size: int) -> None:
    expected = np.zeros(size)
    expected[np.array(kept)] = values = np.arange(1, kept.size + 1)
    if not np.array_equal(np.array(compact.scatter(mx.array(values))), expected):
        raise CheckFailed(f"{where}: expected each neuron in its place, found others")


def _numpy_ranks(energy: np.ndarray) -> np.ndarray:
    """Ranks [F] from 1 on, ties by index."""
    ranks = np.empty(len(energy), np.int64)
    ranks[np.argsort(-energy, kind="stable")] = np.arange(1, len(energy) + 1)
    return ranks


def _numpy_choice(ranks: np.ndarray, k: int, group: int) -> np.ndarray:
    """The k best neurons by their ranks [F], ascending; in whole units if there are groups."""
    if group == 1:
        return np.sort(np.argsort(ranks, kind="stable")[:k])
    within = np.argsort(ranks.reshape(-1, group), axis=1, kind="stable")
    units = (within + group * np.arange(len(within))[:, None]).reshape(-1, UNIT)
    best = np.argsort(ranks[units].sum(1), kind="stable")[: k // UNIT]
    return np.sort(units[best].reshape(-1))


def _same_neurons(where: str, found: np.ndarray, expected: np.ndarray) -> None:
    if not np.array_equal(found, expected):
        wrong = len(np.setdiff1d(found, expected))
        raise CheckFailed(f"{where}: expected the {len(expected)} neurons that NumPy keeps, found {wrong} others")


def check_ranks(case: Case) -> str:
    """Ranks and the best half of the neurons are the same as NumPy's, with ties."""
    size = case.dense.args.intermediate_size
    energy = np.random.default_rng(0).exponential(size=size).astype(np.float32)
    energy[::5] = energy[1]
    expected, found = _numpy_ranks(energy), np.array(rank(mx.array(energy)))
    if wrong := int((found != expected).sum()):
        raise CheckFailed(f"expected NumPy's ranks, found {wrong} of {size} others")
    for group in (1, 64, 128):
        k = kept_count(0.5, size, group)
        kept = np.array(select(mx.array(expected), k, group))
        _same_neurons(f"groups of {group}", kept, _numpy_choice(expected, k, group))
    return f"{size} neurons"


def check_wrap(case: Case) -> str:
    """GLASS wraps the model with all of its FFN blocks and its global ranks."""
    if case.name == SHIPPED:
        model = wrap(case.dense, path=DEMO_PATH)
    else:  # a look-up would refuse them, because the weights differ
        model, stats = wrap(case.dense, stats=False), GlobalStatistics.read(STATS_DIR / "demo.safetensors")
        ranks = {signal: of_blocks[:LAYERS] for signal, of_blocks in stats.ranks.items()}
        model.set_global_ranks(ranks, responses=stats.responses[:LAYERS])
    if len(model.blocks) != len(case.dense.layers):
        raise CheckFailed(f"expected {len(case.dense.layers)} FFN blocks, found {len(model.blocks)}")
    if model.global_ranks is None:
        raise CheckFailed("expected the demo model's global ranks, found none")
    case.glass = model
    return f"{len(model.blocks)} blocks"


def check_density_1(case: Case) -> str:
    """At density 1 the tokens are mlx-lm's own."""
    return _same_tokens(case.answer(density=1.0), case.greedy)


def check_selection(case: Case) -> str:
    """After a prompt, NumPy keeps the same neurons given the same energies."""
    model, cache = case.model, case.prefilled(global_weight=0.0, layer_budgets="uniform")
    energies = np.split(np.array(model.session(cache).energy), np.cumsum([b.size for b in model.blocks])[:-1])
    kept, counts = model.kept_neurons(cache), model.kept_counts(0.5, "uniform")
    for block, energy, k in zip(model.blocks, energies, counts):
        expected = _numpy_choice(_numpy_ranks(energy), k, block.group)
        _same_neurons(block.path, np.array(kept[block.path]), expected)
    return f"{sum(counts)} of {sum(b.size for b in model.blocks)} neurons"


def check_sparse(case: Case) -> str:
    """Decoding on compact weights equals the dense model with the dropped neurons' hidden values as NumPy predicts
    them."""
    model, cache = case.model, case.prefilled()
    replaced, dense = copy.deepcopy(cache[:-1]), copy.deepcopy(cache[:-1])
    kept, predictions = model.kept_neurons(cache).values(), _numpy_predictions(case)
    masks = [np.isin(np.arange(b.size), np.array(k)) for b, k in zip(model.blocks, kept)]
    inputs: dict[int, mx.array] = {}

    def predicted(i: int, h: mx.array) -> mx.array:
        return mx.where(mx.array(masks[i]), h, mx.array(predictions[i](_numpy(inputs[i])).astype(np.float32)))

    def logits(run: Callable, cache: list[Any]) -> mx.array:
        return mx.concatenate([run(mx.array([[token]]), cache=cache) for token in case.continuation[:2]])

    found, unchanged = logits(model.decode, cache), logits(case.dense, dense)
    hooks = watching_inputs(model.blocks, inputs.__setitem__) | hooked(
        model.blocks, lambda i, h: predicted(i, h).astype(h.dtype)
    )
    expected = run_with(hooks, logits, case.dense, replaced)
    error, effect = distance(found, expected), distance(unchanged, expected)
    _near("logits against the dense model with neurons predicted", error, case.tolerance)
    _differs("logits against the dense model", effect, case.tolerance)
    return f"relative error {error:.1g}, dense {effect:.1g}"


def _numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), np.float64)


def _numpy_predictions(case: Case) -> list[Callable[[np.ndarray], np.ndarray]]:
    """For each block what NumPy expects of its hidden vectors by its inputs, after the prompt; the formula is that of
    ``core/compensation.py``."""
    model = case.model
    seen: list[list[np.ndarray]] = [[] for _ in model.blocks]

    def keep(i: int, vectors: mx.array) -> None:
        seen[i].append(_numpy(vectors).reshape(len(case.prompt), -1)[1:])  # the first token does not count

    run_with(watching_inputs(model.blocks, keep) | hooked(model.blocks, keep), case.dense, mx.array([case.prompt]))

    def prediction(response: Response, x: np.ndarray, h: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        mu, a = _numpy(response.input_mean), _numpy(response.hidden_mean)
        map_ = _numpy(response.directions) @ _numpy(response.coefficients)
        e = (h - a - (x - mu) @ map_).sum(axis=0) / (len(h) + SHRINKAGE)
        return lambda inputs: a + e + (inputs - mu) @ map_

    return [prediction(response, *pair) for response, pair in zip(model.responses, seen)]


def _keys_and_values(cache: list[Any], tokens: int) -> list[mx.array]:
    """The keys and values of the first tokens in each layer, [B, heads, tokens, D]."""
    return [array[:, :, :tokens] for entry in cache for array in entry.state if isinstance(array, mx.array)]


def check_reread(case: Case) -> str:
    """The next prompt reads the answer before it again, densely: keys and values are then the dense model's, and the
    answer's evidence is recorded."""
    model, n, given = case.model, len(case.prompt), mx.array([case.continuation])
    cache = case.prefilled()
    sparse, dense = copy.deepcopy(cache), copy.deepcopy(cache[:-1])
    for conversation in (cache, sparse):
        mx.eval(model.run_phase(Phase.DECODE, given[:, :4], conversation))
    model.prefill(given[:, 4:5], cache)
    model.run_phase(Phase.DECODE, given[:, 4:5], sparse)
    case.dense(given[:, :5], cache=dense)
    recorded = model.session(cache).prompt_tokens
    if recorded != n + 5:
        raise CheckFailed(f"expected evidence of {n + 5} tokens, found {recorded}")
    expected, found, unrepaired = (_keys_and_values(c, n + 5) for c in (dense, cache[:-1], sparse[:-1]))
    error, effect = max(map(distance, found, expected)), max(map(distance, unrepaired, expected))
    _near("keys and values against the dense model's", error, case.tolerance)
    _differs("keys and values before they are read again", effect, case.tolerance)
    return f"5 tokens reread, relative error {error:.1g}, without {effect:.1g}"


def check_saved(case: Case) -> str:
    """A prompt cache that was saved and loaded continues like the one in memory."""
    cache = case.model.make_cache(density=0.5)
    case.answer(n=2, prompt_cache=cache)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "cache.safetensors")
        save_prompt_cache(file, cache)
        loaded = load_prompt_cache(file)
        found = case.answer(case.continuation[:2], 3, prompt_cache=loaded)  # arrays are read from the file on first use
    return _same_tokens(found, case.answer(case.continuation[:2], 3, prompt_cache=cache))


def check_verified(case: Case) -> str:
    """Verified decoding gives the dense model's tokens, or at a tie within rounding either token."""
    found = case.answer(density=0.5, verify=True, draft_tokens=3)
    if found == case.greedy:
        return f"{len(found)} tokens"
    start = len(case.prompt) - 1
    logits = case.dense(mx.array([case.prompt + found[:-1]]))[0, start:].astype(mx.float32)
    chosen = mx.take_along_axis(logits, mx.array(found)[:, None], axis=1)[:, 0]
    gap = mx.max((mx.max(logits, axis=1) - chosen) / mx.max(mx.abs(logits), axis=1)).item()
    _near("verified tokens against the dense model's best", gap, case.tolerance)
    return f"{len(found)} tokens, some at ties"


def check_thread(case: Case) -> str:
    """The server's thread gives the same answer as this one."""
    prompt = case.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    expected = generate(case.model, case.tokenizer, prompt, max_tokens=TOKENS)
    engine = Engine()
    try:
        # called first, because it passes on the backend's errors
        called = engine.call(lambda model, tokenizer: generate(model, tokenizer, prompt, max_tokens=TOKENS)).result()
        answered = "".join(p.text for p in engine.submit(Request(messages=MESSAGES, max_tokens=TOKENS)))
    finally:
        engine.close()
    for found in (called, answered):
        if found != expected:
            raise CheckFailed(f"the answer: expected {expected!r}, found {found!r}")
    return f"{len(expected)} characters"


# By name: the check, what holds if it passes, and the formats that it runs on.
CHECKS: dict[str, tuple[Callable[[Case], str], str, Iterable[str]]] = {
    "mlx-lm": (check_mlx_lm, "mlx-lm alone runs the model", FORMATS),
    "slices": (check_slices, "compact weights equal the original's", FORMATS),
    "ranks": (check_ranks, "NumPy ranks the same way", (SHIPPED,)),
    "wrap": (check_wrap, "GLASS wraps all FFN blocks", FORMATS),
    "density 1": (check_density_1, "mlx-lm's own tokens", FORMATS),
    "selection": (check_selection, "NumPy keeps the same neurons", FORMATS),
    "sparse": (check_sparse, "equals dense with neurons predicted", FORMATS),
    "reread": (check_reread, "the next prompt reads the answer again", FORMATS),
    "saved": (check_saved, "a loaded prompt cache continues alike", FORMATS),
    "verified": (check_verified, "the dense model's tokens", FORMATS),
    "thread": (check_thread, "the server's thread answers alike", (SHIPPED,)),
}
