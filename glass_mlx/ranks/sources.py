"""The token sequences that a model's global statistics are measured on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from jinja2 import TemplateError
from mlx_lm import batch_generate
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from ..errors import GlassError
from ..model.glass_model import GlassModel
from ..model.randomness import random_state_kept

# The first batch of each kind of text has so many sequences, one for each half of the evidence, and each further one
# twice as many up to the usual: a run that is stopped early has something to keep.
_FIRST_BATCH = 2


@dataclass
class Source:
    """Where the tokens come from.

    Attributes:
        domains: names of the kinds of text; batches come from each in turn.
        batch: a function from a batch's number to its token sequences, each of which begins as a text does (with BOS,
            say). An empty list ends the source. The same number gives the same sequences.
        settings: further entries of the metadata.
        watchers: told at every step how many tokens it has generated.
    """

    domains: tuple[str, ...]
    batch: Callable[[int], list[list[int]]]
    settings: dict[str, Any] = field(default_factory=dict)
    watchers: list[Callable[[int], None]] = field(default_factory=list)

    def tell(self, tokens: int) -> None:
        """Tell the watchers of a step."""
        for watcher in self.watchers:
            watcher(tokens)

    @property
    def method(self) -> str:
        """How the tokens were obtained, for the metadata."""
        return " and ".join(self.domains)


def batch_size(turn: int, most: int) -> int:
    """How many sequences the batch of a kind's ``turn`` has, from 0 on."""
    return min(most, _FIRST_BATCH << min(turn, 30))


def null_prompt(
    model: GlassModel,
    tokenizer: Any,
    sequences: int = 32,
    length: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    chat: bool | None = None,
) -> Source:
    """Sequences that the dense model samples: from its BOS token; in answer to an empty message; and of both sides of a
    conversation, which begin with the user's turn. An assistant that is given only the beginning of a user's turn
    writes an instruction of the kind that it was trained on (Magpie, arXiv 2406.08464), and then answers it.

    Args:
        model (GlassModel): the model.
        tokenizer: its tokenizer.
        sequences (int): sequences in a batch; the first ones have fewer.
        length (int): most tokens to sample for a sequence.
        temperature (float): of the sampling.
        seed (int): of the sampling.
        chat (bool, optional): True for answers only, False for none. Default: all in turn, if the model has a chat
            template that accepts an empty message.

    Raises:
        GlassError: answers were asked for, but the model cannot answer an empty message.
    """
    starts = {} if chat else {"null prompt": start_tokens(tokenizer)}
    turn: tuple[list[int], list[int]] | None = None
    if chat is not False:
        try:
            starts["chat null prompt"] = empty_message(tokenizer)
        except GlassError:
            if chat:
                raise
        turn = user_turn(tokenizer) if "chat null prompt" in starts else None
    kinds = (*starts, *(["own conversation"] if turn else []))
    sampler = make_sampler(temp=temperature)

    def told_sampler(logprobs: mx.array) -> mx.array:
        source.tell(len(logprobs))
        return sampler(logprobs)

    def sampled(prompts: list[list[int]], most: int) -> list[list[int]]:
        """The prompts, each with what the model says after it."""
        said = _sample(model, tokenizer, prompts, most, told_sampler)
        return [[*prompt, *ids] for prompt, ids in zip(prompts, said)]

    def batch(number: int) -> list[list[int]]:
        place, kind = divmod(number, len(kinds))
        size = batch_size(place, sequences)
        with random_state_kept():
            mx.random.seed(int(np.random.SeedSequence((seed, number)).generate_state(1)[0]))
            if kinds[kind] in starts:
                return sampled([starts[kinds[kind]]] * size, length)
            before, after = turn
            asked = [_until(row, after[0], len(before)) for row in sampled([before] * size, length // 4)]
            return sampled([[*row, *after] for row in asked], length - length // 4)

    settings = {"sequences": sequences, "length": length, "temperature": temperature, "seed": seed}
    source = Source(kinds, batch, settings)
    return source


def user_turn(tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """The tokens before and after the words of a user's first message, up to the answer; None where the template puts
    nothing around them."""
    framed = [
        list(tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True))
        for text in ("the", "47", "Zebra?")  # of which no tokenizer makes tokens that are alike
    ]
    before = os.path.commonprefix(framed)
    after = os.path.commonprefix([row[len(before) :][::-1] for row in framed])[::-1]
    return (before, after) if before and after else None


def _until(row: list[int], token: int, start: int) -> list[int]:
    """A row up to a token, which may come from ``start`` on."""
    return row[: row.index(token, start)] if token in row[start:] else row


def empty_message(tokenizer: Any) -> list[int]:
    """The prompt tokens of a conversation in which the user has sent an empty message.

    Raises:
        GlassError: the model has no chat template, or one that rejects an empty message.
    """
    if not tokenizer.has_chat_template:
        raise GlassError("This model has no chat template: leave out --chat.")
    try:
        return list(tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True))
    except TemplateError as e:
        raise GlassError(f"The chat template rejects an empty message ({e}): leave out --chat.") from e


def given_sequences(
    method: str, rows: list[list[int]], sequences: int = 32, settings: dict[str, Any] | None = None
) -> Source:
    """A source of given token sequences, from a text or a data set."""
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]

    def batch(number: int) -> list[list[int]]:
        before = sum(batch_size(turn, sequences) for turn in range(number))
        return rows[before : before + batch_size(number, sequences)]

    return Source((method,), batch, {"sequences": sequences, "digest": digest, **(settings or {})})


def text_rows(text: str, tokenizer: Any, length: int) -> list[list[int]]:
    """A text cut into rows of at most ``length`` tokens, each after a BOS token."""
    start = start_tokens(tokenizer)
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    return [[*start, *ids[i : i + length]] for i in range(0, len(ids), length)]


def dataset_rows(lines: list[str], tokenizer: Any, length: int) -> list[list[int]]:
    """One row of at most ``length`` tokens for each JSON line.

    A line has ``text``, ``messages``, or ``prompt`` and ``completion``, as mlx-lm's data sets have.

    Raises:
        GlassError: a line has none of these.
    """
    start, rows = start_tokens(tokenizer), []
    for number, line in enumerate(lines, 1):
        try:
            item = json.loads(line)
            if "messages" in item:
                row = list(tokenizer.apply_chat_template(item["messages"]))
            else:
                text = item["text"] if "text" in item else item["prompt"] + item["completion"]
                row = [*start, *tokenizer.encode(text, add_special_tokens=False)]
        except Exception as e:  # bad JSON, an error of the template, or a missing key
            raise GlassError(
                f'Line {number} of the data set has no "text", "messages" or "prompt" and "completion".'
            ) from e
        rows.append(row[: length + 1])
    return rows


def start_tokens(tokenizer: Any) -> list[int]:
    """The token that a text begins with: BOS, or the end token in families without one."""
    bos = tokenizer.bos_token_id
    return [tokenizer.eos_token_id if bos is None else bos]


def _sample(
    model: GlassModel, tokenizer: Any, prompts: list[list[int]], most: int, sampler: Callable
) -> list[list[int]]:
    """What the model says after each prompt, without a token that ends it: at once, or one by one where mlx-lm cannot
    batch its caches."""
    if all(hasattr(c, "merge") for c in make_prompt_cache(model.dense)):
        out = batch_generate(model.dense, tokenizer, prompts, max_tokens=most, sampler=sampler, return_token_ids=True)
        return out.token_ids
    said = []
    for prompt in prompts:
        said.append([])
        for token, _ in generate_step(mx.array(prompt), model.dense, max_tokens=most, sampler=sampler):
            if token in tokenizer.eos_token_ids:
                break
            said[-1].append(token)
    return said
