"""Ways to damage a safetensors file, drawn from a seed: its bytes, its header, its tensors, and JSON inside of it."""

from __future__ import annotations

import json
import math
import struct
from random import Random
from typing import Any

import numpy as np

DTYPES = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "I32": "<i4", "I64": "<i8", "U16": "<u2", "U32": "<u4", "U8": "u1"}
_NUMBERS = (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-38, 1e38, 3.4e38, 1e6)
_INTEGERS = (0, -1, 1, 2, 96, 97, 2**15, 2**31 - 1, -(2**31), 2**32, 2**62, 10**30)
_TEXTS = ("", "\x1b[2J\x07", "a\nb\r", "[" * 5000, "x" * 100_000, "NaN", "1e999", "9" * 5000, "null", "\ud7ff é", "..")
_HOSTILE: tuple = (None, True, [], {}, [[]], *_NUMBERS, *_INTEGERS, *_TEXTS)


def mutate(data: bytes, seed: int) -> bytes:
    """A damaged copy of a safetensors file; the same for the same seed."""
    rng = Random(seed)
    ways = (_in_tensors, _in_tensors, _in_metadata, _in_json, _in_json, _in_header, _in_bytes)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            data = rng.choice(ways)(data, rng)
        except (ValueError, LookupError, TypeError, AttributeError, struct.error):  # by now no more than bytes
            data = _in_bytes(data, rng)
    return data


def _parse(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _build(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _tensors(data: bytes) -> tuple[dict[str, str], dict[str, list]]:
    """The metadata, and tensors as [dtype, shape, bytes]."""
    header, body = _parse(data)
    metadata = header.pop("__metadata__", {})
    return metadata, {n: [t["dtype"], t["shape"], body[slice(*t["data_offsets"])]] for n, t in header.items()}


def _pack(metadata: dict[str, str], tensors: dict[str, list]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    body = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(content)]}
        body += content
    return _build(header, body)


def _in_bytes(data: bytes, rng: Random) -> bytes:
    """Bytes flipped, cut off, put in or added."""
    end = min(len(data), rng.choice((8, 64, 2000, len(data))))
    at = rng.randrange(end + 1)
    piece = rng.randbytes(rng.choice((1, 4, 40)))
    over = data[at + len(piece) :]
    return rng.choice((data[:at], data[:at] + piece + over, data[:at] + piece + data[at:], data + piece))


def _in_header(data: bytes, rng: Random) -> bytes:
    """The header's length, or what it says of a tensor."""
    header, body = _parse(data)
    name = rng.choice(list(header))
    way = rng.randrange(4)
    if way == 0:
        return struct.pack("<Q", rng.choice((0, 1, len(data), 2**31, 2**63, 2**64 - 1))) + data[8:]
    if way == 1:
        header[name] = rng.choice(_HOSTILE)
    elif header[name]:
        header[name][rng.choice(list(header[name]))] = rng.choice((*_HOSTILE, [0, 2**62], [-1, 4], [2**40, 2**40, 16]))
    return _build(header, body)


def _in_tensors(data: bytes, rng: Random) -> bytes:
    """Tensors left out, renamed, exchanged, in another shape or dtype, or with other values."""
    metadata, tensors = _tensors(data)
    name, other = rng.choice(list(tensors)), rng.choice(list(tensors))
    tensor = tensors[name]
    way = rng.choice(("drop", "rename", "swap", "shape", "dtype", "values", "values", "values"))
    if way == "drop":
        del tensors[name]
    elif way == "rename":
        parts = name.split(".")
        parts[rng.randrange(len(parts))] = rng.choice(("0", "9", "99999999", "-1", "x", ""))
        tensors[".".join(parts)] = tensors.pop(name)
    elif way == "swap":
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif way == "shape":
        tensor[1] = rng.choice((tensor[1][::-1], [1, *tensor[1]], [math.prod(tensor[1])], tensor[1][:-1], [0]))
    elif way == "dtype":
        tensor[0] = rng.choice((*DTYPES, "BF16", "BOOL", "F8_E4M3", "none"))
    else:
        _change_values(tensor, rng)
    return _pack(metadata, tensors)


def _change_values(tensor: list, rng: Random) -> None:
    values = np.frombuffer(tensor[2], DTYPES.get(tensor[0], "u1")).copy()
    few = rng.sample(range(len(values)), min(len(values), rng.choice((1, 3))))
    which = slice(None) if rng.random() < 0.3 else few
    integers = np.issubdtype(values.dtype, np.integer)
    number = rng.choice([n for n in _INTEGERS if abs(n) < 2**63] if integers else _NUMBERS)
    with np.errstate(all="ignore"):
        value = np.array(number).astype(values.dtype)
        found = rng.choice((value, values[which] + value, values[::-1][which], np.sort(values)[which]))
    values[which] = found
    tensor[2] = values.tobytes()


def _in_metadata(data: bytes, rng: Random) -> bytes:
    """An entry of the metadata left out, added or with another value."""
    metadata, tensors = _tensors(data)
    key = rng.choice(list(metadata))
    way = rng.randrange(4)
    if way == 0:
        del metadata[key]
    elif way == 1:
        metadata[rng.choice(_TEXTS)] = metadata[key]
    elif way == 2:
        metadata[key] = rng.choice(_HOSTILE)  # not even a text
    else:
        metadata[key] = rng.choice((*_TEXTS, *map(str, _INTEGERS), *map(json.dumps, _NUMBERS), "1", "2"))
    return _pack(metadata, tensors)


def _in_json(data: bytes, rng: Random) -> bytes:
    """A value in JSON: in a metadata entry, or in a text that is stored as a tensor of code points."""
    metadata, tensors = _tensors(data)
    places = [(metadata, key, found) for key, text in metadata.items() if (found := _as_json(text)) is not None]
    for tensor in tensors.values():
        if tensor[0] in ("I32", "I64"):
            points = np.frombuffer(tensor[2], DTYPES[tensor[0]])
            if len(points) and ((points > 0) & (points < 2**15)).all():
                found = _as_json("".join(map(chr, points.tolist())))
                places += [] if found is None else [(None, tensor, found)]
    target, key, found = rng.choice(places)
    text = json.dumps(_with_another_value(found, rng))
    if target is not None:
        target[key] = text
    else:
        points = np.array([ord(c) for c in text], DTYPES[key[0]])
        key[1:] = [[len(points)], points.tobytes()]
    return _pack(metadata, tensors)


def _as_json(text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None


def _with_another_value(value: Any, rng: Random) -> Any:
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value + rng.choice((-1, 1)) if number and rng.random() < 0.4 else rng.choice(_HOSTILE)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if rng.random() < 0.15:
        del value[key]
    else:
        value[key] = _with_another_value(value[key], rng)
    return value
