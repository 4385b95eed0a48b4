"""How much the output suffers by a block, against a plain computation."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from glass_mlx import GlassModel
from glass_mlx.evaluation.tiny_models import tiny_model
from glass_mlx.ranks.measure import measure_statistics
from glass_mlx.ranks.sensitivity import sensitivity
from glass_mlx.ranks.sources import given_sequences

ROWS = [[1, 5, 7, 9, 11, 3], [1, 2, 3], [4]]


@pytest.fixture(scope="module")
def model() -> GlassModel:
    return GlassModel(tiny_model("llama"))


class Seen(nn.Module):
    """An output projection that shows its input."""

    def __init__(self, projection: nn.Linear, hidden: list[np.ndarray]):
        super().__init__()
        self.projection, self._hidden = projection, hidden

    def __call__(self, h: mx.array) -> mx.array:
        self._hidden.append(np.array(h[0], np.float64))
        return self.projection(h)


def logs(model: GlassModel, row: list[int]) -> np.ndarray:
    logits = np.array(model.dense(mx.array([row]))[0], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_against_rows_one_by_one(model):
    """Each row on its own, its dropped neurons' columns of the output projection set to zero."""
    energies = measure_statistics(model, given_sequences("text", ROWS[:2]), stable_at=None).energies["impact"]
    seen = []
    got = sensitivity(model, ROWS, energies, seen.append)
    assert seen == list(range(1, len(model.blocks) + 1))
    for block, energy, value in zip(model.blocks, energies, got, strict=True):
        keep = np.argsort(-np.array(energy), kind="stable")[: block.size // 2]
        down = block.module.down_proj
        mask = np.isin(np.arange(block.size), keep)
        norms = np.linalg.norm(np.array(down.weight, np.float64), axis=0)
        kls, lost = [], []
        for row in ROWS[:2]:
            dense, hidden = logs(model, row), []

            block.module.down_proj = Seen(down, hidden)
            logs(model, row)
            squares = (hidden[0] * norms) ** 2
            lost += ((squares * ~mask).sum(1) / squares.sum(1)).tolist()
            block.module.down_proj = nn.Linear(block.size, down.weight.shape[0], bias=False)
            block.module.down_proj.weight = down.weight * mx.array(mask, mx.float32)
            sparse = logs(model, row)
            block.module.down_proj = down
            kls += (np.exp(dense) * (dense - sparse)).sum(-1).tolist()
        assert value == pytest.approx(np.mean(kls) / np.mean(lost), rel=1e-2)


def test_leaves_the_model_as_it_was(model):
    own = [block.module[block.output] for block in model.blocks]
    sensitivity(model, ROWS, [mx.ones((block.size,)) for block in model.blocks])
    assert all(block.module[block.output] is o for block, o in zip(model.blocks, own))


def test_nothing_to_read(model):
    assert all(value >= 0 for value in sensitivity(model, [], [mx.ones((b.size,)) for b in model.blocks]))
