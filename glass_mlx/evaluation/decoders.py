"""Ways to decode, side by side: how fast each one is, and how far its answers are from the dense model's.

The option ``--ways`` of ``tradeoff`` and the keys ``ways`` and ``strays`` of its JSON mean decoders and their
disagreement rate; they keep their names because scripts rely on them.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from ..model.session import Phase
from .free_running import sample_continuations
from .intervals import window_means
from .names import DECODERS
from .teacher_forcing import TextBatch

Sampler = Callable[[mx.array], mx.array]


class CountingScheduler(DraftScheduler):
    """A draft scheduler that counts.

    Attributes:
        passes (int): dense passes that checked drafts.
        kept (int): drafted tokens that they accepted.
        checked (int): drafted tokens up to the first rejected one, which is included.
    """

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
class Decoder:
    """A way to decode.

    Attributes:
        config (dict | None): of its conversations; None is plain mlx-lm.
        verified (bool): the sparse model only drafts, and the dense model verifies.
        acceptance (float | None): simulated probability that a drafted token is accepted.
        draft_tokens (int | None): as in ``stream_generate``.
        scheduler (CountingScheduler): what it has learnt from its answers, if it verifies.
    """

    config: dict[str, Any] | None = None
    verified: bool = False
    acceptance: float | None = None
    draft_tokens: int | None = None
    scheduler: CountingScheduler = field(default_factory=CountingScheduler)

    def steps(self, model: GlassModel, prompt: list[int], tokens: int, sampler: Sampler) -> Iterator[tuple[int, Any]]:
        """Yield an answer's tokens, each with the session it is decoded in (None for plain mlx-lm)."""
        given = mx.array(prompt)
        if self.config is None:
            cache = make_prompt_cache(model.dense)
            options = {"max_tokens": tokens, "sampler": _by_place(sampler), "prompt_cache": cache}
            return ((int(token), None) for token, _ in generate_step(given, model.dense, **options))
        cache = model.make_cache(**self.config)
        session = model.session(cache)
        if self.verified:
            sampler = sampler if self.acceptance is None else simulated_sampler(self.acceptance)
            options = {"max_tokens": tokens, "sampler": sampler, "prompt_cache": cache, "scheduler": self.scheduler}
            options |= {"draft_tokens": self.draft_tokens}
            steps = verified_generate_step(given, model, **options)
            return ((token, session) for token, *_ in steps)
        options = {"max_tokens": tokens, "sampler": _by_place(sampler), "prompt_cache": cache}
        phased = PhasedModel(model, len(prompt))
        return ((int(token), session) for token, _ in generate_step(given, phased, **options))


# By name and density.
Decoders = dict[str, dict[float, Decoder]]


def standard_decoders(
    densities: list[float],
    global_weight: float | str = "auto",
    draft_tokens: int | None = None,
    kinds: Sequence[str] = DECODERS,
    layer_budgets: str = GlassConfig.layer_budgets,
) -> Decoders:
    """Decoders by name and density, the dense model first.

    Args:
        densities (list[float]): of each decoder.
        global_weight (float or "auto"): of all but GRIFFIN.
        draft_tokens (int, optional): always draft this many tokens.
        kinds (sequence): of ``names.DECODERS``.
        layer_budgets (str): of all but GRIFFIN, as ``GlassConfig.layer_budgets``.
    """
    glass = {"global_weight": global_weight, "layer_budgets": layer_budgets}
    griffin = {"global_weight": 0.0, "signal": "activation", "layer_budgets": "uniform"}
    griffin["compensation"] = False  # as published
    decoders: Decoders = {"dense": {1.0: Decoder()}}
    for kind in kinds:
        config = griffin if kind == "griffin" else glass
        decoders[kind] = {
            d: Decoder({**config, "density": d}, kind == "verified", draft_tokens=draft_tokens) for d in densities
        }
    return decoders


def simulated_decoders(densities: list[float], acceptances: list[float]) -> Decoders:
    """The decoders whose speed a model with random weights can show; verified ones with simulated acceptance."""
    decoders = standard_decoders(densities, kinds=("glass",))
    for a in acceptances:
        decoders[f"verified, acceptance {a:g}"] = {d: Decoder({"density": d}, True, acceptance=a) for d in densities}
    return decoders


def simulated_sampler(acceptance: float) -> Sampler:
    """A sampler whose two calls for the same place agree with a given probability.

    Each call takes token 0 with the root of that probability, or else a token that no other call takes. The logits are
    computed all the same.
    """
    rng, other = np.random.default_rng(0), itertools.count(1)

    def sample(logprobs: mx.array) -> mx.array:
        token = 0 if rng.random() < acceptance**0.5 else next(other) % logprobs.shape[-1]
        return mx.depends(mx.array([token]), mx.argmax(logprobs, axis=-1))

    return sample


def _by_place(sampler: Sampler) -> Sampler:
    """A sampler for mlx-lm's loop, which calls it once per place, with the random numbers of verified decoding."""
    randomness, place = CommonRandomNumbers(), itertools.count()

    def sample(logprobs: mx.array) -> mx.array:
        randomness.at(next(place))
        return sampler(logprobs)

    return sample


def timed_answer(
    model: GlassModel, decoder: Decoder, prompt: list[int], tokens: int, sampler: Sampler, seed: int
) -> tuple[list[int], float]:
    """Answer a prompt; returns the tokens, and tokens per second from the first one on, with selection."""
    mx.random.seed(seed)
    answer, times, select = [], [], 0.0
    with wired_limit(model, [generation_stream]):
        for token, session in decoder.steps(model, prompt, tokens, sampler):
            answer.append(token)
            times.append(time.perf_counter())
            if len(answer) == 1 and session is not None:
                select = session.selection_time  # mlx-lm's loop has begun the second token by now
    return answer, (len(answer) - 1) / (times[-1] - times[0] + select)


def disagreement(
    model: GlassModel, prompt: list[int], answer: list[int], sampler: Sampler, seed: int
) -> tuple[float, float]:
    """Judge an answer by the dense model.

    Returns:
        tuple: the disagreement rate, which is the share of tokens that the dense model, with the same text before them
        and the same random numbers, would not have chosen; and the answer's negative log-likelihood in nats per token.
    """
    batch = TextBatch([prompt], [answer])
    logits = batch.predictions(model.dense(batch.tokens))
    nll = batch.nll(logits).mean()
    mx.random.seed(seed)
    sample = _by_place(sampler)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    own = mx.concatenate([sample(logprobs[:, i]) for i in range(len(answer))])
    return mx.mean(own != mx.array(answer)).item(), nll.item()


def teacher_forced_kl(
    model: GlassModel, decoder: Decoder, prompt: list[int], continuation: list[int], dense: mx.array
) -> np.ndarray:
    """KL(dense || decoder) in nats at each of T tokens of a given continuation, [T].

    Args:
        model, decoder, prompt: what decodes, and after which tokens.
        continuation (list[int]): T tokens.
        dense (mx.array): the dense model's logits that predict them, [1, T, vocabulary].
    """
    cache = model.make_cache(**decoder.config)
    first = model.prefill(mx.array([prompt]), cache)[:, -1:]
    rest = model.run_phase(Phase.DECODE, mx.array([continuation[:-1]]), cache)
    return np.array(kl_divergence(dense, mx.concatenate([first, rest], axis=1).astype(mx.float32))[0])


def measure_decoders(
    model: GlassModel,
    prompts: list[list[int]],
    decoders: Decoders,
    tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    fidelity: bool = True,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure decoders on the same prompts, in turn.

    Args:
        model (GlassModel): the model.
        prompts (list[list[int]]): tokens.
        decoders (dict): from :func:`standard_decoders`.
        tokens (int): length of an answer, at least 3.
        temperature (float): of the sampling.
        seed (int): of the sampling.
        fidelity (bool): also measure fidelity.

    Returns:
        dict: by decoder and density ``tps`` and ``speedup``, medians over prompts, with their ``range``; ``acceptance``
        and ``tokens_per_pass`` of those that verify. With fidelity ``strays``, ``own_ppl``, and ``kl``, also of the
        last third and by position (:func:`intervals.window_means`).
    """
    sampler = make_sampler(temp=temperature)
    listed = [(name, d, decoder) for name, by_density in decoders.items() for d, decoder in by_density.items()]
    rows: dict[tuple, dict[str, list]] = {
        (name, d): {"tps": [], "speedup": [], "strays": [], "nll": [], "kl": []} for name, d, _ in listed
    }
    for _, _, decoder in listed:  # warm up
        timed_answer(model, decoder, prompts[0], min(tokens, 16), sampler, seed)
        decoder.scheduler = CountingScheduler()
    for i, prompt in enumerate(tqdm(prompts, unit="prompt", file=sys.stderr, disable=None)):
        answers = {}
        for name, d, decoder in listed:  # the dense one first
            answers[name, d], tps = timed_answer(model, decoder, prompt, tokens, sampler, seed + i)
            row = rows[name, d]
            row["tps"].append(tps)
            row["speedup"].append(tps / rows["dense", 1.0]["tps"][-1])
        if fidelity:
            _add_fidelity(model, prompt, listed, answers, rows, sampler, seed + i, temperature)
    return {
        name: {f"{d:g}": _summary(rows[name, d], decoder) for d, decoder in by_density.items()}
        for name, by_density in decoders.items()
    }


def _add_fidelity(model, prompt, listed, answers, rows, sampler, seed, temperature) -> None:
    dense_answer = answers["dense", 1.0]
    mx.random.seed(seed)
    [continuation] = [dense_answer] if temperature == 0 else sample_continuations(model, [prompt], len(dense_answer))
    batch = TextBatch([prompt], [continuation])
    dense = batch.predictions(model.dense(batch.tokens))
    for name, d, decoder in listed:
        row = rows[name, d]
        rate, nll = disagreement(model, prompt, answers[name, d], sampler, seed)
        row["strays"].append(rate)
        row["nll"].append(nll)
        if decoder.config is None or decoder.verified:
            row["kl"].append(np.zeros(len(continuation)))
        else:
            row["kl"].append(teacher_forced_kl(model, decoder, prompt, continuation, dense))


def _summary(row: dict[str, list], decoder: Decoder) -> dict[str, Any]:
    result: dict[str, Any] = {key: statistics.median(row[key]) for key in ("tps", "speedup")}
    result["range"] = {key: [min(row[key]), max(row[key])] for key in ("tps", "speedup")}
    if decoder.verified:
        counts = decoder.scheduler
        result["acceptance"] = counts.kept / counts.checked if counts.checked else None
        result["tokens_per_pass"] = (counts.kept + counts.passes) / counts.passes if counts.passes else None
    if row["strays"]:
        kl = np.stack(row["kl"])  # [prompts, T]
        result["kl"], result["kl_error"] = _mean(kl.mean(axis=1))
        result["kl_last_third"] = float(kl[:, -(kl.shape[1] // 3) :].mean())
        result["kl_by_position"] = window_means(kl)
        result["strays"], result["strays_error"] = _mean(np.array(row["strays"]))
        result["own_ppl"] = math.exp(statistics.fmean(row["nll"]))
    return result


def _mean(values: np.ndarray) -> tuple[float, float]:
    """A mean over prompts and its standard error."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(values.mean()), float(error)
