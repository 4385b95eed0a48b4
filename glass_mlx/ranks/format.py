"""Global statistics: how important each neuron is to what the model itself tends to generate. Their file format.

Users call them global ranks. A file holds, for FFN block i and both signals, ``layers.{i}.{signal}.rank`` ([F] uint16
or uint32, 1 = most important) and ``layers.{i}.{signal}.energy`` ([F] float32, mean share of a token's energy, sums to
1). If it was measured on several kinds of text, it also holds ``layers.{i}.{signal}.domains`` ([K, F] float32), the
energies on each kind. The neurons of E routed experts are [E, F / E] in all of these: ranked within each expert, while
the energies of all of them sum to 1. Where it was measured how the dense blocks respond to their inputs
(``core/compensation.py``), it holds ``layers.{i}.response.`` with ``input_mean`` ([H] float32), ``hidden_mean`` ([F]
float32), ``directions`` ([H, r] float16) and ``coefficients`` ([r, F] float16). Its metadata says which model it
belongs to, how it was made, and how sensitive the model's output is to each block. A file may come from anyone: it is a
safetensors file, data only, and checked before anything is allocated.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..core.compensation import Response
from ..core.importance import SIGNALS
from ..core.ranking import rank_by_expert
from ..errors import StatsError, printable
from ..files import SMALL_HEADER, check_header, write_atomically
from ..model.quality import QualityPoint
from .identity import describe, fingerprints

if TYPE_CHECKING:
    from ..model.glass_model import GlassModel

FORMAT_VERSION = "1"
_RESPONSE = ("input_mean", "hidden_mean", "directions", "coefficients")
_SHARE = "unpredictable"  # of a response; older files lack it


@dataclass
class GlobalStatistics:
    """A model's global statistics.

    Attributes:
        ranks: for each signal the ranks [F] (int64) of every FFN block, those of routed experts within each of them.
        energies: for each signal the energies [F] (float32) of every FFN block.
        domains: for each signal the energies [K, F] (float32) of every FFN block on each kind of text; with a single
            kind, ``energies``.
        sensitivity: of every block (``sensitivity.sensitivity``); None if it was not measured.
        responses: of every block to its inputs, None for routed experts; None if they were not measured.
        quality: what densities cost; empty if that was not measured.
        metadata: strings: format_version; model, original, revision, model_type, quantization and fingerprint
            (the model it belongs to); as JSON sizes (F of each block), experts (E of each block, 0 if it is dense;
            left out if all are) and blocks (their paths); method, tokens, domains and domain_tokens, sequences, length,
            temperature, seed, stability and tool versions (how it was made).
    """

    ranks: dict[str, list[mx.array]]
    energies: dict[str, list[mx.array]]
    metadata: dict[str, str]
    domains: dict[str, list[mx.array]] = field(default_factory=dict)
    sensitivity: list[float] | None = None
    responses: list[Response | None] | None = None
    quality: list[QualityPoint] = field(default_factory=list)

    def __post_init__(self):
        self.domains = self.domains or {s: [e[None] for e in es] for s, es in self.energies.items()}

    @property
    def sizes(self) -> list[int]:
        """F of each FFN block."""
        return json.loads(self.metadata["sizes"])

    @property
    def experts(self) -> list[int]:
        """E of each FFN block; 0 if it is dense."""
        return _experts(self.metadata, self.sizes)

    @property
    def domain_names(self) -> list[str]:
        """The name of each kind of text."""
        return _domain_names(self.metadata)

    @property
    def domain_tokens(self) -> list[int]:
        """How many tokens of each kind were read."""
        return _domain_tokens(self.metadata)

    @classmethod
    def read(cls, path: str | Path) -> GlobalStatistics:
        """Read a file.

        Raises:
            StatsError: it is missing, damaged or not a ranks file of this version.
        """
        try:
            check_header(Path(path), SMALL_HEADER)
            with safe_open(str(path), framework="numpy") as f:
                return cls._read(f)
        except FileNotFoundError as e:
            raise StatsError(f"There is no ranks file {path}.") from e
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as e:
            reason = (str(e).splitlines() or [type(e).__name__])[0][:100]
            raise StatsError(f"{path} is not a usable ranks file: {reason}") from e

    @classmethod
    def _read(cls, f: Any) -> GlobalStatistics:
        metadata = {printable(key): printable(value) for key, value in (f.metadata() or {}).items()}
        version = metadata.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version}, expected {FORMAT_VERSION}")
        sizes = json.loads(metadata["sizes"])
        if not isinstance(sizes, list) or not all(type(n) is int and 0 < n < 2**24 for n in sizes):
            raise ValueError("sizes is not a list of neuron counts")
        experts = _experts(metadata, sizes)
        kinds = len(_domain_names(metadata))
        if len(_domain_tokens(metadata)) != kinds:
            raise ValueError("domains and domain_tokens differ in length")
        names = set(f.keys())
        ranks: dict[str, list[mx.array]] = {}
        energies: dict[str, list[mx.array]] = {}
        domains: dict[str, list[mx.array]] = {}
        for signal in SIGNALS:
            prefixes = [f"layers.{i}.{signal}" for i in range(len(sizes))]
            blocks = [_read_block(f, names, *block, kinds) for block in zip(prefixes, sizes, experts)]
            ranks[signal] = [block[0] for block in blocks]
            energies[signal] = [block[1] for block in blocks]
            domains[signal] = [block[2] for block in blocks]
        sensitivity, quality = _sensitivity(metadata, len(sizes)), _quality(metadata)
        responses = _responses(f, names, sizes, experts)
        return cls(ranks, energies, metadata, domains, sensitivity, responses, quality)

    def write(self, path: str | Path) -> None:
        """Write a file, completely or not at all."""
        tensors = {}
        for signal in SIGNALS:
            for i, (size, experts) in enumerate(zip(self.sizes, self.experts)):
                shape = _shape(size, experts)
                small = np.uint16 if shape[-1] < 2**16 else np.uint32
                tensors[f"layers.{i}.{signal}.rank"] = np.array(self.ranks[signal][i]).astype(small).reshape(shape)
                tensors[f"layers.{i}.{signal}.energy"] = np.array(self.energies[signal][i]).reshape(shape)
                if len(self.domain_names) > 1:
                    domains = np.array(self.domains[signal][i])
                    tensors[f"layers.{i}.{signal}.domains"] = domains.reshape(len(domains), *shape)
        for i, response in enumerate(self.responses or []):
            for name in (*_RESPONSE, _SHARE):
                if (value := getattr(response, name, None)) is not None:
                    tensors[f"layers.{i}.response.{name}"] = np.array(value)
        metadata = dict(self.metadata)
        if self.sensitivity is not None:
            metadata["sensitivity"] = json.dumps([float(f"{value:.4g}") for value in self.sensitivity])
        if self.quality:
            metadata["quality"] = json.dumps([[float(f"{v:.4g}") for v in astuple(point)] for point in self.quality])
        write_atomically(path, lambda temporary: temporary.write_bytes(save(tensors, metadata=metadata)))

    def use_in(self, model: GlassModel) -> None:
        """Let a model choose its neurons by these statistics."""
        model.set_global_ranks(self.ranks, self.domains, self.sensitivity, self.responses, self.quality)

    def check(self, model: GlassModel) -> GlobalStatistics:
        """Return self if the statistics are this model's, or those of the model that it is a quantised copy of.

        Raises:
            StatsError: they are another model's; the message says why.
        """
        made_for = self.metadata.get("model") or "another model"
        blocks = model.blocks if model.part is None else model.part.whole.blocks
        expected = [block.size for block in blocks]
        if len(self.sizes) != len(expected):
            raise StatsError(
                f"The ranks are for {made_for} with {len(self.sizes)} FFN layers; this model has {len(expected)}."
            )
        for i, (got, want) in enumerate(zip(self.sizes, expected)):
            if got != want:
                raise StatsError(
                    f"The ranks are for {made_for} with {got} neurons in FFN layer {i}; this model has {want}."
                )
        for i, (got, block) in enumerate(zip(self.experts, blocks)):
            if got != block.experts:
                raise StatsError(
                    f"The ranks are for {made_for} with {got} routed experts in FFN layer {i}; "
                    f"this model has {block.experts}."
                )
        for i, (response, block) in enumerate(zip(self.responses or [], blocks)):
            if response is not None and len(response.input_mean) != block.input_size:
                raise StatsError(
                    f"The ranks are for {made_for} with {len(response.input_mean)} inputs of FFN layer {i}; "
                    f"this model has {block.input_size}."
                )
        if self.metadata.get("fingerprint") in fingerprints(model):
            return self
        ours, theirs = describe(model)["original"], self.metadata.get("original")
        if ours and ours == theirs:
            return self
        raise StatsError(
            f"The ranks are for {made_for}, whose weights differ from this model's, and neither is known to be a "
            "conversion of the other."
        )


def _experts(metadata: dict[str, str], sizes: list[int]) -> list[int]:
    """The experts of each block; files of models that have none do not say."""
    experts = json.loads(metadata.get("experts", "null")) or [0] * len(sizes)
    sound = isinstance(experts, list) and len(experts) == len(sizes) and all(type(e) is int for e in experts)
    if not sound or not all(0 <= e <= size and size % (e or 1) == 0 for e, size in zip(experts, sizes)):
        raise ValueError("experts is not a list of how many experts each layer has")
    if not all(size // (e or 1) < 2**20 for e, size in zip(experts, sizes)):
        raise ValueError("sizes has a layer of too many neurons")
    return experts


def _shape(size: int, experts: int) -> list[int]:
    """The shape of a value for each neuron in a file."""
    return [experts, size // experts] if experts else [size]


def _domain_names(metadata: dict[str, str]) -> list[str]:
    """The kinds of text; older files name none and have one."""
    names = json.loads(metadata.get("domains", "null")) or [metadata.get("method", "")]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) > 64:
        raise ValueError("domains is not a list of names")
    return [printable(name) for name in names]


def _domain_tokens(metadata: dict[str, str]) -> list[int]:
    read = json.loads(metadata.get("domain_tokens", "null")) or [json.loads(metadata.get("tokens", "1"))]
    if not isinstance(read, list) or not all(type(n) is int and n > 0 for n in read):
        raise ValueError("domain_tokens is not a list of numbers")
    return read


def _sensitivity(metadata: dict[str, str], blocks: int) -> list[float] | None:
    values = json.loads(metadata.pop("sensitivity", "null"))
    if values is None:
        return None
    numbers = isinstance(values, list) and all(type(v) in (int, float) and 0 <= v < 1e9 for v in values)
    if not numbers or len(values) != blocks:
        raise ValueError("sensitivity is not a list of one number for each layer")
    return [float(v) for v in values]


def _quality(metadata: dict[str, str]) -> list[QualityPoint]:
    values = json.loads(metadata.pop("quality", "[]"))
    rows = values if isinstance(values, list) else [None]
    if not all(isinstance(row, list) and len(row) == 3 and all(type(v) in (int, float) for v in row) for row in rows):
        raise ValueError("quality is not a list of density, KL and agreement")
    points = [QualityPoint(*map(float, row)) for row in rows]
    densities = [0.0, *(point.density for point in points), 1.0]
    ascending = all(a < b for a, b in zip(densities, densities[1:]))
    if not ascending or not all(0 <= p.kl < 1e3 and 0 <= p.agreement <= 1 for p in points):
        raise ValueError("quality has values out of range")
    return points


def _read_block(
    f: Any, names: set[str], prefix: str, size: int, experts: int, kinds: int
) -> tuple[mx.array, mx.array, mx.array]:
    """One block's ranks [F], energies [F] and energies on each kind of text [K, F], for one signal."""
    shape = _shape(size, experts)
    expected = [("rank", ("U16", "U32"), shape), ("energy", ("F32",), shape)]
    if kinds > 1:
        expected.append(("domains", ("F32",), [kinds, *shape]))
    for name, dtypes, shape in expected:
        if f"{prefix}.{name}" not in names:
            raise ValueError(f"{prefix}.{name} is missing")
        entry = f.get_slice(f"{prefix}.{name}")
        if entry.get_shape() != shape or entry.get_dtype() not in dtypes:
            raise ValueError(f"{prefix}.{name} has a wrong shape or dtype")
    ranks = f.get_tensor(f"{prefix}.rank").astype(np.int64)
    if not (np.sort(ranks, axis=-1) == np.arange(1, ranks.shape[-1] + 1)).all():
        raise ValueError(f"{prefix}.rank is not a ranking of {ranks.shape[-1]} neurons")
    energies = _read_energies(f, f"{prefix}.energy", (size,))
    domains = _read_energies(f, f"{prefix}.domains", (kinds, size)) if kinds > 1 else energies[None]
    return mx.array(ranks.reshape(-1)), energies, domains


def _read_energies(f: Any, name: str, shape: tuple[int, ...]) -> mx.array:
    values = f.get_tensor(name).reshape(shape)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError(f"{name} has values that are not energies")
    if not (np.abs(values.sum(axis=-1, dtype=np.float64) - 1) < 1e-2).all():
        raise ValueError(f"{name} does not sum to 1")
    return mx.array(values)


def _responses(f: Any, names: set[str], sizes: list[int], experts: list[int]) -> list[Response | None] | None:
    """The responses of all blocks; None if the file has none. Older files have none of routed experts."""
    if not any(".response." in name for name in names):
        return None
    found: list[Response | None] = []
    for i, size in enumerate(sizes):
        prefix = f"layers.{i}.response."
        missing = [name for name in _RESPONSE if prefix + name not in names]
        if experts[i] and len(missing) == len(_RESPONSE):
            found.append(None)
            continue
        if missing:
            raise ValueError(f"{prefix}{missing[0]} is missing")
        shapes = {name: f.get_slice(prefix + name).get_shape() for name in _RESPONSE}
        dtypes = {name: f.get_slice(prefix + name).get_dtype() for name in _RESPONSE}
        width, rank = (shapes["directions"] + [0, 0])[:2]
        expected = {"input_mean": [width], "hidden_mean": [size], "directions": [width, rank]}
        if shapes != {**expected, "coefficients": [rank, size]} or not 0 < rank <= width < 2**20:
            raise ValueError(f"{prefix}directions and what belongs to it have wrong shapes")
        if list(dtypes.values()) != ["F32", "F32", "F16", "F16"]:
            raise ValueError(f"{prefix}directions and what belongs to it have a wrong dtype")
        tensors = [f.get_tensor(prefix + name) for name in _RESPONSE]
        if not all(np.isfinite(tensor).all() for tensor in tensors):
            raise ValueError(f"{prefix}directions or what belongs to it has values that are not finite")
        share = _share(f, prefix + _SHARE, size) if prefix + _SHARE in names else None
        found.append(Response(*map(mx.array, tensors), share))
    return found


def _share(f: Any, name: str, size: int) -> mx.array:
    tensor = f.get_slice(name)
    if tensor.get_shape() != [size] or tensor.get_dtype() != "F16":
        raise ValueError(f"{name} has a wrong shape or dtype")
    values = f.get_tensor(name)
    if not ((values >= 0) & (values <= 1)).all():  # nor is any NaN
        raise ValueError(f"{name} has values that are not from 0 to 1")
    return mx.array(values)


def merge(parts: list[GlobalStatistics]) -> GlobalStatistics:
    """Join the statistics of several files of one model.

    The result has the kinds of text of all parts, and energies over all their tokens. The sensitivity, the
    responses and the quality come from the first part that has them.

    Raises:
        StatsError: the parts are of different models.
    """
    first = parts[0]
    for other in parts[1:]:
        if [other.metadata.get(k) for k in ("fingerprint", "sizes", "experts")] != [
            first.metadata.get(k) for k in ("fingerprint", "sizes", "experts")
        ]:
            raise StatsError("The files are of different models: merge files of one model.")
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
    for key in ("stability", "stability_history", "sequences", "digest", "file"):  # these are of one part only
        metadata.pop(key, None)
    ranks = {signal: list(map(rank_by_expert, energies[signal], first.experts)) for signal in SIGNALS}
    sensitivity = next((part.sensitivity for part in parts if part.sensitivity is not None), None)
    responses = next((part.responses for part in parts if part.responses is not None), None)
    quality = next((part.quality for part in parts if part.quality), [])
    return GlobalStatistics(ranks, energies, metadata, domains, sensitivity, responses, quality)


def write_index(directory: Path) -> int:
    """Write ``index.json`` for the ranks files of a directory, and return how many there are."""
    entries = []
    for path in sorted(directory.glob("*.safetensors")):
        entries.append(index_entry(path.name, GlobalStatistics.read(path).metadata))
    index = {"format_version": FORMAT_VERSION, "models": entries}
    write_atomically(directory / "index.json", lambda p: p.write_text(json.dumps(index, indent=2) + "\n"))
    return len(entries)


def index_entry(file: str, metadata: dict[str, str]) -> dict[str, str]:
    """A file's entry in an index."""
    keys = ("model", "original", "model_type", "quantization", "fingerprint")
    return {"file": file, **{key: metadata.get(key, "") for key in keys}}
