"""Tests that what Metal refuses is caught, by every way to evaluate, and that nothing else is."""

from __future__ import annotations

import metal
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

INDICES = mx.array([1, 0])
BITS = mx.array([True, False])


@pytest.fixture(autouse=True)
def rules():
    """On in these tests even with --no-metal-rules."""
    with metal.enforce():
        yield


def assigned(dtype: mx.Dtype) -> mx.array:
    array = mx.zeros((4,), dtype)
    array[INDICES] = mx.ones((2,), dtype)
    return array


def along_axis(dtype: mx.Dtype) -> mx.array:
    return mx.put_along_axis(mx.zeros((4,), dtype), INDICES, mx.ones((2,), dtype), axis=0)


def quantised(group_size: int, bits: int, mode: str) -> mx.array:
    """A product by weights whose scales fit no kernel of the mode."""
    weight = mx.zeros((8, 256 * bits // 32), mx.uint32)
    scales = mx.zeros((8, 256 // group_size), mx.uint8)
    return mx.quantized_matmul(mx.zeros((1, 256)), weight, scales, group_size=group_size, bits=bits, mode=mode)


PLANTED = {
    "float64": (lambda: mx.zeros((4,)).astype(mx.float64) + 1, "float64"),
    "put_along_axis of int64": (lambda: along_axis(mx.int64), "8-byte dtypes along an axis"),
    "put_along_axis of uint64": (lambda: along_axis(mx.uint64), "8-byte dtypes along an axis"),
    "item assignment of int64": (lambda: assigned(mx.int64), "8-byte dtypes"),
    ".at[].add of int64": (lambda: mx.zeros((4,), mx.int64).at[INDICES].add(1), "8-byte dtypes"),
    ".at[].maximum of complex64": (lambda: mx.zeros((4,), mx.complex64).at[INDICES].maximum(1), "8-byte dtypes"),
    "a scatter within mx.diag": (lambda: mx.diag(mx.arange(3, dtype=mx.int64)), "8-byte dtypes"),
    "12 index arrays": (lambda: mx.zeros([2] * 12)[tuple([INDICES] * 12)], "index arrays"),
    "sorting booleans": (lambda: mx.argsort(BITS), "sorting of booleans"),
    "argmax of complex64": (lambda: mx.argmax(mx.zeros((4,), mx.complex64)), "complex"),
    "inverse": (lambda: mx.linalg.inv(mx.eye(3), stream=mx.cpu), "linear algebra"),
    "svd": (lambda: mx.linalg.svd(mx.eye(3), stream=mx.cpu)[1], "linear algebra"),
    "qr": (lambda: mx.linalg.qr(mx.eye(3), stream=mx.cpu)[0], "linear algebra"),
    "cholesky": (lambda: mx.linalg.cholesky(mx.eye(3), stream=mx.cpu), "linear algebra"),
    "eigh": (lambda: mx.linalg.eigh(mx.eye(3), stream=mx.cpu)[0], "linear algebra"),
    "lu": (lambda: mx.linalg.lu(mx.eye(3), stream=mx.cpu)[0], "linear algebra"),
    "mxfp4 in groups of 64": (lambda: quantised(64, 4, "mxfp4"), "quantisation mode"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_violation_is_caught(planted):
    make, rule = PLANTED[planted]
    for _ in range(2):  # what failed once is not taken for known
        with pytest.raises(metal.MetalError, match=rule):
            mx.eval({"nested": [make()]})


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_violation_is_caught_in_a_model(planted, tiny):
    """Where all else is known, and so is a sort or a scatter that Metal can do."""
    make, rule = PLANTED[planted]
    dense, prompt = tiny[0].dense, mx.array([[5, 6, 7]])
    for _ in range(2):
        mx.eval(dense(prompt), mx.argsort(dense(prompt)))
        mx.eval(dense(prompt), along_axis(mx.int32), assigned(mx.int32), mx.argmax(dense(prompt)))
    with pytest.raises(metal.MetalError, match=rule):
        mx.eval(dense(prompt), make())


def test_a_violation_late_in_a_loop_is_caught():
    """Of graphs that the same line evaluates again and again, every eighth is looked at."""
    with pytest.raises(metal.MetalError, match="8-byte dtypes"):
        for i in range(28):
            mx.eval(along_axis(mx.int32 if i < 20 else mx.int64).astype(mx.int32))


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda a: a.tolist(),
        str,
        lambda a: f"{a}",
        lambda a: np.array(a),
        lambda a: np.asarray(a),
        lambda a: bool(a[0]),
        lambda a: int(a[0]),
        lambda a: a[0].item(),
        lambda a: range(a[0]),
        lambda a: mx.async_eval(a * 2),
        lambda a: mx.eval(nn.relu(a)),
        lambda a: mx.save_safetensors("never.safetensors", {"a": a}),
    ],
)
def test_every_way_to_evaluate_is_watched(evaluate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(metal.MetalError):
        evaluate(along_axis(mx.int64))
    assert not list(tmp_path.iterdir())


def test_calls_whose_graph_is_another_on_a_cpu(tmp_path):
    path = str(tmp_path / "a.safetensors")
    mx.save_safetensors(path, {"a": mx.zeros((2,))})
    assert mx.load(path)["a"].tolist() == [0, 0]
    with pytest.raises(metal.MetalError, match="loading"):
        mx.load(path, stream=mx.default_stream(mx.default_device()))
    weight, scales, biases = mx.quantize(mx.zeros((8, 256)))
    with pytest.raises(metal.MetalError, match="biases"):
        mx.dequantize(weight, scales, biases.astype(mx.float16))
    with pytest.raises(metal.MetalError, match="groups of 256"):
        mx.dequantize(weight, scales[:, :1], biases[:, :1], group_size=256, bits=4)


def test_what_metal_does_is_let_through():
    ranks = mx.argsort(mx.arange(5, dtype=mx.int64) * -1)
    assert along_axis(mx.int32).tolist() == [1, 1, 0, 0] and assigned(mx.bool_).tolist() == [True, True, False, False]
    assert mx.sum(ranks.astype(mx.int64) // 2).item() == 4 and ranks[INDICES].tolist() == [3, 4]
    assert mx.zeros((4,), mx.complex64).at[INDICES].add(1).tolist() == [1, 1, 0, 0]


def test_graphs_are_listed_with_dtypes_and_arguments():
    nodes = metal.graph({"a": [along_axis(mx.int32)]})
    assert nodes[-1].name == "ScatterAxis" and nodes[-1].outputs[0].shape == (4,)
    assert nodes[-1].dtypes == (mx.int32, mx.int32, mx.int32, mx.int32)


def test_what_is_evaluated_is_recorded():
    with metal.recording() as evaluations:
        a = mx.ones((2,)) + 1
        mx.async_eval(a)
        a.tolist()
    assert [(e.call, [n.name for n in e.nodes][-1:]) for e in evaluations] == [("async_eval", ["Add"]), ("tolist", [])]
