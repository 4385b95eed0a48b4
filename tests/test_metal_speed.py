"""What decoding on compact weights costs Metal, by the graphs of true shapes: layout, dtypes, launches, fast kernels.

One layer of each shape, weights of zeros; the step itself is never computed.
"""

from __future__ import annotations

from collections import Counter
from math import prod

import metal
import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm import stream_generate as mlx_lm_stream_generate

from glass_mlx.core.compensation import Response
from glass_mlx.decoding.stream import stream_generate
from glass_mlx.evaluation import shapes
from glass_mlx.model import discovery
from glass_mlx.model.glass_model import GlassModel

SHAPES = ("mistral-7b", "llama-3.1-8b", "gemma-3-4b", "qwen3-4b", "llama-3.2-1b")
DENSITIES = (0.3, 0.5, 0.7)

# Primitives that only describe memory anew.
_NO_KERNEL = {"Broadcast", "Reshape", "Transpose", "ExpandDims", "Squeeze", "Slice", "Split", "View", "Unflatten"}
_NO_KERNEL |= {"Flatten", "StopGradient", "Depends", "AsStrided", "Contiguous"}


def fake(name: str, monkeypatch: pytest.MonkeyPatch, mode: str = "affine", group_size: int = 64) -> GlassModel:
    """One layer of a shape at 4 bits in bfloat16, all weights zero, with global ranks."""
    small = {"vocab_size": 64, "sliding_window_pattern": 1}
    monkeypatch.setitem(shapes.SHAPES, name, shapes.SHAPES[name] | small)
    monkeypatch.setattr(discovery, "check", lambda block: ("", ""))  # that blocks are separable is tested elsewhere
    dense = shapes.build(name, layers=1)
    dense.set_dtype(mx.bfloat16)
    nn.quantize(dense, group_size=group_size, bits=4, mode=mode)
    dense.update(tree_map(lambda a: mx.zeros(a.shape, a.dtype), dense.parameters()))
    mx.eval(dense.parameters())  # equal nodes of a graph would be listed as one
    model = GlassModel(dense)
    ranks = [mx.random.permutation(block.size, key=mx.random.key(0)) + 1 for block in model.blocks]
    model.set_global_ranks({"impact": ranks, "activation": ranks})
    return model


def step(model: GlassModel, density: float) -> tuple[list[metal.Node], list[dict[str, nn.Module]]]:
    """The graph of a decode step after one token, and the compact projections."""
    cache = model.make_cache(density=density)
    model.select(cache)
    nodes = metal.graph(model.decode(mx.array([[1]]), cache))
    return nodes, model.session(cache).compact.projections


def dense_step(model: GlassModel) -> list[metal.Node]:
    return metal.graph(model.dense(mx.array([[1]]), cache=model.make_cache()[:-1]))


def kernels(nodes: list[metal.Node]) -> Counter[str]:
    return Counter(node.name for node in nodes if node.name not in _NO_KERNEL)


def in_float32(nodes: list[metal.Node]) -> Counter[str]:
    """Primitives that compute more than a few numbers in float32."""
    return Counter(n.name for n in nodes if any(o.dtype == mx.float32 and prod(o.shape) > 256 for o in n.outputs))


def is_row_contiguous(array: mx.array) -> bool:
    if array.dtype == mx.bfloat16:  # the buffer protocol does not know it
        array = mx.view(array, mx.uint16)
    return memoryview(array).c_contiguous


def misses_the_fast_kernel(node: metal.Node) -> bool:
    """Whether a quantised matrix-vector product is none for ``qmv_fast`` (mlx/backend/metal/quantized.cpp qmv)."""
    x, weight = node.inputs[:2]
    rows, k, n, bits = prod(x.shape[:-1]), x.shape[-1], weight.shape[0], node.arguments[1]
    assert rows == 1
    return k % (256 if bits in (6, 8) else 512) != 0 or n % 8 != 0


@pytest.mark.few(3)
@pytest.mark.parametrize("name", SHAPES)
def test_compact_decoding(name, monkeypatch):
    model = fake(name, monkeypatch)
    dense = dense_step(model)
    for density in DENSITIES:
        sparse, compact = step(model, density)
        for projections in compact:
            for projection in projections.values():
                assert all(is_row_contiguous(array) for _, array in tree_flatten(projection.parameters()))
        assert not in_float32(sparse) - in_float32(dense)
        assert not kernels(sparse) - kernels(dense)
        products = [node for node in sparse if node.name == "QuantizedMatmul"]
        missed = [node for node in products if misses_the_fast_kernel(node)]
        assert not missed


def test_answers_for_dropped_neurons_cost_two_launches(monkeypatch):
    """And nothing of theirs is in float32, nor copied at every step."""
    model = fake("llama-3.2-1b", monkeypatch)
    (block,) = model.blocks
    shapes_ = ((block.input_size,), (block.size,), (block.input_size, 63), (63, block.size))
    model.set_global_ranks(model.global_ranks, responses=[Response(*map(mx.zeros, shapes_))])
    dense, (sparse, _) = dense_step(model), step(model, 0.5)
    assert kernels(sparse) - kernels(dense) == {"AddMM": 2}
    assert not in_float32(sparse) - in_float32(dense)
    assert all(is_row_contiguous(a) for a in model.responses[0].reader(block.dtype))


def test_a_whole_output_projection_costs_two_launches(monkeypatch):
    """Groups of 32 cannot be cut: hidden values are spread out for the projection (``slicing.ScatterLinear``)."""
    model = fake("llama-3.2-1b", monkeypatch, "mxfp4", 32)
    sparse, _ = step(model, 0.5)
    assert kernels(sparse) - kernels(dense_step(model)) == {"Gather": 1, "Select": 1}


def test_tokens_wait_for_the_host_as_often_as_in_mlx_lm(tiny):
    """Between two tokens: one evaluation that is started and one token that is read, as in mlx-lm's own loop."""

    def calls(generate, model, **options) -> list[list[str]]:
        found = []
        with metal.recording() as evaluations:
            for _ in generate(model, tiny[1], [5, 6, 7, 8], max_tokens=8, **options):
                found.append([evaluation.call for evaluation in evaluations])
                evaluations.clear()
        return found[2:]  # the second token waits for the choice of neurons

    dense = calls(mlx_lm_stream_generate, tiny[0].dense)
    assert calls(stream_generate, tiny[0]) == dense
    assert dense[1] == ["async_eval", "item"]


@pytest.mark.parametrize(
    ("k", "n", "bits", "missed"),
    [(512, 8, 4, False), (256, 8, 4, True), (256, 8, 8, False), (512, 12, 4, True), (128, 8, 6, True)],
)
def test_the_fast_kernel(k, n, bits, missed):
    weight = mx.quantize(mx.zeros((n, k)), group_size=32, bits=bits)
    product = mx.quantized_matmul(mx.zeros((1, k)), *weight, group_size=32, bits=bits)
    assert misses_the_fast_kernel(metal.graph(product)[-1]) == missed
