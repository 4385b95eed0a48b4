"""Global ranks: how important each neuron is to what the model itself likes to say.

    python -m glass_mlx.stats build --model demo --out ranks.safetensors

They are measured once per model from its null prompt: sequences that it samples from the BOS token alone.
A file holds, for FFN block i and both signals, ``layers.{i}.{signal}.rank`` ([F] uint16 or uint32, 1 = most
important) and ``layers.{i}.{signal}.energy`` ([F] float32, mean share of a token's energy, sums to 1), and
says in its metadata what it belongs to and how it was made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ._version import __version__
from .cli import add_verbose, run
from .errors import GlassError, StatsError
from .ffn import Tap, swapped
from .importance import SIGNALS, energy, output_norms
from .ranking import rank

if TYPE_CHECKING:
    from .model import GlassModel

FORMAT_VERSION = "1"
_CHECKOUT = Path(__file__).parents[1] / "stats"
_INSTALLED = Path(__file__).parent / "_stats"
STATS_DIR = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT


@dataclass
class GlobalRanks:
    """A model's global ranks.

    Attributes:
        ranks: for each signal, the ranks [F] (int64) of every FFN block.
        energies: for each signal, the energies [F] (float32) of every FFN block.
        metadata: strings: format_version, model, model_type, fingerprint, sizes (F of each block, JSON),
            tokens, sequences, temperature, seed, method and tool versions.
    """

    ranks: dict[str, list[mx.array]]
    energies: dict[str, list[mx.array]]
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: str | Path) -> GlobalRanks:
        """Read a file.

        Raises:
            StatsError: it is missing, damaged or not a ranks file of this version.
        """
        try:
            with safe_open(str(path), framework="numpy") as f:
                return cls._read(f)
        except FileNotFoundError as e:
            raise StatsError(f"There is no ranks file {path}.") from e
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as e:
            raise StatsError(f"{path} is not a usable ranks file: {str(e).splitlines()[0]}") from e

    @classmethod
    def _read(cls, f: Any) -> GlobalRanks:
        metadata = f.metadata() or {}
        version = metadata.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version}, expected {FORMAT_VERSION}")
        sizes = json.loads(metadata["sizes"])
        names = set(f.keys())
        ranks: dict[str, list[mx.array]] = {}
        energies: dict[str, list[mx.array]] = {}
        for signal in SIGNALS:
            ranks[signal], energies[signal] = [], []
            for i, size in enumerate(sizes):
                prefix = f"layers.{i}.{signal}"
                for kind, dtypes in (("rank", ("U16", "U32")), ("energy", ("F32",))):
                    if f"{prefix}.{kind}" not in names:
                        raise ValueError(f"{prefix}.{kind} is missing")
                    entry = f.get_slice(f"{prefix}.{kind}")
                    if entry.get_shape() != [size] or entry.get_dtype() not in dtypes:
                        raise ValueError(f"{prefix}.{kind} has a wrong shape or dtype")
                order = f.get_tensor(f"{prefix}.rank").astype(np.int64)
                if not np.array_equal(np.sort(order), np.arange(1, size + 1)):
                    raise ValueError(f"{prefix}.rank is no ranking of {size} neurons")
                values = f.get_tensor(f"{prefix}.energy")
                if not (np.isfinite(values).all() and (values >= 0).all()):
                    raise ValueError(f"{prefix}.energy has values that are no energies")
                ranks[signal].append(mx.array(order))
                energies[signal].append(mx.array(values))
        return cls(ranks, energies, dict(metadata))

    def write(self, path: str | Path) -> None:
        """Write a file: complete, or not at all."""
        tensors = {}
        for signal in SIGNALS:
            for i, (r, e) in enumerate(zip(self.ranks[signal], self.energies[signal])):
                small = np.uint16 if r.shape[0] < 2**16 else np.uint32
                tensors[f"layers.{i}.{signal}.rank"] = np.array(r).astype(small)
                tensors[f"layers.{i}.{signal}.energy"] = np.array(e)
        write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata=self.metadata))

    def check(self, model: GlassModel) -> GlobalRanks:
        """Return self if the ranks are this model's.

        Raises:
            StatsError: they are not, with the reason.
        """
        made_for = self.metadata.get("model", "another model")
        sizes, expected = json.loads(self.metadata["sizes"]), [b.size for b in model.blocks]
        if len(sizes) != len(expected):
            raise StatsError(
                f"The ranks are for {made_for} with {len(sizes)} FFN layers; this model has {len(expected)}."
            )
        for i, (got, want) in enumerate(zip(sizes, expected)):
            if got != want:
                raise StatsError(
                    f"The ranks are for {made_for} with {got} neurons in FFN layer {i}; this model has {want}."
                )
        if self.metadata.get("fingerprint") != fingerprint(model):
            raise StatsError(f"The ranks are for {made_for}, whose weights differ from this model's.")
        return self


def fingerprint(model: GlassModel) -> str:
    """A short digest of a model's FFN weights: shapes, dtypes and some values of its first and last block."""
    digest = hashlib.sha256(json.dumps([block.size for block in model.blocks]).encode())
    for block in (model.blocks[0], model.blocks[-1]):
        for name in (*block.inputs, block.output):
            weight = block.module[name].weight
            digest.update(f"{name} {weight.shape} {weight.dtype}".encode())
            digest.update(np.array(weight[:2].reshape(-1)[:512].view(mx.uint8)).tobytes())
    return digest.hexdigest()[:32]


def find_ranks(model: GlassModel, source: str | Path | bool | None = None) -> GlobalRanks | None:
    """Ranks for a model: from the file ``source``, or by the model's fingerprint from ``stats/``.

    Returns:
        GlobalRanks | None: None where the model is not known, or ``source`` is False.

    Raises:
        StatsError: the file is unusable.
    """
    if source is False:
        return None
    if source is not None and source is not True:
        return GlobalRanks.read(source)
    index = STATS_DIR / "index.json"
    if not index.is_file():
        return None
    wanted = fingerprint(model)
    for entry in json.loads(index.read_text())["models"]:
        if entry["fingerprint"] == wanted:
            return GlobalRanks.read(STATS_DIR / entry["file"])
    return None


def write_index(directory: Path) -> int:
    """Write ``index.json`` for the ranks files of a directory; returns how many there are."""
    entries = []
    for path in sorted(directory.glob("*.safetensors")):
        metadata = GlobalRanks.read(path).metadata
        entry = {key: metadata[key] for key in ("model", "model_type", "fingerprint")}
        entries.append({"file": path.name, **entry})
    index = {"format_version": FORMAT_VERSION, "models": entries}
    write_atomically(directory / "index.json", lambda p: p.write_text(json.dumps(index, indent=2) + "\n"))
    return len(entries)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a temporary file, then rename it: the file is complete, or as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as e:
        raise GlassError(f"Cannot write {path}: {e}") from e
    finally:
        temporary.unlink(missing_ok=True)


def build_ranks(
    model: GlassModel,
    tokenizer: Any,
    tokens: int = 16384,
    sequences: int = 32,
    length: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    name: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GlobalRanks:
    """Measure a model's global ranks on what it says by itself.

    The dense model samples ``sequences`` continuations of its BOS token at a time, up to ``length`` tokens or
    the end of the sequence, until ``tokens`` tokens are recorded.

    Args:
        model (GlassModel): the model; its dense form is run.
        tokenizer: its tokenizer, for the BOS and end tokens.
        tokens (int): how many tokens to record, at least.
        sequences (int): sequences in a batch.
        length (int): longest sequence, in tokens.
        temperature (float): of the sampling.
        seed (int): of the sampling; the same seed gives the same ranks on the same machine.
        name (str): what to call the model in the metadata.
        progress: called with the tokens recorded so far and ``tokens``.

    Returns:
        GlobalRanks: both signals, all blocks.
    """
    bos = tokenizer.bos_token_id
    if bos is None:  # families without one start a text with their end token
        bos = tokenizer.eos_token_id
    ends = mx.array(sorted(tokenizer.eos_token_ids))
    sampler = make_sampler(temp=temperature)
    norms = [output_norms(block.module[block.output]) for block in model.blocks]
    sums = {signal: [mx.zeros((b.size,)) for b in model.blocks] for signal in SIGNALS}
    alive = mx.ones((sequences, 1))

    def tap(i: int, projection: Any) -> Tap:
        def observe(h: mx.array) -> None:
            weights = alive[:, : h.shape[1]]
            sums["activation"][i] = sums["activation"][i] + energy(h, None, weights)
            sums["impact"][i] = sums["impact"][i] + energy(h, norms[i], weights)

        return Tap(projection, observe)

    taps = [{b.output: tap(i, b.module[b.output])} for i, b in enumerate(model.blocks)]
    mx.random.seed(seed)
    recorded = batches = 0
    while recorded < tokens:
        cache = make_prompt_cache(model.dense)
        inputs = mx.full((sequences, 1), bos, dtype=mx.int32)
        alive = mx.ones((sequences, 1))
        batches += 1
        for _ in range(length):
            recorded += int(alive.sum().item())
            with swapped(model.blocks, taps):
                logits = model.dense(inputs, cache=cache)[:, -1, :].astype(mx.float32)
            inputs = sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[:, None]
            # a sequence that ended is not recorded any further
            alive = alive * mx.all(inputs != ends, axis=-1, keepdims=True)
            mx.eval(inputs, alive, sums)
            progress(min(recorded, tokens), tokens)
            if recorded >= tokens or not alive.any().item():
                break
        mx.clear_cache()
    energies = {s: [e / mx.sum(e) for e in sums[s]] for s in SIGNALS}
    return GlobalRanks(
        ranks={s: [rank(e) for e in energies[s]] for s in SIGNALS},
        energies=energies,
        metadata={
            "format_version": FORMAT_VERSION,
            "model": name,
            "model_type": str(getattr(model.dense, "model_type", "")),
            "fingerprint": fingerprint(model),
            "sizes": json.dumps([block.size for block in model.blocks]),
            "blocks": json.dumps([block.path for block in model.blocks]),
            "method": "null prompt",
            "tokens": str(recorded),
            "sequences": str(batches * sequences),
            "length": str(length),
            "temperature": str(temperature),
            "seed": str(seed),
            "glass_mlx": __version__,
            "mlx": mx.__version__,
            "mlx_lm": mlx_lm.__version__,
        },
    )


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="glass_mlx.stats", description="Global neuron ranks.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="measure a model's ranks by null prompt")
    build.add_argument("--model", required=True, help="directory, Hub repository or alias")
    build.add_argument("--out", required=True, type=Path, help="the .safetensors file to write")
    build.add_argument("--tokens", type=int, default=16384, help="tokens to record")
    build.add_argument("--sequences", type=int, default=32, help="sequences in a batch")
    build.add_argument("--length", type=int, default=256, help="longest sequence in tokens")
    build.add_argument("--temp", type=float, default=1.0, help="sampling temperature")
    build.add_argument("--seed", type=int, default=0, help="PRNG seed")
    build.add_argument("--trust-remote-code", action="store_true")
    add_verbose(build)
    index = commands.add_parser("index", help="list a directory's ranks files in its index.json")
    index.add_argument("directory", type=Path, nargs="?", default=STATS_DIR)
    add_verbose(index)
    return parser


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    if args.command == "index":
        run(lambda: print(f"{write_index(args.directory)} models in {args.directory / 'index.json'}"), args.verbose)
        return
    for option in ("tokens", "sequences", "length"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} must be at least 1")
    if args.temp < 0:
        parser.error("--temp must not be negative")
    run(lambda: _build(args), args.verbose)


def _build(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .loading import load

    model, tokenizer = load(args.model, stats=False, trust_remote_code=args.trust_remote_code)
    with tqdm(total=args.tokens, unit="tok", file=sys.stderr, disable=None) as bar:
        ranks = build_ranks(
            model,
            tokenizer,
            tokens=args.tokens,
            sequences=args.sequences,
            length=args.length,
            temperature=args.temp,
            seed=args.seed,
            name=args.model,
            progress=lambda done, total: bar.update(done - bar.n),
        )
    ranks.write(args.out)
    print(f"{args.out}: {len(model.blocks)} FFN layers, {ranks.metadata['tokens']} tokens")


if __name__ == "__main__":
    main()
