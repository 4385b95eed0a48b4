"""Prompt caches that come out of a file. Anyone may have written it, and mlx-lm and MLX believe what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
)
from safetensors import SafetensorError, safe_open

from ..errors import GlassError, printable
from ..files import SMALL_HEADER, check_header

# Names in a file become lists, and a list as long as its largest index says is allocated.
_LARGEST_INDEX = 10_000
# No attention makes larger keys or values, and with these no product overflows.
_LARGEST_VALUE = 2.0**15


class UnusableCache(GlassError):
    """A prompt cache out of a file is damaged, or another model's; ``reason`` says what is wrong."""

    def __init__(self, reason: str):
        super().__init__(f"The prompt cache cannot be used: {reason}")
        self.reason = printable(reason)


def read_prompt_cache(path: str | Path) -> list[Any]:
    """mlx-lm's ``load_prompt_cache``, for files of anyone.

    Raises:
        UnusableCache: the file is missing or is not a prompt cache.
    """
    try:
        check_header(Path(path), SMALL_HEADER)
        with safe_open(str(path), framework="numpy") as file:  # MLX would not check the header
            names = [*file.keys(), *(file.metadata() or {})]
        if any(int(part) > _LARGEST_INDEX for name in names for part in name.split(".") if part.isdecimal()):
            raise ValueError("an index is out of range")
        return load_prompt_cache(str(path))
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
        raise UnusableCache((str(e).splitlines() or [type(e).__name__])[0][:100]) from e


def check_entries(entries: list[Any], dense: nn.Module) -> tuple[int | None, int | None]:
    """Hold what mlx-lm keeps in a prompt cache against what the model would write there.

    Args:
        entries (list): of the prompt cache, without a session.
        dense (nn.Module): the model. It is called with a token, but nothing is evaluated: shapes are known without.

    Returns:
        tuple: how many tokens are in the cache, if its entries count them, and of how many sequences, if there are any.

    Raises:
        UnusableCache: it is damaged, or another model's.
    """
    own = make_prompt_cache(dense)
    dense(mx.zeros((1, 1), mx.int32), cache=own)
    if len(entries) != len(own):
        raise UnusableCache("it is of another model.")
    try:
        pairs = [pair for entry, expected in zip(entries, own) for pair in _pairs(entry, expected)]
        sound = all(_is_like(*pair) and _counts_fit(pair[0]) for pair in pairs)
    except (ValueError, TypeError, AttributeError, LookupError):
        sound = False
    if not sound:
        raise UnusableCache("its keys and values are damaged, or of another model.")
    # layers that share the keys and values of others count none
    counts = {entry.offset for entry, expected in pairs if getattr(expected, "offset", 0)}
    arrays = [leaf for entry, _ in pairs for leaf in _leaves(entry).values() if isinstance(leaf, mx.array)]
    batches = {a.shape[0] for a in arrays}
    if len(counts) > 1 or len(batches) > 1:
        raise UnusableCache("its layers differ in size.")
    if not all(mx.all(mx.abs(a) <= _LARGEST_VALUE).item() for a in arrays if _is_float(a)):  # a NaN is not, either
        raise UnusableCache("its keys and values have numbers that no model writes.")
    return next(iter(counts), None), next(iter(batches), None)


def _pairs(entry: Any, expected: Any) -> list[tuple[Any, Any]]:
    """An entry with what it should be like, or those inside of it."""
    if not isinstance(expected, CacheList):
        return [(entry, expected)]
    if type(entry) is not CacheList or len(entry.caches) != len(expected.caches):
        raise ValueError
    return [pair for inner in zip(entry.caches, expected.caches) for pair in _pairs(*inner)]


def _is_like(entry: Any, expected: Any) -> bool:
    """Whether an entry is of a kind, shape and dtype that a model's own entry may have or be turned into."""
    if type(expected) is KVCache and type(entry) is QuantizedKVCache:
        if any(type(n) is not int for n in (entry.group_size, entry.bits)) or 0 in (entry.group_size, entry.bits):
            return False  # MLX would divide by it
        expected = expected.to_quantized(entry.group_size, entry.bits)
    elif type(expected) is KVCache and type(entry) is RotatingKVCache:
        rotating = RotatingKVCache(entry.max_size, entry.keep)
        rotating.keys, rotating.values, expected = expected.keys, expected.values, rotating
    if type(entry) is not type(expected) or _settings(entry) != _settings(expected):
        return False
    found, own = _forms(entry), _forms(expected)
    return found == own or found == dict.fromkeys(own)  # nothing in it yet


def _settings(entry: Any) -> list[Any]:
    return [getattr(entry, name, None) for name in ("max_size", "keep", "chunk_size", "group_size", "bits")]


def _leaves(entry: Any) -> dict[str, Any]:
    """The arrays of an entry by their place, or None where there is none yet."""
    parts = list(entry.cache) if isinstance(entry, ArraysCache) else [entry.keys, entry.values]
    return dict(tree_flatten(parts))


def _forms(entry: Any) -> dict[str, Any]:
    return {place: _form(leaf) for place, leaf in _leaves(entry).items()}


def _form(leaf: Any) -> Any:
    """What two arrays must share: the dtype, if they are not of floats, and the sizes but batch and length."""
    if not isinstance(leaf, mx.array):
        return leaf
    shape = (leaf.shape[1], *leaf.shape[3:]) if leaf.ndim == 4 else leaf.shape[1:]
    return leaf.ndim, shape, "float" if _is_float(leaf) else leaf.dtype


def _is_float(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)


def _counts_fit(entry: Any) -> bool:
    """Whether the positions in an entry are within its arrays."""
    if isinstance(entry, ArraysCache):
        return True
    lengths = {leaf.shape[2] for leaf in _leaves(entry).values() if leaf is not None} or {0}
    start, at = getattr(entry, "start_position", 0), getattr(entry, "_idx", entry.offset)
    if len(lengths) > 1 or not all(type(n) is int and n >= 0 for n in (start, at, entry.offset)):
        return False
    length = lengths.pop()
    if not isinstance(entry, RotatingKVCache):
        return start <= entry.offset <= start + length
    if type(entry.max_size) is not int or type(entry.keep) is not int or not 0 <= entry.keep < entry.max_size:
        return False
    if entry.offset <= entry.max_size:
        return at == entry.offset <= length
    return entry.keep <= at <= length and length >= entry.max_size
