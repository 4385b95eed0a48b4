"""Tests of ranks on the Hub: the real client against a Hub on loopback, both directions, and what goes wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import constants, file_download
from processes import environment

from glass_mlx import GlassError, StatsError
from glass_mlx.hub.access import download, hub_access
from glass_mlx.ranks.format import GlobalStatistics
from glass_mlx.ranks.share import CARD, INDEX, upload

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's uploads

REPO = "me/ranks"
FILE = "tiny.safetensors"
DEMO = Path(__file__).parents[2] / "stats" / "demo.safetensors"
RANKS = DEMO.read_bytes()
ALWAYS = 1000


@pytest.fixture
def server(monkeypatch):
    """A Hub that this process uses; the client's pauses between its tries are left out."""
    with HubServer() as server:
        server.use(monkeypatch)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server


@pytest.fixture
def repo(server):
    return server.repo(REPO, {FILE: RANKS, INDEX: b'{"format_version": "1", "models": []}\n', "notes.txt": b"hello"})


@pytest.fixture
def ranks_file(tmp_path):
    """Make a ranks file that says to be of some model."""

    def ranks_file(model: str, file: str = "", **metadata) -> Path:
        ranks = GlobalStatistics.read(DEMO)
        path = tmp_path / "mine" / (file or f"{model.split('/')[-1]}.safetensors")
        changed = {**ranks.metadata, "model": model, "fingerprint": f"{model}'s", **metadata}
        dataclasses.replace(ranks, metadata=changed).write(path)
        return path

    return ranks_file


def refused(*says: str, call=lambda: download(REPO, FILE), kind=GlassError) -> str:
    """The call raises a one-line error that says these things."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for part in says:
        assert re.search(part, message), message
    return message


def cached_bytes() -> list[Path]:
    """All files of contents in the cache, whole or not."""
    return [p for p in Path(constants.HF_HUB_CACHE).glob("models--*/blobs/*")]


def test_download(server, repo):
    path = download(REPO, FILE)
    assert path.read_bytes() == RANKS and path.parent.name == repo.refs["main"]
    assert not server.leaked
    GlobalStatistics.read(path)
    assert server.sent(FILE) + server.sent("/cdn/") == len(RANKS)
    assert download(REPO, FILE) == path  # asks for the ETag only
    assert server.requests[-1][:2] == ("HEAD", f"/{REPO}/resolve/main/{FILE}")
    assert server.sent("/cdn/") == len(RANKS)


def test_progress(server, repo, monkeypatch, capsys):
    monkeypatch.setenv("TQDM_POSITION", "-1")  # a bar though stderr is no terminal
    download(REPO, FILE)
    err = capsys.readouterr().err
    assert FILE in err and "100%" in err


def test_new_commit_is_found_and_unchanged_content_not_sent_again(server, repo):
    first = download(REPO, FILE)
    repo.commit({"notes.txt": b"new"})
    second = download(REPO, FILE)
    assert second != first and second.read_bytes() == RANKS
    assert server.sent("/cdn/") == len(RANKS)
    repo.commit({FILE: RANKS + b" "})
    assert download(REPO, FILE).read_bytes() == RANKS + b" "


@pytest.mark.parametrize("pin", ["commit", "tag", "branch/with/slashes"])
def test_pinned_revision(server, repo, pin):
    old = repo.refs["main"]
    repo.refs[pin] = old
    repo.commit({FILE: b"newer"})
    path = download(REPO, FILE, revision=old if pin == "commit" else pin)
    assert path.read_bytes() == RANKS and path.parent.name == old
    assert download(REPO, FILE).read_bytes() == b"newer"
    if pin == "commit":
        seen = len(server.requests)
        assert download(REPO, FILE, revision=old) == path
        assert len(server.requests) == seen  # needs no request at all


def test_interrupted_download_is_resumed(server, repo, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # whole chunks are kept, and they are of 10 MB
    server.fail("GET /cdn/", truncate=1000)
    assert download(REPO, FILE).read_bytes() == RANKS
    assert [r[2:] for r in server.requests if r[0] == "GET"] == [(200, 1000), (206, len(RANKS) - 1000)]


def test_stalled_download_is_resumed(server, repo, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    server.fail("GET /cdn/", stall=20)
    assert download(REPO, FILE).read_bytes() == RANKS


@pytest.mark.parametrize("fault", [{"truncate": 0}, {"drop": True}])
def test_download_that_never_completes(server, repo, fault):
    server.fail("GET /cdn/", times=6, **fault)
    refused(FILE, REPO, "check the network")
    assert cached_bytes() == []
    assert download(REPO, FILE).read_bytes() == RANKS


def test_half_a_download_is_not_used(server, repo, monkeypatch):
    """The connection ends for good after a part of the file."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    server.fail("GET /cdn/", truncate=1000)
    server.fail("GET /cdn/", times=6, drop=True)
    refused(FILE, REPO, "check the network")
    assert cached_bytes() == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(FILE, REPO, "HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert download(REPO, FILE).read_bytes() == RANKS


@pytest.mark.parametrize("file", [FILE, INDEX])  # LFS and git
def test_corrupted_download(server, repo, file):
    server.fail(f"GET .*(/cdn/|{INDEX})", flip=-2)
    refused(file, REPO, "damaged", "try again", call=lambda: download(REPO, file))
    assert cached_bytes() == []
    assert download(REPO, file).read_bytes() == repo.files[file]


def test_damaged_cache(server, repo):
    path = download(REPO, FILE)
    path.resolve().write_bytes(RANKS[:-1] + b"!")
    refused(FILE, REPO, "damaged", "try again")
    assert download(REPO, FILE).read_bytes() == RANKS


def test_wrong_size(server, repo):
    """The body is whole by its own header, but not what the Hub has promised."""
    server.fail("GET /cdn/", shorten=1)
    refused(FILE, REPO, "size", "try again")
    assert cached_bytes() == []
    assert download(REPO, FILE).read_bytes() == RANKS


def test_without_links(server, repo, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    path = download(REPO, FILE)
    assert not path.is_symlink() and path.read_bytes() == RANKS


@pytest.mark.parametrize("token", ["hf_loopback", None])
def test_no_such_repo(server, monkeypatch, token):
    server.use(monkeypatch, token)
    refused(REPO, "check the name", "hf auth login")


def test_no_such_file(server, repo):
    refused("other.safetensors", REPO, "main", "check the name", call=lambda: download(REPO, "other.safetensors"))
    repo.commit({"other.safetensors": RANKS})
    assert download(REPO, "other.safetensors").read_bytes() == RANKS


def test_no_such_revision(server, repo):
    refused(REPO, "'v9'", "branch, a tag", call=lambda: download(REPO, FILE, revision="v9"))


def test_private_and_gated(server, repo, monkeypatch):
    repo.private = True
    server.use(monkeypatch, None)
    refused(REPO, "hf auth login")
    server.use(monkeypatch)
    assert download(REPO, FILE).read_bytes() == RANKS
    server.repo("me/gated", {FILE: RANKS}, gated=True)
    refused("me/gated", "gated", "accept its terms", call=lambda: download("me/gated", FILE))


def test_bad_token(server, repo, monkeypatch):
    server.use(monkeypatch, "hf_expired")
    refused(REPO, "401", "hf auth login")


@pytest.mark.parametrize("status", [403, 418, 429, 500, 503])
def test_error_status(server, repo, status):
    server.fail("HEAD", status=status, times=ALWAYS, message="because of it")
    remedy = {403: "token that may", 418: "check the name"}.get(status, "try again later")
    refused(FILE, REPO, str(status), "because of it", remedy)
    server.faults.clear()
    assert download(REPO, FILE).read_bytes() == RANKS


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_unavailable_once(server, repo, method):
    server.fail(method, status=503)
    if method == "GET":  # huggingface_hub repeats the metadata request only
        refused(FILE, REPO, "503", "try again later")
    assert download(REPO, FILE).read_bytes() == RANKS


def test_unavailable_but_cached(server, repo):
    path = download(REPO, FILE)
    server.fail("HEAD", status=503, times=ALWAYS)
    assert download(REPO, FILE) == path


def test_nobody_answers(server, repo, monkeypatch):
    path = download(REPO, FILE)
    with HubServer() as gone:
        pass
    gone.use(monkeypatch)
    refused("me/new", "connection", "check the network", call=lambda: download("me/new", FILE))
    assert download(REPO, FILE) == path


def test_not_a_hub(server, repo):
    """A captive portal answers everything, kindly."""
    server.fail("HEAD", status=200, times=ALWAYS)
    refused(FILE, REPO, "HF_ENDPOINT")


def test_offline(server, repo, monkeypatch):
    path = download(REPO, FILE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    seen = len(server.requests)
    assert download(REPO, FILE) == path
    refused(INDEX, REPO, "HF_HUB_OFFLINE is set", call=lambda: download(REPO, INDEX))
    assert len(server.requests) == seen


@pytest.mark.parametrize("name", ["", "ranks", "me/ranks/x", "me/ra nks", "me/--", "../ranks"])
def test_invalid_repo_name(server, name):
    refused(re.escape(repr(name)), "owner/name", call=lambda: download(name, FILE))
    assert server.requests == []


@pytest.mark.parametrize("file", ["../x", "/etc/passwd", "a/../../x"])
def test_invalid_file_name(server, repo, file):
    """A name out of an index from the network leads nowhere else."""
    refused(re.escape(file), REPO, "check the name", call=lambda: download(REPO, file))
    assert cached_bytes() == []


def _deny(*args, **kwargs):
    raise PermissionError(errno.EACCES, "Permission denied")


def _fill_disk(url, temp_file, **kwargs):
    temp_file.write(RANKS[:1000])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk(server, repo):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_download, "http_get", _fill_disk)
        refused(FILE, REPO, "No space left", re.escape(constants.HF_HUB_CACHE), "free some")
    assert cached_bytes() == []
    assert download(REPO, FILE).read_bytes() == RANKS


def test_unwritable_cache(server, repo, monkeypatch, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "makedirs", _deny)
        refused(FILE, REPO, "Permission denied", re.escape(constants.HF_HUB_CACHE), "writable")
    (tmp_path / "file").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
        refused(FILE, REPO, "Not a directory", "file/hub", "set HF_HOME")
    assert download(REPO, FILE).read_bytes() == RANKS


def test_read_only_cache_is_used(server, repo, monkeypatch):
    path = download(REPO, FILE)
    monkeypatch.setattr(os, "makedirs", _deny)
    assert download(REPO, FILE) == path


def test_hub_access_lets_other_errors_through():
    with pytest.raises(ZeroDivisionError), hub_access(REPO):
        raise ZeroDivisionError
    with pytest.raises(StatsError, match="mine"), hub_access(REPO):
        raise StatsError("mine")


def test_in_a_process_of_its_own(server, repo, tmp_path):
    """As a user has it: the environment says everything."""
    code = f"from glass_mlx.ranks.share import download; print(download({REPO!r}, {FILE!r}))"
    env = environment(**server.env(), HF_HOME=str(tmp_path / "home"))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.read_bytes() == RANKS and path.is_relative_to(tmp_path / "home")


def test_upload_to_a_new_repo(server, ranks_file):
    path = ranks_file("org/Tiny-4bit", original="org/Tiny", tokens="123", note="a | b\n<i>c</i>")
    url = upload(path, REPO)
    repo = server.repos[REPO]
    assert url == f"{server.url}/{REPO}/commit/{repo.refs['main']}"
    assert [c.message for c in repo.commits] == ["initial commit", "Add global ranks of org/Tiny-4bit"]
    assert set(repo.files) == {".gitattributes", path.name, INDEX, CARD}
    assert not repo.private
    index = json.loads(repo.files[INDEX])
    assert index["format_version"] == "1"
    (entry,) = index["models"]
    assert entry["file"] == path.name and entry["model"] == "org/Tiny-4bit"
    assert entry["fingerprint"] == "org/Tiny-4bit's" and entry["model_type"] == "llama"
    card = repo.files[CARD].decode()
    sizes = GlobalStatistics.read(path).sizes
    assert card.startswith("---\nlicense: other\n")
    assert f"--stats-repo {REPO}" in card and f"GLASS_STATS_REPO={REPO}" in card
    for row in (
        "model | org/Tiny-4bit",
        "tokens | 123",
        r"note | a \| b \<i\>c\</i\>",
        f"FFN layers | {len(sizes)}",
        f"neurons | {sum(sizes)}",
    ):
        assert f"\n| {row} |\n" in card
    # and what was uploaded can be had
    assert download(REPO, path.name).read_bytes() == path.read_bytes()


def test_upload_options(server, ranks_file):
    upload(ranks_file("a"), REPO, private=True, message="by hand", license="mit")
    repo = server.repos[REPO]
    assert repo.private and repo.commits[-1].message == "by hand"
    assert repo.files[CARD].startswith(b"---\nlicense: mit\ntags:")


def test_upload_of_another_model_merges(server, ranks_file):
    upload(ranks_file("b"), REPO)
    upload(ranks_file("a"), REPO)
    repo = server.repos[REPO]
    assert len(repo.commits) == 3
    assert [e["file"] for e in json.loads(repo.files[INDEX])["models"]] == ["a.safetensors", "b.safetensors"]
    card = repo.files[CARD].decode()
    assert re.findall("^## .*", card, re.M)[1:] == ["## b.safetensors", "## a.safetensors"]
    assert card.count("\n# ranks\n") == card.count("--stats-repo") == 1


def test_upload_again_replaces(server, ranks_file):
    upload(ranks_file("a", tokens="1"), REPO)
    upload(ranks_file("b"), REPO)
    url = upload(path := ranks_file("a", tokens="2222"), REPO)
    repo = server.repos[REPO]
    assert repo.files["a.safetensors"] == path.read_bytes()
    assert len(json.loads(repo.files[INDEX])["models"]) == 2
    card = repo.files[CARD].decode()
    assert "| tokens | 2222 |" in card and "| tokens | 1 |" not in card
    assert card.count("## a.safetensors") == card.count("## b.safetensors") == 1
    assert upload(path, REPO) == url and len(repo.commits) == 4  # nothing new, no commit


def test_upload_keeps_what_is_there(server, ranks_file):
    mine = "---\nlicense: mit\n---\n# My model\n\nText.\n\n## Use\n\none\n\n## Use\n\ntwo\n"
    entry = {"file": "x.safetensors", "model": "x", "fingerprint": "1", "more": [1]}
    index = {"format_version": "1", "models": [entry], "extra": True}
    repo = server.repo(REPO, {CARD: mine.encode(), INDEX: json.dumps(index).encode(), "config.json": b"{}"})
    upload(ranks_file("a"), REPO)
    card = repo.files[CARD].decode()
    assert card.startswith(mine) and "--stats-repo" in card and "## a.safetensors" in card
    merged = json.loads(repo.files[INDEX])
    assert merged["extra"] and merged["models"][1] == entry and repo.files["config.json"] == b"{}"


def test_upload_to_a_branch(server, ranks_file):
    repo = server.repo(REPO)
    repo.refs["next"] = repo.refs["main"]
    upload(ranks_file("a"), REPO, revision="next")
    assert "a.safetensors" in repo.at("next").files and "a.safetensors" not in repo.files
    refused(REPO, "'nope'", "branch", call=lambda: upload(ranks_file("a"), REPO, revision="nope"))


def test_upload_refuses_a_taken_name(server, ranks_file):
    upload(ranks_file("a"), REPO)
    before = server.repos[REPO].commits[-1]
    refused(REPO, "a.safetensors", "for a", "rename", call=lambda: upload(ranks_file("b", "a.safetensors"), REPO))
    assert server.repos[REPO].commits[-1] is before


@pytest.mark.parametrize("index", [b"{}", b"[]", b"junk", b'{"format_version": "9", "models": []}', b"\xff"])
def test_upload_refuses_a_foreign_index(server, ranks_file, index):
    repo = server.repo(REPO, {INDEX: index})
    refused(REPO, INDEX, "another repository", call=lambda: upload(ranks_file("a"), REPO))
    assert len(repo.commits) == 1


def test_upload_refuses_a_bad_file(server, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"junk")
    refused("x.safetensors", call=lambda: upload(tmp_path / "x.safetensors", REPO), kind=StatsError)
    refused("none", call=lambda: upload(tmp_path / "none.safetensors", REPO), kind=StatsError)
    refused(REPO, "name it", call=lambda: upload(tmp_path / "README.md", REPO))
    assert server.requests == []


def test_private_upload_to_a_public_repo(server, ranks_file):
    repo = server.repo(REPO)
    refused(REPO, "public", "make it private", call=lambda: upload(ranks_file("a"), REPO, private=True))
    assert len(repo.commits) == 1


def test_upload_without_rights(server, ranks_file, monkeypatch):
    path = ranks_file("a")
    repo = server.repo(REPO, writable=False)
    refused(REPO, "403", "no write permission", "token that may", call=lambda: upload(path, REPO))
    for token in (None, "hf_expired"):
        server.use(monkeypatch, token)
        refused(REPO, "401", "hf auth login", call=lambda: upload(path, REPO))
    refused(REPO, "401", "hf auth login", call=lambda: upload(path, REPO))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(REPO, "HF_HUB_OFFLINE", call=lambda: upload(path, REPO))
    assert len(repo.commits) == 1
    refused("'ranks'", "owner/name", call=lambda: upload(path, "ranks"))


@pytest.mark.few(11)  # every second one: each step, and each fault
@pytest.mark.parametrize("fault", [{"drop": True}, {"status": 500}, {"status": 403, "message": "no"}])
@pytest.mark.parametrize(
    "step", ["create", "/api/models/me/ranks$", "validate-yaml", "preupload", "batch", "/lfs/", "commit"]
)
def test_upload_that_fails_midway(server, ranks_file, step, fault):
    """Whichever request fails, the repository is as before, and the next try succeeds."""
    path, repo = ranks_file("a"), server.repo(REPO, {CARD: b"---\nlicense: mit\n---\nmine"})
    server.fail(step, times=ALWAYS, **fault)
    if step == "create" and fault.get("status") == 403:  # a token that may only write to what exists
        upload(path, REPO)
        return
    refused(REPO, "try again later|check the network|token that may", call=lambda: upload(path, REPO))
    assert len(repo.commits) == 1
    server.faults.clear()
    upload(path, REPO)
    assert len(repo.commits) == 2 and set(repo.files) == {".gitattributes", CARD, INDEX, path.name}


def test_upload_beside_another(server, ranks_file):
    """Somebody else commits between reading the index and writing it: theirs is not lost."""
    repo = server.repo(REPO)
    answer = type(server)._fault

    def meanwhile(self, request):
        if "/commit/" in request and len(repo.commits) == 1:
            repo.commit({INDEX: b"theirs"})
        return answer(self, request)

    server._fault = meanwhile.__get__(server)
    refused(REPO, "412", "try again", call=lambda: upload(ranks_file("a"), REPO))
    assert repo.files[INDEX] == b"theirs" and "a.safetensors" not in repo.files
