"""Tests of the pictures."""

from __future__ import annotations

import errno
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from glass_mlx import GlassError
from glass_mlx.core.importance import SIGNALS
from glass_mlx.evaluation.plot import plot_ranks
from glass_mlx.stats import main


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that were saved, without drawing them, which takes longest; test_disk_full draws one."""
    figures = []

    def savefig(figure, path, **_):
        figures.append(figure)
        Path(path).write_bytes(b"\x89PNG\r\n\x1a\n")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    return figures


def assert_png(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.few(1)
@pytest.mark.parametrize("signal", SIGNALS)
def test_concentration(ranks, tmp_path, drawn, signal):
    """Each layer's line says how much of the energy the best x of the neurons hold."""
    out = tmp_path / "new" / "x.png"
    plot_ranks(ranks, out, signal=signal)
    assert_png(out)
    axes = drawn[0].axes[0]
    *lines, diagonal = axes.lines
    for line, energy in zip(lines, ranks.energies[signal], strict=True):
        x, y = line.get_data()
        best = np.sort(np.array(energy, np.float64))[::-1]
        for k in (1, 48, 96):
            assert x[k - 1] == k / 96 and y[k - 1] == pytest.approx(best[:k].sum() / best.sum())
    assert signal in axes.get_title() and "tiny" in drawn[0].get_suptitle()


@pytest.mark.parametrize("columns", [2, 3])  # older files lack the efficiency
def test_stability(ranks, tmp_path, drawn, columns):
    history = [row[: 1 + columns] for row in ([10, 0.5, 0.1, 0.4], [20, 0.7, 0.4, 0.8], [40, 0.8, 0.6, 0.9])]
    metadata = ranks.metadata | {"stability_history": json.dumps(history)}
    plot_ranks(replace(ranks, metadata=metadata), tmp_path / "x.png")
    lines = [np.transpose(line.get_data()).tolist() for line in drawn[0].axes[1].lines]
    assert lines == [[[row[0], row[i]] for row in history] for i in range(1, 1 + columns)]


@pytest.mark.parametrize(
    "text", ["", "[", "null", "3", "{}", "[[1, 2, 3]]", "[[1, 2], [3, 4]]", '["a", "b"]', "[1, [2]]"]
)
def test_no_or_odd_history(ranks, tmp_path, drawn, text):
    """Files may be anyone's."""
    metadata = ranks.metadata | {"stability_history": text}
    plot_ranks(replace(ranks, metadata=metadata), tmp_path / "x.png")
    assert_png(tmp_path / "x.png")
    assert len(drawn[0].axes) == 2  # with the scale of the layers


def test_overlaps(ranks, tmp_path, drawn):
    metadata = ranks.metadata | {"stability_history": "[]"}
    plot_ranks(replace(ranks, metadata=metadata), tmp_path / "x.png", np.array([[0.5, 0.7], [0.6, 0.9]]), 0.25)
    assert_png(tmp_path / "x.png")
    axes = drawn[0].axes[1]
    assert "25%" in axes.get_ylabel() and "2 prompts" in axes.get_title()


@pytest.mark.parametrize("many", [2, 40])
def test_layers_are_told_by_a_scale(ranks, tmp_path, drawn, many):
    """However many there are: no two have one colour, and no legend hides their curves."""
    energies = {s: [ranks.energies[s][0]] * many for s in SIGNALS}
    plot_ranks(replace(ranks, energies=energies), tmp_path / "x.png")
    axes, scale = drawn[0].axes[0], drawn[0].axes[-1]
    assert len({tuple(line.get_color()) for line in axes.lines[:-1]}) == many
    assert len(axes.get_legend().get_texts()) == 1 and scale.get_ylabel() == "layer"


def test_without_matplotlib(ranks, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(GlassError, match=r"^Plots need matplotlib: pip install 'glass_mlx\[plot\]'$"):
        plot_ranks(ranks, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_disk_full(ranks, tmp_path, monkeypatch):
    def fail(self, path, **options):
        Path(path).write_bytes(b"\x89PNG")
        raise OSError(errno.ENOSPC, "No space left on device")

    named = replace(ranks, metadata=ranks.metadata | {"model": "$a_$"})  # no formula
    plot_ranks(named, tmp_path / "x.png")
    before = (tmp_path / "x.png").read_bytes()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(GlassError, match="Cannot write .*No space left"):
        plot_ranks(ranks, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == before
    assert_png(tmp_path / "x.png")


def test_command(invoke, written, tiny_dir, tmp_path, drawn):
    out = tmp_path / "new" / "x.png"
    done = invoke(main, "plot", written, "--out", out)
    assert (done.code, done.out, done.err) == (0, f"{out}\n", "")
    assert_png(out)
    done = invoke(main, "plot", written, "--out", out, "--model", tiny_dir, "--prompt", "The old house")
    assert done.code == 0
    assert len(drawn[1].axes) == len(drawn[0].axes) + 1
    assert any("1 prompts" in axes.get_title() for axes in drawn[1].axes)


def test_command_refuses(invoke, written, tmp_path):
    for options in ((), ("--model", "demo")):
        (tmp_path / "file").touch()
        done = invoke(main, "plot", written, "--out", tmp_path / "file" / "x.png", *options)
        assert (done.code, done.out) == (1, "") and done.err.count("\n") == 1
    assert "FFN layers" in done.err
