"""Sessions that come out of a file. Anyone may have written it, so everything is checked before it is used."""

from __future__ import annotations

import json
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from ..errors import GlassError
from .config import GlassConfig
from .discovery import vocabulary_size
from .evidence import EvidenceLayout
from .saved_cache import UnusableCache, check_entries
from .selection import NeuronSelector
from .session import SAVED_AS, EvidenceSpan, Session

_NAME = SAVED_AS.rpartition(" ")[0]


def restore(entry: Any) -> Session | None:
    """The session that mlx-lm's ``load_prompt_cache`` read as an ArraysCache; None if the entry is not one.

    Raises:
        UnusableCache: it is damaged, or another version saved it.
    """
    values = entry.cache if type(entry) is ArraysCache else None
    if not isinstance(values, list) or not values or not str(values[0]).startswith(_NAME):
        return None
    if values[0] != SAVED_AS:
        raise UnusableCache("another version of glass_mlx saved it.")
    try:
        return _session(json.loads(values[1]), values[2:])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, GlassError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0][:80]
        raise UnusableCache(f"its session is damaged ({reason}).") from e


def _session(header: dict[str, Any], arrays: list[Any]) -> Session:
    if not all(isinstance(a, mx.array) for a in arrays):
        raise ValueError("an entry is not an array")
    session = Session(GlassConfig(**header["config"]), header["offset"])
    session.generated, session.in_prompt = header["generated"], header["in_prompt"] is True
    spans, pending = header["spans"], header["pending"]
    if not all(type(n) is int and 0 <= n < 2**40 for n in (session.offset, session.generated, pending)) or pending > 1:
        raise ValueError("a count is out of range")
    session.spans = _spans(spans, arrays)
    end = session.spans[-1].end if session.spans else 0
    if len(session.spans) != len(spans) or end > session.offset:
        raise ValueError("evidence is missing, or is of tokens that are not in the cache")
    session.evidence = session.spans[-1].evidence if session.spans else None
    rest = arrays[len(spans) :]
    session.pending_reread, kept = rest[:pending], rest[pending:]
    for tokens in session.pending_reread:
        fits = tokens.ndim == 2 and mx.issubdtype(tokens.dtype, mx.integer)
        if not fits or not 0 < tokens.shape[1] <= session.offset - end:
            raise ValueError("the tokens to be read again do not fit the cache")
    session.kept = kept or None
    return session


def _spans(spans: list[list[int]], arrays: list[mx.array]) -> list[EvidenceSpan]:
    found, end = [], 0
    for span, evidence in zip(spans, arrays):
        start, stop, tokens = span
        if not all(type(n) is int for n in span) or not end <= start < stop or not 1 <= tokens <= stop - start:
            raise ValueError("a span of evidence is out of order")
        if evidence.dtype != mx.float32 or evidence.ndim != 1 or not mx.all(mx.isfinite(evidence)).item():
            raise ValueError("evidence has values that are not finite")
        found.append(EvidenceSpan(start, stop, tokens, evidence))
        end = stop
    return found


def check_restored(
    session: Session, entries: list[Any], layout: EvidenceLayout, selector: NeuronSelector, dense: nn.Module
) -> None:
    """Hold a restored session against the model; neurons that cannot be kept in it are chosen again.

    Args:
        session (Session): from :func:`restore`.
        entries (list): the other entries of its prompt cache.
        layout (EvidenceLayout): the model's.
        selector (NeuronSelector): the model's.
        dense (nn.Module): the model.

    Raises:
        UnusableCache: the session is of another model, or its indices are out of range.
    """
    if any(span.evidence.shape != (layout.size,) for span in session.spans):
        raise UnusableCache("its session is of another model.")
    session.neurons = layout.neurons
    if any(mx.any(span.evidence[: layout.neurons] < 0).item() for span in session.spans):
        raise UnusableCache("its session has energies below 0.")
    offset, batch = check_entries(entries, dense)
    if offset not in (None, session.offset):
        raise UnusableCache(f"its session is of {session.offset} tokens, its keys and values are not.")
    tokens = accumulate(span.tokens + 1 for span in session.spans)  # rounding and cutting included
    for most, span in zip(tokens, session.spans):  # a token of each sequence adds at most 1 to a block
        sums = mx.stack([mx.sum(energy) for energy in selector.by_block(span.evidence[: layout.neurons])])
        if not mx.all(sums <= most * (batch or 1)).item():
            raise UnusableCache("its session has more evidence than tokens.")
    vocabulary = vocabulary_size(dense)
    for tokens in session.pending_reread:
        if batch not in (None, tokens.shape[0]) or not mx.all((tokens >= 0) & (tokens < vocabulary)).item():
            raise UnusableCache("it has token ids that the model does not have.")
    if session.kept is not None and not selector.fits(session.kept, session.config):
        session.drop_choice()  # chosen for weights in another quantisation, or damaged
