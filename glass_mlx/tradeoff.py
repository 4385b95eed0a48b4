"""Speed against fidelity: the dense model, GLASS with and without refresh, verified decoding, GRIFFIN.

    python -m glass_mlx.tradeoff --model demo --density 0.3,0.5,0.7 --plot tradeoff.png
    python -m glass_mlx.tradeoff --ways glass,refresh --refresh 10,30,auto --tokens 1024
    python -m glass_mlx.tradeoff --ways glass,refresh --global-weight 0.5 --allocation uniform  # rank fusion
    python -m glass_mlx.tradeoff --shape mistral-7b --layers 2 --bits 4 --acceptance 0.7,0.9

Every way of decoding answers the same prompts, in turn with the dense model and in one process. *Speed* is in tokens a
second from the first token on, with choosing neurons and slicing; an answer runs on over an end token, so that all are
of one length.

*Strays* are the fidelity that all ways have: the share of tokens of a way's own answer that the dense model, given the
same text so far and the same random numbers, would not have said in that place. The dense model has none, and neither
has verified decoding, up to rounding. (At temperature 0 it is the share that are not the dense model's most likely
ones. The random numbers are Gumbel noise, so two equal distributions have no strays and close ones few.) *KL* is
KL(dense || way) in nats per token, where the dense model's continuation is fed to a way as in `evaluate`. *Own PPL* is
the perplexity of a way's answer under the dense model.

Random weights (`--shape`) have true speed but say nothing true: there is no fidelity then, and `--acceptance` is the
simulated share of drafted tokens that the check accepts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

from .benchmark import backend, machine
from .cli import add_verbose, density, global_weight, list_of, refresh, run
from .continuation import speak
from .evaluate import PROMPTS, cut, read_prompts
from .fidelity import Text, divergence
from .loading import DEFAULT_MODEL, load
from .model import GlassModel
from .plot import plot_tradeoff
from .ranks import write_atomically
from .sampling import Chance, make_sampler
from .session import ALLOCATIONS, GlassConfig
from .shapes import BITS, SHAPES, random_model
from .summary import windows
from .verify import Pace, verified_generate_step

Sampler = Callable[[mx.array], mx.array]


class CountingPace(Pace):
    """A cost model that also counts."""

    def __init__(self):
        super().__init__()
        self.passes = self.kept = self.checked = 0

    def saw(self, drafted: int, accepted: int, draft_seconds: float, dense_seconds: float) -> None:
        super().saw(drafted, accepted, draft_seconds, dense_seconds)
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
        pace (CountingPace): what its answers have learnt, if it verifies.
    """

    config: dict[str, Any] | None = None
    verified: bool = False
    acceptance: float | None = None
    draft_tokens: int | None = None
    pace: CountingPace = field(default_factory=CountingPace)

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
            options = {"max_tokens": tokens, "sampler": sampler, "prompt_cache": cache, "pace": self.pace}
            options |= {"draft_tokens": self.draft_tokens}
            steps = verified_generate_step(given, model, **options)
            return ((token, session) for token, *_ in steps)
        session.begin_prompt(len(prompt))
        options = {"max_tokens": tokens, "sampler": _by_place(sampler), "prompt_cache": cache}
        return ((int(token), session) for token, _ in generate_step(given, model, **options))


KINDS = ("griffin", "glass", "refresh", "verified")


def ways(
    densities: list[float],
    weight: float | str = "auto",
    k: int | None = None,
    refreshes: tuple[int | str, ...] | list[int | str] = ("auto",),
    kinds: tuple[str, ...] | list[str] = KINDS,
    allocation: str = GlassConfig.allocation,
) -> dict[str, dict[float, Way]]:
    """Ways of decoding by name and density, the dense model first.

    Args:
        densities (list[float]): of each way.
        weight (float or "auto"): the global weight of all but GRIFFIN.
        k (int, optional): draft always so many tokens.
        refreshes (list): as ``GlassConfig.refresh``.
        kinds (list[str]): of ``KINDS``.
        allocation (str): of all but GRIFFIN, as ``GlassConfig.allocation``.
    """
    glass = {"global_weight": weight, "refresh": 0, "allocation": allocation}
    griffin = {"global_weight": 0.0, "signal": "activation", "refresh": 0, "allocation": "uniform"}
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
    chance, place = Chance(), itertools.count()

    def sample(logprobs: mx.array) -> mx.array:
        chance.at(next(place))
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
    model.session(cache).begin_prompt(len(prompt))
    first = model(mx.array([prompt]), cache=cache)[:, -1:]
    rest = model.decode(mx.array([said[:-1]]), cache)
    return np.array(divergence(dense, mx.concatenate([first, rest], axis=1).astype(mx.float32))[0])


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
        way.pace = CountingPace()
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
        pace = way.pace
        result["acceptance"] = pace.kept / pace.checked if pace.checked else None
        result["tokens_per_pass"] = (pace.kept + pace.passes) / pace.passes if pace.passes else None
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


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"{result['model']} on {result['machine']}, {result['backend']}",
        f"{result['prompts']} prompts of {result['prompt_tokens'] or 'their own number of'} tokens, {result['tokens']} "
        f"generated at temperature {result['temperature']:g}; speed: median [lowest, highest]",
        f"{'':>26} {'density':>7} {'tok/s':>22} {'speed-up':>20} {'strays':>14} {'KL':>14} "
        f"{'last third':>10} {'own PPL':>8} {'accepted':>9} {'a pass':>7}",
    ]
    for name, by_density in result["ways"].items():
        for d, row in by_density.items():
            ranges = [f"{row[k]:{f}} [{row['range'][k][0]:{f}}, {row['range'][k][1]:{f}}]" for k, f in _SPEEDS]
            strays = f"{row['strays']:.1%} ± {row['strays_error']:.1%}" if "strays" in row else ""
            kl = f"{row['kl']:.3f} ± {row['kl_error']:.3f}" if "kl" in row else ""
            last = f"{row['kl_last_third']:.3f}" if "kl" in row else ""
            ppl = f"{row['own_ppl']:.1f}" if "own_ppl" in row else ""
            accepted, a_pass = row.get("acceptance"), row.get("tokens_per_pass")
            lines.append(
                f"{name:>26} {d:>7} {ranges[0]:>22} {ranges[1]:>20} {strays:>14} {kl:>14} {last:>10} {ppl:>8} "
                f"{'' if accepted is None else f'{accepted:.1%}':>9} {'' if a_pass is None else f'{a_pass:.2f}':>7}"
            )
    return "\n".join(lines)


_SPEEDS = (("tps", ".1f"), ("speedup", ".2f"))


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return float(text)


def _kind(text: str) -> str:
    if text not in KINDS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(KINDS)}")
    return text


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glass_mlx.tradeoff", description="Speed against fidelity of all ways to decode."
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help=f"directory, Hub repository or alias (default: {DEFAULT_MODEL})")
    what.add_argument("--shape", choices=SHAPES, help="random weights of this model's shape: speed only")
    parser.add_argument("--layers", type=int, help="with --shape: so many layers, for small machines")
    parser.add_argument("--bits", type=int, choices=BITS, default=4, help="with --shape: of a weight (default: 4)")
    parser.add_argument(
        "--acceptance",
        type=list_of(_share),
        default=[0.7],
        metavar="A[,A...]",
        help="with --shape: simulated share of drafted tokens that are accepted (default: 0.7)",
    )
    parser.add_argument("--density", type=list_of(density), default=[0.3, 0.5, 0.7], metavar="X[,X...]")
    parser.add_argument(
        "--draft-tokens", type=int, metavar="K", help="draft always so many tokens (default: as many as pay)"
    )
    parser.add_argument(
        "--refresh", type=list_of(refresh), default=["auto"], metavar="TOKENS[,TOKENS...]", help="(default: auto)"
    )
    parser.add_argument(
        "--ways",
        type=list_of(_kind),
        default=KINDS,
        metavar="WAY[,WAY...]",
        help=f"of {', '.join(KINDS)} (default: all)",
    )
    parser.add_argument("--global-weight", type=global_weight, default=GlassConfig.global_weight, metavar="WEIGHT")
    parser.add_argument("--allocation", choices=ALLOCATIONS, default=GlassConfig.allocation)
    parser.add_argument("--stats", metavar="FILE", help="global ranks (default: looked up)")
    parser.add_argument("--prompts", default=str(PROMPTS), metavar="FILE", help="one prompt a line")
    parser.add_argument("--count", type=int, default=8, help="so many prompts, from all over the file (default: 8)")
    parser.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="cut prompts to this length (default: their own)"
    )
    parser.add_argument("--tokens", type=int, default=256, help="length of the answers (default: 256)")
    parser.add_argument("--temp", type=float, default=1.0, help="sampling temperature (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="PRNG seed")
    parser.add_argument(
        "--float32",
        action=argparse.BooleanOptionalAction,
        default=mx.default_device() == mx.Device(mx.cpu),
        help="compute in float32, much faster than 16 bits on a CPU (default: on a CPU)",
    )
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file; - prints them and nothing else")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG (pip install 'glass_mlx[plot]')")
    add_verbose(parser)
    return parser


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    if args.tokens < 3 or args.count < 1 or args.temp < 0 or (args.prompt_tokens or 1) < 1:
        parser.error("--tokens must be at least 3, --count and --prompt-tokens at least 1, --temp not negative")
    if args.layers is not None and (args.shape is None or args.layers < 1):
        parser.error("--layers goes with --shape, and is at least 1")
    run(lambda: _compare(args), args.verbose)


def _compare(args: argparse.Namespace) -> None:
    if args.shape:
        model = random_model(args.shape, args.layers, args.bits, args.seed)
        name = f"{args.shape} shape, {len(model.dense.layers)} layers, {args.bits} bits, random weights"
        rng = np.random.default_rng(args.seed)
        prompts = rng.integers(0, SHAPES[args.shape]["vocab_size"], (args.count, args.prompt_tokens or 16)).tolist()
        made = simulated_ways(args.density, args.acceptance)
    else:
        name = args.model or DEFAULT_MODEL
        model, tokenizer = load(name, stats=args.stats, trust_remote_code=args.trust_remote_code)
        if args.float32:
            model.dense.set_dtype(mx.float32)
        prompts = read_prompts(args.prompts, tokenizer, None)
        prompts = [prompts[i * len(prompts) // args.count] for i in range(min(args.count, len(prompts)))]
        prompts = cut(model, prompts, args.prompt_tokens, args.temp, args.seed)
        made = ways(
            args.density,
            weight=args.global_weight,
            k=args.draft_tokens,
            refreshes=args.refresh,
            kinds=args.ways,
            allocation=args.allocation,
        )
    found = measure(model, prompts, made, args.tokens, args.temp, args.seed, fidelity=not args.shape)
    result = {
        "model": name,
        "machine": machine(),
        "backend": backend(),
        "float32": args.float32 and not args.shape,
        "simulated_acceptance": bool(args.shape),
        "prompts": len(prompts),
        "prompt_tokens": args.prompt_tokens,
        "tokens": args.tokens,
        "temperature": args.temp,
        "seed": args.seed,
        "ways": found,
    }
    if args.plot:
        plot_tradeoff(result, args.plot)
    if args.json == "-":
        print(json.dumps(result))
        return
    if args.json:
        write_atomically(Path(args.json), lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))
    print(table(result))


if __name__ == "__main__":
    main()
