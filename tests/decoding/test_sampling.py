"""Tests of the sampler that drafts and checks share."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler as make_mlx_lm_sampler

from glass_mlx.decoding.sampling import CommonRandomNumbers, make_sampler


def distribution(seed: int, n: int = 50) -> mx.array:
    return mx.log(mx.softmax(1.5 * mx.random.normal((n,), key=mx.random.key(seed))))


def agreement(make, n: int = 500) -> float:
    """How often samples of two distributions agree at the same place."""
    mx.random.seed(0)
    randomness, sampler, same = CommonRandomNumbers(), make(temp=1.0), 0
    both = [distribution(seed)[None] for seed in range(2)]
    for place in range(n):
        said = []
        for one in both:
            randomness.at(place)
            said.append(sampler(one))
        same += (said[0] == said[1]).item()
    return same / n


def test_the_same_random_numbers_agree_more_often_than_others():
    p, q = (np.exp(np.array(distribution(seed))) for seed in range(2))
    d = 0.5 * np.abs(p - q).sum()
    bound, apart = (1 - d) / (1 + d), (p * q).sum()
    assert agreement(make_sampler) > bound - 0.03 > apart + 0.05
    assert agreement(make_sampler) > agreement(make_mlx_lm_sampler) + 0.05


@pytest.mark.parametrize("options", [{"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 5}, {"temp": 0.5}, {"temp": 2.0}])
def test_samples_follow_mlx_lms_distribution(options):
    logprobs, n = mx.broadcast_to(distribution(3, 12), (20_000, 12)), 20_000
    mx.random.seed(1)
    ours, theirs = (
        np.bincount(np.array(make(**{"temp": 1.0, **options})(logprobs)), minlength=12) / n
        for make in (make_sampler, make_mlx_lm_sampler)
    )
    np.testing.assert_allclose(ours, theirs, atol=0.015)


def test_xtc():
    options = {"temp": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.05}
    logprobs = distribution(3, 12)[None]
    mx.random.seed(1)
    assert int(mx.argmax(logprobs)) not in {make_sampler(**options)(logprobs).item() for _ in range(50)}


def test_at_temperature_0_the_most_likely():
    logprobs = distribution(5)[None]
    assert make_sampler()(logprobs).item() == mx.argmax(logprobs).item()


def test_places():
    mx.random.seed(2)
    randomness = CommonRandomNumbers()
    drawn = {}
    for place in (0, 1, 2, 1, 0):
        randomness.at(place)
        value = mx.random.uniform().item()
        assert drawn.setdefault(place, value) == value
    assert len(set(drawn.values())) == 3
