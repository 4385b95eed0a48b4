"""Ranks files on the Hugging Face Hub: fetch them, share them; and what goes wrong there, in one line."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub import errors as hub_errors

from ._version import __version__
from .errors import GlassError
from .ranks import FORMAT_VERSION, GlobalRanks, index_entry

REPO_VARIABLE = "GLASS_STATS_REPO"
INDEX, CARD = "index.json", "README.md"

_ABOUT = """## Global neuron ranks for GLASS

Each `.safetensors` file says which neurons of one model's feed-forward layers matter most to what the model likes to
say: their ranks, and their mean share of a token's energy. It holds no weights. With it, `glass_mlx` decodes with the
neurons that matter only (GLASS, [arXiv 2508.14302](https://arxiv.org/abs/2508.14302)):

```sh
python -m glass_mlx.chat --model MODEL --stats-repo {repo}
export GLASS_STATS_REPO={repo}  # or this, for every command; {repo}@COMMIT pins it
```

`index.json` lists the files with the models they belong to; a model that a file does not belong to refuses it. The
ranks are measurements of a model, whose own licence may bear on their use.

"""


@contextlib.contextmanager
def hub_access(repo: str, revision: str | None = None, filename: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub and the network raise into GlassErrors that say what to do."""
    if repo.count("/") != 1:
        raise GlassError(f"{repo!r} is no Hub repository: give owner/name.")
    try:
        yield
    except (hub_errors.HTTPError, OSError, ValueError, RuntimeError) as e:
        cause: BaseException = e
        while isinstance(cause, (hub_errors.LocalEntryNotFoundError, RuntimeError)) and cause.__cause__:
            cause = cause.__cause__  # "not in the cache" and "upload failed" wrap the reason
        raise GlassError(_explain(cause, repo, revision, filename)) from e


def _explain(e: BaseException, repo: str, revision: str | None, filename: str | None) -> str:
    what = f"{filename} of {repo}" if filename else repo
    reason = textwrap.shorten(str(e), 150).rstrip(".") or type(e).__name__
    match e:
        case hub_errors.GatedRepoError():
            return f"{repo} is gated: accept its terms on its Hub page, then `hf auth login`."
        case hub_errors.RepositoryNotFoundError():
            return f"The Hub has no repository {repo} that you may see: check the name, or `hf auth login`."
        case hub_errors.RevisionNotFoundError():
            return f"{repo} has no revision {revision!r}: give a branch, a tag or a full commit hash."
        case hub_errors.RemoteEntryNotFoundError():
            return f"{repo} has no file {filename} at {revision or 'main'}: check the name and the revision."
        case hub_errors.HFValidationError():
            return f"{repo!r} is no Hub repository: give owner/name."
        case hub_errors.HfHubHTTPError():
            status = e.response.status_code
            said = textwrap.shorten(f"{status} {e.server_message or e.response.reason_phrase}", 200)
            if status == 401:
                return f"The Hub gives no access to {repo} ({said}): check the name, or `hf auth login`."
            if status == 403:
                return f"You may not do this with {what} ({said}): use a token that may, or ask its owner."
            if status in (409, 412):
                return f"{what} was changed by someone else meanwhile ({said}): try again."
            if status == 429 or status >= 500:
                return f"The Hub cannot serve {what} now ({said}): try again later."
            return f"The Hub refuses {what} ({said}): check the name and the revision."
        case hub_errors.OfflineModeIsEnabled():
            return f"{what} is not in the local cache and HF_HUB_OFFLINE is set: unset it, or give a local path."
        case hub_errors.LocalEntryNotFoundError() | hub_errors.FileMetadataError():
            return f"{what} is not in the local cache, and no Hub answers ({reason}): check HF_ENDPOINT and the proxy."
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return f"No space left for {what} in {constants.HF_HUB_CACHE}: free some, or set HF_HOME to another disk."
        case hub_errors.HTTPError() | ConnectionError() | TimeoutError():
            return f"{what}: the connection to the Hub failed ({reason}): check the network, or give a local path."
        case OSError(errno=int()):
            return f"Cannot write {what} to {constants.HF_HUB_CACHE} ({e.strerror}): make it writable, or set HF_HOME."
        case OSError():  # huggingface_hub's check of the size, and Xet's errors
            return f"{what} could not be transferred ({reason}): try again."
        case json.JSONDecodeError():
            return f"The Hub's answer about {what} makes no sense: try again later, or check HF_ENDPOINT."
    return f"{what}: {reason}; check the names and the file."


def _api() -> HfApi:
    return HfApi(library_name="glass_mlx", library_version=__version__)


def download(repo: str, filename: str, revision: str | None = None) -> Path:
    """A file of a repository, from the cache where that is up to date; the path contains the commit.

    Raises:
        GlassError: it is neither in the cache nor to be had, or damaged.
    """
    with hub_access(repo, revision, filename):
        path = Path(_api().hf_hub_download(repo, filename, revision=revision))
        if not path.is_symlink():  # a file system without links: huggingface_hub has checked the size
            return path
        # The link's target is named by the ETag, which over plain HTTP huggingface_hub does not compare.
        blob = path.parent / os.readlink(path)
        data = blob.read_bytes()
        digests = {64: hashlib.sha256(data), 40: hashlib.sha1(b"blob %d\0" % len(data) + data)}  # LFS, git
        digest = digests.get(len(blob.name))
        if digest is not None and digest.hexdigest() != blob.name:
            for link in (blob.resolve(), blob, path):
                link.unlink(missing_ok=True)
            raise GlassError(f"{filename} of {repo} was damaged on its way and is deleted from the cache: try again.")
    return path


def upload(
    path: str | Path,
    repo: str,
    revision: str | None = None,
    private: bool = False,
    message: str | None = None,
    license: str = "other",
) -> str:
    """Share a ranks file: it, the repository's index and its card, in one commit. Creates the repository.

    Returns:
        str: the commit's URL.

    Raises:
        GlassError: the file is unusable, or the Hub does not take it; the repository's files are as before (a new
            one may be left, empty).
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise GlassError(f"{path} would not be found in {repo}: name it something.safetensors.")
    entry = index_entry(path.name, metadata := GlobalRanks.read(path).metadata)
    with hub_access(repo, revision):
        api = _api()
        api.create_repo(repo, private=private, exist_ok=True)
        info = api.model_info(repo, revision=revision)
        if private and not info.private:
            raise GlassError(f"{repo} exists and is public: make it private on its Hub page, or upload publicly.")
        there = {s.rfilename for s in info.siblings or ()}
        old = {f: download(repo, f, info.sha).read_bytes() for f in (INDEX, CARD) if f in there}
        new = {INDEX: _index(old.get(INDEX), entry, repo), CARD: _card(old.get(CARD), repo, entry, metadata, license)}
        operations = [CommitOperationAdd(path.name, path)]
        operations += [CommitOperationAdd(file, text.encode()) for file, text in new.items()]
        message = message or f"Add global ranks of {entry['model'] or path.stem}"
        return api.create_commit(
            repo, operations, commit_message=message, revision=revision, parent_commit=info.sha
        ).commit_url


def _index(old: bytes | None, entry: dict[str, str], repo: str) -> str:
    """A repository's index with an entry put in, in the place of that of the same model."""
    try:
        index = json.loads(old) if old else {"format_version": FORMAT_VERSION, "models": []}
        if index["format_version"] != FORMAT_VERSION:
            raise ValueError
        others = [e for e in index["models"] if e["fingerprint"] != entry["fingerprint"]]
        taken = [e["model"] for e in others if e["file"] == entry["file"]]
        index["models"] = sorted([*others, entry], key=lambda e: e["file"])
    except (ValueError, TypeError, KeyError) as e:
        raise GlassError(f"{repo} has an index.json that is not of this version: use another repository.") from e
    if taken:
        raise GlassError(f"{repo} already has a {entry['file']}, for {taken[0]}: rename your file.")
    return json.dumps(index, indent=2) + "\n"


def _card(old: bytes | None, repo: str, entry: dict[str, str], metadata: dict[str, str], license: str) -> str:
    """A repository's card with a file's section put in; whatever else it says stays."""
    name = "license_name: that-of-each-model\n" if license == "other" else ""
    front = f"---\nlicense: {license}\n{name}tags:\n- glass\n- mlx\n---\n\n"
    text = old.decode() if old else front + f"# {repo.split('/')[1]}\n"
    sizes = json.loads(metadata["sizes"])
    rows = {k: v for k, v in sorted(metadata.items()) if v and k not in ("format_version", "sizes", "blocks")}
    rows = {"model": entry["model"], **rows, "FFN layers": len(sizes), "neurons": sum(sizes)}
    cells = ((k, re.sub(r"([|<>\[\]`*\\])", r"\\\1", " ".join(str(v).split()))) for k, v in rows.items())
    section = f"## {entry['file']}\n\n| | |\n|---|---|\n" + "".join(f"| {k} | {v} |\n" for k, v in cells) + "\n"
    parts = [part.rstrip("\n") + "\n\n" for part in re.split(r"^(?=## )", text, flags=re.MULTILINE)]
    for new in (_ABOUT.format(repo=repo), section):
        heading = new.partition("\n")[0]
        at = next((i for i, part in enumerate(parts) if part.partition("\n")[0].rstrip() == heading), len(parts))
        parts[at : at + 1] = [new]
    return "".join(parts).rstrip("\n") + "\n"
