"""Every way to decode, side by side: how fast it is and how far its answers are from the dense model's."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

from ..core.metrics import kl_divergence
from ..decoding.draft_scheduler import DraftScheduler
from ..decoding.sampling import CommonRandomNumbers, make_sampler
from ..decoding.speculative import verified_generate_step
from ..decoding.stream import PhasedModel
from ..model.config import GlassConfig
from ..model.glass_model import GlassModel
from .free_running import speak
from .intervals import windows
from .teacher_forcing import Text, decode_given


class CountingScheduler(DraftScheduler):
    """A cost model that also counts."""

    def __init__(self):
        super().__init__()
        self.passes = self.kept = self.checked = 0

    def observe(self, drafted: int, accepted: int, draft_seconds: float, dense_seconds: float) -> None:
        super().observe(drafted, accepted, draft_seconds, dense_seconds)
        if drafted:
            self.passes += 1
            self.kept += accepted
            self.checked += min(drafted, accepted + 1)


@dataclass
class Way:
    """A way of decoding.

    Attributes:
        config (dict | None): of a conversation; None is plain mlx-lm.
        verified (bool): only draft, and check.
        acceptance (float | None): the simulated one.
        draft_tokens (int | None): as in ``stream_generate``.
        scheduler (CountingScheduler): what its answers have learnt, if it verifies.
    """

    config: dict[str, Any] | None = None
    verified: bool = False
    acceptance: float | None = None
    draft_tokens: int | None = None
    scheduler: CountingScheduler = field(default_factory=CountingScheduler)

    def steps(self, model: GlassModel, prompt: list[int], tokens: int, sampler: Sampler) -> Iterator[tuple[int, Any]]:
        """Tokens of an answer, and the session that they are decoded in."""
        given = mx.array(prompt)
        if self.config is None:
            cache = make_prompt_cache(model.dense)
            options = {"max_tokens": tokens, "sampler": _by_place(sampler), "prompt_cache": cache}
            return ((int(token), None) for token, _ in generate_step(given, model.dense, **options))
        cache = model.make_cache(**self.config)
        session = model.session(cache)
        if self.verified:
            sampler = sampler if self.acceptance is None else simulated(self.acceptance)
            options = {"max_tokens": tokens, "sampler": sampler, "prompt_cache": cache, "scheduler": self.scheduler}
            options |= {"draft_tokens": self.draft_tokens}
            steps = verified_generate_step(given, model, **options)
            return ((token, session) for token, *_ in steps)
        options = {"max_tokens": tokens, "sampler": _by_place(sampler), "prompt_cache": cache}
        phased = PhasedModel(model, len(prompt))
        return ((int(token), session) for token, _ in generate_step(given, phased, **options))


KINDS = ("griffin", "glass", "refresh", "verified")


def ways(
    densities: list[float],
    weight: float | str = "auto",
    k: int | None = None,
    refreshes: tuple[int | str, ...] | list[int | str] = ("auto",),
    kinds: tuple[str, ...] | list[str] = KINDS,
    layer_budgets: str = GlassConfig.layer_budgets,
) -> dict[str, dict[float, Way]]:
    """Ways of decoding by name and density, the dense model first.

    Args:
        densities (list[float]): of each way.
        weight (float or "auto"): the global weight of all but GRIFFIN.
        k (int, optional): draft always so many tokens.
        refreshes (list): as ``GlassConfig.refresh``.
        kinds (list[str]): of ``KINDS``.
        layer_budgets (str): of all but GRIFFIN, as ``GlassConfig.layer_budgets``.
    """
    glass = {"global_weight": weight, "refresh": 0, "layer_budgets": layer_budgets}
    griffin = {"global_weight": 0.0, "signal": "activation", "refresh": 0, "layer_budgets": "uniform"}
    refreshed = {**glass, "refresh": "auto"}
    made: dict[str, dict[float, Way]] = {"dense": {1.0: Way()}}
    named = {"griffin": {"griffin": (griffin,)}, "glass": {"glass": (glass,)}}
    named["refresh"] = {
        "glass + refresh" if r == "auto" else f"glass + refresh {r}": ({**glass, "refresh": r},) for r in refreshes
    }
    named["verified"] = {"verified": (refreshed, True)}
    for kind in kinds:
        for name, (config, *rest) in named[kind].items():
            made[name] = {d: Way({**config, "density": d}, *rest, draft_tokens=k) for d in densities}
    return made


def simulated_ways(densities: list[float], acceptances: list[float]) -> dict[str, dict[float, Way]]:
    """The ways of decoding whose speed random weights can show."""
    all_ways = ways(densities)
    made = {name: all_ways[name] for name in ("dense", "glass", "glass + refresh")}
    for a in acceptances:
        made[f"verified, acceptance {a:g}"] = {
            d: Way({"density": d, "refresh": "auto"}, True, acceptance=a) for d in densities
        }
    return made


def simulated(acceptance: float) -> Sampler:
    """A sampler of which two calls for the same place agree with a given probability: each takes token 0 with the root
    of it, and else one that no other call takes. The logits are computed all the same."""
    rng, other = np.random.default_rng(0), itertools.count(1)

    def sample(logprobs: mx.array) -> mx.array:
        token = 0 if rng.random() < acceptance**0.5 else next(other) % logprobs.shape[-1]
        return mx.depends(mx.array([token]), mx.argmax(logprobs, axis=-1))

    return sample


def _by_place(sampler: Sampler) -> Sampler:
    """A sampler for mlx-lm's loop, which calls it once for each place, that draws as verified decoding does."""
    randomness, place = CommonRandomNumbers(), itertools.count()

    def sample(logprobs: mx.array) -> mx.array:
        randomness.at(next(place))
        return sampler(logprobs)

    return sample


def answer(
    model: GlassModel, way: Way, prompt: list[int], tokens: int, sampler: Sampler, seed: int
) -> tuple[list[int], float]:
    """An answer's tokens, and how many of them a second there were."""
    mx.random.seed(seed)
    said, times, select = [], [], 0.0
    with wired_limit(model, [generation_stream]):
        for token, session in way.steps(model, prompt, tokens, sampler):
            said.append(token)
            times.append(time.perf_counter())
            if len(said) == 1 and session is not None:
                select = session.selection_time  # mlx-lm's loop has begun the second token by now
    return said, (len(said) - 1) / (times[-1] - times[0] + select)


def strays(model: GlassModel, prompt: list[int], said: list[int], sampler: Sampler, seed: int) -> tuple[float, float]:
    """Share of an answer's tokens that the dense model would not have said, and the answer's negative log-likelihood
    under the dense model in nats per token."""
    text = Text([prompt], [said])
    logits = text.predicting(model.dense(text.tokens))
    nll = text.nll(logits).mean()
    mx.random.seed(seed)
    sample = _by_place(sampler)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    own = mx.concatenate([sample(logprobs[:, i]) for i in range(len(said))])
    return mx.mean(own != mx.array(said)).item(), nll.item()


def forced_kl(model: GlassModel, way: Way, prompt: list[int], said: list[int], dense: mx.array) -> np.ndarray:
    """KL(dense || way) in nats at each token of a given continuation, refreshed on the way, [T].

    Args:
        dense (mx.array): the dense model's logits [1, T, vocabulary] of its tokens.
    """
    cache = model.make_cache(**way.config)
    first = model.prefill(mx.array([prompt]), cache)[:, -1:]
    rest = decode_given(model, mx.array([said[:-1]]), cache)
    return np.array(kl_divergence(dense, mx.concatenate([first, rest], axis=1).astype(mx.float32))[0])


def measure(
    model: GlassModel,
    prompts: list[list[int]],
    made: dict[str, dict[float, Way]],
    tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    fidelity: bool = True,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure ways of decoding.

    Args:
        model (GlassModel): the model.
        prompts (list[list[int]]): tokens.
        made (dict): from :func:`ways`.
        tokens (int): length of an answer, at least 3.
        temperature (float): of the sampling.
        seed (int): of the sampling.
        fidelity (bool): also measure that.

    Returns:
        dict: by way and density ``tps`` and ``speedup``, medians over prompts, with ``range``; ``acceptance`` and
        ``tokens_per_pass`` of those that check; where there is fidelity ``strays``, ``own_ppl``, and ``kl``, the
        latter also in its last third and ``kl_by_position`` (``summary.windows``).
    """
    sampler = make_sampler(temp=temperature)
    pairs = [(name, d, way) for name, by_density in made.items() for d, way in by_density.items()]
    rows: dict[tuple, dict[str, list]] = {
        (name, d): {"tps": [], "speedup": [], "strays": [], "nll": [], "kl": []} for name, d, _ in pairs
    }
    for _, _, way in pairs:  # warming up
        answer(model, way, prompts[0], min(tokens, 16), sampler, seed)
        way.scheduler = CountingScheduler()
    for i, prompt in enumerate(tqdm(prompts, unit="prompt", file=sys.stderr, disable=None)):
        answers = {}
        for name, d, way in pairs:  # the dense one first
            answers[name, d], tps = answer(model, way, prompt, tokens, sampler, seed + i)
            row = rows[name, d]
            row["tps"].append(tps)
            row["speedup"].append(tps / rows["dense", 1.0]["tps"][-1])
        if fidelity:
            _add_fidelity(model, prompt, pairs, answers, rows, sampler, seed + i, temperature)
    return {
        name: {f"{d:g}": _summary(rows[name, d], way) for d, way in by_density.items()}
        for name, by_density in made.items()
    }


def _add_fidelity(model, prompt, pairs, answers, rows, sampler, seed, temperature) -> None:
    some = answers["dense", 1.0]
    mx.random.seed(seed)
    [said] = [some] if temperature == 0 else speak(model, [prompt], len(some))
    text = Text([prompt], [said])
    dense = text.predicting(model.dense(text.tokens))
    for name, d, way in pairs:
        row = rows[name, d]
        stray, nll = strays(model, prompt, answers[name, d], sampler, seed)
        row["strays"].append(stray)
        row["nll"].append(nll)
        if way.config is not None and not way.verified:
            row["kl"].append(forced_kl(model, way, prompt, said, dense))
        else:
            row["kl"].append(np.zeros(len(said)))


def _summary(row: dict[str, list], way: Way) -> dict[str, Any]:
    result: dict[str, Any] = {key: statistics.median(row[key]) for key in ("tps", "speedup")}
    result["range"] = {key: [min(row[key]), max(row[key])] for key in ("tps", "speedup")}
    if way.verified:
        scheduler = way.scheduler
        result["acceptance"] = scheduler.kept / scheduler.checked if scheduler.checked else None
        result["tokens_per_pass"] = (scheduler.kept + scheduler.passes) / scheduler.passes if scheduler.passes else None
    if row["strays"]:
        kl = np.stack(row["kl"])  # [prompts, T]
        ends = windows(kl.shape[1])
        result["kl"], result["kl_error"] = _mean(kl.mean(axis=1))
        result["kl_last_third"] = float(kl[:, -(kl.shape[1] // 3) :].mean())
        result["kl_by_position"] = [float(kl[:, a:b].mean()) for a, b in zip([0, *ends], ends)]
        result["strays"], result["strays_error"] = _mean(np.array(row["strays"]))
        result["own_ppl"] = math.exp(statistics.fmean(row["nll"]))
    return result


def _mean(values: np.ndarray) -> tuple[float, float]:
    """A mean over prompts and its standard error."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(values.mean()), float(error)


Sampler = Callable[[mx.array], mx.array]
