"""Tests of the survey of model families."""

from __future__ import annotations

import pytest

from glass_mlx.evaluation import coverage


@pytest.mark.parametrize(
    ("name", "covered", "projections", "note"),
    [
        ("llama", True, "gate_proj+up_proj/down_proj", ""),
        ("gpt_neox", True, "dense_h_to_4h/dense_4h_to_h", ""),
        ("gemma3n", True, "gate_proj+up_proj/down_proj", "not independent"),
        ("mixtral", False, "", "routed experts"),
        ("mamba2", False, "", "SSM"),
        ("olmo", False, "", "not tried: needs the ai2-olmo package"),
    ],
)
def test_survey(name, covered, projections, note):
    family = coverage.survey(name)
    assert (family.name, family.covered, family.projections) == (name, covered, projections)
    assert note in family.note if note else family.note == ""


def test_a_family_that_breaks_is_listed(monkeypatch):
    def broken(name):
        raise RuntimeError("no such config\nat all")

    monkeypatch.setattr(coverage, "tiny_model", broken)
    assert coverage.survey("llama") == coverage.Family("llama", False, "", "not tried: RuntimeError: no such config")
