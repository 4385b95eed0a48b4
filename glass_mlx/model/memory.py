"""How much memory the sessions of a model may take, and how a model decodes without its dense FFN weights.

Compact weights can be made again from the kept neurons in about the time of two dense decode steps. So idle sessions
need none: ``SessionMemory`` drops theirs, least recently used first. In the same way the dense FFN weights can be read
again from the model's files when the next prompt comes: ``WeightFiles`` lets go of them in between.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..core.slicing import ScatterLinear
from .blocks import Block
from .session import Session

logger = logging.getLogger("glass_mlx")


def available_memory() -> int:
    """Bytes to use: on Apple's GPU what the system recommends, elsewhere the machine's memory."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    return int(recommended or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def default_limit(model: nn.Module) -> int:
    """Half of the memory that a loaded model leaves."""
    return max(0, available_memory() - model_bytes(model)) // 2


def model_bytes(model: nn.Module) -> int:
    """Size of a model's parameters in bytes."""
    return sum(a.nbytes for _, a in _arrays(model))


class SessionMemory:
    """Keeps the compact weights of the sessions within a limit, by dropping those of the sessions not used for longest.

    Attributes:
        limit: bytes for all sessions. The session that decodes keeps its weights in any case.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._sessions: list[weakref.ref[Session]] = []  # the last one was used last

    def use(self, session: Session, needed: int = 0) -> None:
        """A session is about to decode, for which it has compact weights or will have some of ``needed`` bytes."""
        if self._sessions and self._sessions[-1]() is session and not needed:
            return
        sessions = [s for s in (ref() for ref in self._sessions) if s is not None and s is not session]
        holding = [s for s in sessions if s.compact is not None]
        # deep copies of a session share its weights
        while holding and needed + self._held([*holding, session]) > self.limit:
            holding.pop(0).drop_weights()
        self._sessions = [weakref.ref(s) for s in (*holding, session)]

    def make_room(self) -> None:
        """Drop all compact weights; the choices of neurons stay."""
        for ref in self._sessions:
            if (session := ref()) is not None:
                session.drop_weights()

    def forget(self) -> None:
        """Drop all compact weights, and the choices of neurons."""
        for ref in self._sessions:
            if (session := ref()) is not None:
                session.drop_choice()
        self._sessions = []

    def held(self) -> int:
        """Bytes of all compact weights."""
        return self._held([s for s in (ref() for ref in self._sessions) if s is not None])

    @staticmethod
    def _held(sessions: list[Session]) -> int:
        return sum({id(s.compact): s.compact_bytes for s in sessions if s.compact is not None}.values())


class WeightFiles:
    """The dense FFN weights in a model's safetensors files, to read again those that were let go.

    Only arrays that are in a file under their own name, equal to the bit, can be let go: what an adapter or a family's
    code changed while loading stays in memory.

    An array that is still to be read belongs to the thread that asked for it. ``bring_here`` makes it this thread's.
    """

    def __init__(self, path: Path, blocks: list[Block]):
        """
        Args:
            path (Path): the model's directory.
            blocks (list[Block]): the model's FFN blocks.
        """
        self._files = sorted(path.glob("model*.safetensors"))
        stored = self.read()
        # for each block, the arrays' names in it, such as ("down_proj", "scales")
        self._names: list[list[tuple[str, str]]] = []
        for block in blocks:
            names = [(name, key) for name in (*block.inputs, block.output) for key, _ in _arrays(block.module[name])]
            self._names.append([n for n in names if self._is_stored(block, n, stored)])
        self._released: set[tuple[int, str, str]] = set()
        self._reader: threading.Thread | None = None
        if not any(self._names):
            logger.warning("no FFN weight of this model is in its files as it is in memory: all of them stay there.")

    def read(self) -> dict[str, mx.array]:
        """All arrays of the files, by name. They are read when they are used."""
        return {key: array for file in self._files for key, array in mx.load(str(file)).items()}

    def release(self, index: int, block: Block, compact: dict[str, nn.Module], stored: dict[str, mx.array]) -> None:
        """Let go of a block's dense weights, until they are used.

        Args:
            index (int): of the block.
            block (Block): the block.
            compact (dict): the projections that it decodes with; what these use themselves stays.
            stored (dict): from ``read``, nothing of it used so far.
        """
        for name, key in self._names[index]:
            if not isinstance(compact[name], ScatterLinear):
                self._released.add((index, name, key))
                _put(block, name, key, stored)
        self._reader = threading.current_thread()

    def bring_here(self, blocks: list[Block]) -> bool:
        """Have this thread read what another one let go of, when it is used; returns whether there was anything.

        Args:
            blocks (list[Block]): the model's.
        """
        if self._reader in (None, threading.current_thread()):
            return False
        stored = self.read()
        for index, name, key in self._released:
            _put(blocks[index], name, key, stored)
        self._reader = threading.current_thread()
        return True

    @staticmethod
    def _is_stored(block: Block, name: tuple[str, str], stored: dict[str, mx.array]) -> bool:
        own, there = block.module[name[0]][name[1]], stored.pop(_path(block, *name), None)
        if there is None or there.shape != own.shape or there.dtype != own.dtype:
            return False
        return mx.array_equal(own, there).item()


def _put(block: Block, name: str, key: str, stored: dict[str, mx.array]) -> None:
    dict.__setitem__(block.module[name], key, stored[_path(block, name, key)])


def _path(block: Block, name: str, key: str) -> str:
    return f"{block.path}.{name}.{key}" if block.path else f"{name}.{key}"


def _arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    return tree_flatten(module.parameters())
