"""Tests of the command line that sets speed against fidelity."""

from __future__ import annotations

import itertools
import json

import pytest

from glass_mlx import GlassModel
from glass_mlx.evaluation.shapes import SHAPES
from glass_mlx.evaluation.tiny_models import tiny_model
from glass_mlx.tradeoff import main


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


def test_the_command_line(invoke, tiny_dir, written, drawn, tmp_path):
    out, picture = tmp_path / "t.json", tmp_path / "t.png"
    options = ["--model", tiny_dir, "--stats", written, "--density", "0.5", "--prompt-tokens", 8, "--count", 2]
    ran = invoke(main, *options, "--tokens", 6, "--json", str(out), "--plot", str(picture))
    assert ran.code == 0, ran.err
    result = json.loads(out.read_text())
    names = ["dense", "griffin", "glass", "verified"]
    assert list(result["ways"]) == names and all(name in ran.out for name in names)
    assert result["prompts"] == 2 and not result["simulated_acceptance"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_shape_says_that_acceptance_is_simulated(invoke, monkeypatch, drawn, tmp_path):
    monkeypatch.setattr("glass_mlx.evaluation.shapes.random_model", lambda *_: GlassModel(tiny_model("llama")))
    monkeypatch.setitem(SHAPES, "qwen3-0.6b", {"vocab_size": 90})
    options = ["--shape", "qwen3-0.6b", "--density", "0.5", "--acceptance", "0.6,0.9", "--count", 2, "--tokens", 5]
    ran = invoke(main, *options, "--json", "-", "--plot", str(tmp_path / "t.png"))
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert result["simulated_acceptance"] and "random weights" in result["model"]
    assert list(itertools.islice(result["ways"], 2, None)) == ["verified, acceptance 0.6", "verified, acceptance 0.9"]


@pytest.mark.parametrize(
    "options", [["--tokens", 2], ["--layers", 1], ["--density", "2"], ["--acceptance", "0"], ["--ways", "all"]]
)
def test_bad_options(invoke, options):
    assert invoke(main, *options).code == 2
