"""Tests of the options that several commands have."""

from __future__ import annotations

import argparse

import pytest

from glass_mlx.cli.options import add_glass_options


@pytest.mark.parametrize("build", [True, False])
def test_build_option(build):
    parser = argparse.ArgumentParser()
    add_glass_options(parser, build=build)
    options = {"": build, "--build": True, "--no-build": False}
    assert [parser.parse_args(o.split()).build for o in options] == list(options.values())
