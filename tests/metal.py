"""Metal's rules on any backend: what MLX's GPU backend refuses fails here, by name, before it is evaluated.

MLX is lazy, so the graph that is about to be evaluated can be read first, with what mlx-lm and MLX itself put into it.
``enforce`` stands before every evaluation that Python code can ask for (``mx.eval``, ``.item()``, ``np.array(...)``,
``mx.save...``), lists the graph's primitives with ``mx.export_function`` and holds each against ``RULES``. A graph is
listed only if something in it looks new (``_pieces``): ``mx.export_to_dot`` takes a tenth of the time. Nor is every
graph drawn that a loop makes: of those that the same lines of code evaluate within a test, the first two and every
eighth are.

Not seen: what a subprocess evaluates; arrays that reach C code through the buffer protocol alone; and graphs of
compiled functions, which is why MLX's compiler is off while the rules are on.
"""

from __future__ import annotations

import io
import sys
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import mlx.core as mx
import numpy as np

_EVALUATING = ("item", "tolist", "__array__", "__bool__", "__int__", "__float__", "__index__", "__repr__", "__format__")
_SAVING = ("save", "savez", "savez_compressed", "save_safetensors", "save_gguf")


class MetalError(RuntimeError):
    """The graph has an operation that MLX's Metal backend refuses."""


@dataclass(frozen=True)
class Operand:
    """An array of a graph: a name of the listing's own, its shape and its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype


@dataclass(frozen=True)
class Node:
    """One primitive of a graph, by MLX's own name for it, with the arguments that MLX exports of it."""

    name: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    arguments: tuple = ()

    @property
    def dtypes(self) -> tuple[mx.Dtype, ...]:
        return tuple(operand.dtype for operand in (*self.inputs, *self.outputs))


def graph(*trees: Any) -> list[Node]:
    """The primitives that evaluating these (nested) arrays would run, in order.

    Raises:
        ValueError: MLX cannot export one of them.
    """
    listed: list[dict] = []
    mx.export_function(listed.append, lambda: _arrays(trees))
    return [_node(entry) for entry in listed if entry["type"] == "primitive"]


def _node(entry: dict) -> Node:
    inputs, outputs = ([Operand(*operand) for operand in entry[side]] for side in ("inputs", "outputs"))
    return Node(entry["name"], tuple(inputs), tuple(outputs), tuple(entry["arguments"]))


def _arrays(tree: Any) -> list[mx.array]:
    """The leaves that are arrays, as ``tree_flatten`` finds them, which takes long in a list of numbers."""
    if isinstance(tree, mx.array):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    return [array for branch in tree if not isinstance(branch, (int, float, str)) for array in _arrays(branch)]


@dataclass(frozen=True)
class Rule:
    """What Metal refuses.

    Attributes:
        name: of the rule.
        source: the file of MLX, under mlx/, and the function that throws.
        primitives: those that it is about.
        broken: whether one of them breaks it.
    """

    name: str
    source: str
    primitives: tuple[str, ...]
    broken: Callable[[Node], bool]


def _scatters_8_bytes(sum_code: int) -> Callable[[Node], bool]:
    def broken(node: Node) -> bool:
        dtype, sums = node.outputs[0].dtype, node.arguments[0] == sum_code
        return dtype in (mx.int64, mx.uint64) or (dtype == mx.complex64 and not sums)

    return broken


_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")  # by MLX's own numbers
_FLOAT_MODES = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}


def _has_kernels(group_size: int, bits: int, mode: int | str) -> bool:
    mode = mode if isinstance(mode, str) else _MODES[mode]
    if mode == "affine":
        return group_size in (32, 64, 128) and bits in (1, 2, 3, 4, 5, 6, 8)
    return (group_size, bits) == _FLOAT_MODES[mode]


# Read in MLX's source (0.32.2) and in the kernels and messages of the macOS wheel (mlx-metal 0.32.4). What has no rule
# has kernels there for every dtype but float64: arithmetic, reductions, scans, gathers and selects, int64 too.
RULES: tuple[Rule, ...] = (
    Rule(
        "no scatter of 8-byte dtypes along an axis",
        "backend/metal/indexing.cpp ScatterAxis::eval_gpu",
        ("ScatterAxis",),
        _scatters_8_bytes(sum_code=0),
    ),
    Rule(
        "no scatter of 8-byte dtypes",
        "ops.cpp scatter; backend/metal/indexing.cpp Scatter::eval_gpu",
        ("Scatter",),
        _scatters_8_bytes(sum_code=2),
    ),
    Rule(  # the check is for more than 20; from 12 on the kernel would need more buffers than Metal binds
        "no more than 11 index arrays",
        "backend/metal/indexing.cpp Gather::eval_gpu, Scatter::eval_gpu",
        ("Gather", "Scatter"),
        lambda node: len(node.inputs) > {"Gather": 12, "Scatter": 13}[node.name],
    ),
    Rule(
        "no sorting of booleans",
        "backend/metal/kernels/sort.metal",
        ("Sort", "ArgSort", "Partition", "ArgPartition"),
        lambda node: node.inputs[0].dtype == mx.bool_,
    ),
    Rule(
        "no complex numbers here",
        "backend/metal/kernels/arg_reduce.metal, arange.metal, unary.metal",
        ("ArgReduce", "Arange", "ArcCosh", "ArcSinh", "ArcTanh"),
        lambda node: mx.complex64 in node.dtypes,
    ),
    Rule(
        "no other parameters of a quantisation mode",
        "backend/metal/kernels/quantized.metal, fp_quantized.metal",
        ("QuantizedMatmul", "GatherQMM"),
        lambda node: not _has_kernels(*node.arguments[:3]),
    ),
    Rule(
        "no linear algebra",
        "linalg.cpp check_cpu_stream",
        ("QRF", "SVD", "Inverse", "Cholesky", "Eig", "Eigh", "LUF"),
        lambda node: True,
    ),
)
_FLOAT64 = Rule("no float64", "array.cpp array", (), lambda node: mx.float64 in node.dtypes)
_RULES_OF = {name: [rule for rule in RULES if name in rule.primitives] for rule in RULES for name in rule.primitives}


@dataclass
class Evaluation:
    """An evaluation that was asked for: by which call, and the primitives that were still to run."""

    call: str
    nodes: list[Node] = field(default_factory=list)


_SMALL = 8000  # characters of what ``mx.export_to_dot`` writes: some 60 primitives
# Primitives whose rules are about what is done before; and those whose rules are about the number of inputs, which
# shows, or are held against them at the call.
_BY_INPUT = {"ArgReduce", "Sort", "ArgSort", "Partition", "ArgPartition"}
_BY_LOOKS = {"Gather", "Arange", "QuantizedMatmul", "GatherQMM"}
_passed: set[Hashable] = set()
_asked: Counter[Hashable] = Counter()
_recordings: list[tuple[int, list[Evaluation]]] = []


def check(*trees: Any) -> None:
    """Hold the graph of these (nested) arrays against the rules.

    Raises:
        MetalError: it breaks one.
    """
    arrays = _arrays(trees)
    if not arrays or _often(arrays):
        return
    drawn = io.StringIO()
    mx.export_to_dot(drawn, *arrays)
    if "label" not in (written := drawn.getvalue()) or (whole := _whole(written, arrays)) in _passed:
        return
    pieces = _pieces(written, arrays)
    if not pieces <= _passed:
        _list(arrays)
    _passed.update(pieces, [whole])


def forget() -> None:
    """A new test: whatever it evaluates is drawn the first times."""
    _asked.clear()


def _often(arrays: list[mx.array]) -> bool:
    """Whether such arrays were asked for by these lines of code, and their callers, so often that this can pass."""
    frame, lines = sys._getframe(4), []  # of the one who called what ``enforce`` has put in place
    while frame is not None and not frame.f_code.co_name.startswith("pytest_"):
        lines += id(frame.f_code), frame.f_lasti  # the hash of a code object takes long
        frame = frame.f_back
    asked = hash((*lines, *((a.shape, a.dtype) for a in arrays)))
    _asked[asked] += 1
    return _asked[asked] > 2 and _asked[asked] % 8 > 0


def _list(arrays: list[mx.array]) -> None:
    try:
        mx.export_function(_hold, lambda: arrays)
    except ValueError as e:  # a primitive that MLX does not export; what comes before it was held
        if "LUF" in str(e):
            _hold({"type": "primitive", "name": "LUF", "inputs": [], "outputs": [], "arguments": []})


def _hold(entry: dict) -> None:
    """Hold an entry of a listing against the rules."""
    if entry["type"] != "primitive":
        return
    rules = _RULES_OF.get(entry["name"], ())
    if any(dtype == mx.float64 for _, _, dtype in (*entry["inputs"], *entry["outputs"])):
        rules = (_FLOAT64, *rules)
    for rule in rules:
        if rule.broken(node := _node(entry)):
            raise MetalError(f"{rule.name} (mlx/{rule.source}): {_written(node)}")


def _whole(drawn: str, arrays: list[mx.array]) -> Hashable:
    """What graphs share that do the same to the same arrays, one by one, given what ``mx.export_to_dot`` writes."""
    edges = drawn.encode().translate(None, b"0123456789")  # without addresses
    return hash((edges, *((a.shape, a.dtype) for a in arrays)))


def _pieces(drawn: str, arrays: list[mx.array]) -> set[Hashable]:
    """What a graph is made of: if all of it was listed, in whatever graphs, there is nothing new in it.

    Of a large graph, such as models make: its primitives, each with the next and the number of arrays that they take
    and give, and before a sort more of them. No rule asks for a shape, or how often something is done, so longer texts
    and more layers are made of the same. With primitives whose rules ask for more, a large graph is one piece; so is a
    small one, such as tests of a single function make.
    """
    if len(drawn) < _SMALL:
        return {_whole(drawn, arrays)}
    dtypes = frozenset(a.dtype for a in arrays)
    head, *texts = drawn.split('label ="')
    names = [text[: text.index('"')] for text in texts]
    primitives = [(name, text.count("->")) for name, text in zip(names, texts)]
    pieces = {(*pair, dtypes) for pair in zip(primitives, primitives[1:])}
    if not _RULES_OF.keys() & set(names) <= _BY_INPUT | _BY_LOOKS:
        return {frozenset(pieces)}
    for i in (i for i, name in enumerate(names) if name in _BY_INPUT):
        evaluated = [head, *texts][i].count("source")  # of the arrays that are sorted: they are written before it
        pieces.add((*primitives[max(i - 4, 0) : i + 1], evaluated, dtypes))
    return pieces


def _written(node: Node) -> str:
    inputs, outputs = (
        ", ".join(f"{str(o.dtype).removeprefix('mlx.core.')}{list(o.shape)}" for o in operands)
        for operands in (node.inputs, node.outputs)
    )
    return f"{node.name}({inputs}) -> {outputs}"


@contextmanager
def recording() -> Iterator[list[Evaluation]]:
    """What this thread evaluates meanwhile; needs ``enforce``."""
    evaluations: list[Evaluation] = []
    entry = (threading.get_ident(), evaluations)
    _recordings.append(entry)
    try:
        yield evaluations
    finally:
        _recordings.remove(entry)


def _before(call: str, trees: Any) -> None:
    check(trees)
    for thread, evaluations in _recordings:
        if thread == threading.get_ident():
            arrays = _arrays(trees)
            evaluations.append(Evaluation(call, graph(arrays) if arrays else []))


@contextmanager
def enforce() -> Iterator[None]:
    """Check every graph before it is evaluated, and what no graph shows on another backend at the call."""
    if hasattr(mx.eval, "__wrapped__"):  # on already
        yield
        return
    own = {(owner, name): getattr(owner, name) for owner, name in _watched()}

    def checked(owner: Any, name: str) -> Callable:
        call = own[owner, name]

        @wraps(call)
        def checking(*args: Any, **kwargs: Any) -> Any:
            _before(name, [args, kwargs])
            return call(*args, **kwargs)

        return checking

    try:
        for owner, name in own:
            setattr(owner, name, checked(owner, name))
        with _calls_checked():
            yield
    finally:
        for (owner, name), call in own.items():
            setattr(owner, name, call)


def _watched() -> list[tuple[Any, str]]:
    """Everything in Python that evaluates, by its owner and name."""
    found = [(mx, name) for name in ("eval", "async_eval", *_SAVING) if hasattr(mx, name)]
    found += [(mx.array, name) for name in _EVALUATING if hasattr(mx.array, name)]
    return [*found, (np, "array"), (np, "asarray")]


@contextmanager
def _calls_checked() -> Iterator[None]:
    """Rules for calls whose graph is another on a CPU, or does not show their arguments in ``_pieces``."""
    own = {name: getattr(mx, name) for name in ("load", "dequantize", "quantized_matmul", "gather_qmm")}
    load, dequantize = own["load"], own["dequantize"]

    @wraps(load)
    def checked_load(*args: Any, stream: Any = None, **kwargs: Any) -> Any:
        if stream is not None and stream != mx.cpu:
            raise MetalError("no loading on a GPU stream (mlx/backend/metal/primitives.cpp Load::eval_gpu)")
        return load(*args, **kwargs)

    @wraps(dequantize)
    def checked_dequantize(w, scales, biases=None, group_size=None, bits=None, mode="affine", **kwargs: Any) -> Any:
        given = (group_size, bits) != (None, None)
        if given and not _has_kernels(group_size or 64, bits or 4, mode):
            raise MetalError(f"no dequantising of {mode} in groups of {group_size} at {bits} bits (quantized.metal)")
        if biases is not None and biases.dtype != scales.dtype:
            raise MetalError("no biases of another dtype than the scales (mlx/ops.cpp affine_dequantize)")
        return dequantize(w, scales, biases, group_size=group_size, bits=bits, mode=mode, **kwargs)

    mx.load, mx.dequantize = checked_load, checked_dequantize
    mx.quantized_matmul, mx.gather_qmm = map(_product_checked, (own["quantized_matmul"], own["gather_qmm"]))
    try:
        yield
    finally:
        for name, call in own.items():
            setattr(mx, name, call)


def _product_checked(call: Callable) -> Callable:
    """A product by quantised weights, whose parameters are given by name, as mlx and mlx-lm do."""

    @wraps(call)
    def checked(*args: Any, group_size=None, bits=None, mode="affine", **kwargs: Any) -> Any:
        given = (group_size, bits) != (None, None)
        if given and not _has_kernels(group_size or 64, bits or 4, mode):
            raise MetalError(f"no other parameters of a quantisation mode: {mode}, {bits} bits, groups of {group_size}")
        return call(*args, group_size=group_size, bits=bits, mode=mode, **kwargs)

    return checked
