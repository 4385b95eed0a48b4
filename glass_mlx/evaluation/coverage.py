"""Which mlx-lm model families GLASS covers, found by trying them on tiny random models."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import GlassError
from ..model.blocks import Block
from ..model.glass_model import GlassModel
from .tiny_models import Unbuildable, tiny_model

FFNS = ("dense", "shared", "routed")


@dataclass
class Family:
    """One model family of mlx-lm.

    Attributes:
        name: its module in mlx-lm, which is its ``model_type``.
        covered: whether at least one kind of its FFN blocks decodes sparsely.
        projections: names of these blocks' projections, such as ``gate_proj+up_proj/down_proj``.
        ffns: which FFNs these blocks are: ``dense``, ``shared`` (experts that every token is sent to), ``routed``.
        note: what stays dense and why.
    """

    name: str
    covered: bool
    projections: str = ""
    ffns: str = ""
    note: str = ""


def survey(name: str) -> Family:
    """Try one family on a tiny random model."""
    try:
        model = GlassModel(tiny_model(name))
    except Unbuildable as e:
        return Family(name, False, note=f"not tried: {e}")
    except GlassError as e:
        return Family(name, False, note=str(e).split(". Use it")[0].removeprefix(f"{name} "))
    except Exception as e:  # a family of a newer mlx-lm, say; the others are still worth listing
        return Family(name, False, note=f"not tried: {type(e).__name__}: {e}".splitlines()[0])
    kinds = {f"{'+'.join(b.inputs)}/{b.output}": None for b in model.blocks}
    notes = {f"{path}: {reason}": None for path, reason in model.left_dense.items()}
    found = {_ffn(block) for block in model.blocks}
    ffns = [ffn for ffn in FFNS if ffn in found]
    return Family(name, True, ", ".join(kinds), ", ".join(ffns), "; ".join(list(notes)[:1]))


def _ffn(block: Block) -> str:
    if block.experts:
        return "routed"
    return "shared" if "share" in block.path else "dense"
