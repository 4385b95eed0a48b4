"""Tests of the survey of model families."""

from __future__ import annotations

import pytest

from glass_mlx.evaluation import coverage


@pytest.mark.parametrize(
    ("name", "covered", "projections", "ffns", "note"),
    [
        ("llama", True, "gate_proj+up_proj/down_proj", "dense", ""),
        ("gpt_neox", True, "dense_h_to_4h/dense_4h_to_h", "dense", ""),
        ("gemma3n", True, "gate_proj+up_proj/down_proj", "dense", "not independent"),
        ("mixtral", True, "gate_proj+up_proj/down_proj", "routed", ""),
        ("phixtral", True, "fc1/fc2", "routed", ""),
        ("deepseek", True, "gate_proj+up_proj/down_proj", "dense, shared, routed", ""),
        ("dbrx", False, "", "", "one expert by itself"),
        ("mamba2", False, "", "", "SSM"),
        ("olmo", False, "", "", "not tried: needs the ai2-olmo package"),
    ],
)
def test_survey(name, covered, projections, ffns, note):
    family = coverage.survey(name)
    assert (family.name, family.covered, family.projections, family.ffns) == (name, covered, projections, ffns)
    assert note in family.note if note else family.note == ""


def test_a_family_that_breaks_is_listed(monkeypatch):
    def broken(name):
        raise RuntimeError("no such config\nat all")

    monkeypatch.setattr(coverage, "tiny_model", broken)
    assert coverage.survey("llama") == coverage.Family("llama", False, note="not tried: RuntimeError: no such config")
