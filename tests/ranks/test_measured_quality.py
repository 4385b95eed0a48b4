"""Tests of what densities cost: it is the difference between decoding sparsely and densely after a prompt."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from glass_mlx.ranks import quality
from glass_mlx.ranks.quality import measure_quality


@pytest.fixture
def short(monkeypatch):
    for name, value in {"DENSITIES": (0.4, 0.8), "_ROWS": 2, "_PROMPT": 4, "_LENGTH": 9}.items():
        monkeypatch.setattr(quality, name, value)


def test_it_is_decoding_against_the_dense_model(tiny, short):
    model, _ = tiny
    rows = [[1, *range(20, 40)], [1, 5], [1, *range(60, 90)], [1, *range(90, 96)]]
    done = []
    points = measure_quality(model, rows, lambda *progress: done.append(progress))
    assert [p.density for p in points] == [0.4, 0.8] and done == [(n, 4) for n in (1, 2, 3, 4)]
    kls, agreements = [], []
    for row in (rows[2], rows[0]):
        dense = model.dense(mx.array([row[:9]]))[0, 4:]
        cache = model.make_cache(density=0.4)
        model.prefill(mx.array([row[:4]]), cache)
        model.select(cache)
        sparse = [model.decode(mx.array([[token]]), cache)[0, 0] for token in row[4:9]]
        p, q = (np.array(mx.softmax(x.astype(mx.float32), axis=-1), np.float64) for x in (dense, mx.stack(sparse)))
        kls.append((p * np.log(p / q)).sum(axis=-1).mean())
        agreements.append((p.argmax(axis=-1) == q.argmax(axis=-1)).mean())
    assert points[0].kl == pytest.approx(np.mean(kls), rel=1e-2)
    assert points[0].agreement == pytest.approx(np.mean(agreements))
    assert points[1].kl < points[0].kl


def test_nothing_to_measure(tiny):
    assert measure_quality(tiny[0], [[1, 2], []]) == []
