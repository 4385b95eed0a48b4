"""Global ranks: how important each neuron is to what the model itself likes to say. Their file format.

A file holds, for FFN block i and both signals, ``layers.{i}.{signal}.rank`` ([F] uint16 or uint32, 1 = most important)
and ``layers.{i}.{signal}.energy`` ([F] float32, mean share of a token's energy, sums to 1); where it was measured on
several kinds of text, ``layers.{i}.{signal}.domains`` ([K, F] float32), the energies on each of them. Its metadata says
what it belongs to, how it was made, and how sensitive the model is to each block. It is data only: a safetensors file,
checked before anything is allocated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..core.importance import SIGNALS
from ..core.ranking import rank
from ..errors import StatsError
from ..files import write_atomically
from .identity import describe, fingerprint

if TYPE_CHECKING:
    from ..model.glass_model import GlassModel

FORMAT_VERSION = "1"


@dataclass
class GlobalRanks:
    """A model's global ranks.

    Attributes:
        ranks: for each signal, the ranks [F] (int64) of every FFN block.
        energies: for each signal, the energies [F] (float32) of every FFN block.
        domains: for each signal, the energies [K, F] (float32) of every FFN block on each kind of text; with one kind,
            ``energies``.
        sensitivity: of every block (``sensitivity.sensitivity``), or None where it was not measured.
        metadata: strings: format_version; model, original, revision, model_type, quantization and fingerprint
            (what it belongs to); sizes (F of each block) and blocks (their paths), as JSON; method, tokens,
            domains and domain_tokens, sequences, length, temperature, seed, stability and tool versions (how it was
            made).
    """

    ranks: dict[str, list[mx.array]]
    energies: dict[str, list[mx.array]]
    metadata: dict[str, str]
    domains: dict[str, list[mx.array]] = field(default_factory=dict)
    sensitivity: list[float] | None = None

    def __post_init__(self):
        self.domains = self.domains or {s: [e[None] for e in es] for s, es in self.energies.items()}

    @property
    def sizes(self) -> list[int]:
        """F of each FFN block."""
        return json.loads(self.metadata["sizes"])

    @property
    def domain_names(self) -> list[str]:
        """What each kind of text is called."""
        return _domain_names(self.metadata)

    @property
    def domain_tokens(self) -> list[int]:
        """How many tokens were read of each."""
        return _domain_tokens(self.metadata)

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
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as e:
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            raise StatsError(f"{path} is not a usable ranks file: {reason}") from e

    @classmethod
    def _read(cls, f: Any) -> GlobalRanks:
        metadata = {_printable(key): _printable(value) for key, value in (f.metadata() or {}).items()}
        version = metadata.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version}, expected {FORMAT_VERSION}")
        sizes = json.loads(metadata["sizes"])
        if not isinstance(sizes, list) or not all(type(n) is int and 0 < n < 2**20 for n in sizes):
            raise ValueError("sizes is no list of neuron counts")
        names = set(f.keys())
        kinds = _domain_names(metadata)
        if len(_domain_tokens(metadata)) != len(kinds):
            raise ValueError("domains and domain_tokens differ in length")
        ranks: dict[str, list[mx.array]] = {}
        energies: dict[str, list[mx.array]] = {}
        domains: dict[str, list[mx.array]] = {}
        for signal in SIGNALS:
            ranks[signal], energies[signal], domains[signal] = [], [], []
            for i, size in enumerate(sizes):
                prefix = f"layers.{i}.{signal}"
                expected = [("rank", ("U16", "U32"), [size]), ("energy", ("F32",), [size])]
                if len(kinds) > 1:
                    expected.append(("domains", ("F32",), [len(kinds), size]))
                for kind, dtypes, shape in expected:
                    if f"{prefix}.{kind}" not in names:
                        raise ValueError(f"{prefix}.{kind} is missing")
                    entry = f.get_slice(f"{prefix}.{kind}")
                    if entry.get_shape() != shape or entry.get_dtype() not in dtypes:
                        raise ValueError(f"{prefix}.{kind} has a wrong shape or dtype")
                order = f.get_tensor(f"{prefix}.rank").astype(np.int64)
                if not np.array_equal(np.sort(order), np.arange(1, size + 1)):
                    raise ValueError(f"{prefix}.rank is no ranking of {size} neurons")
                ranks[signal].append(mx.array(order))
                energies[signal].append(_energies(f, f"{prefix}.energy"))
                several = _energies(f, f"{prefix}.domains") if len(kinds) > 1 else energies[signal][-1][None]
                domains[signal].append(several)
        return cls(ranks, energies, metadata, domains, _sensitivity(metadata, len(sizes)))

    def write(self, path: str | Path) -> None:
        """Write a file: complete, or not at all."""
        tensors = {}
        for signal in SIGNALS:
            for i, (r, e) in enumerate(zip(self.ranks[signal], self.energies[signal])):
                small = np.uint16 if r.shape[0] < 2**16 else np.uint32
                tensors[f"layers.{i}.{signal}.rank"] = np.array(r).astype(small)
                tensors[f"layers.{i}.{signal}.energy"] = np.array(e)
                if len(_domain_names(self.metadata)) > 1:
                    tensors[f"layers.{i}.{signal}.domains"] = np.array(self.domains[signal][i])
        metadata = dict(self.metadata)
        if self.sensitivity is not None:
            metadata["sensitivity"] = json.dumps([float(f"{value:.4g}") for value in self.sensitivity])
        write_atomically(path, lambda temporary: temporary.write_bytes(save(tensors, metadata=metadata)))

    def use_in(self, model: GlassModel) -> None:
        """Let a model choose its neurons by these."""
        model.set_global_ranks(self.ranks, self.domains, self.sensitivity)

    def check(self, model: GlassModel) -> GlobalRanks:
        """Return self if the ranks are this model's, or those of the model that it is a quantised copy of.

        Raises:
            StatsError: they are not, with the reason.
        """
        made_for = self.metadata.get("model") or "another model"
        expected = [block.size for block in model.blocks]
        if len(self.sizes) != len(expected):
            raise StatsError(
                f"The ranks are for {made_for} with {len(self.sizes)} FFN layers; this model has {len(expected)}."
            )
        for i, (got, want) in enumerate(zip(self.sizes, expected)):
            if got != want:
                raise StatsError(
                    f"The ranks are for {made_for} with {got} neurons in FFN layer {i}; this model has {want}."
                )
        if self.metadata.get("fingerprint") == fingerprint(model):
            return self
        ours, theirs = describe(model)["original"], self.metadata.get("original")
        if ours and ours == theirs:
            return self
        raise StatsError(
            f"The ranks are for {made_for}, whose weights differ from this model's, and nothing says that one is "
            "a conversion of the other."
        )


def _domain_names(metadata: dict[str, str]) -> list[str]:
    """The kinds of text; a file of before there were several says none."""
    names = json.loads(metadata.get("domains", "null")) or [metadata.get("method", "")]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) > 64:
        raise ValueError("domains is no list of names")
    return names


def _domain_tokens(metadata: dict[str, str]) -> list[int]:
    read = json.loads(metadata.get("domain_tokens", "null")) or [json.loads(metadata.get("tokens", "1"))]
    if not isinstance(read, list) or not all(type(n) is int and n > 0 for n in read):
        raise ValueError("domain_tokens is no list of numbers")
    return read


def _sensitivity(metadata: dict[str, str], blocks: int) -> list[float] | None:
    values = json.loads(metadata.pop("sensitivity", "null"))
    if values is None:
        return None
    numbers = isinstance(values, list) and all(type(v) in (int, float) and 0 <= v < 1e9 for v in values)
    if not numbers or len(values) != blocks:
        raise ValueError("sensitivity is no list of one number for each layer")
    return [float(v) for v in values]


def _energies(f: Any, name: str) -> mx.array:
    values = f.get_tensor(name)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError(f"{name} has values that are no energies")
    return mx.array(values)


def merge(parts: list[GlobalRanks]) -> GlobalRanks:
    """The ranks of several files of one model as one, with the kinds of text of all of them, and energies over all
    their tokens. What was measured of the model itself comes from the first that has it.

    Raises:
        StatsError: they are not of one model.
    """
    first = parts[0]
    for other in parts[1:]:
        if [other.metadata.get(k) for k in ("fingerprint", "sizes")] != [
            first.metadata.get(k) for k in ("fingerprint", "sizes")
        ]:
            raise StatsError("The files are of different models.")
    tokens = [sum(part.domain_tokens) for part in parts]
    energies: dict[str, list[mx.array]] = {}
    domains: dict[str, list[mx.array]] = {}
    for signal in SIGNALS:
        rows = zip(*(part.energies[signal] for part in parts))
        energies[signal] = [sum(e * (n / sum(tokens)) for e, n in zip(row, tokens)) for row in rows]
        domains[signal] = [mx.concatenate(row) for row in zip(*(part.domains[signal] for part in parts))]
    names = [name for part in parts for name in part.domain_names]
    metadata = {
        **first.metadata,
        "method": " and ".join(names),
        "domains": json.dumps(names),
        "domain_tokens": json.dumps([n for part in parts for n in part.domain_tokens]),
        "tokens": str(sum(tokens)),
    }
    for key in ("stability", "stability_history", "sequences", "digest", "file"):  # each part's own
        metadata.pop(key, None)
    known = [part.sensitivity for part in parts if part.sensitivity is not None]
    ranks = {signal: [rank(e) for e in energies[signal]] for signal in SIGNALS}
    return GlobalRanks(ranks, energies, metadata, domains, known[0] if known else None)


def _printable(text: str) -> str:
    """A file may be anyone's, and a terminal obeys control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def write_index(directory: Path) -> int:
    """Write ``index.json`` for the ranks files of a directory; returns how many there are."""
    entries = []
    for path in sorted(directory.glob("*.safetensors")):
        entries.append(index_entry(path.name, GlobalRanks.read(path).metadata))
    index = {"format_version": FORMAT_VERSION, "models": entries}
    write_atomically(directory / "index.json", lambda p: p.write_text(json.dumps(index, indent=2) + "\n"))
    return len(entries)


def index_entry(file: str, metadata: dict[str, str]) -> dict[str, str]:
    """What an index says of a file."""
    keys = ("model", "original", "model_type", "quantization", "fingerprint")
    return {"file": file, **{key: metadata.get(key, "") for key in keys}}
