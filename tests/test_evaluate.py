"""Tests of the evaluation's command line, its tables and pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest

from glass_mlx.errors import GlassError
from glass_mlx.evaluate import main
from glass_mlx.evaluation.names import SELECTORS
from glass_mlx.evaluation.selectors import choose_selectors


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("The old house\n\nShe had never\n")
    return path


@pytest.fixture
def evaluated(invoke, prompts, tiny_dir, written):
    """Run the command line on two prompts and the random model."""

    def evaluated(*options):
        outcome = invoke(main, "--model", tiny_dir, "--stats", written, "--prompts", prompts, "--tokens", 4, *options)
        assert outcome.code == 0, outcome.err
        return outcome.out

    return evaluated


def test_json(evaluated):
    result = json.loads(evaluated("--density", "0.25,0.5", "--json"))
    assert list(result["arms"]) == list(SELECTORS)
    assert list(result["arms"]["dense"]) == ["1"] and list(result["arms"]["glass"]) == ["0.25", "0.5"]
    assert (result["prompts"], result["tokens"], result["windows"]) == (2, 4, [1, 2, 3, 4])
    assert result["prompt_set"].endswith("prompts.txt")
    row = result["arms"]["glass"]["0.5"]
    assert {"ppl", "kl", "agreement", "jaccard", "ci"} < set(row) and set(row["ci"]) == {
        "ppl",
        "kl",
        "agreement",
        "jaccard",
    }
    assert len(row["kl_by_position"]) == 4 and len(row["jaccard_by_layer"]) == 2
    for name in row["ci"]:
        low, high = row["ci"][name]
        assert low <= row[name] * (1 + 1e-6) and row[name] <= high * (1 + 1e-6)
    griffin = result["arms"]["griffin"]["0.5"]
    assert row["against_griffin"]["kl"] == pytest.approx(row["kl"] - griffin["kl"])
    assert result["arms"]["oracle"]["0.5"]["jaccard"] == 1


def test_the_same_seed_gives_the_same(evaluated):
    a, b, c = (json.loads(evaluated("--arms", "glass", "--seed", seed, "--json"))["arms"] for seed in (1, 1, 2))
    assert a == b != c


def test_sweeps(evaluated, tmp_path, drawn):
    out, picture = tmp_path / "new" / "a.json", tmp_path / "a.png"
    options = ["--density", "0.3,0.6", "--global-weight", "0,0.5,auto", "--prompt-tokens", "2,7", "--free"]
    options += ["--arms", "griffin,glass,glass-a,glass-i"]
    text = evaluated(*options, "--json", out, "--plot", picture)
    result = json.loads(out.read_text())
    assert list(result["prompt_tokens"]) == ["2", "7"] and result["arms"] == result["prompt_tokens"]["2"]
    assert [name for name in result["arms"] if " " in name] == ["glass-a 0", "glass-a 0.5", "glass-i 0", "glass-i 0.5"]
    assert result["arms"]["glass-a 0"]["0.3"]["kl"] == result["arms"]["griffin"]["0.3"]["kl"]
    assert text.count("density ") == text.count("self-PPL") == 4 and "prompts of 7 tokens" in text
    free = result["arms"]["griffin"]["0.6"]["free"]
    assert set(free) == set(free["ci"]) | {"ci"} == {"repetition", "distinct-1", "distinct-2", "self_ppl", "ci"}
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    axes = {a.get_title(): a for a in drawn[0].axes}
    assert set(axes) == {
        "By density",
        "By position, density 0.6",
        "By global weight, density 0.6",
        "By prompt length, density 0.6",
    }
    lines = {line.get_label(): line for line in axes["By density"].lines}
    assert "dense" not in lines and "glass-i 0.5" not in lines
    np.testing.assert_allclose(lines["glass"].get_ydata(), [result["arms"]["glass"][d]["kl"] for d in ("0.3", "0.6")])


def test_the_null_prompt(evaluated):
    result = json.loads(evaluated("--prompts", "null", "--count", 3, "--arms", "glass,static", "--json"))
    assert result["prompts"] == 3
    kl = {name: rows["0.5"]["kl"] for name, rows in result["arms"].items() if name != "dense"}
    assert set(kl) == {"glass", "static"} and all(0 < value < 1 for value in kl.values())


def test_without_global_ranks(invoke, prompts, tiny_dir):
    common = ["--model", tiny_dir, "--prompts", prompts, "--tokens", 3]
    outcome = invoke(main, *common, "--json")
    assert set(json.loads(outcome.out)["arms"]) == set(SELECTORS) - {"static", "glass-a", "glass-i", "glass-i+"}
    assert "without static, glass-a, glass-i" in outcome.err
    with pytest.raises(GlassError, match="no global ranks"):
        choose_selectors(["griffin", "static"], [0.5], False)


def test_own_precision(evaluated):
    assert "own precision" in evaluated("--no-float32", "--arms", "griffin")


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--density", "0"], 2, "not a number above 0"),
        (["--density", "0.5,"], 2, "not a number above 0"),
        (["--global-weight", "0,2"], 2, "auto"),
        (["--tokens", "1"], 2, "at least 2"),
        (["--temp", "-1"], 2, "negative"),
        (["--prompt-tokens", "4,0"], 2, "above 0"),
        (["--arms", "glass,magic"], 2, "'magic' is not one of"),
        (["--exact", "recall", "--tasks", "x"], 2, "not allowed"),
        (["--prompts", "nowhere.txt"], 1, "nowhere.txt"),
        (["--arms", "static"], 1, "no global ranks"),
        (["--json", "/dev/null/x.json", "--tokens", "2", "--arms", "griffin"], 1, "Cannot write"),
    ],
)
def test_bad_input_is_one_line(invoke, prompts, tiny_dir, options, code, says):
    outcome = invoke(main, "--model", tiny_dir, "--prompts", prompts, *options)
    assert outcome.code == code
    assert says in outcome.err.splitlines()[-1]


def test_an_empty_prompt_file(invoke, tmp_path, tiny_dir):
    (tmp_path / "empty.txt").write_text("\n")
    outcome = invoke(main, "--model", tiny_dir, "--prompts", tmp_path / "empty.txt")
    assert (outcome.code, "no prompts" in outcome.err) == (1, True)
