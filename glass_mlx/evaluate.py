"""How far sparse decoding strays from the dense model, by what chooses the neurons.

    python -m glass_mlx.evaluate --model demo --density 0.5 --global-weight 0,0.5,1

The dense model samples a continuation of each prompt. Every arm reads the prompt densely, chooses its neurons from it,
and is then fed that continuation while decoding sparsely. Reported are the perplexity of the continuation and
KL(dense || sparse), means over all its tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler
from tqdm import tqdm

from .cli import add_verbose, density, global_weight, run
from .errors import GlassError
from .importance import SIGNALS
from .loading import DEFAULT_MODEL, load
from .model import GlassModel
from .session import GlassConfig

PROMPTS = Path(__file__).parent / "prompts.txt"


def continuation(model: GlassModel, prompt: list[int], tokens: int, temperature: float) -> list[int]:
    """What the dense model says after a prompt: ``tokens`` sampled tokens."""
    steps = generate_step(mx.array(prompt), model.dense, max_tokens=tokens, sampler=make_sampler(temp=temperature))
    return [int(token) for token, _ in steps]


def forced_logprobs(model: GlassModel, prompt: list[int], said: list[int], config: GlassConfig) -> mx.array:
    """Log-probabilities [len(said), vocabulary] (float32) at each token of a given continuation: the prompt is
    prefilled densely, the continuation decoded on the neurons chosen from it."""
    cache = model.make_cache(**vars(config))
    model.session(cache).begin_prompt(len(prompt))
    first = model(mx.array(prompt)[None], cache=cache)[:, -1:]
    rest = model.decode(mx.array(said[:-1])[None], cache)
    logits = mx.concatenate([first, rest], axis=1)[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def evaluate(
    model: GlassModel,
    prompts: list[list[int]],
    arms: dict[str, GlassConfig],
    tokens: int = 192,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Perplexity and KL of each arm on the dense model's own continuations.

    Args:
        model (GlassModel): the model.
        prompts (list[list[int]]): token lists.
        arms (dict): a configuration for each arm's name.
        tokens (int): length of a continuation.
        temperature (float): of its sampling.
        seed (int): of its sampling.

    Returns:
        dict: for each arm and ``dense``: ``ppl``, ``kl`` in nats per token, ``agreement`` (share of tokens with the
        dense model's most likely token on top) and ``kl_std_error``, over prompts.
    """
    mx.random.seed(seed)
    scores: dict[str, list[tuple[float, float, float]]] = {"dense": [], **{name: [] for name in arms}}
    for prompt in tqdm(prompts, unit="prompt", file=sys.stderr, disable=None):
        said = continuation(model, prompt, tokens, temperature)
        dense = forced_logprobs(model, prompt, said, GlassConfig(density=1.0))
        for name in scores:
            sparse = dense if name == "dense" else forced_logprobs(model, prompt, said, arms[name])
            scores[name].append(_score(dense, sparse, mx.array(said)))
    return {name: _mean(rows) for name, rows in scores.items()}


def _score(dense: mx.array, sparse: mx.array, said: mx.array) -> tuple[float, float, float]:
    nll = -mx.take_along_axis(sparse, said[:, None], axis=-1).mean()
    kl = mx.sum(mx.exp(dense) * (dense - sparse), axis=-1).mean()
    agreement = mx.mean(mx.argmax(dense, axis=-1) == mx.argmax(sparse, axis=-1))
    return nll.item(), kl.item(), agreement.item()


def _mean(rows: list[tuple[float, float, float]]) -> dict[str, float]:
    nll, kl, agreement = np.array(rows).T
    return {
        "ppl": float(np.exp(nll.mean())),
        "kl": float(kl.mean()),
        "kl_std_error": float(kl.std(ddof=1) / len(kl) ** 0.5) if len(kl) > 1 else 0.0,
        "agreement": float(agreement.mean()),
    }


def _weights(text: str) -> list[float | str]:
    return [global_weight(part) for part in text.split(",")]


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glass_mlx.evaluate", description="Fidelity of sparse decoding to the dense model."
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="directory, Hub repository or alias")
    parser.add_argument("--density", type=density, default=GlassConfig.density)
    parser.add_argument("--global-weight", type=_weights, default=[0.0, 0.5, 1.0, "auto"], metavar="W[,W...]")
    parser.add_argument("--signal", choices=SIGNALS, default=GlassConfig.signal)
    parser.add_argument("--stats", metavar="FILE", help="global ranks (default: looked up)")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="a text file, one prompt a line")
    parser.add_argument("--prompt-tokens", type=int, help="cut prompts to this many tokens")
    parser.add_argument("--tokens", type=int, default=192, help="length of the continuations")
    parser.add_argument("--temp", type=float, default=1.0, help="sampling temperature of the continuations")
    parser.add_argument("--seed", type=int, default=0, help="PRNG seed")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_verbose(parser)
    return parser


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    if args.tokens < 2 or (args.prompt_tokens is not None and args.prompt_tokens < 1):
        parser.error("--tokens must be at least 2, --prompt-tokens at least 1")
    run(lambda: _evaluate(args), args.verbose)


def _evaluate(args: argparse.Namespace) -> None:
    model, tokenizer = load(args.model, stats=args.stats, trust_remote_code=args.trust_remote_code)
    if model.global_ranks is None and any(w != 0 for w in args.global_weight):
        raise GlassError("There are no global ranks for this model: build some, or use --global-weight 0.")
    prompts = _read_prompts(args.prompts, tokenizer, args.prompt_tokens)
    arms = {f"{w}": GlassConfig(args.density, w, args.signal) for w in args.global_weight}
    results = evaluate(model, prompts, arms, args.tokens, args.temp, args.seed)
    if args.json:
        print(json.dumps({"model": args.model, "density": args.density, "signal": args.signal, "arms": results}))
        return
    print(f"{args.model}, density {args.density:g}, {args.signal}, {len(prompts)} prompts, {args.tokens} tokens each")
    print(f"{'global weight':>14} {'PPL':>8} {'KL':>8} {'± s.e.':>8} {'agreement':>10}")
    for name, row in results.items():
        print(f"{name:>14} {row['ppl']:8.2f} {row['kl']:8.3f} {row['kl_std_error']:8.3f} {row['agreement']:10.1%}")


def _read_prompts(path: Path, tokenizer: Any, length: int | None) -> list[list[int]]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise GlassError(f"Cannot read prompts from {path}: {e}") from e
    if not lines:
        raise GlassError(f"{path} has no prompts.")
    return [tokenizer.encode(line)[:length] for line in lines]


if __name__ == "__main__":
    main()
