"""A state machine of conversations: prefill, decode, reread, trim, copy, save, load and reconfigure in any order.

Against a plain account of the same conversation: its tokens, and which of them only the sparse model has read. After
each step the cache's length, the tokens that wait to be read again and the evidence agree with the account, keys and
values of everything that was read densely are the dense model's own, and logits are those of dense reading.
"""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
from conftest import examples
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache, trim_prompt_cache

from glass_mlx import GlassModel
from glass_mlx.evaluation.tiny_models import tiny_model
from glass_mlx.model.session import Phase

tokens = st.lists(st.integers(0, 99), min_size=1, max_size=5)


@cache
def the_model() -> GlassModel:
    return GlassModel(tiny_model("llama"))


def dense_keys(row: list[int]) -> list[np.ndarray]:
    """Keys of each layer [tokens, ...] that the dense model writes for a text."""
    entries = make_prompt_cache(the_model().dense)
    mx.eval(the_model().dense(mx.array([row]), cache=entries))
    return [np.array(entry.state[0])[0] for entry in entries]


class Conversation(RuleBasedStateMachine):
    @initialize(prompt=tokens)
    def begin(self, prompt):
        self.cache = the_model().make_cache()
        self.row: list[int] = []
        self.waiting = 0  # how many of the last tokens no dense call has read
        self.evidence = 0  # how many tokens were recorded
        self.read(prompt)

    @property
    def session(self):
        return the_model().session(self.cache)

    def read(self, prompt):
        self.row = [*self.row, *prompt]
        logits = the_model().prefill(mx.array([prompt]), self.cache)
        mx.eval(logits, [entry.state for entry in self.cache])
        assert logits.shape[:2] == (1, len(prompt))
        self.evidence += self.waiting + len(prompt)
        self.waiting = 0
        dense = the_model().dense(mx.array([self.row]))[0, -1]
        assert np.abs(np.array(logits[0, -1] - dense)).max() < 1e-3 * np.abs(np.array(dense)).max()

    @rule(prompt=tokens)
    def prefill(self, prompt):
        self.read(prompt)
        assert self.session.kept is None and self.session.generated == 0

    @rule(answer=tokens)
    def generate(self, answer):
        for one in answer:
            mx.eval(the_model().run_phase(Phase.DECODE, mx.array([[one]]), self.cache))
            self.row.append(one)
            if self.session.config.density < 1 or self.waiting:
                self.waiting += 1
        assert self.session.kept is not None or self.session.config.density == 1

    @precondition(lambda self: len(self.row) > 1)
    @rule(data=st.data())
    def trim(self, data):
        n = data.draw(st.integers(1, min(len(self.row) - 1, data.draw(st.sampled_from([2, 2, 100])))))
        assert trim_prompt_cache(self.cache, n) == n
        self.row = self.row[:-n]
        self.waiting = max(0, self.waiting - n)
        self.evidence = min(self.evidence, self.session.prompt_tokens)

    @rule(density=st.sampled_from([0.3, 0.5, 1.0]))
    def reconfigure(self, density):
        changed = density != self.session.config.density
        self.session.configure(density=density)
        assert not changed or self.session.kept is None

    @rule()
    def branch(self):
        """Go on with a copy; the original stays as it is."""
        original, before = self.cache, self.account(self.cache)
        self.cache = copy.deepcopy(self.cache)
        the_model().select(self.cache)
        self.read([1, 2])
        assert self.account(original) == before

    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "cache.safetensors")
            before = self.account(self.cache)
            save_prompt_cache(path, self.cache)
            self.cache = load_prompt_cache(path)
            mx.eval([entry.state for entry in self.cache])
            assert self.account(self.cache) == before

    @staticmethod
    def account(cache) -> tuple:
        session = the_model().session(cache)
        waiting = [n for chunk in session.pending_reread for n in chunk[0].tolist()]
        energy = None if session.energy is None else session.energy.tolist()
        kept = None if session.kept is None else [k.tolist() for k in session.kept]
        return session.config, session.offset, session.generated, session.prompt_tokens, waiting, energy, kept

    @invariant()
    def agrees(self):
        if not hasattr(self, "row"):
            return
        session = self.session
        waiting = [n for chunk in session.pending_reread for n in chunk[0].tolist()]
        assert session.offset == len(self.row) == self.cache[0].offset
        assert waiting == self.row[len(self.row) - self.waiting :]
        assert session.prompt_tokens == self.evidence
        assert (session.energy is None) == (self.evidence == 0)
        assert session.compact is None or session.kept is not None
        read = len(self.row) - self.waiting
        for ours, theirs in zip(self.cache[:-1], dense_keys(self.row)):
            np.testing.assert_allclose(np.array(ours.state[0])[0][:, :read], theirs[:, :read], rtol=2e-3, atol=2e-4)


TestConversation = Conversation.TestCase
TestConversation.settings = settings(
    deadline=None,
    max_examples=examples(8, 24),
    stateful_step_count=10,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
