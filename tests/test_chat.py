"""Tests of the terminal chat: what is typed, and what is shown."""

from __future__ import annotations

import io
import json
import re
import sys

import mlx.core as mx
import pytest

import glass_mlx.decoding.conversation
from glass_mlx.chat import main
from glass_mlx.decoding.conversation import Conversation
from glass_mlx.ranks import measure, sources
from glass_mlx.ranks.lookup import STATS_DIR
from glass_mlx.terminal import chat
from glass_mlx.terminal.chat import Chat

HELLO = "I want to find a restaurant in San Jose."
STATUS = re.compile(
    r"^\d+ tokens · [\d.]+ tok/s · prompt [\d.]+ tok/s · density ([\d.]+) "
    r"\(([\d,]+) of ([\d,]+) neurons\) · peak [\d.]+ GB$",
    re.MULTILINE,
)


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


@pytest.fixture
def talk(monkeypatch, invoke):
    """Run the chat on lines typed at a terminal one after the other; exceptions are raised. Ends with Ctrl-D."""

    def talk(*lines, options=()):
        typed = iter([*lines, EOFError()])

        def type_(prompt=""):
            line = next(typed)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(chat, "line_reader", lambda: type_)
        for stream in (sys.stdin, sys.stdout):
            monkeypatch.setattr(stream, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", "200")
        done = invoke(main, "--max-tokens", 8, *options)
        done.out, done.left = re.sub(r"\x1b\[\d*m", "", done.out), list(typed)
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
    for command in ("q", "/quit", "/exit", "r", "h", "/help", "/density", "/dense", "/measure", "Ctrl-C", "Ctrl-D"):
        assert re.search(rf"(^  |, |as |and ){re.escape(command)}\b", chat.HELP, re.MULTILINE)
    assert max(map(len, chat.HELP.splitlines())) < 80
    for command in ("/help", "/quit", "/exit", "quit", "exit"):
        assert "unknown" not in talk(command).out and not STATUS.search(talk(command).out)


def test_forget(talk, chats, answer):
    done = talk(HELLO, "And you?", "r", HELLO)
    assert done.out.split("conversation forgotten\n")[1].startswith(f"{answer}\n")
    assert len(chats[0].conversation.messages) == 2


def test_density(talk):
    done = talk("/density", "/density 0.25", HELLO, "/density 1", HELLO, "/density")
    assert re.findall(r"^density (.*)", done.out, re.MULTILINE) == ["0.5", "0.25", "1", "1"]
    assert [float(s[0]) for s in STATUS.findall(done.out)] == [0.25, 1.0]


@pytest.mark.parametrize("bad", ["0", "1.5", "abc", "nan"])
def test_bad_density(talk, bad):
    done = talk(f"/density {bad}", "/density")
    assert f"'{bad}' is not a number above 0" in done.out
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


@pytest.mark.parametrize(
    ("command", "instead"),
    [("/helpme", "did you mean /help?"), ("/densityx 0.5", "did you mean /density?"), ("/", ""), ("/quit now", "")],
)
def test_unknown_command(talk, command, instead):
    done = talk(command)
    assert f"unknown command {command.split()[0]}; {instead}" in done.out and not STATUS.search(done.out)


def test_interrupted_answer(talk, chats, interrupted, answer):
    done = talk(HELLO, "h")
    assert done.code == 0 and " [stopped]\n" in done.out
    assert done.out.count(chat.HELP) == 2
    [user, reply] = chats[0].conversation.messages
    assert reply["content"] and answer.startswith(reply["content"]) and reply["content"] != answer


def test_goes_on_after_an_interruption(talk, chats, interrupted):
    done = talk(HELLO, "And you?", "/density 0.25", HELLO)
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
        *(("--density", "0"), ("--max-tokens", "0"), ("--signal", "x")),
        *(("--temp", "-1"), ("--top-p", "5"), ("--max-kv-size", "0"), ("--draft-tokens", "0")),
    ],
)
def test_usage_errors(talk, options):
    done = talk(options=options)
    assert (done.code, done.out) == (2, "")
    assert options[0] in done.err.splitlines()[-1]


def test_ranks_are_measured_at_first_use(talk, chats, tiny_dir, small_builds, monkeypatch, caplog, cache_root):
    """And kept: the second start finds them at once."""
    assert talk("Hi", options=("--model", tiny_dir, "--build")).code == 0
    assert "measuring them, once" in caplog.text
    caplog.clear()
    monkeypatch.setattr(measure, "build_ranks", None)
    assert talk("Hi", options=("--model", tiny_dir)).code == 0
    assert "WARNING" not in caplog.text
    first, second = (chat.model.global_ranks["impact"] for chat in chats)
    for a, b in zip(first, second, strict=True):
        assert mx.array_equal(a, b)
    assert chats[1].model.global_weight(chats[1].conversation.session) > 0
    assert {path.suffix for path in (cache_root / "glass_cache_dir").iterdir()} == {".safetensors", ".read"}


def test_interrupted_measuring(talk, chats, tiny_dir, small_builds, monkeypatch, caplog, cache_root):
    """Ctrl-C goes on without ranks; the next time goes on measuring."""
    calls, original = [], sources.batch_generate

    def batch_generate(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(sources, "batch_generate", batch_generate)
    done = talk("Hi", options=("--model", tiny_dir, "--build"))
    assert done.code == 0 and len(STATUS.findall(done.out)) == 1
    assert re.search(r"stopped: \d+ tokens are kept", caplog.text) and chats[0].model.global_ranks is None
    assert [path.suffix for path in (cache_root / "glass_cache_dir").iterdir()] == [".read"]
    assert talk("/measure", "Hi", options=("--model", tiny_dir)).code == 0
    assert chats[1].model.global_ranks is not None
    assert len(calls) == 5  # the first batch was kept; conversations take two calls


@pytest.mark.parametrize(
    "options", [(), ("--no-build",), ("--build", "--dense"), ("--build", "--global-weight", 0), ("--stats", "given")]
)
def test_measuring_declined(talk, chats, tiny_dir, written, monkeypatch, caplog, options):
    monkeypatch.setattr(measure, "build_ranks", None)
    options = [written if option == "given" else option for option in options]
    assert talk("Hi", options=("--model", tiny_dir, *options)).code == 0
    assert (chats[0].model.global_ranks is None) == (written not in options)
    lacking = "--build" not in options and written not in options
    assert ("/measure in the chat" in caplog.text) == lacking  # what is missing, and what to do
    assert ("--build has no effect" in caplog.text) == ("--build" in options)


def test_an_answer_that_is_cut(talk):
    """Says so, and why."""
    assert "cut at 3 tokens: --max-tokens N allows more\n" in talk(HELLO, options=("--max-tokens", 3)).out
    assert "cut at" not in talk(HELLO, options=("--max-tokens", 99)).out


def test_a_conversation_longer_than_the_context(talk, model_copy):
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    options = ("--model", model_copy, "--max-tokens", 100)
    done = talk(HELLO, HELLO, "a word and " * 40, "Hi", options=options)
    assert done.code == 0
    assert "the model's context is full" in done.out
    assert "the conversation is longer than the model's context of 32 tokens: its first 2 messages" in done.out
    assert re.search(r"error: The prompt has \d+ tokens .* context is 32", done.out)
    assert len(STATUS.findall(done.out)) == 3


def test_verified(talk):
    """What share of the tokens was drafted is said."""
    out = talk(HELLO, options=("--verify", "--draft-tokens", 4)).out
    assert re.search(r"^verified: \d+% of the tokens were drafted$", out, re.MULTILINE)
    assert "verified" not in talk(HELLO).out


def test_one_token_has_no_speed(talk):
    assert re.search(r"^1 tokens · prompt ", talk(HELLO, options=("--max-tokens", 1)).out, re.MULTILINE)


def test_an_interrupted_pipe(monkeypatch, invoke, interrupted):
    """Nobody is there to go on: it ends."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{HELLO}\n{HELLO}\n"))
    done = invoke(main, "--max-tokens", 8)
    assert done.code == 130 and "stopped" not in done.out and not STATUS.search(done.err)


def test_piped(forked, real_demo):
    """A process of its own, typed to through a pipe: standard output has the answers and nothing else."""
    answer = "".join(r.text for r in Conversation(*real_demo).reply(HELLO, max_tokens=8))
    done = forked("-m", "glass_mlx", "chat", "--max-tokens", 8, stdin=f"{HELLO}\n/dense\nq\n{HELLO}\n")
    assert done.code == 0
    assert done.out.startswith(f"{answer}\n") and done.out.count("\n") == 2
    assert [float(s[0]) for s in STATUS.findall(done.err)] == [0.5, 1.0]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_bytes_that_are_no_text(monkeypatch, encoding):
    """Neither what comes in nor what a terminal cannot show ends the chat."""
    typed = f"caf\udce9 {HELLO}\n/density\n".encode(errors="surrogateescape")
    for name, errors in (("stdin", "strict"), ("stdout", "strict"), ("stderr", "backslashreplace")):  # as Python opens
        stream = io.TextIOWrapper(io.BytesIO(typed if name == "stdin" else b""), encoding, errors)
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "argv", ["glass_mlx.chat", "--max-tokens", "3"])
    main()
    assert "density 0.5" in written_to(sys.stderr) and written_to(sys.stdout).strip()


def written_to(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)


def test_the_answer_is_read_while_the_user_types(talk, chats, tiny_dir):
    """Before the next message is taken, and before the chat ends."""
    assert talk("Hello", "And then?", options=("--model", tiny_dir, "--max-tokens", 8)).code == 0
    session = chats[0].conversation.session
    assert session.pending_reread == [] and session.generated > 0
