"""What GLASS knows of a loaded model: its blocks, its statistics, and where its sessions' weights go."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..core.compensation import Response
from ..core.importance import output_norms
from .blocks import Block
from .compacting import Known
from .context import context_of
from .discovery import find_blocks, signature, summarise
from .evidence import EvidenceLayout
from .memory import SessionMemory, WeightFiles, default_limit
from .part import ModelPart, WholeModel
from .quality import QualityPoint
from .selection import BlockShape, Measured, NeuronSelector
from .session import Session

logger = logging.getLogger("glass_mlx")


@dataclass
class Plan:
    """Kept out of the module tree: none of it is a parameter.

    Attributes:
        blocks: the FFN blocks that decode sparsely.
        left_dense: those that do not: {path: reason}.
        path: the model's directory, where known.
        selector: chooses neurons.
        memory: the sessions' compact weights.
        files: where dense weights that were let go are read again; None where they stay in memory.
        responses: of every block, to answer for dropped neurons, None of a block where it was not measured; None where
            none was.
        quality: what densities cost, of the statistics.
        context_length: the longest text in tokens that the model was made for; None where it does not say.
        made_for: the projections and weights that the plan is for (``discovery.signature``).
        draft_schedulers: what verified decoding has learnt, by density.
        part: which part of a model it is that several processes share; None of a whole model.
    """

    blocks: list[Block]
    left_dense: dict[str, str]
    path: Path | None
    selector: NeuronSelector
    memory: SessionMemory
    context_length: int | None
    made_for: tuple
    files: WeightFiles | None = None
    responses: list[Response | None] | None = None
    quality: list[QualityPoint] = field(default_factory=list)
    draft_schedulers: dict[float, Any] = field(default_factory=dict)
    part: ModelPart | None = None
    _norms: list[mx.array] = field(default_factory=list)

    @classmethod
    def make(
        cls, dense: nn.Module, path: Path | None, max_session_memory: int | None, whole: WholeModel | None = None
    ) -> Plan:
        """Find the model's blocks; arguments as for :class:`~glass_mlx.GlassModel`.

        Raises:
            GlassError: there is none, or a block is no part of the whole model's.
        """
        blocks, left_dense = find_blocks(dense)
        for message in summarise(left_dense):
            logger.warning(message)
        limit = default_limit(dense) if max_session_memory is None else max_session_memory
        context, made_for = context_of(dense, path), signature(dense, blocks)
        selector, memory = NeuronSelector(_shapes(blocks)), SessionMemory(limit)
        part = None if whole is None else ModelPart(whole, blocks)
        return cls(blocks, left_dense, path, selector, memory, context, made_for, part=part)

    def let_go(self) -> None:
        """Let go of the dense FFN weights while decoding."""
        self.files = WeightFiles(self.path, self.blocks)

    def set_statistics(self, responses: list[Response | None] | None, *statistics: Any) -> None:
        """Choose neurons by these: ``ranks``, ``domains`` and ``sensitivity`` of :class:`Measured`; and answer by these
        responses for those that are dropped. All of them are the whole model's."""
        shares = [getattr(response, "unpredictable", None) for response in responses or []]
        self.responses = responses if self.part is None else self.part.responses(responses)
        make = NeuronSelector if self.part is None else self.part.selector
        self.selector = make(_shapes(self.blocks), Measured(*statistics, shares or None))

    @property
    def layout(self) -> EvidenceLayout:
        """How evidence is laid out."""
        return EvidenceLayout.of(self.blocks)

    def passed_on(self, entries: list[Any]) -> list[Any]:
        """What must be evaluated of a prompt cache with a dense call: of a pipeline all of it, because mlx-lm sends the
        hidden vectors to the next process with it, which waits for them."""
        pipeline = self.part is not None and self.part.whole.way == "pipeline"
        return [entry.state for entry in entries] if pipeline else []

    def known(self, session: Session) -> list[Known] | None:
        """For each block what a conversation's dropped neurons are answered for by; None where they are not."""
        if not session.config.compensation:
            return None
        nothing = [None] * len(self.blocks)
        sums = nothing if session.evidence is None else self.layout.sums(session.evidence)
        return list(zip(self.responses or nothing, sums))

    def norms(self) -> list[mx.array]:
        """Column norms [F] or [E, F] of each block's output projection."""
        if not self._norms:
            self._norms = [output_norms(block.module[block.output]) for block in self.blocks]
            mx.eval(self._norms)
        return self._norms

    def accept(self, dense: nn.Module) -> None:
        """The weights that the model has now are the plan's own doing."""
        self.made_for = signature(dense, self.blocks)

    def bring_here(self, dense: nn.Module, make_room: bool = False) -> None:
        """Have this thread read the weights that another one let go of (``WeightFiles.bring_here``). ``make_room``:
        they take the place of all compact weights, which are made anew."""
        if self.files is None:
            return
        if make_room:
            self.memory.make_room()
        if self.files.bring_here(self.blocks):
            self.accept(dense)

    def follow(self, dense: nn.Module) -> None:
        """Plan again if the model's FFNs were quantised, replaced or given other weights.

        Raises:
            GlassError: an adapter was put into all of them, or they cannot be sparsified any more.
        """
        self.bring_here(dense)
        if signature(dense, self.blocks) == self.made_for:
            return
        layout = self.layout
        self.blocks, self.left_dense = find_blocks(dense)
        self.part = None if self.part is None else ModelPart(self.part.whole, self.blocks)
        if self.layout != layout:  # what is known is of other blocks
            self.responses, self.quality = None, []
        self.selector = self.selector.of(_shapes(self.blocks))
        self.files = WeightFiles(self.path, self.blocks) if self.files is not None else None
        self._norms = []
        self.memory.forget()
        self.accept(dense)
        logger.warning("the model's FFN weights have changed: its blocks and their norms were read again")


def _shapes(blocks: list[Block]) -> list[BlockShape]:
    return [BlockShape(b.size, b.group, b.step, b.experts or 1, b.active) for b in blocks]
