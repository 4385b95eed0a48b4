"""Tests of measuring global statistics: what is recorded of the tokens, when it ends, and that it can be resumed."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from global_statistics import same
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

import glass_mlx
from glass_mlx import GlassConfig, GlassError, GlassModel, StatsError
from glass_mlx.core.importance import SIGNALS
from glass_mlx.evaluation.tiny_models import tiny_model
from glass_mlx.ranks import bars as bars_module
from glass_mlx.ranks import measure as module
from glass_mlx.ranks.agreement import compare
from glass_mlx.ranks.evidence import SplitEvidence
from glass_mlx.ranks.format import GlobalStatistics
from glass_mlx.ranks.identity import fingerprint
from glass_mlx.ranks.measure import build_ranks, measure_statistics
from glass_mlx.ranks.sources import Source, given_sequences, null_prompt

pytestmark = pytest.mark.usefixtures("insensitive")


def small(model, tokenizer, **options) -> Source:
    return null_prompt(model, tokenizer, **{"sequences": 4, "length": 8, **options})


def energies(model, signal: str, rows: list[list[int]]) -> list[np.ndarray]:
    """Mean shares of the energy of these rows' tokens, layer by layer, each row on its own, in NumPy."""
    shares = [[] for _ in model.dense.layers]
    for row in rows:
        x = model.dense.model.embed_tokens(mx.array([row]))
        for layer, seen in zip(model.dense.layers, shares):
            x = x + layer.self_attn(layer.input_layernorm(x), "causal")
            z, mlp = layer.post_attention_layernorm(x), layer.mlp
            h = nn.silu(mlp.gate_proj(z)) * mlp.up_proj(z)
            x = x + mlp.down_proj(h)
            h = np.array(h[0], np.float64)
            if signal == "impact":
                h = h * np.linalg.norm(np.array(mlp.down_proj.weight, np.float64), axis=0)
            seen.append(h**2 / (h**2).sum(axis=1, keepdims=True))
    return [np.concatenate(seen).mean(axis=0) for seen in shares]


@pytest.mark.parametrize("at_once", [1, 2**25])
@pytest.mark.parametrize("signal", SIGNALS)
def test_energies(tiny, rows, monkeypatch, signal, at_once):
    """Rows of unequal length: their padding counts for nothing, however they are put together."""
    monkeypatch.setattr(module, "_MAX_HIDDEN", at_once)
    ranks = measure_statistics(tiny[0], given_sequences("text", rows, 4), stable_at=None)
    assert ranks.metadata["tokens"] == str(sum(map(len, rows))) and ranks.metadata["sequences"] == str(len(rows))
    for got, order, expected in zip(
        ranks.energies[signal], ranks.ranks[signal], energies(tiny[0], signal, rows), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-6)
        assert sorted(order.tolist()) == list(range(1, len(expected) + 1))
        assert (np.diff(np.array(got)[np.argsort(np.array(order))]) <= 0).all()


def test_stability(tiny, rows):
    """Every other sequence is of the other half, across batches too; the worse signal is told."""
    seen, rows = [], [rows[2], rows[5]] * 3 + [rows[2]]
    measure_statistics(
        tiny[0], given_sequences("text", rows, 3), stable_at=None, progress=lambda n, s: seen.append((n, s))
    )
    assert [n for n, _ in seen] == [sum(map(len, rows[:n])) for n in (2, 5, 7)]
    means = []
    for signal in SIGNALS:
        halves = (energies(tiny[0], signal, rows[half::2]) for half in (0, 1))
        layers = [compare(a, b) for a, b in zip(*halves, strict=True)]
        means.append([np.mean([layer[key] for layer in layers]) for key in ("overlap", "correlation", "efficiency")])
    got = [seen[-1][1][key] for key in ("overlap", "correlation", "efficiency")]
    np.testing.assert_allclose(got, np.min(means, axis=0), atol=0.012)


@pytest.mark.parametrize("stable_at, tokens, read", [(0.97, 1000, 8), (None, 1000, 40), (None, 20, 24), (1.0, 5, 8)])
def test_when_it_stops(tiny, stable_at, tokens, read):
    """Halves of the same tokens are stable at once; else all tokens are read, in whole batches."""
    ranks = measure_statistics(tiny[0], given_sequences("text", [[1, 5, 7, 9]] * 10, 2), tokens, stable_at)
    assert ranks.metadata["tokens"] == str(read)
    history = json.loads(ranks.metadata["stability_history"])
    assert [n for n, *_ in history] == list(range(8, read + 1, 8)) and history[-1][1:] == [1.0, 1.0, 1.0]
    assert json.loads(ranks.metadata["stability"]) == {"correlation": 1.0, "overlap": 1.0, "efficiency": 1.0}


def test_not_stable(tiny):
    ranks = measure_statistics(*tiny[:1], small(*tiny), tokens=100, stable_at=1.0)
    assert 100 <= int(ranks.metadata["tokens"]) < 100 + 4 * 9


def test_seed(tiny, sensitive):
    first, again, other = (measure_statistics(tiny[0], small(*tiny, seed=s), 20, None) for s in (1, 1, 2))
    assert same(first, again)
    assert not mx.array_equal(first.energies["impact"][0], other.energies["impact"][0])


def test_metadata(tiny):
    metadata = measure_statistics(tiny[0], small(*tiny, seed=3), 60, None, name="mine").metadata
    expected = {"format_version": "1", "model": "mine", "model_type": "llama", "fingerprint": fingerprint(tiny[0])}
    expected |= {
        "sizes": "[96, 96]",
        "method": "null prompt and chat null prompt and own conversation",
        "length": "8",
        "temperature": "1.0",
        "seed": "3",
    }
    expected |= {"glass_mlx": glass_mlx.__version__, "mlx": mx.__version__, "mlx_lm": mlx_lm.__version__}
    assert expected.items() <= metadata.items()
    assert json.loads(metadata["blocks"]) == [block.path for block in tiny[0].blocks]


@pytest.mark.parametrize("rows", [[], [[]], [[], []]])
def test_empty_source(tiny, rows):
    with pytest.raises(GlassError, match="source gave no tokens"):
        measure_statistics(tiny[0], given_sequences("text", rows))


def interrupted(source: Source, at: int) -> Source:
    """The source, with a Ctrl-C at a batch, once."""
    left = [at]

    def batch(number):
        if left and number == left[0]:
            left.clear()
            raise KeyboardInterrupt
        return source.batch(number)

    return replace(source, batch=batch)


@pytest.fixture(scope="module")
def whole(tiny, rows):
    """What is measured in one go, of the model's own text or of a given one."""

    @functools.cache
    def whole(own: bool, tokens: int) -> GlobalStatistics:
        source = small(*tiny) if own else given_sequences("text", rows, 2)
        return measure_statistics(tiny[0], source, tokens, None)

    return whole


@pytest.mark.few(2)
@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("own", [True, False])
def test_resume(tiny, rows, tmp_path, own, at, whole):
    """Interrupted at any batch, the result is that of one go."""
    source = small(*tiny) if own else given_sequences("text", rows, 2)
    whole, partial = whole(own, 80), tmp_path / "new" / "partial"
    source, asked = interrupted(source, at), []
    with pytest.raises(KeyboardInterrupt):
        measure_statistics(tiny[0], source, 80, None, partial=partial)
    assert partial.exists() == (at > 0)
    again = replace(source, batch=lambda number: asked.append(number) or source.batch(number))
    assert same(measure_statistics(tiny[0], again, 80, None, partial=partial), whole)
    assert asked[0] == at
    assert same(
        measure_statistics(tiny[0], Source(source.domains, lambda n: [], source.settings), 80, None, None, partial),
        whole,
    )


def test_resume_when_stable(tiny, rows, tmp_path, monkeypatch):
    """What was stable when it was interrupted, just after being saved, is not read on."""
    original, arguments = SplitEvidence.save, (tiny[0], given_sequences("text", rows[2:3] * 8, 2), 999, 0.9)

    def save(self, *args):
        original(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SplitEvidence, "save", save)
        with pytest.raises(KeyboardInterrupt):
            measure_statistics(*arguments, partial=tmp_path / "partial")
    assert same(measure_statistics(*arguments, partial=tmp_path / "partial"), measure_statistics(*arguments))


def test_nothing_is_lost_when_the_ranks_cannot_be_written(tiny, rows, tmp_path, monkeypatch):
    out, source = tmp_path / "x.safetensors", given_sequences("text", rows)

    def fail(*args):
        raise GlassError("Cannot write x: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(GlobalStatistics, "write", fail)
        with pytest.raises(GlassError, match="No space"):
            build_ranks(*tiny, out, source, 20)
    assert build_ranks(*tiny, out, replace(source, batch=fail), 20) == out
    assert out.exists()


def test_what_a_killed_run_keeps(tiny, tmp_path):
    """The first batches are small, and all of them are kept."""
    rows, partial = [[1, 5 + n, 7, 9] for n in range(64)], tmp_path / "partial"
    kept, source = [], interrupted(given_sequences("text", rows, 32), 4)
    with pytest.raises(KeyboardInterrupt):
        measure_statistics(tiny[0], source, 999, None, partial=partial, progress=lambda n, _: kept.append(n // 4))
    assert kept == [2, 6, 14, 30]
    with safe_open(str(partial), "numpy") as file:
        assert json.loads(file.metadata()["state"])["rows"] == [rows[:30]]


@pytest.mark.few(2)
@pytest.mark.parametrize("other", [{"seed": 1}, {"sequences": 3}, {"length": 7}, {"temperature": 0.5}, {"chat": True}])
def test_partial_of_other_arguments(tiny, tmp_path, other, whole):
    measure_statistics(tiny[0], small(*tiny, **other), 20, None, partial=tmp_path / "partial")
    assert same(measure_statistics(tiny[0], small(*tiny), 20, None, None, tmp_path / "partial"), whole(True, 20))


def _state(path, change, sums=None):
    data = path.read_bytes()
    n = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(change(json.loads(json.loads(data[8:n])["__metadata__"]["state"])))
    save_file({"sums": np.zeros((2, 2, 1, 192)) if sums is None else sums}, path, metadata={"state": text})


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "garbage": lambda path: path.write_bytes(b"\x07" * 999),
    "no metadata": lambda path: save_file({"sums": np.zeros((2, 2, 1, 192))}, path),
    "no sums": lambda path: save_file({"x": np.zeros(3)}, path, metadata={"state": "{}"}),
    "no JSON": lambda path: save_file({"sums": np.zeros(3)}, path, metadata={"state": "{"}),
    "number": lambda path: _state(path, lambda state: 3),
    "list": lambda path: _state(path, lambda state: []),
    "no tokens": lambda path: _state(path, lambda state: state | {"tokens": [[0], [0]]}),
    "text for tokens": lambda path: _state(path, lambda state: state | {"tokens": "12"}),
    "other sizes": lambda path: _state(path, lambda state: state | {"sizes": [96, 95]}),
    "more": lambda path: _state(path, lambda state: state | {"more": 1}),
    "ids out of range": lambda path: _state(path, lambda state: state | {"rows": [[[2**31 - 1, 5]]]}),
    "negative ids": lambda path: _state(path, lambda state: state | {"rows": [[[-7, 5]]]}),
    "numbers for rows": lambda path: _state(path, lambda state: state | {"rows": [[7]]}),
    "a count that is text": lambda path: _state(path, lambda state: state | {"batches": "1"}),
    "deep": lambda path: save_file({"sums": np.zeros(3)}, path, metadata={"state": "[" * 99_999}),
    "not a number": lambda path: _state(path, lambda state: state, np.full((2, 2, 1, 192), np.nan)),
    "negative energies": lambda path: _state(path, lambda state: state, np.full((2, 2, 1, 192), -1.0)),
    "more energy than tokens": lambda path: _state(path, lambda state: state, np.full((2, 2, 1, 192), 1e308)),
    "no list for the history": lambda path: _state(path, lambda state: state | {"history": ""}),
    "no list for the samples": lambda path: _state(path, lambda state: state | {"samples": {"": ""}}),
    "no numbers in the history": lambda path: _state(path, lambda state: state | {"history": [[np.nan] * 3]}),
    "directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.few(10)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_partial(tiny, rows, tmp_path, damage):
    source, partial = given_sequences("text", rows[:3], 2), tmp_path / "partial"
    whole = measure_statistics(tiny[0], source, 20, None, partial=partial)
    DAMAGE[damage](partial)
    if damage == "directory":
        with pytest.raises(GlassError, match="Cannot write"):
            measure_statistics(tiny[0], source, 20, None, None, partial)
    else:
        assert same(measure_statistics(tiny[0], source, 20, None, None, partial), whole)


def test_model_stays_as_it_is(tiny, rows):
    model, x = tiny[0], mx.array([rows[0]])
    before, own = model.dense(x), [block.module[block.output] for block in model.blocks]

    def fail(tokens, agreement):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure_statistics(model, given_sequences("text", rows), progress=fail)
    assert all(block.module[block.output] is o for block, o in zip(model.blocks, own))
    assert mx.array_equal(model.dense(x), before)


def test_domains_are_kept_apart(tiny, rows):
    """Every other batch is of the other domain; what is read of each gives its energies, in whatever order."""
    source = Source(("a", "b"), lambda n: rows[n : n + 1])
    ranks = measure_statistics(tiny[0], source, stable_at=None)
    assert json.loads(ranks.metadata["domains"]) == ["a", "b"]
    assert json.loads(ranks.metadata["domain_tokens"]) == [sum(map(len, rows[d::2])) for d in (0, 1)]
    for signal in SIGNALS:
        for d in (0, 1):
            for got, expected in zip(ranks.domains[signal], energies(tiny[0], signal, rows[d::2]), strict=True):
                np.testing.assert_allclose(got[d], expected, rtol=1e-3, atol=1e-6)


def test_every_domain_is_read_once_at_least(tiny, rows):
    ranks = measure_statistics(tiny[0], Source(("a", "b", "c"), lambda n: rows[n : n + 1]), tokens=1, stable_at=0.01)
    assert json.loads(ranks.metadata["domains"]) == ["a", "b", "c"]


def bars(capsys, monkeypatch, build) -> list[tuple[str, int, int]]:
    """What the bars of a building showed: (phase, done, total), as on a terminal."""
    shown = []

    class Bar(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options | {"disable": False, "mininterval": 0, "miniters": 1})

        def refresh(self, *args, **options):
            shown.append((self.desc, self.n, self.total, self.format_dict["rate"], self.initial))
            return super().refresh(*args, **options)

    monkeypatch.setattr(bars_module, "tqdm", Bar)
    build()
    return shown


def test_progress(tiny, sensitive, tmp_path, monkeypatch, capsys):
    """It moves with every token that the model generates, in its phases' order, and each phase comes to its end."""
    told = []
    source, out = small(*tiny), tmp_path / "x.safetensors"
    shown = bars(
        capsys,
        monkeypatch,
        lambda: build_ranks(*tiny, out, source, 60, stable_at=None, on_step=lambda *step: told.append(step)),
    )
    phases = list(dict.fromkeys(name for name, *_ in shown))
    assert len(phases) == 4 and phases[0] == bars_module.READING
    read = [done for name, done, *_ in shown if name == phases[0]]
    assert max(b - a for a, b in zip(read, read[1:])) <= 8 < max(read)  # a token of every sequence of a batch
    assert list(dict.fromkeys(name for name, *_ in told)) == phases
    assert [done for name, done, _ in told if name == phases[0]][-1] >= 60
    for phase in phases[1:]:
        name, done, total, *_ = [entry for entry in shown if entry[0] == phase][-1]
        assert done == total or phase == phases[-1]  # no text is long enough to judge densities by
    assert source.watchers == []


def test_progress_of_a_resumed_run(tiny, tmp_path, monkeypatch, capsys, caplog):
    """What is kept is said; the next run begins there, and its rate is of its own tokens."""
    out, source = tmp_path / "x.safetensors", small(*tiny)
    with pytest.raises(KeyboardInterrupt):
        build_ranks(*tiny, out, interrupted(source, 2), 60, stable_at=None)
    kept = int(re.search(r"stopped: (\d+) tokens are kept", caplog.text)[1])
    shown = bars(capsys, monkeypatch, lambda: build_ranks(*tiny, out, source, 60, stable_at=None))
    assert kept > 0 and all(initial == kept for name, *_, initial in shown if name == bars_module.READING)
    caplog.clear()
    with pytest.raises(KeyboardInterrupt):
        build_ranks(*tiny, tmp_path / "y.safetensors", interrupted(source, 0), 60)
    assert "stopped: no tokens are kept" in caplog.text


@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_routed_experts(family, tmp_path):
    """Measured, written and read: ranked within each expert; padding counts for nothing; decoding uses them."""
    model = GlassModel(tiny_model(family), GlassConfig(experts="sparse"))
    rows = [[(7 * i + j) % 97 for j in range(5 + 9 * i)] for i in range(5)]
    statistics = measure_statistics(model, given_sequences("text", rows, 5), stable_at=None)
    expected = []
    for row in rows:
        cache = model.make_cache()
        mx.eval(model.prefill(mx.array([row]), cache))
        expected.append(np.array(model.session(cache).energy))
    found = np.concatenate([np.array(e) for e in statistics.energies["impact"]])
    np.testing.assert_allclose(found, sum(expected) / sum(map(len, rows)), rtol=1e-3, atol=1e-7)
    assert statistics.experts == [b.experts for b in model.blocks] and max(statistics.experts) == 4
    for block, ranks, response in zip(model.blocks, statistics.ranks["impact"], statistics.responses or [None] * 9):
        within = np.sort(np.array(ranks).reshape(block.experts or 1, -1), axis=1)
        assert (within == np.arange(1, block.width + 1)).all()
        assert response.coefficients.shape[1] == response.hidden_mean.size == block.size
    statistics.write(tmp_path / "ranks.safetensors")
    read = GlobalStatistics.read(tmp_path / "ranks.safetensors")
    assert same(read, statistics)
    with safe_open(str(tmp_path / "ranks.safetensors"), framework="numpy") as f:
        routed = model.blocks[0]
        assert f.get_slice("layers.0.impact.rank").get_shape() == [4, routed.width]
    read.check(model).use_in(model)
    cache = model.make_cache()
    mx.eval(model.prefill(mx.array([rows[1]]), cache))
    model.select(cache)
    assert mx.all(mx.isfinite(model.decode(mx.array([[5]]), cache)))
    known = [None if b.experts else response for b, response in zip(model.blocks, statistics.responses)]
    replace(statistics, responses=known).write(tmp_path / "older.safetensors")  # without those of routed experts
    older = GlobalStatistics.read(tmp_path / "older.safetensors").responses or known
    assert [response is None for response in older] == [b.experts > 0 for b in model.blocks]
    with pytest.raises(StatsError, match="experts in FFN layer 0"):
        statistics.metadata["experts"] = json.dumps([2 * e for e in statistics.experts])
        statistics.check(model)


def test_stability_of_routed_experts_is_that_of_each_expert():
    """Which experts a half of the text was sent to does not count for the order, only which of their neurons fired."""
    order = np.array([[4.0, 1, 3, 2], [1, 2, 4, 3]])
    halves = [order * [[100], [1]], order * [[1], [100]]]

    def stability(second: np.ndarray) -> dict[str, float]:
        sums = np.stack([halves[0], second]).reshape(2, 1, 8)
        return SplitEvidence([8], np.stack([sums, sums]), [[9], [9]], [[]], experts=[2]).stability()

    assert stability(halves[1]) == {"correlation": pytest.approx(1), "overlap": 1, "efficiency": 1}
    assert stability(halves[1][:, ::-1])["overlap"] < 1
