"""Tests of the evaluation's command line, its prompts, tables and pictures."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from glass_mlx.errors import GlassError
from glass_mlx.evaluate import main
from glass_mlx.evaluation.fidelity import summarise
from glass_mlx.evaluation.free_running import fit_length, sample_continuations
from glass_mlx.evaluation.intervals import interval, windows
from glass_mlx.evaluation.prompts import PROMPTS, read_prompts
from glass_mlx.evaluation.selectors import SELECTORS, choose_selectors
from glass_mlx.evaluation.teacher_forcing import Scores


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


def test_sweeps(evaluated, tmp_path, monkeypatch):
    figures, original = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), original(self, *a, **k))[1])
    out, picture = tmp_path / "new" / "a.json", tmp_path / "a.png"
    options = ["--density", "0.3,0.6", "--global-weight", "0,0.5,auto", "--prompt-tokens", "2,7", "--free"]
    text = evaluated(*options, "--json", out, "--plot", picture)
    result = json.loads(out.read_text())
    assert list(result["prompt_tokens"]) == ["2", "7"] and result["arms"] == result["prompt_tokens"]["2"]
    assert [name for name in result["arms"] if " " in name] == ["glass-a 0", "glass-a 0.5", "glass-i 0", "glass-i 0.5"]
    assert result["arms"]["glass-a 0"]["0.3"]["kl"] == result["arms"]["griffin"]["0.3"]["kl"]
    assert text.count("density ") == text.count("self-PPL") == 4 and "prompts of 7 tokens" in text
    free = result["arms"]["griffin"]["0.6"]["free"]
    assert set(free) == set(free["ci"]) | {"ci"} == {"repetition", "distinct-1", "distinct-2", "self_ppl", "ci"}
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    axes = {a.get_title(): a for a in figures[0].axes}
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
    assert set(json.loads(outcome.out)["arms"]) == set(SELECTORS) - {"static", "glass-a", "glass-i"}
    assert "without static, glass-a, glass-i" in outcome.err
    with pytest.raises(GlassError, match="no global ranks"):
        choose_selectors(["griffin", "static"], [0.5], False)


def test_selectors_by_name():
    assert set(choose_selectors(["griffin"], ["auto"], True)) == {"griffin"}
    assert set(choose_selectors(["glass-i"], [0.1, "auto", 1.0], True)) == {"glass-i 0.1", "glass-i 1"}


def test_own_precision(evaluated):
    assert "own precision" in evaluated("--no-float32", "--arms", "griffin")


def test_prompts_are_cut_and_continued(exact):
    model, tokenizer = exact
    prompts = read_prompts(str(PROMPTS), tokenizer, 3)
    assert fit_length(model, prompts, None, 0, 0) == prompts
    length = len(prompts[0])
    short = fit_length(model, prompts, length + 3, 0, 0)[0]
    assert short[:length] == prompts[0] and short[length:] == sample_continuations(model, prompts[:1], 3, 0)[0]
    assert fit_length(model, prompts, 5, 0, 0) == [p[:5] for p in prompts]


def test_the_bundled_prompts_are_read_without_a_second_bos(demo):
    _, tokenizer = demo
    prompts = read_prompts(str(PROMPTS), tokenizer, None)
    assert len(prompts) == 32 and all(p.count(tokenizer.bos_token_id) == 1 for p in prompts)


@pytest.mark.parametrize(
    "line", ["{", "3", "[]", "{}", '{"text": 3}', '{"messages": [3]}', '{"messages": [{"role": "user"}]}']
)
def test_bad_prompts(tmp_path, demo, line):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(GlassError, match='bad.jsonl:2 has no "text" and no "messages"'):
        read_prompts(str(file), demo[1], None)


def test_prompts_by_template(tmp_path, demo, tiny_dir):
    messages = [{"role": "user", "content": "Hello"}]
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n\n" + json.dumps({"text": "Once"}))
    tokenizer = demo[1]
    [chat, text] = read_prompts(str(file), tokenizer, None)
    assert chat == tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert text == tokenizer.encode("Once")
    without = SimpleNamespace(has_chat_template=False, encode=list)
    assert read_prompts(str(file), without, 1) == [list("Hello\n\n")]


def test_windows():
    assert windows(256) == [32, 64, 96, 128, 160, 192, 224, 256]
    assert windows(2) == [1, 2] and windows(17)[-1] == 17 and len(windows(17)) <= 8


def test_intervals():
    rng = np.random.default_rng(1)
    values = rng.normal(3, 1, 400)
    low, high = interval(values)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert interval(np.array([2.0])) == [2.0, 2.0]


def test_the_comparison_is_paired():
    """A small difference that is the same for every prompt is seen through what prompts differ by."""
    kl = np.linspace(0, 5, 20)[:, None] * np.ones((1, 3))
    scores = [Scores(kl, kl + shift, kl > 1, kl, []) for shift in (0.0, -0.01)]
    row = summarise(scores[1], scores[0])
    assert row["against_griffin"]["kl"] == pytest.approx(-0.01)
    assert row["against_griffin"]["ci"] == pytest.approx([-0.01, -0.01])
    assert row["ci"]["kl"][1] - row["ci"]["kl"][0] > 1


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--density", "0"], 2, "not above 0"),
        (["--density", "0.5,"], 2, "not above 0"),
        (["--global-weight", "0,2"], 2, "auto"),
        (["--tokens", "1"], 2, "at least 2"),
        (["--temp", "-1"], 2, "negative"),
        (["--prompt-tokens", "4,0"], 2, "above 0"),
        (["--arms", "glass,magic"], 2, "'magic' is none of"),
        (["--recall", "--tasks", "x"], 2, "not allowed"),
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
