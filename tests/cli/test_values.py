"""Tests of what options may be."""

from __future__ import annotations

import argparse

import pytest

from glass_mlx.cli.values import density, global_weight, memory_size


@pytest.mark.parametrize("text, value", [("0.5", 0.5), ("1", 1.0), ("1e-3", 1e-3)])
def test_density(text, value):
    assert density(text) == value


@pytest.mark.parametrize("text", ["0", "-1", "1.01", "nan", "inf", "abc", ""])
def test_bad_density(text):
    with pytest.raises(argparse.ArgumentTypeError, match="above 0"):
        density(text)


@pytest.mark.parametrize("text, value", [("auto", "auto"), ("0", 0.0), ("1", 1.0)])
def test_global_weight(text, value):
    assert global_weight(text) == value


@pytest.mark.parametrize("text", ["-0.1", "1.01", "nan", "Auto", ""])
def test_bad_global_weight(text):
    with pytest.raises(argparse.ArgumentTypeError, match="neither"):
        global_weight(text)


@pytest.mark.parametrize(
    "text, value", [("0", 0), ("123", 123), ("500MB", 500_000_000), ("1.5 gb", 1_500_000_000), ("2GiB", 2 * 2**30)]
)
def test_memory_size(text, value):
    assert memory_size(text) == value


@pytest.mark.parametrize("text", ["", "-1", "GB", "1PB", "1e9", "nan"])
def test_bad_memory_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="500MB"):
        memory_size(text)
