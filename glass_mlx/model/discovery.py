"""Find the feed-forward blocks of any mlx-lm model, and check that they can do with some of their neurons."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from ..core.ranking import kept_count, rank, select
from ..core.slicing import SLICEABLE, in_float32
from .blocks import HALVES, INTERLEAVED, Block, Tap, swapped

# (input projections, output projection) by the names that mlx-lm's families give them, most specific first.
PROJECTIONS = (
    (("gate_proj", "up_proj"), "down_proj"),  # llama, mistral, qwen2, qwen3, gemma, cohere, ...
    (("gate_up_proj",), "down_proj"),  # phi3, glm, glm4, plamo2: fused [gate; up]
    (("up_proj",), "down_proj"),  # nemotron, apertus; phi3small: fused, interleaved
    (("w1", "w3"), "w2"),  # internlm2, lfm2
    (("w1", "v1"), "w2"),  # dbrx
    (("w1", "w2"), "c_proj"),  # qwen: w2 is the gate
    (("c_fc_0", "c_fc_1"), "c_proj"),  # exaone
    (("mlp_gate", "mlp_linear"), "mlp_resid"),  # talkie
    (("c_fc",), "c_proj"),  # gpt2, gpt_bigcode, starcoder2, nanochat
    (("fc1",), "fc2"),  # phi
    (("fc_in",), "fc_out"),  # gptj
    (("dense_h_to_4h",), "dense_4h_to_h"),  # gpt_neox
    (("ff_proj",), "ff_out"),  # olmo: fused, in the transformer block itself
    (("proj_1",), "proj_2"),  # openelm: fused
    (("input_linear",), "output_linear"),  # granitemoehybrid: fused
)


# Blocks below these are no dense decoder FFNs: routed experts see few tokens each and already read little
# memory per token; vision and audio towers do not run while decoding.
_SKIPPED_PARTS = {"experts", "switch_mlp"}


_SKIPPED_PREFIXES = ("vision", "visual", "audio")


def find_blocks(model: nn.Module) -> tuple[list[Block], dict[str, str]]:
    """The FFN blocks of a model that can decode on a subset of their neurons.

    Args:
        model (nn.Module): a loaded mlx-lm model.

    Returns:
        tuple: the blocks in the model's order, and the blocks that must stay dense: {path: reason}.
    """
    blocks, dense, seen, checked = [], {}, set(), {}
    for path, module in _walk(model):
        if id(module) in seen or _skipped(path):
            continue
        seen.add(id(module))
        for inputs, output in PROJECTIONS:
            if all(isinstance(module.get(name), nn.Module) for name in (*inputs, output)):
                block = _structure(path, module, inputs, output)
                if isinstance(block, str):
                    if block:
                        dense[path] = block
                    continue
                kind = block.kind()
                if kind not in checked:
                    checked[kind] = check(block)
                layout, reason = checked[kind]
                if reason:
                    dense[path] = reason
                else:
                    block.fused = layout
                    blocks.append(block)
                break
    for block in blocks:
        dense.pop(block.path, None)
    return blocks, dense


def check(block: Block) -> tuple[str, str]:
    """Try a block on random input: permuting its neurons must not change the output, and keeping half of them
    must give what the whole block gives with the other half's hidden values zeroed.

    The kept half is the one that fires most, so that a block that normalises over its neurons shows it.

    Returns:
        tuple[str, str]: the layout of a fused projection, and the reason for a failure ("" if it passed).

    Raises:
        RuntimeError, ValueError: MLX's backend cannot compute it. That says nothing of the block: it is no reason to
            leave it dense.
    """
    layouts = (HALVES, INTERLEAVED) if block.fused else ("",)
    reason = ""
    for layout in layouts:
        candidate = Block(block.path, block.module, block.inputs, block.output, block.size, layout)
        try:
            reason = _try(candidate)
        except _Refused as e:
            reason = str(e)
        except (RuntimeError, ValueError) as e:
            e.add_note(f"raised by MLX on {mx.default_device()} in the check of {block.path}")
            raise
        if not reason:
            return layout, ""
    return "", reason


class _Refused(Exception):
    """A family's own code does not take the probe."""


def _run(module: nn.Module, x: mx.array, how: str) -> mx.array:
    """What a block makes of the probe. Only its Python code may refuse; what MLX raises on evaluation passes."""
    try:
        y = module(x)
    except Exception as e:
        raise _Refused(f"cannot be run {how} ({type(e).__name__}: {(str(e).splitlines() or [''])[0][:80]})") from e
    mx.eval(y)
    return y


def _walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All sub-modules with their paths, parents first, in the order of the model's definition."""
    yield path, module
    stack = [(f"{path}.{k}" if path else k, v) for k, v in module.children().items()]
    stack.reverse()
    while stack:
        name, value = stack.pop()
        if isinstance(value, nn.Module):
            yield from _walk(value, name)
        elif isinstance(value, list):
            stack.extend((f"{name}.{i}", v) for i, v in reversed(list(enumerate(value))))
        elif isinstance(value, dict):
            stack.extend((f"{name}.{k}", v) for k, v in reversed(list(value.items())))


def _skipped(path: str) -> bool:
    parts = path.split(".")
    return any(p in _SKIPPED_PARTS or p.startswith(_SKIPPED_PREFIXES) for p in parts)


def _dims(linear: nn.Module) -> tuple[int, int]:
    """(input, output) dimensions of a linear layer, quantised or not."""
    out_dims, in_dims = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        in_dims = in_dims * 32 // linear.bits
    return in_dims, out_dims


def _structure(path: str, module: nn.Module, inputs: tuple[str, ...], output: str) -> Block | str:
    """A block if the shapes fit, else why not ("" where the names mean something else altogether)."""
    projections = [module[name] for name in (*inputs, output)]
    for p in projections:
        if type(p) not in SLICEABLE:
            if "Switch" in type(p).__name__:
                return ""  # routed experts
            if hasattr(p, "linear") or hasattr(p, "fuse"):
                return "has an adapter: fuse it into the model first (mlx_lm.fuse)"
            return f"{type(p).__name__} projections cannot be sliced"
    size = _dims(projections[-1])[0]
    widths = {_dims(p)[1] for p in projections[:-1]}
    if widths == {size}:
        return Block(path, module, inputs, output, size)
    if widths == {2 * size} and len(inputs) == 1:
        return Block(path, module, inputs, output, size, HALVES)
    return ""


def _try(block: Block) -> str:
    # MLX's CPU backend sums quantised products in their 16-bit type: too coarse to compare by.
    precise = {name: in_float32(block.module[name]) for name in (*block.inputs, block.output)}
    with swapped([block], [precise]):
        return _compare(block)


def _compare(block: Block) -> str:
    module, n = block.module, block.size
    projection = module[block.output]
    dtype = _float_dtype(module[block.inputs[0]])
    x = mx.random.normal((1, 4, _dims(module[block.inputs[0]])[0]), key=mx.random.key(0)).astype(dtype)
    hidden = []
    with swapped([block], [{block.output: Tap(projection, hidden.append)}]):
        dense = _run(module, x, "on its own")
    if len(hidden) != 1 or hidden[0].shape[-1] != n:
        return "its output projection does not see the neurons once"
    scores = rank(mx.sum(mx.abs(hidden[0].astype(mx.float32)), axis=(0, 1)))
    half = select(scores, kept_count(0.5, n, block.group), block.group)
    mask = mx.zeros((n,), dtype).at[half].add(1)
    with swapped([block], [{block.output: Tap(projection, lambda h: h * mask)}]):
        masked = _run(module, x, "with hidden values set to zero")
    with swapped([block], [block.compact(half)]):
        sliced = _run(module, x, "on half of its neurons")
    with swapped([block], [block.compact(_shuffled(scores, block.group))]):
        permuted = _run(module, x, "with its neurons in another order")
    if not _close(permuted, dense):
        return "its output depends on the order of its neurons"
    if not _close(sliced, masked):
        return "its neurons are not independent of one another"
    return ""


def _shuffled(scores: mx.array, group: int) -> mx.array:
    """All neurons in another order: by their scores, or the groups of a quantised projection backwards and the neurons
    of each by their scores."""
    if group == 1:
        return mx.argsort(scores).astype(mx.int32)
    within = mx.argsort(scores.reshape(-1, group), axis=1)
    groups = mx.arange(within.shape[0])[:, None] * group
    return (within + groups)[::-1].reshape(-1).astype(mx.int32)


def _float_dtype(linear: nn.Module) -> mx.Dtype:
    dtype = linear.weight.dtype
    return dtype if mx.issubdtype(dtype, mx.floating) else mx.float32


def _close(a: mx.array, b: mx.array) -> bool:
    tolerance = 1e-3 if a.dtype == mx.float32 else 3e-2
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return bool(mx.max(mx.abs(a - b)) <= tolerance * mx.max(mx.abs(b)))
