"""What a model remembers of one conversation. It travels with the prompt cache, as its last element."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from ..errors import GlassError
from .blocks import CompactWeights
from .config import GlassConfig

SAVED_AS = "glass_mlx session 5"
_MAX_SPANS = 8
# Evidence counts half after this many generated tokens: an answer moves away from what it began with.
_HALF_LIFE = 128


class Phase(Enum):
    """What a call of the model is for."""

    PREFILL = "prefill"  # dense, recorded: the tokens of a prompt
    DECODE = "decode"  # on the kept neurons


def call_length(inputs: mx.array, kwargs: dict[str, Any]) -> int:
    """How many tokens a call of a model has; embeddings count where they are given."""
    embeddings = kwargs.get("input_embeddings")
    return (inputs if embeddings is None else embeddings).shape[1]


@dataclass(frozen=True)
class EvidenceSpan:
    """Tokens ``start`` to before ``end`` of the prompt cache, read in dense calls.

    Attributes:
        tokens: how many of them were recorded.
        evidence: the session's evidence after them.
    """

    start: int
    end: int
    tokens: int
    evidence: mx.array


class _TakesTurns(type):
    """Says in words why mlx-lm cannot batch conversations: its own error names the class of what it cannot merge, and a
    ``merge`` that raises would have mlx-lm's server try to."""

    def __format__(cls, spec: str) -> str:
        raise GlassError(
            "A GlassModel's conversations cannot be batched: each decodes on neurons of its own. Answer the prompts "
            "one after the other with glass_mlx.generate, or batch the dense model, model.dense."
        )


class Session(metaclass=_TakesTurns):
    """A conversation's evidence, its kept neurons and their compact weights.

    It has the interface of an mlx-lm cache entry, so whatever mlx-lm does to a prompt cache (evaluate, deep-copy, trim,
    save, load) it does to the session too. It has no ``merge``: its weights are its own, so conversations cannot be
    batched together, which mlx-lm then says. Nor has it ``to_quantized``: ``kv_bits`` passes it by.

    Attributes:
        config (GlassConfig): how this conversation chooses its neurons.
        offset (int): tokens in the prompt cache.
        evidence (mx.array | None): what dense calls recorded (``EvidenceLayout``), float32, less what has faded.
        neurons (int | None): how many of its entries are energies, the first ones; None for all.
        spans (list[EvidenceSpan]): where the evidence is from; what trimming falls back to.
        kept (list[mx.array] | None): kept neurons of each block, [k] int32, ascending.
        compact (CompactWeights | None): their weights.
        generated (int): tokens decoded since the last prompt.
        pending_reread (list[mx.array]): the last of them, which no dense call has read yet, [B, L] each.
        in_prompt (bool): whether a single token would still be taken for one of a prompt (``infer_phase``).
        selection_time (float): seconds that the last choice of neurons and making their compact weights took.
    """

    def __init__(self, config: GlassConfig, offset: int = 0, neurons: int | None = None):
        """
        Args:
            config (GlassConfig): how neurons are chosen.
            offset (int): tokens that are in the cache already; they left no evidence.
            neurons (int, optional): of the model.
        """
        self.config = config
        self.offset = offset
        self.neurons = neurons
        self.evidence: mx.array | None = None
        self.spans: list[EvidenceSpan] = []
        self.kept: list[mx.array] | None = None
        self.compact: CompactWeights | None = None
        self.generated = 0
        self.pending_reread: list[mx.array] = []
        self.in_prompt = True
        self.selection_time = 0.0

    @property
    def energy(self) -> mx.array | None:
        """The energies of all neurons, [sum of F] float32: a sum of 1 in each block for each recorded token, less what
        has faded. None without evidence."""
        return None if self.evidence is None else self.evidence[: self.neurons]

    @property
    def prompt_tokens(self) -> int:
        """Tokens whose evidence was recorded."""
        return sum(span.tokens for span in self.spans)

    def configure(self, **changes: Any) -> None:
        """Change fields of the configuration, from the next decoded token on. A change of signal discards the evidence,
        which is of the other signal."""
        config = self.config.updated(**changes)
        if config.signal != self.config.signal:
            self.evidence, self.spans = None, []
        if config != self.config:
            self.config = config
            self.drop_choice()

    # Which phase a call is in.

    def infer_phase(self, length: int) -> Phase:
        """The phase of a call of ``length`` tokens, where the caller does not say: mlx-lm's own loops, for example.

        Several tokens are a prompt, and so is the single token after them, because mlx-lm runs a prompt's last token by
        itself. Two cases look alike: where the rest of a prompt after whole prefill chunks is one token, it is taken
        for the last, and the real last token is decoded; and a later turn of a single token is taken for decoding.
        """
        if length > 1 or self.in_prompt:
            return Phase.PREFILL
        return Phase.DECODE

    # What calls of the model change.

    def record(self, evidence: mx.array, length: int, prompt: int | None = None) -> None:
        """Add the evidence of a dense call.

        Args:
            evidence (mx.array): as ``evidence``.
            length (int): tokens read.
            prompt (int, optional): how many of them, the last ones, are of a prompt. Default: all. The others were
                generated, and earlier evidence fades by them.
        """
        prompt = length if prompt is None else prompt
        if self.evidence is not None:
            evidence = 0.5 ** ((length - prompt) / _HALF_LIFE) * self.evidence + evidence
        self.evidence = evidence
        self.spans.append(EvidenceSpan(self.offset, self.offset + length, length, evidence))
        if len(self.spans) > _MAX_SPANS:
            a, b = self.spans[:2]
            self.spans[:2] = [EvidenceSpan(a.start, b.end, a.tokens + b.tokens, b.evidence)]
        self.offset += length
        if prompt > 0:
            self.generated, self.in_prompt = 0, prompt > 1

    def advance(self, length: int, tokens: mx.array | None) -> None:
        """Count decoded tokens, which end a prompt.

        Args:
            length (int): how many.
            tokens (mx.array, optional): [B, length], to be read again later. None: they cannot be, and so nothing
                before them can.
        """
        self.offset += length
        self.generated += length
        self.in_prompt = False
        self.pending_reread = [] if tokens is None else [*self.pending_reread, tokens]

    def draft(self, length: int) -> None:
        """Count drafted tokens: :meth:`retract` takes them back."""
        self.offset += length

    def retract(self, length: int) -> None:
        """Take back the last tokens and their share of the evidence; the choice of neurons stays."""
        self.offset -= length
        self._cut_evidence()

    def accept(self, length: int) -> None:
        """Count tokens of an answer that the dense model has read already."""
        self.generated += length
        self.in_prompt = False

    def take_pending(self) -> mx.array | None:
        """Go back to before the tokens that wait to be read again, and return them, [B, n]; None if there are none. The
        caller trims the cache's other entries."""
        if not self.pending_reread:
            return None
        tokens, self.pending_reread = mx.concatenate(self.pending_reread, axis=1), []
        self.offset -= tokens.shape[1]
        return tokens

    def forget_pending(self) -> None:
        """Nothing waits to be read again."""
        self.pending_reread = []

    def choose(self, kept: list[mx.array]) -> None:
        """Keep these neurons."""
        self.kept, self.compact = kept, None

    def hold(self, compact: CompactWeights, seconds: float) -> None:
        """Keep the compact weights, which took so long to choose and make."""
        self.compact, self.selection_time = compact, seconds

    def drop_choice(self) -> None:
        """Choose neurons anew when they are next needed."""
        self.kept = self.compact = None

    def drop_weights(self) -> None:
        """Make the compact weights anew when they are next needed."""
        self.compact = None

    # The interface of an mlx-lm cache entry.

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Take back the last n tokens. Decoded tokens left no evidence. Those of a dense call take their average share
        of its evidence with them."""
        n = min(n, self.offset)
        self.offset -= n
        self.generated = max(0, self.generated - n)
        if self.pending_reread:
            tokens = mx.concatenate(self.pending_reread, axis=1)
            left = tokens.shape[1] - n
            self.pending_reread = [tokens[:, :left]] if left > 0 else []
        if self._cut_evidence():
            self.in_prompt = True
            self.drop_choice()
        return n

    def _cut_evidence(self) -> bool:
        """Leave the evidence of the first ``offset`` tokens; returns whether there was more."""
        if not self.spans or self.offset >= self.spans[-1].end:
            return False
        while self.spans and self.offset <= self.spans[-1].start:
            self.spans.pop()
        if self.spans and self.offset < self.spans[-1].end:
            cut = self.spans.pop()
            share = (self.offset - cut.start) / (cut.end - cut.start)
            before = self.spans[-1].evidence if self.spans else mx.zeros_like(cut.evidence)
            evidence = before + share * (cut.evidence - before)
            tokens = max(1, round(share * cut.tokens))
            self.spans.append(EvidenceSpan(cut.start, self.offset, tokens, evidence))
        self.evidence = self.spans[-1].evidence if self.spans else None
        return True

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> Session:
        """It stays as it is: what mlx-lm quantises are keys and values."""
        return self

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> None:
        """A session is no layer's cache, but mlx-lm's speculative decoding takes it for the draft model's first one."""
        raise GlassError("A session is not a layer's cache. With a draft model, leave out prompt_cache.")

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.offset == 0

    @property
    def compact_bytes(self) -> int:
        """Size of the compact weights."""
        return 0 if self.compact is None else self.compact.nbytes

    @property
    def nbytes(self) -> int:
        arrays = [span.evidence for span in self.spans] + self.pending_reread + (self.kept or [])
        return sum(a.nbytes for a in arrays) + self.compact_bytes

    @property
    def state(self) -> tuple:
        pending = [mx.concatenate(self.pending_reread, axis=1)] if self.pending_reread else []
        header = {
            "config": asdict(self.config),
            "offset": self.offset,
            "spans": [(span.start, span.end, span.tokens) for span in self.spans],
            "in_prompt": self.in_prompt,
            "generated": self.generated,
            "pending": len(pending),
        }
        arrays = [span.evidence for span in self.spans] + pending + (self.kept or [])
        return [SAVED_AS, json.dumps(header), *arrays], None, None

    def __deepcopy__(self, memo: dict) -> Session:
        # MLX arrays are never changed in place here, so copies share them, the compact weights above all.
        copy = Session(self.config)
        copy.__dict__.update(self.__dict__)
        copy.spans, copy.pending_reread = list(self.spans), list(self.pending_reread)
        return copy


# mlx-lm's load_prompt_cache makes each entry again by its class name, which must be one of mlx-lm's own.
# Under this name a saved session comes back as plain arrays, which ``saved_session.restore`` turns into a session.
Session.__name__ = ArraysCache.__name__
