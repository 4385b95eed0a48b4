"""Tests of the command line that lists model families."""

from __future__ import annotations

import json
import sys

import pytest

from glass_mlx import families


@pytest.fixture
def command(monkeypatch, capsys):
    def command(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["glass_mlx.families", *args])
        code = 0
        try:
            families.main()
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return command


def test_table(command):
    code, out, err = command("llama", "mamba", "gpt2")
    header, *rows, _, total = out.splitlines()
    assert (code, err) == (0, "")
    assert header.split() == ["family", "works", "projections", "FFNs"]
    assert [row.split()[:2] for row in rows if row[0] != " "] == [["llama", "yes"], ["mamba", "-"], ["gpt2", "yes"]]
    assert rows[2].startswith("    has no FFN block")  # what is said of mamba
    assert total == "2 of 3 families covered"


def test_json(command):
    code, out, _ = command("--json", "llama", "mamba")
    llama, mamba = json.loads(out)
    assert code == 0
    assert llama == {
        "name": "llama",
        "covered": True,
        "projections": "gate_proj+up_proj/down_proj",
        "ffns": "dense",
        "note": "",
    }
    assert mamba.keys() == llama.keys() and not mamba["covered"]


def test_unknown_family(command):
    code, out, err = command("llama", "no_such")
    assert (code, out) == (2, "")
    assert "'no_such'" in err
