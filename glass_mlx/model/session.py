"""What GLASS remembers of one conversation. It travels with the prompt cache, as its last element."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from .config import GlassConfig

_SAVED = "glass_mlx session 2"
_MAX_MARKS = 8
# By "auto", what was said is read again every so many tokens; the neurons are chosen after the second number of tokens,
# after three times as many, and from then on every so many as the third.
_READ_GAP, _FIRST_CHOICE, _CHOICE_GAP = 16, 32, 128
# Evidence counts half after so many tokens said: an answer leaves behind what it began with.
_HALF_LIFE = 128


@dataclass(frozen=True)
class Mark:
    """A recorded stretch of the prompt cache, from token ``start`` to before ``end``, of which ``tokens`` were
    recorded; ``energy`` is the session's evidence after it."""

    start: int
    end: int
    tokens: int
    energy: mx.array


def bytes_of(compact: list[dict[str, nn.Module]]) -> int:
    """Size of compact projections, without what a ``Spread`` only refers to."""
    modules = [module for projections in compact for module in projections.values()]
    return sum(value.nbytes for module in modules for value in module.values() if isinstance(value, mx.array))


def next_refresh(refresh: int | str, said: int) -> int:
    """After how many tokens said the next refresh is due, not before ``said``."""
    gap = _READ_GAP if refresh == "auto" else refresh
    return max(1, -(-said // gap)) * gap


def next_choice(refresh: int | str, said: int) -> int:
    """After how many tokens said a refresh chooses the neurons again, not before ``said``."""
    if refresh != "auto":
        return next_refresh(refresh, said)
    due = _FIRST_CHOICE
    while due < said:
        due = min(3 * due, due + _CHOICE_GAP)
    return due


class Session:
    """A conversation's evidence, its kept neurons and their compact weights.

    It has the interface of an mlx-lm cache entry, so that whatever mlx-lm does to a prompt cache (evaluate, deep-copy,
    trim, save, load) is done to the session as well. It has no ``merge``: a session's weights are its own, so
    conversations are not batched together.

    The phase of a call is explicit after ``begin_prompt``. Without it (mlx-lm's own loops drive the model) it is
    inferred: a call of several tokens is prefill, and so is the first one-token call after one, which is how
    mlx-lm runs a prompt's last token. Where a prefill chunk's remainder is a single token, that one is taken
    for the last, and the real last token is then decoded on the compact weights; and a later turn whose prompt
    is a single token is taken for decoding.

    Attributes:
        config (GlassConfig): how this conversation chooses its neurons.
        offset (int): tokens in the prompt cache.
        prompt_tokens (int): tokens whose evidence was recorded.
        energy (mx.array | None): evidence of all blocks, concatenated, [sum of F] float32: a sum of 1 in each block for
            each recorded token, or what is left of it.
        kept (list[mx.array] | None): kept neurons of each block, [k] int32, ascending.
        compact (list[dict[str, nn.Module]] | None): compact projections of each block.
        said (int): tokens decoded since the last prompt.
        unread (list[mx.array]): those of them that no dense call has read yet, [B, L] each.
        selection_time (float): seconds that choosing the neurons and making their compact weights last took.
    """

    def __init__(self, config: GlassConfig):
        self.config = config
        self.offset = 0
        self.energy: mx.array | None = None
        self.marks: list[Mark] = []  # what trimming falls back to
        self.prompt_left = 0
        self.in_prompt = True
        self.kept: list[mx.array] | None = None
        self.compact: list[dict[str, nn.Module]] | None = None
        self.said = 0
        self.unread: list[mx.array] = []
        self.selection_time = 0.0

    @property
    def prompt_tokens(self) -> int:
        return sum(mark.tokens for mark in self.marks)

    def configure(self, **changes: Any) -> None:
        """Change fields of the configuration from the next decoded token on. A change of signal discards the recorded
        evidence, which is of the other signal."""
        config = self.config.updated(**changes)
        if config.signal != self.config.signal:
            self.energy, self.marks = None, []
        if config != self.config:
            self.config = config
            self.choose_again()

    def begin_prompt(self, tokens: int) -> None:
        """Announce that the next ``tokens`` tokens are a prompt: dense and recorded, to the last one."""
        self.prompt_left = tokens

    def is_prefill(self, length: int) -> bool:
        """Whether a call of ``length`` tokens is prefill."""
        return self.prompt_left > 0 or length > 1 or self.in_prompt

    def record(self, energy: mx.array, length: int, prompt: int | None = None, choose: bool = True) -> None:
        """Add the evidence of a dense call: energy [sum of F] float32 over ``length`` tokens, the last ``prompt``
        (default: all) of which are of a prompt, and the others said before. By what is said, earlier evidence
        fades. The neurons are chosen again unless not ``choose``."""
        prompt = length if prompt is None else prompt
        if self.energy is not None:
            energy = 0.5 ** ((length - prompt) / _HALF_LIFE) * self.energy + energy
        self.energy = energy
        self.marks.append(Mark(self.offset, self.offset + length, length, energy))
        if len(self.marks) > _MAX_MARKS:
            a, b = self.marks[:2]
            self.marks[:2] = [Mark(a.start, b.end, a.tokens + b.tokens, b.energy)]
        if prompt > 0:
            self.said = 0
            if self.prompt_left > 0:
                self.prompt_left = max(0, self.prompt_left - prompt)
                self.in_prompt = self.prompt_left > 0
            else:
                self.in_prompt = prompt > 1
        self.offset += length
        if choose:
            self.choose_again()

    def retract(self, n: int) -> None:
        """Take back the last n tokens and their share of the evidence; the choice of neurons stays."""
        self.offset -= n
        self._cut_evidence()

    def advance(self, length: int, tokens: mx.array | None = None) -> None:
        """Count decoded tokens; they end a prompt. ``tokens`` [B, length] are to be read again later; without them,
        nothing before can be read again either."""
        self.offset += length
        self.said += length
        self.in_prompt, self.prompt_left = False, 0
        if tokens is None:
            self.unread = []
        else:
            self.unread.append(tokens)

    def take_unread(self) -> mx.array | None:
        """Go back to before the unread tokens; returns them, [B, n], or None if there are none. The caller
        trims the other entries of the cache by as many, and reads them again."""
        if not self.unread:
            return None
        tokens, self.unread = mx.concatenate(self.unread, axis=1), []
        self.offset -= tokens.shape[1]
        return tokens

    def until_refresh(self) -> int | None:
        """How many tokens may be decoded before what was said is to be read again; None for any number."""
        if self.config.refresh == 0 or self.config.density == 1:
            return None
        return next_refresh(self.config.refresh, self.said) - self.said

    def chooses_now(self) -> bool:
        """Whether a refresh that is due chooses the neurons again."""
        return next_choice(self.config.refresh, self.said) == self.said

    def choose_again(self) -> None:
        """Choose the neurons anew when they are next needed."""
        self.kept = self.compact = None

    # The interface of an mlx-lm cache entry.

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Take back the last n tokens. Generated tokens left no evidence. Those of a prompt take their
        average share of the recorded call's evidence with them, all of it if the whole call goes."""
        n = min(n, self.offset)
        self.offset -= n
        self.said = max(0, self.said - n)
        if self.unread:
            tokens = mx.concatenate(self.unread, axis=1)
            left = tokens.shape[1] - n
            self.unread = [tokens[:, :left]] if left > 0 else []
        if self._cut_evidence():
            self.in_prompt, self.prompt_left = True, 0
            self.choose_again()
        return n

    def _cut_evidence(self) -> bool:
        """Leave the evidence of the first ``offset`` tokens; returns whether there was more."""
        if not self.marks or self.offset >= self.marks[-1].end:
            return False
        while self.marks and self.offset <= self.marks[-1].start:
            self.marks.pop()
        if self.marks and self.offset < self.marks[-1].end:
            cut = self.marks.pop()
            share = (self.offset - cut.start) / (cut.end - cut.start)
            before = self.marks[-1].energy if self.marks else mx.zeros_like(cut.energy)
            energy = before + share * (cut.energy - before)
            tokens = max(1, round(share * cut.tokens))
            self.marks.append(Mark(cut.start, self.offset, tokens, energy))
        self.energy = self.marks[-1].energy if self.marks else None
        return True

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.offset == 0

    @property
    def compact_bytes(self) -> int:
        """Size of the compact weights."""
        return bytes_of(self.compact or [])

    @property
    def nbytes(self) -> int:
        arrays = [mark.energy for mark in self.marks] + self.unread + (self.kept or [])
        return sum(a.nbytes for a in arrays) + self.compact_bytes

    @property
    def state(self) -> tuple:
        unread = [mx.concatenate(self.unread, axis=1)] if self.unread else []
        header = {
            "config": asdict(self.config),
            "offset": self.offset,
            "marks": [(mark.start, mark.end, mark.tokens) for mark in self.marks],
            "in_prompt": self.in_prompt,
            "said": self.said,
            "unread": len(unread),
        }
        arrays = [mark.energy for mark in self.marks] + unread + (self.kept or [])
        return [_SAVED, json.dumps(header), *arrays], None, None

    def __deepcopy__(self, memo: dict) -> Session:
        # MLX arrays are never changed in place here, so copies share them, the compact weights above all.
        copy = Session(self.config)
        copy.__dict__.update(self.__dict__)
        copy.marks, copy.unread = list(self.marks), list(self.unread)
        return copy

    @classmethod
    def restore(cls, entry: Any) -> Session | None:
        """The session that mlx-lm's ``load_prompt_cache`` read as an ArraysCache, or None if it is none."""
        if type(entry) is not ArraysCache or entry.cache[:1] != [_SAVED]:
            return None
        header, arrays = json.loads(entry.cache[1]), entry.cache[2:]
        session = cls(GlassConfig(**header["config"]))
        session.offset, session.in_prompt = header["offset"], header["in_prompt"]
        spans = header["marks"]
        session.marks = [Mark(*span, energy) for span, energy in zip(spans, arrays)]
        if session.marks:
            session.energy = session.marks[-1].energy
        said, rest = header["unread"], arrays[len(spans) :]
        session.said, session.unread = header["said"], rest[:said]
        session.kept = rest[said:] or None
        return session


# mlx-lm's load_prompt_cache makes each entry again by its class name, which must be one of mlx-lm's own.
# Under this name a saved session comes back as plain arrays, which ``restore`` turns into a session.
Session.__name__ = ArraysCache.__name__
