"""Nothing that comes out of anyone's file, name or request can command a terminal, whatever prints or logs it."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from servers import CHAT, QUESTION, serving

from glass_mlx import GlassError, benchmark, chat, evaluate, server, stats, stream_generate, tradeoff
from glass_mlx.cli.running import run
from glass_mlx.decoding import conversation, stream
from glass_mlx.errors import printable, printable_lines
from glass_mlx.generate import main as generate_main
from glass_mlx.serving.app import ApiOptions
from glass_mlx.serving.logs import log_to_file

# Clear the screen, go back to the line's start, ring; a C1 sequence; text that runs the other way; surrogates' place.
NASTY = "a\x1b[2J\r\a\x08\x9b31m\x7f\u202eb\u2028"


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


def assert_clean(*texts: str) -> None:
    for text in texts:
        assert [c for c in text if not c.isprintable() and c not in "\n\t"] == []


@pytest.fixture
def nasty_ranks(ranks, tmp_path) -> Path:
    """Ranks with such values in their metadata, in a file of such a name."""
    path = tmp_path / f"{NASTY}.safetensors"
    told = dict.fromkeys(("model", "original", "method", "revision", NASTY), NASTY)
    replace(ranks, metadata=ranks.metadata | told | {"domains": json.dumps([NASTY])}).write(path)
    return path


@pytest.fixture
def nasty_model(tiny_dir, tmp_path) -> Path:
    """The random model in a directory of such a name, with a template that raises such an error for such a text."""
    path = shutil.copytree(tiny_dir, tmp_path / NASTY)
    template = path / "chat_template.jinja"
    raises = "{% if 'fail' in messages[-1].content %}{{ raise_exception(messages[-1].content) }}{% endif %}"
    template.write_text(raises + template.read_text())
    return path


def test_printable():
    assert printable(NASTY) == "a [2J    31m  b " and printable("é 漢 😀") == "é 漢 😀"
    assert printable_lines("a\tb\n👩\u200d💻\x1b") == "a\tb\n👩\u200d💻 "


@pytest.mark.parametrize("command", "show verify diff merge list plot index unreadable absent".split())
def test_ranks(command, nasty_ranks, invoke, monkeypatch, drawn, tmp_path):
    monkeypatch.setattr("glass_mlx.ranks.lookup.STATS_DIR", nasty_ranks.parent)
    if command == "unreadable":
        nasty_ranks.write_bytes(b"rubbish")
    options = {
        "diff": ("diff", nasty_ranks, nasty_ranks),
        "merge": ("merge", nasty_ranks, nasty_ranks, "--out", tmp_path / f"{NASTY}2"),
        "list": ("list",),
        "plot": ("plot", nasty_ranks, "--out", tmp_path / f"{NASTY}.png"),
        "index": ("index", nasty_ranks.parent),
        "absent": ("show", f"{NASTY}/none"),
        "unreadable": ("list",),
    }
    done = invoke(stats.main, *options.get(command, (command, nasty_ranks)))
    assert done.code == (1 if command == "absent" else 0) and (done.out + done.err).strip()
    assert_clean(done.out, done.err)


SMALL = {
    "generate": (generate_main, "--prompt", "x", "--max-tokens", 2),
    "generate fail": (generate_main, "--prompt", f"fail {NASTY}", "--max-tokens", 2),
    "benchmark": (benchmark.main, "-p", 4, "-g", 3, "-n", 1),
    "evaluate": (evaluate.main, "--tokens", 2, "--count", 1, "--arms", "griffin"),
    "tradeoff": (tradeoff.main, "--tokens", 3, "--count", 1, "--density", "0.5", "--ways", "griffin"),
    "build": (stats.main, "build", "--tokens", 8, "--sequences", 2, "--length", 4),
}


@pytest.mark.parametrize("command", SMALL)
def test_commands_with_a_model(command, nasty_model, invoke, tmp_path):
    main, *options = SMALL[command]
    out = ("--out", tmp_path / f"{NASTY}.safetensors") if command == "build" else ()
    done = invoke(main, *options, "--model", nasty_model, *out)
    assert done.code == (1 if command.endswith("fail") else 0), done.err
    assert_clean(done.out, done.err)


def test_chat(nasty_model, invoke, monkeypatch):
    """Names, errors of the template, and what the model says."""
    typed = "\n".join(["x", f"fail {NASTY}", f"/{NASTY}", f"/density {NASTY}", "q"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))

    def nasty(*args, **kwargs):
        for response in stream_generate(*args, **kwargs):
            yield replace(response, text=NASTY)

    monkeypatch.setattr(conversation, "stream_generate", nasty)
    done = invoke(chat.main, "--model", nasty_model, "--no-build", "--max-tokens", 2)
    assert done.code == 0 and "rejects this conversation" in done.err and "[2J" in done.out
    assert_clean(done.out, done.err)


def test_generate_on_a_terminal(nasty_model, invoke, monkeypatch):
    def nasty(*args, **kwargs):
        for response in stream_generate(*args, **kwargs):
            yield replace(response, text=NASTY)

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(stream, "stream_generate", nasty)
    done = invoke(generate_main, "--model", nasty_model, "--prompt", "x", "--max-tokens", 2)
    assert done.code == 0 and "[2J" in done.out
    assert_clean(done.out, done.err)


@pytest.mark.parametrize("error", [GlassError(NASTY), RuntimeError(NASTY)])
def test_errors_of_a_command(error, invoke, monkeypatch):
    """And its log, which goes to stderr too."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def fail() -> None:
        for name in ("glass_mlx", "uvicorn.error", "transformers.anything"):
            logging.getLogger(name).warning("of %s", NASTY)
        try:
            raise ValueError(NASTY)
        except ValueError:
            logging.getLogger("glass_mlx").exception("%s", NASTY)
        raise error

    done = invoke(lambda: run(fail))
    assert done.code == 1 and "ValueError" in done.err and done.err.count("of a [2J") >= 2
    assert_clean(done.out, done.err)


def test_the_servers_log(tiny_dir, tmp_path, monkeypatch):
    """Whatever is asked, with prompts in the log."""
    for name in ("glass_mlx", "uvicorn"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    path = log_to_file(directory=tmp_path)
    model = shutil.copytree(tiny_dir, tmp_path / NASTY)
    options = ApiOptions(defaults={"max_tokens": 2}, log_prompts=True)
    asked = [
        {"messages": [{"role": "user", "content": NASTY}]},
        {"messages": QUESTION, "user": NASTY, "stop": [NASTY], "stream": True},
        {"messages": QUESTION, "model": NASTY},
        {"messages": [{"role": NASTY, "content": ""}]},
        {"messages": QUESTION, "chat_template_kwargs": {NASTY: NASTY}},
    ]
    with serving(options, model=str(model), load={"stats": False}) as served:
        answers = [httpx.post(served.url + CHAT, json=body, timeout=60) for body in asked]
        answers.append(httpx.get(served.url + "/v1/models/%1b%5b2J%0d"))
        assert [answer.status_code for answer in answers] == [200, 200, 200, 400, 200, 404]  # it is the default's name
    text = path.read_text(encoding="utf-8")
    assert text.count("2 generated") == 4 and "[2J" in text
    assert_clean(text)
    assert all(len(line.split(" glass_mlx: ")) == 2 for line in text.splitlines())  # none is forged


def test_the_servers_greeting(invoke, monkeypatch, tmp_path):
    monkeypatch.setattr(server.threading.Event, "wait", lambda self, timeout=None: True)
    done = invoke(server.main, "--port", 0, "--log-dir", tmp_path / NASTY)
    assert done.out.startswith("glass_mlx is at ") or done.code
    assert_clean(done.out, done.err)
