"""A Hugging Face Hub in this process: what huggingface_hub needs to download and upload, and faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import close_session, constants

TOKEN = "hf_loopback"


def git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A repository: its commits, the newest last, and its branches and tags."""

    private: bool = False
    gated: bool = False
    writable: bool = True
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], message: str = "", branch: str = "main") -> str:
        """Add a commit that changes these files; returns its hash."""
        before = self.at(branch)
        oid = hashlib.sha1(f"{id(self)} {len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, {**(before.files if before else {}), **files}))
        self.refs[branch] = oid
        return oid

    def at(self, revision: str) -> Commit | None:
        oid = self.refs.get(revision, revision)
        return next((c for c in self.commits if c.oid == oid), None)

    @property
    def files(self) -> dict[str, bytes]:
        return self.at("main").files


@dataclass
class Fault:
    """What is to go wrong with requests whose "METHOD /path" matches ``pattern``, ``times`` times.

    ``status``: this status is answered. ``drop``: no answer. ``truncate``: the connection ends after n bytes of
    the body. ``flip``: the byte at this place is another. ``shorten``: the body lacks its last n bytes,
    by its length too. ``stall``: so many seconds pass before the body.
    """

    pattern: str
    times: int = 1
    status: int | None = None
    message: str = ""
    drop: bool = False
    truncate: int | None = None
    flip: int | None = None
    shorten: int = 0
    stall: float = 0


class HubServer:
    """A Hub on loopback, as a context manager. ``requests`` lists (method, path, status, bytes of the body)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int, int]] = []
        self.faults: list[Fault] = []
        self.leaked = False  # a token was sent to the CDN
        self._closing = threading.Event()

    def __enter__(self) -> HubServer:
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        close_session()

    def use(self, monkeypatch, token: str | None = TOKEN) -> None:
        """Make it this process's Hub, for huggingface_hub has read HF_ENDPOINT when it was imported."""
        close_session()
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + template[template.index("/{repo_id}") :]
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", os.devnull)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        for name, value in self.env(token).items():
            monkeypatch.setenv(name, value)

    def env(self, token: str | None = TOKEN) -> dict[str, str]:
        """The environment of a process that is to use it."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            **({"HF_TOKEN": token} if token else {}),
        }

    def repo(self, name: str, files: dict[str, bytes] | None = None, **options) -> Repo:
        """Add a repository with a first commit."""
        self.repos[name] = Repo(**options)
        self.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})}, "initial commit")
        return self.repos[name]

    def fail(self, pattern: str, **fault) -> None:
        self.faults.append(Fault(pattern, **fault))

    def sent(self, pattern: str) -> int:
        """Bytes of the bodies that were sent for the matching requests."""
        return sum(n for method, path, _, n in self.requests if re.search(pattern, f"{method} {path}"))

    def _fault(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, request):
                fault.times -= 1
                return fault
        return None


class _Answer(Exception):
    """An error that the Hub answers with."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message or code}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        self.fault = self.hub._fault(f"{self.command} {path}") or Fault("")
        if self.fault.drop:
            self._log(path, 0, 0)
            self.close_connection = True
            return
        try:
            if self.fault.status:
                raise _Answer(self.fault.status, message=self.fault.message)
            self._answer(path, body)
        except _Answer as e:
            self._send(e.status, b"", e.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET

    def _log(self, path: str, status: int, sent: int) -> None:
        self.hub.requests.append((self.command, path, status, sent))

    def _answer(self, path: str, body: bytes) -> None:
        for pattern, answer in (
            (r"/cdn/([0-9a-f]{64})", self._cdn),
            (r"/lfs/([0-9a-f]{64})", self._lfs_put),
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate_yaml),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs_batch),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ):
            match = re.fullmatch(pattern, path)
            if match:
                answer(
                    *(g and unquote(g) for g in match.groups()),
                    **({"body": body} if self.command in ("POST", "PUT") else {}),
                )
                return
        raise _Answer(404)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        fault = self.fault
        body = bytearray(body[: len(body) - fault.shorten])
        length = len(body)
        if self.command == "HEAD":
            body.clear()
        if fault.flip is not None and body:
            body[fault.flip] ^= 1
        if fault.truncate is not None:
            del body[fault.truncate :]
            self.close_connection = True
        self._log(urlsplit(self.path).path, status, len(body))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if fault.stall:
            self.hub._closing.wait(fault.stall)
        self.wfile.write(body)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _authorized(self) -> bool:
        """Whether the token is good; a bad one is refused."""
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            raise _Answer(401, message="Invalid credentials in Authorization header")
        return given is not None

    def _find(self, name: str, write: bool = False) -> Repo:
        authorized, repo = self._authorized(), self.hub.repos.get(name)
        if repo is None or (repo.private and not authorized):
            raise _Answer(404, "RepoNotFound", "Repository not found") if authorized else _Answer(401)
        if repo.gated:
            raise _Answer(403 if authorized else 401, "GatedRepo", "Access to this model is restricted")
        if write and not authorized:
            raise _Answer(401, message="Invalid username or password.")
        if write and not repo.writable:
            raise _Answer(403, message="Your token has no write permission")
        return repo

    def _at(self, repo: Repo, revision: str | None) -> Commit:
        commit = repo.at(revision or "main")
        if commit is None:
            raise _Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _resolve(self, name: str, revision: str, file: str) -> None:
        commit = self._at(self._find(name), revision)
        headers = {"X-Repo-Commit": commit.oid}
        if file not in commit.files:
            error = _Answer(404, "EntryNotFound", "Entry not found")
            error.headers |= headers
            raise error
        data = commit.files[file]
        if not is_lfs(file):
            self._send(200, data, headers | {"ETag": f'"{git_sha(data)}"'})
            return
        self.hub.blobs[sha256(data)] = data
        headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        # another host, as with the Hub's: metadata is in this answer, and the token must not go there
        headers |= {"Location": f"http://localhost:{self.hub.port}/cdn/{sha256(data)}?{file}"}
        self._send(302, b"", headers)

    def _cdn(self, oid: str) -> None:
        self.hub.leaked |= "Authorization" in self.headers
        data = self.hub.blobs[oid]
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        headers = {"ETag": f'"{oid}"', "Content-Disposition": f'inline; filename="{urlsplit(self.path).query}";'}
        if start:
            first = int(start[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            self._send(206, data[first:], headers)
        else:
            self._send(200, data, headers)

    def _info(self, name: str, revision: str | None) -> None:
        repo = self._find(name)
        commit = self._at(repo, revision)
        siblings = [{"rfilename": file} for file in commit.files]
        self._json({"id": name, "sha": commit.oid, "private": repo.private, "siblings": siblings})

    def _tree(self, name: str, revision: str) -> None:
        files = self._at(self._find(name), revision).files
        self._json([{"type": "file", "path": f, "size": len(d), "oid": git_sha(d)} for f, d in files.items()])

    def _create(self, body: bytes) -> None:
        if not self._authorized():
            raise _Answer(401, message="Invalid username or password.")
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.hub.repos
        if not there:
            self.hub.repo(name, private=asked.get("visibility") == "private")
        self._json({"url": f"{self.hub.url}/{name}"}, 409 if there else 200)

    def _validate_yaml(self, body: bytes) -> None:
        good = re.match(r"---\n.*?\n---\n", json.loads(body)["content"], re.DOTALL)
        self._json({"errors": [], "warnings": [] if good else [{"message": "empty or missing yaml metadata"}]})

    def _preupload(self, name: str, revision: str, body: bytes) -> None:
        files, answer = self._at(self._find(name, write=True), revision).files, []
        for path in (file["path"] for file in json.loads(body)["files"]):
            oid = (sha256 if is_lfs(path) else git_sha)(files[path]) if path in files else None
            mode = "lfs" if is_lfs(path) else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answer})

    def _lfs_batch(self, name: str, body: bytes) -> None:
        self._find(name, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append(wanted | ({} if wanted["oid"] in self.hub.blobs else {"actions": upload}))
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str, body: bytes) -> None:
        if sha256(body) != oid:
            raise _Answer(400, message="not this object")
        self.hub.blobs[oid] = body
        self._json({})

    def _commit(self, name: str, revision: str, body: bytes) -> None:
        repo = self._find(name, write=True)
        before, (header, *operations) = self._at(repo, revision), map(json.loads, body.splitlines())
        if header["value"].get("parentCommit", before.oid) != before.oid:
            raise _Answer(412, message="A commit has happened since. Please refresh and try again.")
        files = {}
        for operation in operations:
            value = operation["value"]
            lfs = operation["key"] == "lfsFile"
            files[value["path"]] = self.hub.blobs[value["oid"]] if lfs else base64.b64decode(value["content"])
        oid = repo.commit(files, header["value"]["summary"], revision)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})
