"""Tests of global ranks from the command line: measured, shown, compared, shared; and measured at a first start."""

from __future__ import annotations

import json
import re
import signal
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from global_statistics import same
from hub_server import HubServer
from processes import environment, running

import glass_mlx
from glass_mlx import chat, stats
from glass_mlx.ranks import sources
from glass_mlx.ranks.agreement import compare
from glass_mlx.ranks.format import GlobalStatistics
from glass_mlx.ranks.lookup import STATS_DIR, cache_dir, cached_file
from glass_mlx.terminal import chat as terminal

pytestmark = pytest.mark.usefixtures("insensitive")

FEW = ("--tokens", 60, "--sequences", 4, "--length", 8)
LEAST = ("--tokens", 4, "--sequences", 2, "--length", 4)


@pytest.fixture
def command(invoke):
    return partial(invoke, stats.main)


@pytest.fixture
def build(command, tiny_dir, tmp_path):
    """Measure the random model's ranks; gives the file."""

    def build(*options, name="tiny.safetensors"):
        out = tmp_path / "built" / name
        done = command("build", "--model", tiny_dir, "--out", out, *FEW, *options)
        assert (done.code, done.err) == (0, "") and done.out.startswith(f"{out}: 2 FFN layers, ")
        return out

    return build


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C comes at the second batch, once."""
    left, original = [1], sources.null_prompt

    def null(*args, **kwargs):
        own = original(*args, **kwargs)

        def batch(number):
            if number in left:
                left.clear()
                raise KeyboardInterrupt
            return own.batch(number)

        return replace(own, batch=batch)

    monkeypatch.setattr(sources, "null_prompt", null)


def fails(done, *says, code=1) -> None:
    """A command ended with one line that says these things."""
    assert (done.code, done.out) == (code, "")
    last = done.err.splitlines()[-1]
    assert "error: " in last and (code == 2 or done.err.count("\n") == 1)
    for part in says:
        assert part in last


def test_build(build, tiny, tiny_dir, sensitive):
    file = build("--all")
    ranks = GlobalStatistics.read(file).check(tiny[0])
    assert {p.name for p in file.parent.iterdir()} == {file.name, f"{file.name}.read"}
    method = "null prompt and chat null prompt and own conversation"
    expected = {"model": "tiny", "method": method, "length": "8", "temperature": "1.0", "seed": "0"}
    assert expected.items() <= ranks.metadata.items() and 60 <= int(ranks.metadata["tokens"]) < 96
    assert glass_mlx.load(tiny_dir, stats=file)[0].global_ranks is not None
    assert same(GlobalStatistics.read(build("--all")), ranks)
    assert not same(GlobalStatistics.read(build("--all", "--seed", 1)), ranks)


def test_build_to_the_cache(command, tiny, tiny_dir):
    done = command("build", "--model", tiny_dir, *FEW)
    file = cached_file(tiny[0])
    assert done.out.startswith(f"{file}: 2 FFN layers, ") and "halves agree on" in done.out
    assert glass_mlx.load(tiny_dir)[0].global_ranks is not None


@pytest.mark.parametrize(
    "options, batches", [(("--stable-at", "0.01", "--no-chat"), 1), (("--stable-at", "0.01", "--all"), 3)]
)
def test_build_stops_when_stable(build, options, batches):
    assert len(json.loads(GlobalStatistics.read(build(*options)).metadata["stability_history"])) == batches


@pytest.mark.parametrize(
    "option, method",
    [
        ("--text", "text"),
        ("--dataset", "dataset"),
        ("--chat", "chat null prompt and own conversation"),
        ("--no-chat", "null prompt"),
    ],
)
def test_sources(build, tmp_path, option, method):
    file = tmp_path / "given.txt"
    lines = ["The old house stood at the end of the street."] * 9
    file.write_text("\n".join(lines if method == "text" else ["", *(json.dumps({"text": t}) for t in lines), ""]))
    metadata = GlobalStatistics.read(build(option, *((file,) if option == f"--{method}" else ()))).metadata
    assert metadata["method"] == method and metadata["length"] == "8"
    assert "chat" in option or (metadata["file"] == "given.txt" and len(metadata["digest"]) == 32)


def test_interrupted_build(command, build, tiny_dir, tmp_path, interrupted):
    """The next run goes on from there, with the result of one go."""
    out = tmp_path / "built" / "tiny.safetensors"
    done = command("build", "--model", tiny_dir, "--out", out, *FEW, "--all")
    assert (done.code, done.out, done.err) == (130, "", "")
    assert [p.name for p in out.parent.iterdir()] == ["tiny.safetensors.read"]
    continued = GlobalStatistics.read(build("--all"))
    assert same(GlobalStatistics.read(build("--all", name="whole.safetensors")), continued)


def test_interrupted_process(build, tiny_dir, tmp_path):
    out = tmp_path / "built" / "tiny.safetensors"
    kept = out.with_name(f"{out.name}.read")
    options = ("--model", tiny_dir, "--out", out, "--tokens", 10**9, *FEW[2:], "--all")
    with running(tmp_path, ("-m", "glass_mlx.stats", "build", *options), environment()) as process:
        process.until(lambda so_far: kept.exists())
        process.process.send_signal(signal.SIGINT)
        ended = process.ended()
    assert ended.out == "" and re.fullmatch(r".*stopped: [\d,]+ tokens are kept, .* goes on from them\n", ended.err)
    assert ended.code == 130 and not out.exists()
    build("--all")
    assert out.exists()


def test_refined_later(build, monkeypatch):
    """A build of the same text goes on from what was read for the last one, and gives what one go does."""
    batches, original = [], sources.batch_generate
    monkeypatch.setattr(sources, "batch_generate", lambda *a, **k: batches.append(None) or original(*a, **k))
    first = GlobalStatistics.read(build("--no-chat", "--stable-at", "0.01"))
    several = len(batches)
    refined = GlobalStatistics.read(build("--no-chat", "--all"))
    in_all = len(batches)
    assert int(first.metadata["tokens"]) < 60 <= int(refined.metadata["tokens"])
    assert same(GlobalStatistics.read(build("--no-chat", "--all", name="whole.safetensors")), refined)
    assert 0 < several < in_all == len(batches) - in_all


@pytest.mark.parametrize(
    "options",
    [
        *((name, value) for name in ("--tokens", "--sequences", "--length") for value in ("0", "-1", "x", "1.5")),
        *(("--stable-at", value) for value in ("0", "1.1", "x", "nan")),
        *(("--temp", value) for value in ("-1", "nan", "x")),
        *(("--seed", value) for value in ("-1", "x")),
    ],
)
def test_build_usage(command, options):
    fails(command("build", "--model", "/no/model", *options), options[0], code=2)


@pytest.mark.parametrize(
    "args, says",
    [
        ((), "command"),
        (("bild",), "bild"),
        (("build",), "--model"),
        (("build", "--model", "x", "--chat", "--text", "y"), "--text"),
        (("show",), "file"),
        (("diff", "x"), "file"),
        (("diff", "x", "y", "--density", "0"), "--density"),
        (("plot", "x"), "--out"),
        (("upload", "x"), "--repo"),
    ],
)
def test_usage(command, args, says):
    fails(command(*args), says, code=2)


@pytest.mark.parametrize(
    "args, says",
    [
        (("build", "--model", "nonsense"), "Unknown model"),
        (("build", "--model", "{tiny}", "--text", "{tmp}/missing"), "Cannot read"),
        (("build", "--model", "{tiny}", "--text", "{tmp}"), "Cannot read"),
        (("build", "--model", "{tiny}", "--text", "{tmp}/binary"), "Cannot read"),
        (("build", "--model", "{tiny}", "--text", "{tmp}/empty"), "gave no tokens"),
        (("build", "--model", "{tiny}", "--dataset", "{tmp}/empty"), "gave no tokens"),
        (("build", "--model", "{tiny}", "--dataset", "{tmp}/text"), "Line 1 of the data set"),
        (("build", "--model", "{tiny}", "--out", "{tmp}/text/x.safetensors", *LEAST), "Cannot write"),
        (("build", "--model", "{tiny}", "--out", "{tmp}", *LEAST), "Cannot write"),
        *(((what, "nonsense"), "no ranks file nonsense") for what in ("show", "verify")),
        *(((what, "{tmp}/binary"), "not a usable ranks file") for what in ("show", "verify")),
        (("verify", "demo", "--model", "{tiny}"), "ranks are for demo"),
        (("verify", "demo", "--model", "nonsense"), "Unknown model"),
        (("diff", "demo", "{written}"), "models of different shapes"),
        (("diff", "demo", "nonsense"), "no ranks file nonsense"),
        (("plot", "nonsense", "--out", "{tmp}/x.png"), "no ranks file nonsense"),
        (("plot", "{written}", "--out", "{tmp}/text/x.png"), "Cannot write"),
        (("plot", "demo", "--out", "{tmp}/x.png", "--model", "{tiny}"), "ranks are for demo"),
        (("upload", "nonsense", "--repo", "a/b"), "no ranks file nonsense"),
        (("upload", "demo", "--repo", "nonsense"), "give owner/name"),
        (("upload", "demo", "--repo", "a/b"), "HF_HUB_OFFLINE"),
        (("index", "{tmp}/text"), "is not a directory"),
        (("index", "{tmp}/bad"), "not a usable ranks file"),
    ],
)
def test_failures(command, tiny_dir, written, drawn, tmp_path, args, says):
    (tmp_path / "binary").write_bytes(b"\xff\x07" * 99)
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("The old house\n")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.safetensors").touch()
    names = {"tiny": tiny_dir, "written": written, "tmp": tmp_path}
    fails(command(*(str(arg).format(**names) for arg in args)), says)


def test_chat_template_missing(command, model_copy):
    (model_copy / "chat_template.jinja").unlink()
    fails(command("build", "--model", model_copy, "--chat", *FEW), "leave out --chat")


def test_traceback_on_demand(command):
    with pytest.raises(glass_mlx.GlassError):
        command("show", "nonsense", "--verbose")


def test_list(command, tiny, written):
    cached_file(tiny[0]).parent.mkdir(parents=True)
    cached_file(tiny[0]).write_bytes(written.read_bytes())
    (cache_dir() / "x.safetensors").write_bytes(b"\x07" * 9)
    lines = [re.split(r"\s*│\s*", line.strip("│ ")) for line in command("list").out.splitlines() if "│" in line]
    rows = {tuple(line[i] for i in (0, 1, 2, 5, 6)) for line in lines}
    assert ("tiny", "2", "192", "cache", cached_file(tiny[0]).name) in rows
    assert any(row[0] == "demo" and row[-2:] == ("stats", "demo.safetensors") for row in rows)
    assert any(row[0] == "unreadable" and row[-1] == "x.safetensors" for row in rows)


def test_list_shows_names_as_they_are(command, tiny, written):
    """Of files that may be anyone's: brackets are no markup, and long names are not cut in a pipe."""
    ranks, name = GlobalStatistics.read(written), "[/b] [red]" + "owner/a-long-name" * 3
    replace(ranks, metadata=ranks.metadata | {"model": name}).write(cache_dir() / "[b].safetensors")
    done = command("list")
    assert done.code == 0 and name in done.out and "[b].safetensors" in done.out


def test_show(command, written):
    done = command("show", written)
    assert (done.code, done.err) == (0, "") and done.out.startswith(f"{written}\n")
    shown = dict(line.split(maxsplit=1) for line in done.out.splitlines()[1:] if len(line.split()) > 1)
    metadata = GlobalStatistics.read(written).metadata
    assert shown.keys() == {key for key, value in metadata.items() if value}
    assert shown["fingerprint"] == metadata["fingerprint"]


def test_verify(command, tiny_dir, written):
    done = command("verify", written)
    assert (done.code, done.out) == (0, f"{written}: sound; 2 FFN layers; for tiny\n")
    done = command("verify", written, "--model", tiny_dir)
    assert (done.code, done.out) == (0, f"{written}: sound, and fits {tiny_dir}\n")


@pytest.mark.parametrize("name", ["demo", str(STATS_DIR / "demo.safetensors")])
def test_by_name(command, name):
    assert command("verify", name).out.startswith(f"{STATS_DIR / 'demo.safetensors'}: sound; ")


def test_diff(command, written, build):
    files = (written, build())
    done = command("diff", *files, "--json", "--density", 0.25)
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    assert result["density"] == 0.25 and len(result["layers"]) == 2
    a, b = map(GlobalStatistics.read, files)
    for i, layer in enumerate(result["layers"]):
        for key, values in layer.items():
            assert values == pytest.approx(compare(*(np.array(r.energies[key][i]) for r in (a, b)), 0.25))
    done = command("diff", *files, "--density", 0.25)
    for values in (v for layer in result["layers"] for v in layer.values()):
        assert f"{values['correlation']:.3f}" in done.out and f"{values['overlap']:.3f}" in done.out
    assert done.out.endswith("overlap of the best 25% of the neurons; chance is 0.25\n")


def test_diff_of_the_same(command, written):
    for layer in json.loads(command("diff", written, written, "--json").out)["layers"]:
        assert all(v == {"correlation": pytest.approx(1), "overlap": 1.0, "efficiency": 1.0} for v in layer.values())


def test_index(command, written, tmp_path):
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "a.safetensors").write_bytes(written.read_bytes())
    done = command("index", tmp_path / "ranks")
    assert (done.code, done.out) == (0, f"{tmp_path / 'ranks' / 'index.json'}: 1 models\n")
    [entry] = json.loads((tmp_path / "ranks" / "index.json").read_text())["models"]
    assert (entry["file"], entry["model"]) == ("a.safetensors", "tiny")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize("options", [(), ("--private", "--license", "mit")])
def test_upload(command, written, tiny_dir, monkeypatch, options):
    """What was uploaded is found by the model that it is of."""
    with HubServer() as server:
        server.use(monkeypatch)
        done = command("upload", written, "--repo", "me/ranks", *options)
        assert done.code == 0 and re.fullmatch(rf"{server.url}/me/ranks/commit/\w+\n", done.out)
        repo = server.repos["me/ranks"]
        assert repo.files[written.name] == written.read_bytes() and repo.private == bool(options)
        assert f"license: {options[-1] if options else 'other'}\n" in repo.files["README.md"].decode()
        assert glass_mlx.load(tiny_dir, stats_repo="me/ranks")[0].global_ranks is not None
        server.fail("preupload", status=403)
        fails(command("upload", written, "--repo", "me/ranks"), "You may not do this")


@pytest.fixture
def start(monkeypatch, invoke, caplog, tiny_dir, small_builds):
    """Start a chat with the random model on a terminal, and say something."""

    def start(*options):
        typed = iter(["Hi", EOFError()])

        def type_(prompt=""):
            line = next(typed)
            if isinstance(line, BaseException):
                raise line
            return line

        def main():
            monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
            chat.main()

        monkeypatch.setattr(terminal, "line_reader", lambda: type_)
        for stream in (sys.stdin, sys.stdout):
            monkeypatch.setattr(stream, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", "200")
        caplog.clear()
        done = invoke(main, "--model", tiny_dir, "--max-tokens", 3, *options)
        assert done.code == 0 and "3 tokens · " in done.out
        done.log = caplog.text
        return done

    return start


@pytest.fixture
def used(monkeypatch):
    """The global ranks that each chat has."""
    seen, loop = [], terminal.Chat.loop
    monkeypatch.setattr(terminal.Chat, "loop", lambda self: (seen.append(self.model.global_ranks), loop(self))[1])
    return seen


def test_first_chat(start, used, tiny):
    """Ranks are measured with progress and kept; a second start finds them at once."""
    first = start("--build")
    assert "measuring them, once" in first.log and re.search(r"reading.*: +100%.*stable [\d.]+% of 97%", first.err)
    assert cached_file(tiny[0]).exists()
    second = start()
    assert second.err == "" and "WARNING" not in second.log
    assert all(ranks is not None for ranks in used) and len(used) == 2


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_several_models(command, tiny_dir, lively_dir, tmp_path, monkeypatch):
    """Each has a file in the directory; what fails stops no other, and what is there is not measured again."""
    models, into = f"{tiny_dir},nonsense,{lively_dir}", tmp_path / "ranks"
    done = command("build", "--model", models, "--into", into, *FEW)
    assert done.code == 1 and "nonsense" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err and f"upload {into}" in done.out
    files = sorted(into.glob("*.safetensors"))
    assert {f.stem for f in files} == {tiny_dir.name, lively_dir.name}
    assert len(json.loads((into / "index.json").read_text())["models"]) == 2
    before = [f.stat().st_mtime_ns for f in files]
    again = command("build", "--model", f"{tiny_dir},{lively_dir}", "--into", into, *FEW)
    assert again.code == 0 and again.out.count("there already") == 2
    assert [f.stat().st_mtime_ns for f in files] == before
    with HubServer() as server:
        server.use(monkeypatch)
        done = command("upload", into, "--repo", "me/ranks")
        assert done.code == 0, done.err
        assert {f.name for f in files} <= set(server.repos["me/ranks"].files)


def test_upload_of_an_empty_directory(command, tmp_path):
    done = command("upload", tmp_path, "--repo", "me/ranks")
    assert done.code == 1 and "has no ranks files" in done.err
