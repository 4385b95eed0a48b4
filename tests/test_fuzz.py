"""Tests that damaged files do no harm: they are refused in words, or what comes of them is sound (``fuzzing.py``)."""

from __future__ import annotations

import struct
from collections import Counter

import fuzzing
from mutations import mutate

from glass_mlx import GlassError


def test_damaged_files(request, tmp_path):
    cases = request.config.getoption("--fuzz")
    outcomes = fuzzing.fuzz(list(fuzzing.TARGETS), cases, tmp_path / "log")
    for target in fuzzing.TARGETS:  # pytest -rP shows it
        print(target, dict(Counter(outcomes[target, seed] for seed in range(cases))))
    wrong = {case: outcome for case, outcome in outcomes.items() if outcome not in ("used", "refused")}
    assert len(outcomes) == cases * len(fuzzing.TARGETS) and not wrong


def test_what_is_told_apart(tmp_path):
    def use(path):
        content = path.read_bytes()
        if content == b"unsound":
            raise fuzzing.Unsound("a reason")
        if content == b"raised":
            raise KeyError("name")
        if content != b"used":
            raise GlassError(content.decode())

    expected = {
        b"used": "used",
        b"Too bad": "refused",
        b"x" * 500: f"unsound: message {'x' * 80!r}",
        b"unsound": "unsound: a reason",
        b"raised": "raised: KeyError: 'name'",
    }
    assert {data: fuzzing.outcome(data, use, tmp_path / "file") for data in expected} == expected


def test_a_process_that_ends_is_found_out(tmp_path, monkeypatch):
    """The seeds after it are run all the same."""
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, sys\n"
        "for target, seed in json.load(sys.stdin):\n"
        "    for outcome in ('crashed', 'used'):\n"
        "        print(json.dumps([target, seed, outcome]), file=open(sys.argv[1], 'a'), flush=True)\n"
        "        if seed == 2: os.abort()\n"
    )
    monkeypatch.setattr(fuzzing, "__file__", str(script))
    outcomes = fuzzing.fuzz(["cache"], 4, tmp_path / "log")
    assert list(outcomes.values()) == ["used", "used", "crashed", "used"]


def test_mutations_depend_on_the_seed(written):
    good = written.read_bytes()
    damaged = [mutate(good, seed) for seed in range(60)]
    assert damaged == [mutate(good, seed) for seed in range(60)]
    assert len(set(damaged)) > 50
    readable = [data for data in damaged if struct.unpack("<Q", data[:8].ljust(8, b"\0"))[0] < len(data)]
    assert len(readable) > 40
