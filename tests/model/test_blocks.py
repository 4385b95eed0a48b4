"""Tests of which weights a call computes with: its own, whatever other calls, threads and exceptions do."""

from __future__ import annotations

import copy
import sys
import threading

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from glass_mlx import GlassModel
from glass_mlx.evaluation.tiny_models import tiny_model
from glass_mlx.model.blocks import Block, hooked, run_with

SIZE = 64
X = mx.random.normal((1, 3, 16), key=mx.random.key(1))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(16, SIZE), nn.Linear(SIZE, 16)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.relu(self.up_proj(x)))


@pytest.fixture
def block() -> Block:
    return Block("mlp", Mlp(), ("up_proj",), "down_proj", SIZE)


def test_a_block_is_still_mlx_lms(block):
    plain = Mlp()
    plain.update(block.module.parameters())
    assert mx.array_equal(block.module(X), plain(X))
    assert isinstance(block.module.up_proj, nn.Linear) and type(block.module.up_proj).__name__ == "Linear"
    assert repr(block.module) == repr(plain)
    names = [name for name, _ in tree_flatten(block.module.parameters())]
    assert names == [name for name, _ in tree_flatten(plain.parameters())]
    block.let_go()
    assert type(block.module.up_proj) is nn.Linear


def test_only_the_call_sees_what_replaces_a_projection(block):
    own, other = block.module(X), nn.Linear(SIZE, 16)
    replaced = run_with(block.replacing({"down_proj": other}), block.module, X)
    assert mx.array_equal(replaced, other(nn.relu(block.module.up_proj(X))))
    assert mx.array_equal(block.module(X), own)
    with pytest.raises(ZeroDivisionError):
        run_with(block.replacing({"down_proj": lambda h: 1 / 0}), block.module, X)
    assert mx.array_equal(block.module(X), own)


def test_hooks_see_and_change_hidden_vectors(block):
    seen = []
    assert mx.array_equal(run_with(hooked([block], lambda i, h: seen.append((i, h))), block.module, X), block.module(X))
    assert [(i, h.shape) for i, h in seen] == [(0, (1, 3, SIZE))]
    zeroed = run_with(hooked([block], lambda _, h: 0 * h), block.module, X)
    assert mx.allclose(zeroed, mx.broadcast_to(block.module.down_proj.bias, zeroed.shape))


def test_a_copy_of_a_block_is_dense(block):
    twin, other = copy.deepcopy(block.module), nn.Linear(SIZE, 16)
    assert mx.array_equal(run_with(block.replacing({"down_proj": other}), twin, X), block.module(X))


def test_threads_do_not_see_each_others_weights(block):
    """One thread is in the middle of its call while the other one computes."""
    inside, done, found = threading.Event(), threading.Event(), []

    def pause(h: mx.array) -> mx.array:
        inside.set()
        assert done.wait(60)
        return mx.zeros((1, 3, 16))

    thread = threading.Thread(
        target=lambda: found.append(run_with(block.replacing({"down_proj": pause}), block.module, mx.array(X)))
    )
    expected = block.module(X).tolist()
    thread.start()
    assert inside.wait(60)
    assert block.module(X).tolist() == expected
    done.set()
    thread.join()
    assert len(found) == 1


class Interrupt(KeyboardInterrupt):
    pass


@pytest.mark.few(2)
@pytest.mark.parametrize("first", range(6))
def test_an_interrupt_anywhere_leaves_the_dense_model(first):
    """At every bytecode that GLASS runs in a decode step, once each; in a case, every sixth."""
    model = GlassModel(tiny_model("llama"))
    dense = model.dense(mx.array([[5, 6, 7]])).tolist()
    cache = model.make_cache()
    mx.eval(model.prefill(mx.array([[3, 14, 15]]), cache))
    model.select(cache)
    stops, done = first, False
    while not done:
        countdown = stops

        def trace(frame, event, arg):
            nonlocal countdown
            if "glass_mlx" not in frame.f_code.co_filename:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                if countdown == 0:
                    raise Interrupt
                countdown -= 1
            return trace

        twin = copy.deepcopy(cache)
        sys.settrace(trace)
        try:
            model.decode(mx.array([[8]]), twin)
            done = True
        except Interrupt:
            pass
        finally:
            sys.settrace(None)
        assert model.dense(mx.array([[5, 6, 7]])).tolist() == dense, stops
        stops += 6
    assert stops > 10
