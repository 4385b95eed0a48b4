"""Which model global statistics belong to: a fingerprint of its weights, its name, and what it was converted from."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from huggingface_hub import ModelCard

from ..core.slicing import is_quantised

if TYPE_CHECKING:
    from ..model.glass_model import GlassModel

# What conversions append to a model's name: -4bit, -bf16, -MLX-8bit, -4bit-DWQ, -mxfp4, -q4, -hf, ...
_CONVERSION = re.compile(
    r"([-_.](mlx|hf|\d(\.\d+)?-?bits?|(bf|fp|f|int|mxfp|nvfp)\d+|q\d(_\w+)*|gs?\d+|dwq|awq|gptq))*"
)


def fingerprint(model: GlassModel) -> str:
    """A short digest of a model's FFN weights: the shapes, dtypes and some values of its first and last block."""
    digest = hashlib.sha256(json.dumps([block.size for block in model.blocks]).encode())
    for block in (model.blocks[0], model.blocks[-1]):
        for name in (*block.inputs, block.output):
            weight = block.module[name].weight
            digest.update(f"{name} {weight.shape} {weight.dtype}".encode())
            digest.update(np.array(weight[:2].reshape(-1)[:512].view(mx.uint8)).tobytes())
    return digest.hexdigest()[:32]


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
        "original": _original(path, name),
        "model_type": str(getattr(model.dense, "model_type", "")),
        "quantization": _quantization(model),
    }


def _original(path: Path | None, name: str) -> str:
    """The repository that a model was converted from according to its card, or its own name on the Hub.

    A card's base_model may also be the base of a fine-tune. So either the card says that the model is a quantisation,
    or it says nothing and the name is the base's with what conversions append.
    """
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
