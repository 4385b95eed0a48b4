"""Tests of what is expected after a prompt, against NumPy in double precision."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from glass_mlx.core.prior import FIT, PSEUDO_TOKENS, SHARPNESS, Prior

SIZES = (24, 40)


@pytest.fixture
def domains() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.dirichlet(np.full(size, 0.3), size=3).astype(np.float32) for size in SIZES]


def prompt_of(domains, k: int, tokens: int, seed: int = 0) -> np.ndarray:
    """The energy of a prompt whose tokens each fire one neuron of every block."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.multinomial(tokens, d[k].astype(float) / d[k].sum(dtype=float)) for d in domains])


def test_expected(domains):
    prior, energy = Prior([mx.array(d) for d in domains]), prompt_of(domains, 1, 2).astype(np.float32)
    joined = np.concatenate(domains, axis=1).astype(float)
    logs = np.log(0.98 * joined + 0.02 * joined.mean(axis=0) + 1e-12)
    weights = np.exp(SHARPNESS / len(SIZES) * (logs @ energy))
    weights /= weights.sum()
    np.testing.assert_allclose(prior.weights(mx.array(energy)), weights, rtol=1e-3)
    fit = []
    for k in range(3):
        shares, start = [], 0
        for block in domains:
            best = np.argsort(-block[k], kind="stable")[: block.shape[1] // 2]
            part = energy[start : start + block.shape[1]]
            shares.append(part[best].sum() / part.sum() / (block[k][best].sum() / block[k].sum()))
            start += block.shape[1]
        fit.append(np.mean(shares))
    np.testing.assert_allclose(prior.fit(mx.array(energy)), fit, rtol=1e-4)
    trust = np.clip((weights @ fit - FIT[0]) / (FIT[1] - FIT[0]), 0, 1) ** 2
    tokens = PSEUDO_TOKENS[0] + (PSEUDO_TOKENS[1] - PSEUDO_TOKENS[0]) * trust
    expected = energy + tokens * (weights @ joined)
    np.testing.assert_allclose(prior.posterior_energy(mx.array(energy)), expected, rtol=1e-3, atol=1e-4)


def test_without_evidence_all_domains_are_alike(domains):
    prior = Prior([mx.array(d) for d in domains])
    mean = np.concatenate(domains, axis=1).mean(axis=0)
    np.testing.assert_allclose(prior.posterior_energy(None), mean, rtol=1e-5)


def test_what_fits_no_domain_decides_alone_nearly(domains):
    prior = Prior([mx.array(d[:1]) for d in domains])
    own, other = (mx.array(prompt_of(domains, k, 200), mx.float32) for k in (0, 1))
    assert prior.fit(own).item() == pytest.approx(1, abs=0.05) and prior.fit(other).item() < FIT[0]
    assert prior.tokens(own).item() == PSEUDO_TOKENS[1] and prior.tokens(other).item() == PSEUDO_TOKENS[0]


@pytest.mark.parametrize("k", range(3))
def test_a_prompt_is_taken_for_its_own_domain(domains, k):
    prior = Prior([mx.array(d) for d in domains])
    found = [np.argmax(prior.weights(mx.array(prompt_of(domains, k, 20, seed), mx.float32))) for seed in range(20)]
    assert np.mean(np.array(found) == k) > 0.9


def test_much_evidence_outweighs_what_was_known(domains):
    prior, energy = Prior([mx.array(d[:1]) for d in domains]), prompt_of(domains, 2, 10**6)
    expected = np.array(prior.posterior_energy(mx.array(energy, mx.float32)))
    np.testing.assert_allclose(expected / 10**6, energy / 10**6, atol=3e-4)


def test_routed_experts(domains):
    """Each expert is worth its domains' tokens of its own, whatever their share of the routing is: where it saw n_e
    tokens of a prompt, these count n_e against them."""
    count, active = 4, 2
    known = domains[1][:1].reshape(1, count, -1)
    prior = Prior([mx.array(d[:1]) for d in domains], [(1, 1), (count, active)])
    energy = np.concatenate([prompt_of(domains, 0, 6)[: SIZES[0]], np.zeros(SIZES[1])]).astype(np.float32)
    seen = np.array([0, 1, 3, 8])  # tokens of each expert, each of which two experts share
    energy[SIZES[0] :] = np.repeat(seen / active / (SIZES[1] // count), SIZES[1] // count)
    tokens = prior.tokens(mx.array(energy)).item()
    expected = np.array(prior.posterior_energy(mx.array(energy)))[SIZES[0] :].reshape(count, -1)
    shares = known[0] / known[0].sum(axis=1, keepdims=True)
    by_hand = (energy[SIZES[0] :].reshape(count, -1) * active + tokens * shares) / active
    np.testing.assert_allclose(expected, by_hand, rtol=1e-4)
    np.testing.assert_allclose(expected.sum(axis=1) * active, seen + tokens, rtol=1e-4)


def test_the_fit_of_routed_experts(domains):
    """The better half of each expert counts, not of all their neurons."""
    domain = domains[1][0]
    prior = Prior([mx.array(domain[None])], [(4, 2)])
    best = np.argsort(-domain.reshape(4, -1), axis=1, kind="stable")[:, :5] + 10 * np.arange(4)[:, None]
    energy = np.random.default_rng(0).random(SIZES[1]).astype(np.float32)
    expected = energy[best].sum() / energy.sum() / (domain[best].sum() / domain.sum())
    assert prior.fit(mx.array(energy)).item() == pytest.approx(expected, rel=1e-4)


def test_an_expert_that_no_domain_knows(domains):
    domain = domains[1][0].copy()
    domain[:10] = 0
    found = Prior([mx.array(domain[None])], [(4, 2)]).posterior_energy(mx.ones((SIZES[1],)))
    assert np.isfinite(np.array(found)).all() and found[:10].tolist() == [1.0] * 10
