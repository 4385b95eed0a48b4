"""Find the feed-forward blocks of any mlx-lm model, and check that they work on some of their neurons.

Nearly every family writes its FFN as projections around an elementwise activation, so a block works on any subset of
its neurons once its projections are sliced. No family needs code of its own here, only its projection names in
``PROJECTIONS``. What the names promise is checked on each distinct kind of block (``check``) before it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..core.ranking import kept_count, rank, select
from ..core.slicing import SLICEABLE, in_float32, input_size, plain_class, slice_experts
from ..errors import GlassError
from .blocks import HALVES, INTERLEAVED, Block, Projection, hooked, run_with

logger = logging.getLogger("glass_mlx")

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

# What computes routed experts, all of a layer at once.
ROUTED = (SwitchLinear, QuantizedSwitchLinear)
# Experts that a check tries, and how many of them each of its tokens is sent to.
_TRIED, _SENT = 4, 2

# Modules below these are no decoder FFNs of their own: an expert by itself is not run by every token; vision and audio
# towers do not run while decoding.
_LONE = "experts"
_SKIPPED_PREFIXES = ("vision", "visual", "audio")


def find_blocks(model: nn.Module) -> tuple[list[Block], dict[str, str]]:
    """The FFN blocks of a model that can decode on a subset of their neurons: dense ones and routed experts.

    Args:
        model (nn.Module): a loaded mlx-lm model.

    Returns:
        tuple: the blocks in the model's order, and the blocks that must stay dense: {path: reason}.

    Raises:
        GlassError: there is none.
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
                    block.let_go()
                    dense[path] = reason
                else:
                    block.fused = layout
                    blocks.append(block)
                break
    for block in blocks:
        dense.pop(block.path, None)
    if not blocks:
        name = getattr(model, "model_type", type(model).__name__)
        none = "none of its modules has the projections of an FFN: an SSM, or not a text model"
        why = "; ".join(summarise(dense)) or none
        raise GlassError(f"{name} has no FFN block that GLASS can sparsify ({why}). Use it with mlx-lm directly.")
    _count_active(model, [block for block in blocks if block.experts])
    return blocks, dense


def _count_active(model: nn.Module, blocks: list[Block]) -> None:
    """Find how many of its experts each block of routed experts sends a token to: in a call that is never evaluated."""
    for block in blocks:
        block.active = block.experts  # if the call fails, or does not come by

    def observe(i: int, h: mx.array, experts: mx.array) -> None:
        blocks[i].active = experts.size

    if blocks:
        try:
            run_with(hooked(blocks, observe), model, mx.zeros((1, 1), mx.int32))
        except Exception as e:  # the family's own code; what counts depends on it, not whether it works
            logger.warning("not known how many experts a token is sent to (%s: %s)", type(e).__name__, e)


def signature(model: nn.Module, blocks: list[Block]) -> tuple:
    """Which projections and weights the blocks have now, by identity: it changes when any of them is replaced."""
    found: list[Any] = []
    for block in blocks:
        module = _at(model, block.path)
        for name in block.names:
            projection = module.get(name) if isinstance(module, nn.Module) else None
            found.append((id(projection), id(projection.get("weight")) if isinstance(projection, dict) else 0))
    return tuple(found)


def vocabulary_size(model: nn.Module) -> int:
    """Token ids are below this: the rows of the largest embedding."""
    tables = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.QuantizedEmbedding))]
    return max((table.weight.shape[0] for table in tables), default=2**31)


def _at(model: nn.Module, path: str) -> Any:
    """The module at a path; None if there is none any more."""
    found: Any = model
    for part in path.split(".") if path else ():
        try:
            found = found[int(part)] if isinstance(found, list) else found.get(part)
        except (AttributeError, IndexError, ValueError):
            return None
    return found


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
        try:
            reason = _compare(_precise(block, layout))
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


def _run(module: nn.Module, probe: tuple[mx.array, ...], how: str) -> mx.array:
    """What a block makes of the probe. Only its Python code may refuse; what MLX raises on evaluation passes."""
    try:
        y = module(*probe)
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
    return any(p.startswith(_SKIPPED_PREFIXES) for p in parts)


def _structure(path: str, module: nn.Module, inputs: tuple[str, ...], output: str) -> Block | str:
    """A block if the shapes fit, else why not ("" where the names mean something else altogether)."""
    projections = [module[name] for name in (*inputs, output)]
    for p in projections:
        if plain_class(p) not in (*SLICEABLE, *ROUTED):
            if hasattr(p, "linear") or hasattr(p, "fuse"):
                return "has an adapter: fuse it into the model first (mlx_lm.fuse)"
            return f"{type(p).__name__} projections cannot be sliced"
    axes = {p.weight.shape[:-2] for p in projections}  # (E,) or, if they are dense, ()
    if len(axes) > 1:
        return ""
    (axis,) = axes
    experts = axis[0] if axis else 0
    if not experts and _LONE in path.split("."):
        return "one expert by itself, which few tokens are sent to"
    width, widths = input_size(projections[-1]), {p.weight.shape[-2] for p in projections[:-1]}
    size = width * (experts or 1)
    if widths == {width}:
        return Block(path, module, inputs, output, size, experts=experts)
    if widths == {2 * width} and len(inputs) == 1:
        return Block(path, module, inputs, output, size, HALVES, experts)
    return ""


def _precise(block: Block, layout: str) -> Block:
    """A copy of a block that computes in float32: MLX's CPU backend sums quantised products in their 16-bit type, which
    is too coarse to compare by. Of routed experts a few, and the backend has no others than in float32."""
    projections = {name: block.module[name] for name in block.names}
    if block.experts:
        projections = {name: slice_experts(p, slice(_TRIED)) for name, p in projections.items()}
    kind = plain_class(block.module)
    module = kind.__new__(kind)
    module.__dict__.update(block.module.__dict__)
    everything, experts = bool(block.experts), min(block.experts, _TRIED)
    dict.update(module, {**block.module, **{name: in_float32(p, everything) for name, p in projections.items()}})
    return Block(block.path, module, block.inputs, block.output, (experts or 1) * block.width, layout, experts)


def _compare(block: Block) -> str:
    module, n = block.module, block.width
    x = mx.random.normal((1, 4, block.input_size), key=mx.random.key(0)).astype(_float_dtype(module[block.inputs[0]]))
    routing = [mx.arange(4 * _SENT).reshape(1, 4, _SENT).astype(mx.uint32) % block.experts] if block.experts else []
    seen: list[tuple[mx.array, ...]] = []

    def run(replacements: dict[int, Projection], how: str) -> mx.array:
        return run_with(replacements, _run, module, (x, *routing), how)

    dense = run(hooked([block], lambda _, *hidden: seen.append(hidden)), "on its own")
    if len(seen) != 1 or seen[0][0].shape[-1] != n:
        return "its output projection does not see the neurons once"
    scores = rank(block.by_expert(block.energy(seen[0][0], None, *seen[0][1:])))
    half = block.joined(select(scores, kept_count(0.5, n, block.group), block.group))
    mask = mx.zeros((block.size,), x.dtype).at[half].add(1)
    masked = run(hooked([block], lambda _, h, *of: h * block.beside(mask, *of)), "with hidden values set to zero")
    sliced = run(block.replacing(block.compact(half)), "on half of its neurons")
    permuted = block.compact(block.joined(_shuffled(scores, block.group)))
    permuted = run(block.replacing(permuted), "with its neurons in another order")
    if not _close(permuted, dense):
        return "its output depends on the order of its neurons"
    if not _close(sliced, masked):
        return "its neurons are not independent of one another"
    return ""


def _shuffled(scores: mx.array, group: int) -> mx.array:
    """All neurons [E, F / E] in another order: by their scores, or the groups of a quantised projection backwards and
    the neurons of each by their scores."""
    if group == 1:
        return mx.argsort(scores, axis=-1).astype(mx.int32)
    within = mx.argsort(scores.reshape(len(scores), -1, group), axis=-1)
    groups = mx.arange(within.shape[1])[:, None] * group
    return (within + groups)[:, ::-1].reshape(scores.shape).astype(mx.int32)


def _float_dtype(linear: nn.Module) -> mx.Dtype:
    dtype = linear.weight.dtype
    return dtype if mx.issubdtype(dtype, mx.floating) else mx.float32


def _close(a: mx.array, b: mx.array) -> bool:
    tolerance = 1e-3 if a.dtype == mx.float32 else 3e-2
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return bool(mx.max(mx.abs(a - b)) <= tolerance * mx.max(mx.abs(b)))


def summarise(left_dense: dict[str, str]) -> list[str]:
    """One line for each reason why blocks stay dense."""
    reasons: dict[str, list[str]] = {}
    for path, reason in left_dense.items():
        reasons.setdefault(reason, []).append(path)
    return [
        f"left dense: {paths[0]}{f' and {len(paths) - 1} more' if paths[1:] else ''} ({reason})"
        for reason, paths in reasons.items()
    ]
