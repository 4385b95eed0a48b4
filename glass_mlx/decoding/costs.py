"""What decoding costs, predicted: the bytes that a step moves, and what more rows in a call cost on a class of device.

Decoding is limited by memory bandwidth, so a step takes as long as reading its bytes does. A call over several tokens
reads the same weights once, but Metal's quantised kernels take longer for more rows: ``DEVICES`` has what is known.
All figures of this module are predictions. What a machine was measured at comes from ``benchmark`` without ``--plan``.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from ..core.slicing import ScatterLinear, input_size, is_quantised
from ..errors import GlassError
from ..model.blocks import Block
from ..model.glass_model import GlassModel
from ..model.memory import model_bytes
from .draft_scheduler import MAX_DRAFT, tokens_per_pass

# Rows that Metal's quantised matrix product takes at once: it reads the weights again for the next ones.
_TILE = 32
# Densely read tokens in one call when a prompt, or the answer before it, is read.
_PREFILL = 512


@dataclass(frozen=True)
class DeviceClass:
    """A class of device, by published measurements of others.

    Attributes:
        name: as people call it.
        bandwidth: of its memory in bytes per second, as Apple states it.
        rows: by number of rows, the time of a 4-bit product with a large matrix, relative to one row.
        source: where the times are from; issues and pull requests of ml-explore/mlx.
    """

    name: str
    bandwidth: float
    rows: dict[int, float]
    source: str

    def cost(self, rows: int) -> float:
        """The time of a call over this many rows, relative to one row: what was measured, or the line between; above
        a tile, as many tiles."""
        tiles = -(-rows // _TILE)
        return tiles * float(np.interp(min(rows, _TILE), list(self.rows), list(self.rows.values())))


DEVICES = (
    DeviceClass("M4 Pro", 273e9, {1: 1, 2: 1.03, 3: 1.22, 4: 1.47, 6: 2.07, 8: 2.69, 10: 4.5, 32: 4.5}, "#3839, #3852"),
    DeviceClass("M3 Max", 400e9, {1: 1, 2: 1, 4: 1.28, 6: 2.04, 8: 2.5, 9: 3.14, 10: 3.94, 32: 3.98}, "#3863"),
    DeviceClass("M3 Ultra", 819e9, {1: 1, 2: 1.83, 4: 3.26, 7: 5.28, 8: 6.12, 16: 6.32, 32: 6.32}, "#4265"),
)


@dataclass(frozen=True)
class LinkClass:
    """What connects machines that share a model, by published measurements of others.

    Attributes:
        name: as MLX calls the backend, and what it runs on.
        seconds: that adding up one token's hidden vectors takes, up to 16 KB: latency, nearly all of it.
        source: where that is from.
    """

    name: str
    seconds: float
    source: str


LINKS = (
    LinkClass("ring, TCP over Thunderbolt", 300e-6, "jeffgeerling.com, 2025: 300 µs, less than 50 µs with RDMA"),
    LinkClass("JACCL, RDMA over Thunderbolt 5", 30e-6, "jundot/omlx#3118: 27 to 31 µs between two Macs"),
)

# What each of n processes sends of what goes round in MLX's ring, by the operation, in parts of its size.
_SENT = {"AllReduce": lambda n: 2 * (n - 1) / n, "AllGather": lambda n: n - 1, "Send": lambda n: 1}


@dataclass(frozen=True)
class StepCosts:
    """Bytes that decoding moves at a density.

    Attributes:
        dense: weights that a dense step reads: of routed experts those that one token is sent to.
        sparse: weights that a sparse step reads, with the answers for the dropped neurons.
        cache: keys, values and states that a step reads.
        compacting: read and written when compact weights are made.
        answering: output projections that are read to make the answers.
        answer_rows: for how many rows.
        routed: of ``dense``, the weights of routed experts.
        share: what part of all routed experts' weights that is.
        answers: of ``sparse``, the answers for the dropped neurons.
    """

    dense: int
    sparse: int
    cache: int
    compacting: int
    answering: int
    answer_rows: int
    routed: int = 0
    share: float = 1.0
    answers: int = 0

    def dense_step(self) -> int:
        return self.dense + self.cache

    def sparse_step(self) -> int:
        return self.sparse + self.cache

    # The others in as many bytes as take as long.

    def dense_call(self, rows: int, device: DeviceClass) -> float:
        """A dense call over several tokens. They share routed experts as tokens would that choose independently."""
        reached = 1 - (1 - self.share) ** rows  # part of the experts
        each = max(1, round(rows * self.share / reached))  # tokens for each of them
        routed = self.routed * reached / self.share
        return device.cost(rows) * (self.dense - self.routed) + device.cost(each) * routed + self.cache

    def choice(self, device: DeviceClass) -> float:
        """Choosing the neurons and making their weights and the answers for the others."""
        return self.compacting + device.cost(self.answer_rows) * self.answering if self.compacting else 0

    def verified(self, drafted: int, acceptance: float, device: DeviceClass) -> float:
        """Verified decoding, for each token that it emits."""
        passed = drafted * self.sparse_step() + self.dense_call(drafted + 1, device)
        return passed / tokens_per_pass(drafted, acceptance)


def step_costs(model: GlassModel, density: float, context: int, experts: str | None = None) -> StepCosts:
    """The costs of a model at a density, with ``context`` tokens in its cache. Its weights need not be evaluated.
    Routed experts are as ``experts`` says, or the model's configuration."""
    of_experts = [block for block in model.blocks if block.experts]
    everything = sum(block.nbytes for block in of_experts)
    routed = sum(_read(block, block.module[name]) for block in of_experts for name in block.names)
    dense = model_bytes(model.dense) - unread_embedding(model.dense) - everything + routed
    share = routed / everything if everything else 1.0
    cache = cache_bytes(model, context)
    if density == 1:
        return StepCosts(dense, dense, cache, 0, 0, 0, routed, share)
    sparse, compacting, answering, rank, answers = dense, 0, 0, 0, 0
    responses = model.responses or [None] * len(model.blocks)
    for block, k, response in zip(model.blocks, model.kept_counts(density, experts=experts), responses):
        if k == block.size:
            continue
        compact = block.compact(block.first(k))
        sparse += sum(_read(block, compact[name]) - _read(block, block.module[name]) for name in block.names)
        compacting += _moved(block, compact)
        if model.config.compensation and (response is not None or not block.experts):
            own = 0 if response is None else response.rank
            answers += _answer_bytes(block, own)
            answering += model_bytes(block.module[block.output])
            rank = max(rank, own)
    return StepCosts(dense, sparse + answers, cache, compacting, answering, rank + 1, routed, share, answers)


def _answer_bytes(block: Block, rank: int) -> int:
    """What a step reads to answer for a block's dropped neurons (``model/dropped.py``)."""
    reader = (block.input_size + 1) * (rank + 1) if rank else 0
    return (block.active * block.output_size * (rank + 1) + reader) * block.dtype.size


def _read(block: Block, projection: nn.Module) -> int:
    """Bytes that a step reads of a block's projection, whole or compact: of routed experts those that are active."""
    held = model_bytes(projection.projection if isinstance(projection, ScatterLinear) else projection)
    return held * block.active // (block.experts or 1)


def _moved(block: Block, compact: dict[str, nn.Module]) -> int:
    """Bytes read and written to make a block's compact projections, by the operations of ``core/slicing.py``: rows are
    copied; columns are gathered, of packed weights as octets, which are read again to pack them."""
    moved = sum(2 * model_bytes(compact[name]) for name in block.inputs)
    whole, output = block.module[block.output], compact[block.output]
    if isinstance(output, ScatterLinear):
        return moved
    moved += model_bytes(whole) + model_bytes(output)
    if is_quantised(whole):
        gathers = 1 if 8 % whole.bits == 0 else 2
        moved += 2 * gathers * math.prod(output.weight.shape[:-1]) * input_size(output)
    return moved


def unread_embedding(dense: nn.Module) -> int:
    """Bytes of the token embedding if the model has an output head of its own; else 0."""
    leaves = [leaf for _, leaf in tree_flatten(dense.leaf_modules(), is_leaf=nn.Module.is_module)]
    tables = [m for m in leaves if isinstance(m, (nn.Embedding, nn.QuantizedEmbedding))]
    heads = {m.weight.shape[0] for m in leaves if isinstance(m, (nn.Linear, nn.QuantizedLinear))}
    return sum(model_bytes(table) for table in tables if table.weight.shape[0] in heads)


def cache_bytes(model: GlassModel, context: int) -> int:
    """Bytes of a prompt cache that ``context`` tokens fill, drawn on from one token. Nothing is evaluated."""
    cache = make_prompt_cache(model.dense)
    model.dense(mx.zeros((1, 1), mx.int32), cache=cache)
    return sum(_filled(entry, context) for entry in cache)


def _filled(entry: Any, context: int) -> int:
    """Bytes of a layer's cache: keys and values for each token, up to a window, or a state of one size."""
    if hasattr(entry, "caches"):
        return sum(_filled(part, context) for part in entry.caches)
    keys = getattr(entry, "keys", None)
    if not isinstance(keys, mx.array):
        return _state_bytes(entry)
    return _state_bytes(entry) // keys.shape[2] * min(context, getattr(entry, "max_size", None) or context)


def _state_bytes(entry: Any) -> int:
    return sum(a.nbytes for _, a in tree_flatten(entry.state) if isinstance(a, mx.array))


def exchanges(model: GlassModel) -> dict[str, int]:
    """How often a dense step exchanges a token's hidden vector between the processes that share a model, by MLX's name
    of the operation. Nothing is evaluated."""
    graph = io.StringIO()
    mx.export_to_dot(graph, model.dense(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model.dense)))
    found = re.findall(r'label ="(?:Sum )?(AllReduce|AllGather|Send|Recv)"', graph.getvalue())
    return {name: found.count(name) for name in sorted(set(found))}


def sent_bytes(model: GlassModel) -> int:
    """How many bytes a process that shares a model sends in a decode step, with MLX's ring."""
    vector, count = model.blocks[0].output_size * model.blocks[0].dtype.size, model.part.whole.count
    return round(vector * sum(times * _SENT.get(name, lambda n: 0)(count) for name, times in exchanges(model).items()))


class _OnPaper:
    """Stands for a group of processes, to see what mlx-lm would give each of them."""

    def __init__(self, count: int):
        self.rank, self.size = (lambda: 0), (lambda: count)


def sharing_plan(
    model: GlassModel,
    shared: Mapping[int, nn.Module],
    densities: Sequence[float],
    context: int,
    devices: Sequence[DeviceClass] = DEVICES,
    links: Sequence[LinkClass] = LINKS,
) -> list[dict[str, Any]]:
    """What decoding on several machines is predicted to cost, tensor parallel.

    Args:
        model (GlassModel): the model; its weights need not be evaluated.
        shared (dict): by a number of machines, above 1, another such mlx-lm model, which is sharded for them.
        densities, context, devices: as for ``plan``.
        links (list[LinkClass]): what connects the machines.

    Returns:
        list[dict]: for each number of machines, density, device and link the ``bytes`` that each machine reads for a
        token, ``read_ms`` and ``exchange_ms`` that reading and exchanging take one after the other, and the
        ``speedup`` over one machine that decodes densely and ``speedup_here`` over as many that do.

    Raises:
        GlassError: mlx-lm cannot share the model between so many.
    """
    for count, part in shared.items():
        try:
            part.shard(_OnPaper(count))
        except (AttributeError, ValueError) as e:
            raise GlassError(f"mlx-lm cannot share this model between {count} machines: {e}") from e
    costs = {density: step_costs(model, density, context) for density in dict.fromkeys((1.0, *densities))}
    times = 2 * len(model.dense.layers)  # after attention and after the FFN
    rows = []
    for device, density, (count, part), link in itertools.product(devices, densities, shared.items(), links):
        read, dense = (_read_of_part(model, part, count, costs[d]) for d in (density, 1.0))
        exchange = times * link.seconds
        seconds = read / device.bandwidth + exchange
        rows.append(
            {
                "device": device.name,
                "density": density,
                "machines": count,
                "link": link.name,
                "bytes": round(read),
                "read_ms": 1e3 * read / device.bandwidth,
                "exchange_ms": 1e3 * exchange,
                "speedup": costs[1.0].dense_step() / device.bandwidth / seconds,
                "speedup_here": (dense / device.bandwidth + exchange) / seconds,
            }
        )
    return rows


def _read_of_part(model: GlassModel, part: nn.Module, count: int, costs: StepCosts) -> float:
    """Bytes that a step reads on each of several machines, of which ``part`` is one's.

    Each has all of some weights, embeddings, norms and routers, and answers over all of the outputs."""
    all_of = (count * model_bytes(part) - model_bytes(model.dense)) / (count - 1)
    all_of += costs.answers - unread_embedding(model.dense)
    return all_of + (costs.sparse_step() - all_of) / count


def plan(
    model: GlassModel,
    densities: Sequence[float],
    context: int,
    acceptances: Sequence[float] = (0.6, 0.8, 0.9, 1.0),
    devices: Sequence[DeviceClass] = DEVICES,
) -> list[dict[str, Any]]:
    """What every way to decode is predicted to cost, by density and class of device.

    Args:
        model (GlassModel): the model; its weights need not be evaluated.
        densities (list[float]): of the sparse model.
        context (int): tokens in the cache.
        acceptances (list[float]): how probable it is that a drafted token is the dense model's.
        devices (list[DeviceClass]): to predict for.

    Returns:
        list[dict]: for each density and device ``dense_ms`` and ``sparse_ms`` a token at the full bandwidth;
        ``speedup`` of sparse steps; ``choice_steps``, what choosing takes in dense steps, and ``break_even_tokens``,
        after how many tokens that is made good; ``reread_steps``, what each token of an answer costs when the next
        prompt reads it again, in dense steps; ``verified``: for each acceptance how many tokens to draft and the
        speed-up.
    """
    rows = []
    for density in densities:
        costs = step_costs(model, density, context)
        dense, sparse = costs.dense_step(), costs.sparse_step()
        for device in devices:
            choice = costs.choice(device)
            verified = {}
            for a in acceptances:
                by_draft = {k: dense / costs.verified(k, a, device) for k in range(MAX_DRAFT + 1)}
                best = max(by_draft, key=by_draft.get)
                verified[f"{a:g}"] = {"draft": best, "speedup": by_draft[best]}
            rows.append(
                {
                    "density": density,
                    "device": device.name,
                    "dense_ms": 1e3 * dense / device.bandwidth,
                    "sparse_ms": 1e3 * sparse / device.bandwidth,
                    "speedup": dense / sparse,
                    "choice_steps": choice / dense,
                    "break_even_tokens": choice / (dense - sparse) if sparse < dense else None,
                    "reread_steps": costs.dense_call(_PREFILL, device) / _PREFILL / dense,
                    "verified": verified,
                }
            )
    return rows
