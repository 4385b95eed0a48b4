"""Which model global statistics belong to: a fingerprint of its weights, its name, and what it was converted from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..core.slicing import is_quantised

if TYPE_CHECKING:
    from ..model.blocks import Block
    from ..model.glass_model import GlassModel

# What conversions append to a model's name: -4bit, -bf16, -MLX-8bit, -4bit-DWQ, -mxfp4, -q4, -hf, ...
_CONVERSION = re.compile(
    r"([-_.](mlx|hf|\d(\.\d+)?-?bits?|(bf|fp|f|int|mxfp|nvfp)\d+|q\d(_\w+)*|gs?\d+|dwq|awq|gptq))*"
)

# What fingerprints of this rule begin with, and how many bytes of an array they read.
_VERSION, _SAMPLE = "2-", 1 << 20


def fingerprint(model: GlassModel) -> str:
    """A short digest of a model's FFN weights: shapes, dtypes and values of every block. Of a large array rows at equal
    distances are read, ``_SAMPLE`` bytes in all."""
    return fingerprints(model)[0]


def fingerprints(model: GlassModel) -> tuple[str, ...]:
    """A model's fingerprint, and the one that older files have of it: of the first and last block only. Those of the
    whole model if this is a part of one."""
    return fingerprints_of(model.blocks) if model.part is None else model.part.whole.fingerprints


def fingerprints_of(blocks: list[Block], done: Callable[[Block], None] = lambda block: None) -> tuple[str, str]:
    """The fingerprints of a model with these blocks; ``done`` is called with each after its weights were read."""
    whole, ends = (hashlib.sha256(json.dumps([block.size for block in blocks]).encode()) for _ in range(2))
    for block in blocks:
        for name in block.names:
            for key, array in sorted(tree_flatten(block.module[name].parameters())):
                whole.update(f"{name}.{key} {array.shape} {array.dtype}".encode())
                rows = array.flatten(0, -2) if array.ndim > 2 else array  # of all experts
                sampled = rows[:: -(-array.nbytes // _SAMPLE)]
                whole.update(np.array(sampled.reshape(-1).view(mx.uint8)).tobytes())
        for _ in range((block is blocks[0]) + (block is blocks[-1])):
            for name in block.names:
                weight = block.module[name].weight
                ends.update(f"{name} {weight.shape} {weight.dtype}".encode())
                ends.update(np.array(weight[:2].reshape(-1)[:512].view(mx.uint8)).tobytes())
        done(block)
    return _VERSION + whole.hexdigest()[:32], ends.hexdigest()[:32]


def describe(model: GlassModel) -> dict[str, str]:
    """Describe a model as far as its directory tells.

    Returns:
        dict: ``model`` (Hub repository or directory name), ``revision``, ``original`` (the repository that it was
        converted from, or its own), ``model_type`` and ``quantization``; unknown values are empty.
    """
    name = revision = ""
    path = model.path
    if path is not None:
        hub = [part for part in path.parts if part.startswith("models--")]
        if hub and path.parent.name == "snapshots":
            name, revision = hub[-1].removeprefix("models--").replace("--", "/"), path.name
        else:
            name = path.absolute().name
    return {
        "model": name,
        "revision": revision,
        "original": original(path, name),
        "model_type": str(getattr(model.dense, "model_type", "")),
        "quantization": _quantization(model),
    }


def original(path: Path | None, name: str) -> str:
    """The repository that a model was converted from according to its card, or its own name on the Hub.

    A card's base_model may also be the base of a fine-tune. So either the card says that the model is a quantisation,
    or it says nothing and the name is the base's with what conversions append.
    """
    from huggingface_hub import ModelCard  # only here: it takes long to import

    own = name if "/" in name else ""
    card = path / "README.md" if path is not None else None
    if card is None or not card.is_file():
        return own
    try:
        if not card.read_text(encoding="utf-8").startswith("---"):
            return own
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a card may hold anything, and nothing in it is needed
        return own
    base = data.get("base_model")
    base = base[0] if isinstance(base, list) and len(base) == 1 else base
    if not isinstance(base, str) or base.count("/") != 1:
        return own
    relation = data.get("base_model_relation")
    if relation is not None:
        return base if relation == "quantized" else own
    short, name = (n.split("/")[-1].lower() for n in (base, name))
    converted = name.startswith(short) and _CONVERSION.fullmatch(name[len(short) :])
    return base if converted else own


def _quantization(model: GlassModel) -> str:
    projection = model.blocks[0].module[model.blocks[0].inputs[0]]
    if is_quantised(projection):
        return f"{projection.mode} {projection.bits}-bit, groups of {projection.group_size}"
    return str(projection.weight.dtype).removeprefix("mlx.core.")
