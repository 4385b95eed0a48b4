"""Tests of options that have no effect beside each other."""

from __future__ import annotations

import importlib

import pytest

from glass_mlx.__main__ import COMMANDS

# What each command line is told, warnings first: an error ends it.
TOLD = [
    ("chat", "--verify --draft-tokens 2 --temp 1 --top-p 0.5 --xtc-probability 0.1 --xtc-threshold 0.2 --seed 3", []),
    ("chat", "--draft-tokens 2", ["--draft-tokens has no effect without --verify"]),
    ("chat", "--top-p 0.5 --seed 1", ["--top-p and --seed have no effect without --temp"]),
    ("chat", "--temp 1 --xtc-threshold 0.2", ["--xtc-threshold has no effect without --xtc-probability"]),
    ("chat", "--quality fast --density 0.3", ["--density has no effect with --quality"]),
    ("chat", "--stats f --stats-repo a/b --build", ["--stats-repo and --build have no effect with --stats"]),
    ("chat", "--global-weight 0 --build", ["--build has no effect with --global-weight 0"]),
    (
        "chat",
        "--dense --density 0.3 --signal activation --no-compensation --build",
        [
            "--density and --build have no effect with --dense",
            "--no-compensation and --signal have no effect with --dense until /density chooses another",
        ],
    ),
    ("generate", "--kv-bits 8 --kv-group-size 32 --temp 1 --min-p 0.1 --min-tokens-to-keep 2 --top-k 3", []),
    ("generate", "--temp 1 --min-tokens-to-keep 2", ["--min-tokens-to-keep has no effect without --min-p"]),
    ("generate", "--top-k 3", ["--top-k has no effect without --temp"]),
    ("generate", "--num-draft-tokens 2", ["--num-draft-tokens has no effect without --draft-model"]),
    ("generate", "--density 1 --verify --signal activation", ["--signal and --verify have no effect with --density 1"]),
    ("generate", "--density 1 --quality high --verify", ["--density has no effect with --quality"]),
    (
        "generate",
        "--dense --stats f --verify --draft-tokens 3 --low-memory",
        ["--low-memory, --stats, --verify and --draft-tokens have no effect with --dense"],
    ),
    (
        "generate",
        "--draft-model m --density 0.3 --max-kv-size 9",
        ["--density and --max-kv-size have no effect with --draft-model"],
    ),
    ("generate", "--draft-model m --verify", ["--verify cannot be used with --draft-model"]),
    ("generate", "--draft-model m --prompt-cache-file f", ["--prompt-cache-file cannot be used with --draft-model"]),
    (
        "generate",
        "--ignore-chat-template --system-prompt a --prefill-response b",
        ["--system-prompt and --prefill-response have no effect with --ignore-chat-template"],
    ),
    (
        "generate",
        "--prompt-cache-file f --system-prompt a --max-kv-size 9",
        ["--max-kv-size and --system-prompt have no effect with --prompt-cache-file"],
    ),
    ("server", "--kv-bits 8 --kv-group-size 32 --verify --draft-tokens 2 --top-p 0.5 --log-prompts", []),
    ("server", "--kv-group-size 32", ["--kv-group-size has no effect without --kv-bits"]),
    ("server", "--draft-tokens 2", ["--draft-tokens has no effect without --verify until a request asks to verify"]),
    ("server", "--dense --quality fast", ["--quality has no effect with --dense"]),
    ("server", "--dense --stats f", ["--stats has no effect with --dense until a request sets its density"]),
    ("server", "--log-prompts --log-level ERROR", ["--log-prompts has no effect with --log-level ERROR"]),
    ("evaluate", "--arms glass-i --global-weight 0.3 --free --plot f --count 2", []),
    (
        "evaluate",
        "--arms glass --global-weight 0.3",
        ["--global-weight has no effect without --arms glass-a or --arms glass-i"],
    ),
    (
        "evaluate",
        "--exact recall --limit 3 --plot f --seed 1",
        ["--plot and --seed have no effect with --exact"],
    ),
    ("evaluate", "--tasks a --arms glass --include-path d --limit 3", ["--arms has no effect with --tasks"]),
    ("evaluate", "--limit 3", ["--limit has no effect without --exact or --tasks"]),
    ("tradeoff", "--shape qwen3-4b --layers 1 --bits 8 --acceptance 0.5", []),
    ("tradeoff", "--acceptance 0.5", ["--acceptance has no effect without --shape"]),
    ("tradeoff", "--shape qwen3-4b --ways glass --prompts f", ["--ways and --prompts have no effect with --shape"]),
    ("tradeoff", "--ways glass --draft-tokens 3", ["--draft-tokens has no effect without --ways verified"]),
    ("tradeoff", "--layers 1", ["--layers cannot be used without --shape"]),
    ("benchmark", "--bits 8", ["--bits cannot be used without --shape"]),
    ("benchmark", "--plan --plot f -n 3", ["--num-trials and --plot have no effect with --plan"]),
    ("stats", "build --model m --text f --seed 3", ["--seed has no effect with --text"]),
    ("stats", "build --model m --all --stable-at 0.9", ["--stable-at has no effect with --all"]),
    ("stats", "plot f --out g --density 0.3", ["--density has no effect without --model"]),
    ("stats", "verify f --trust-remote-code", ["--trust-remote-code has no effect without --model"]),
]


@pytest.mark.parametrize(("command", "line", "told"), TOLD)
def test_options_that_have_no_effect_are_told(invoke, monkeypatch, caplog, command, line, told):
    """Each once, and with it what makes it so; what has an effect is not."""
    module = importlib.import_module(f"glass_mlx.{command}")
    monkeypatch.setattr(module, "run", lambda *_: None)
    done = invoke(module.main, *line.split())
    errors = [message for message in told if "cannot be used" in message]
    assert done.code == (2 if errors else 0)
    assert [record.getMessage() for record in caplog.records] == [m for m in told if m not in errors]
    assert all(done.err.strip().endswith(error) for error in errors)


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_told_of_options_that_were_not_given(invoke, monkeypatch, caplog, command):
    module = importlib.import_module(f"glass_mlx.{command}")
    monkeypatch.setattr(module, "run", lambda *_: None)
    assert invoke(module.main, *(["list"] if command in ("models", "stats") else [])).code == 0
    assert not caplog.records
