"""Models of true shape with random weights, to measure speed and memory without a download."""

from __future__ import annotations

import importlib
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..core.compensation import Response
from ..core.ranking import rank_by_expert
from ..core.slicing import is_quantised
from ..errors import GlassError
from ..model.blocks import Block
from ..model.discovery import find_blocks
from ..model.glass_model import GlassModel
from ..model.part import WholeBlock, WholeModel
from ..ranks.amounts import answer_rank
from .shape_configs import SHAPES


def activation_dtype() -> mx.Dtype:
    """bfloat16 on a GPU; float32 on a CPU, where MLX's 16-bit products are slower than their bytes."""
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16


def build(shape: str, layers: int | None = None) -> nn.Module:
    """An mlx-lm model of a true shape, with nothing evaluated yet; arguments as for ``random_model``."""
    config = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    dense = module.Model(module.ModelArgs.from_dict(config))
    dense.sanitize({})  # some families tie their head to the embedding here
    return dense


def shape_label(shape: str, model: GlassModel, bits: int) -> str:
    """How reports name a random model."""
    return f"{shape} shape, {len(model.dense.layers)} layers, {bits} bits, random weights"


def empty_dense(shape: str, layers: int | None = None, bits: int = 4) -> nn.Module:
    """What ``empty_model`` wraps."""
    return _in_format(shape, layers, bits, mx.bfloat16)


def empty_model(shape: str, layers: int | None = None, bits: int = 4) -> GlassModel:
    """A model that has the sizes of a true shape and, but for what finding its FFN blocks takes, no weights yet.

    Args:
        shape (str): one of ``shape_configs.SHAPES``.
        layers (int, optional): number of layers, if fewer than the shape has, for small machines.
        bits (int): of a weight: 4 or 8 (affine, groups of 64), 16 (bfloat16) or 32 (float32).
    """
    return _wrap(empty_dense(shape, layers, bits))


def random_model(
    shape: str, layers: int | None = None, bits: int = 4, seed: int = 0, group: mx.distributed.Group | None = None
) -> GlassModel:
    """A model of a true shape with random weights and random global ranks, evaluated.

    Args:
        shape, layers, bits: as for ``empty_model``.
        seed (int): of the random numbers.
        group (mx.distributed.Group, optional): the processes that share the model, each layer of it.

    Raises:
        GlassError: mlx-lm cannot share models of this family.
    """
    dense = _in_format(shape, layers, bits, activation_dtype())
    if group is not None:
        try:
            dense.shard(group)
        except (AttributeError, ValueError) as e:
            raise GlassError(f"mlx-lm cannot share {shape} between {group.size()} processes: {e}") from e
    keys = iter(mx.random.split(mx.random.key(seed), len(tree_flatten(dense.parameters()))))
    for _, layer in tree_flatten(dense.leaf_modules(), is_leaf=nn.Module.is_module):
        layer.update({name: _random(layer, name, a, next(keys)) for name, a in layer.parameters().items()})
        mx.eval(layer.parameters())
    return _wrap(dense, mx.random.key(seed), group)


def _in_format(shape: str, layers: int | None, bits: int, dtype: mx.Dtype) -> nn.Module:
    """A shape's model with weights of this many bits, not evaluated; ``dtype`` is what quantised ones compute in."""
    dense = build(shape, layers)
    dense.set_dtype({16: mx.bfloat16, 32: mx.float32}.get(bits) or dtype)
    if bits < 16:
        nn.quantize(dense, group_size=64, bits=bits)
    return dense.eval()


def _wrap(dense: nn.Module, key: mx.array | None = None, group: mx.distributed.Group | None = None) -> GlassModel:
    """A GlassModel with responses that predict nothing, and with random ranks where there is a key."""
    model = GlassModel(dense, whole=None if group is None else _whole(dense, group))
    blocks = model.blocks if model.part is None else model.part.whole.blocks
    responses = [_no_response(block.input_size, block.size, answer_rank(block.experts)) for block in blocks]
    ranks = None if key is None else [_random_ranks(block, key) for block in blocks]
    model.set_global_ranks(ranks and {"impact": ranks, "activation": ranks}, responses=responses)
    return model


def _whole(dense: nn.Module, group: mx.distributed.Group) -> WholeModel:
    """The model that this one is a part of, as if the processes had equal parts of every block."""
    count = group.size()
    blocks = [WholeBlock.of(block) for block in find_blocks(dense)[0]]
    blocks = [replace(b, size=count * b.size, step=count * b.step, row=np.tile(b.row, count)) for b in blocks]
    return WholeModel(group.rank(), count, "tensor", blocks)


def _random_ranks(block: Block | WholeBlock, key: mx.array) -> mx.array:
    return rank_by_expert(mx.random.uniform(shape=(block.size,), key=key), block.experts)


def _no_response(inputs: int, size: int, rank: int) -> Response:
    """What costs as much as a measured response, and predicts nothing."""
    shapes = ((inputs,), (size,), (inputs, rank), (rank, size))
    return Response(*map(mx.zeros, shapes))


def _random(layer: nn.Module, name: str, array: mx.array, key: mx.array) -> mx.array:
    """Random values of about unit gain for a layer's array."""
    if is_quantised(layer):
        fan_in = layer.scales.shape[-1] * layer.group_size
        scale = 2 * (3 / fan_in) ** 0.5 / (2**layer.bits - 1)  # uniform codes around zero
        if name == "weight":
            return mx.random.randint(-(2**31), 2**31 - 1, array.shape, mx.int32, key=key).view(mx.uint32)
        return mx.full(array.shape, scale if name == "scales" else -scale * (2**layer.bits - 1) / 2, array.dtype)
    if array.ndim > 1:
        return mx.random.normal(array.shape, array.dtype, scale=array.shape[-1] ** -0.5, key=key)
    return mx.ones(array.shape, array.dtype)
