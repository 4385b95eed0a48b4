"""Tests of what is said of a mistyped command line."""

from __future__ import annotations

import importlib

import pytest

from glass_mlx.hub import model_files


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("chat --modle demo", "--model"),
        ("chat --qualitty=fast", "--quality"),
        ("chat --quality hihg", "high"),
        ("chat qwen3-4b", "--model qwen3-4b"),
        ("generate hello there -m 3", "--prompt 'hello there'"),
        ("server qwen3-4b", "--model qwen3-4b"),
        ("stats bild", "build"),
        ("stats build --model demo --tokns 3", "--tokens"),
        ("models lst", "list"),
        ("models --jsno", "--json"),
        ("benchmark --shape qwen3-8", "qwen3-8b"),
        ("families lama", "llama"),
        ("generate \x1b[2J", "--prompt ' [2J'"),
        ("doctor now", None),
        ("chat --nothing-like-it", None),
    ],
)
def test_what_was_meant(invoke, monkeypatch, line, meant):
    monkeypatch.setattr(model_files, "model_types", lambda: ["llama", "gpt2"])
    command, *arguments = line.split()
    done = invoke(importlib.import_module(f"glass_mlx.{command}").main, *arguments)
    assert done.code == 2 and done.out == ""
    assert (f"did you mean {meant}" in done.err) if meant else ("did you mean" not in done.err)


def test_models_without_a_command_lists_them(invoke):
    main = importlib.import_module("glass_mlx.models").main
    assert invoke(main).out == invoke(main, "list").out
    assert invoke(main, "--json").out == invoke(main, "list", "--json").out
