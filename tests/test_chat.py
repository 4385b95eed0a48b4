"""Tests of the terminal chat: what is typed, and what is shown."""

from __future__ import annotations

import re

import mlx.core as mx
import pytest

import glass_mlx.decoding.conversation
from glass_mlx import chat
from glass_mlx.chat import Chat, main
from glass_mlx.decoding.conversation import Conversation
from glass_mlx.ranks import measure, sources
from glass_mlx.ranks.lookup import STATS_DIR

HELLO = "I want to find a restaurant in San Jose."
STATUS = re.compile(
    r"^\d+ tokens · [\d.]+ tok/s · prompt [\d.]+ tok/s · density ([\d.]+) "
    r"\(([\d,]+) of ([\d,]+) neurons\) · peak [\d.]+ GB$",
    re.MULTILINE,
)


@pytest.fixture
def talk(monkeypatch, invoke):
    """Run the chat on lines typed one after the other; exceptions are raised. Ends with Ctrl-D."""

    def talk(*lines, options=()):
        typed = iter([*lines, EOFError()])

        def type_(prompt=""):
            line = next(typed)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", type_)
        done = invoke(main, "--max-tokens", 8, *options)
        done.left = list(typed)
        return done

    return talk


@pytest.fixture
def chats(monkeypatch):
    """The chats that were opened."""
    opened = []
    init = Chat.__init__
    monkeypatch.setattr(Chat, "__init__", lambda self, args: (opened.append(self), init(self, args))[1])
    return opened


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C comes after the third token of an answer."""
    original = glass_mlx.decoding.conversation.stream_generate

    def stream(*args, **kwargs):
        for n, response in enumerate(original(*args, **kwargs)):
            if n == 3:
                raise KeyboardInterrupt
            yield response

    monkeypatch.setattr(glass_mlx.decoding.conversation, "stream_generate", stream)


@pytest.fixture(scope="module")
def answer(demo):
    """The answer to HELLO, in eight tokens at most."""
    return "".join(r.text for r in Conversation(*demo).reply(HELLO, max_tokens=8))


def test_answer(demo, talk, chats, answer):
    done = talk(HELLO)
    assert (done.code, done.err) == (0, "")
    assert answer in done.out
    [status] = STATUS.findall(done.out)
    sizes = [block.size for block in demo[0].blocks]
    assert status == ("0.5", f"{sum(sizes) // 2:,}", f"{sum(sizes):,}")
    assert done.out.startswith(f"demo: {sum(sizes):,} FFN neurons in {len(sizes)} layers\n{chat.HELP}\n")
    assert [m["content"] for m in chats[0].conversation.messages] == [HELLO, answer]


def test_quit(talk):
    done = talk("", "  ", "q", HELLO)
    assert done.code == 0 and len(done.left) == 2
    assert not STATUS.search(done.out)


def test_end_of_input(talk):
    done = talk()
    assert done.code == 0 and done.out.endswith("\n")


def test_help(talk):
    assert talk("h").out.count(chat.HELP) == 2
    for command in ("q", "r", "h", "/density", "/dense", "Ctrl-C", "Ctrl-D"):
        assert re.search(rf"(^  |or ){re.escape(command)}\b", chat.HELP, re.MULTILINE)


def test_forget(talk, chats, answer):
    done = talk(HELLO, "And you?", "r", HELLO)
    assert done.out.split("conversation forgotten\n")[1].startswith(f"{answer}\n")
    assert len(chats[0].conversation.messages) == 2


def test_density(talk):
    done = talk("/density", "/density 0.25", HELLO, "/density 1", "Mexican food", "/density")
    assert re.findall(r"^density (.*)", done.out, re.MULTILINE) == ["0.5", "0.25", "1", "1"]
    assert [float(s[0]) for s in STATUS.findall(done.out)] == [0.25, 1.0]


@pytest.mark.parametrize("bad", ["0", "1.5", "abc", "nan"])
def test_bad_density(talk, bad):
    done = talk(f"/density {bad}", "/density")
    assert f"'{bad}' is not above 0" in done.out
    assert re.findall(r"^density (.*)", done.out, re.MULTILINE) == ["0.5"]


def test_density_outlives_forgetting(talk):
    assert talk("/density 0.25", HELLO, "r", "/density").out.rstrip().endswith("density 0.25")


def test_dense(demo, talk, chats):
    """The answer of the dense model is shown; the conversation keeps its own."""
    conversation = Conversation(*demo)
    expected = "".join(r.text for r in conversation.reply(HELLO, max_tokens=8, density=1.0))
    done = talk("/density 0.1", HELLO, "/dense")
    assert expected in done.out
    assert [float(s[0]) for s in STATUS.findall(done.out)] == [0.1, 1.0]
    assert len(chats[0].conversation.messages) == 2
    assert chats[0].conversation.messages[-1]["content"] != expected
    assert chats[0].conversation.session.config.density == 0.1


def test_dense_without_a_message(talk):
    done = talk("/dense", options=("--system-prompt", "Be brief."))
    assert "There is no message to answer yet" in done.out and not STATUS.search(done.out)


@pytest.mark.parametrize("command", ["/help", "/densityx 0.5", "/", "/quit now"])
def test_unknown_command(talk, command):
    done = talk(command)
    assert f"unknown command {command.split()[0]};" in done.out and not STATUS.search(done.out)


def test_interrupted_answer(talk, chats, interrupted, answer):
    done = talk(HELLO, "h")
    assert done.code == 0 and " [stopped]\n" in done.out
    assert done.out.count(chat.HELP) == 2
    [user, reply] = chats[0].conversation.messages
    assert reply["content"] and answer.startswith(reply["content"]) and reply["content"] != answer


def test_goes_on_after_an_interruption(talk, chats, interrupted):
    done = talk(HELLO, "Mexican food", "/density 0.25", "Thank you")
    assert done.out.count("[stopped]") == len(STATUS.findall(done.out)) == 3
    assert [m["role"] for m in chats[0].conversation.messages] == ["user", "assistant"] * 3


def test_interrupted_at_the_prompt(talk, answer):
    done = talk(KeyboardInterrupt(), HELLO)
    assert done.code == 0 and answer in done.out


def test_error_in_an_answer(talk, model_copy):
    (model_copy / "chat_template.jinja").write_text(
        "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}Hi"
    )
    done = talk("Hi", "Hi again", "r", "Hi", options=("--model", model_copy, "--dense"))
    assert done.code == 0 and "one message only" in done.out
    assert len(STATUS.findall(done.out)) == 2


def test_dense_option(talk):
    [status] = STATUS.findall(talk(HELLO, options=("--dense",)).out)
    assert status[0] == "1" and status[1] == status[2]


def test_no_chat_template(talk, model_copy):
    (model_copy / "chat_template.jinja").unlink()
    done = talk(HELLO, options=("--model", model_copy, "--dense"))
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: This model has no chat template") and done.err.count("\n") == 1


@pytest.mark.parametrize("options", [("--model", "nonsense"), ("--stats", "missing"), ("--adapter-path", "missing")])
def test_failures(talk, options):
    done = talk(HELLO, options=options)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1


def test_stats_of_another_model(talk, tiny_dir):
    done = talk(options=("--model", tiny_dir, "--stats", STATS_DIR / "demo.safetensors"))
    assert done.code == 1 and "FFN layers" in done.err


@pytest.mark.parametrize(
    "options",
    [
        *(("--density", "0"), ("--max-tokens", "0"), ("--pipeline",), ("--signal", "x")),
        *(("--temp", "-1"), ("--top-p", "5"), ("--max-kv-size", "0"), ("--draft-tokens", "0")),
    ],
)
def test_usage_errors(talk, options):
    done = talk(options=options)
    assert (done.code, done.out) == (2, "")
    assert options[0] in done.err.splitlines()[-1]


def test_ranks_are_measured_at_first_use(talk, chats, tiny_dir, small_builds, monkeypatch, caplog, tmp_path):
    """And kept: the second start finds them at once."""
    assert talk("Hi", options=("--model", tiny_dir)).code == 0
    assert "measuring them, once" in caplog.text
    caplog.clear()
    monkeypatch.setattr(measure, "build_ranks", None)
    assert talk("Hi", options=("--model", tiny_dir)).code == 0
    assert not caplog.records
    first, second = (chat.model.global_ranks["impact"] for chat in chats)
    for a, b in zip(first, second, strict=True):
        assert mx.array_equal(a, b)
    assert chats[1].model.global_weight(chats[1].conversation.session) > 0
    assert [path.suffix for path in (tmp_path / "glass_cache_dir").iterdir()] == [".safetensors"]


def test_interrupted_measuring(talk, chats, tiny_dir, small_builds, monkeypatch, caplog, tmp_path):
    """Ctrl-C goes on without ranks; the next start goes on measuring."""
    calls, original = [], sources.batch_generate

    def batch_generate(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(sources, "batch_generate", batch_generate)
    done = talk("Hi", options=("--model", tiny_dir))
    assert done.code == 0 and len(STATUS.findall(done.out)) == 1
    assert "stopped; what was measured is kept" in caplog.text and chats[0].model.global_ranks is None
    assert [path.suffix for path in (tmp_path / "glass_cache_dir").iterdir()] == [".partial"]
    assert talk("Hi", options=("--model", tiny_dir)).code == 0
    assert chats[1].model.global_ranks is not None
    assert len(calls) == 4  # the first batch was kept


@pytest.mark.parametrize("options", [("--no-build",), ("--dense",), ("--global-weight", 0), ("--stats", "given")])
def test_measuring_declined(talk, chats, tiny_dir, written, monkeypatch, caplog, options):
    monkeypatch.setattr(measure, "build_ranks", None)
    options = [written if option == "given" else option for option in options]
    assert talk("Hi", options=("--model", tiny_dir, *options)).code == 0
    assert (chats[0].model.global_ranks is None) == (written not in options)
    assert len(caplog.records) == ("--no-build" in options)


def test_process(python_m, answer):
    """A process of its own, typed to through a pipe."""
    done = python_m("glass_mlx", "chat", "--max-tokens", 8, stdin=f"{HELLO}\n/dense\nq\n")
    assert (done.code, done.err) == (0, "")
    assert f">> {answer}" in done.out
    assert [float(s[0]) for s in STATUS.findall(done.out)] == [0.5, 1.0]
