"""The Hugging Face Hub: downloads, and its errors as one line that says what to do."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub import errors as hub_errors

from .._version import __version__
from ..errors import GlassError


@contextlib.contextmanager
def hub_access(repo: str, revision: str | None = None, filename: str | None = None) -> Iterator[None]:
    """Turn the errors of huggingface_hub and of the network into GlassErrors that say what to do."""
    if repo.count("/") != 1:
        raise GlassError(f"{repo!r} is not a Hub repository: give owner/name.")
    try:
        yield
    except (hub_errors.HTTPError, OSError, ValueError, RuntimeError) as e:
        cause: BaseException = e
        while isinstance(cause, (hub_errors.LocalEntryNotFoundError, RuntimeError)) and cause.__cause__:
            cause = cause.__cause__  # "not in the cache" and "upload failed" wrap the reason
        raise GlassError(_explain(cause, repo, revision, filename)) from e


def hub_api() -> HfApi:
    """huggingface_hub's client, which names this package to the Hub."""
    return HfApi(library_name="glass_mlx", library_version=__version__)


def download(repo: str, filename: str, revision: str | None = None) -> Path:
    """Download a file of a repository, or find it in the cache if that is up to date. Its path contains the commit.

    Raises:
        GlassError: the file is neither in the cache nor available, or was damaged on its way.
    """
    with hub_access(repo, revision, filename):
        path = Path(hub_api().hf_hub_download(repo, filename, revision=revision))
        if not path.is_symlink():  # a file system without links: huggingface_hub has checked the size
            return path
        # The link's target is named after the ETag, which huggingface_hub does not verify over plain HTTP.
        blob = path.parent / os.readlink(path)
        digests = {64: hashlib.sha256(), 40: hashlib.sha1(b"blob %d\0" % blob.stat().st_size)}  # LFS, git
        digest = digests.get(len(blob.name))
        if digest is not None and _digest(blob, digest) != blob.name:
            for link in (blob.resolve(), blob, path):
                link.unlink(missing_ok=True)
            raise GlassError(f"{filename} of {repo} was damaged on its way and removed from the cache: try again.")
    return path


def _digest(file: Path, digest: hashlib._Hash) -> str:
    """A digest with a file's bytes added, in hexadecimal."""
    with file.open("rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _explain(e: BaseException, repo: str, revision: str | None, filename: str | None) -> str:
    what = f"{filename} of {repo}" if filename else repo
    reason = textwrap.shorten(str(e), 150).rstrip(".") or type(e).__name__
    match e:
        case hub_errors.GatedRepoError():
            return f"{repo} is gated: accept its terms on its Hub page, then run `hf auth login`."
        case hub_errors.RepositoryNotFoundError():
            return f"The Hub has no repository {repo} that you can see: check the name, or run `hf auth login`."
        case hub_errors.RevisionNotFoundError():
            return f"{repo} has no revision {revision!r}: give a branch, a tag or a full commit hash."
        case hub_errors.RemoteEntryNotFoundError():
            return f"{repo} has no file {filename} at {revision or 'main'}: check the name and the revision."
        case hub_errors.HFValidationError():
            return f"{repo!r} is not a Hub repository: give owner/name."
        case hub_errors.HfHubHTTPError():
            return _explain_status(e, repo, what)
        case hub_errors.OfflineModeIsEnabled():
            return f"{what} is not in the local cache and HF_HUB_OFFLINE is set: unset it, or give a local path."
        case hub_errors.LocalEntryNotFoundError() | hub_errors.FileMetadataError():
            return f"{what} is not in the local cache and no Hub answers ({reason}): check HF_ENDPOINT and the proxy."
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return f"No space left for {what} in {constants.HF_HUB_CACHE}: free some, or set HF_HOME to another disk."
        case hub_errors.HTTPError() | ConnectionError() | TimeoutError():
            return f"{what}: the connection to the Hub failed ({reason}): check the network, or give a local path."
        case OSError(errno=int()):
            return f"Cannot write {what} to {constants.HF_HUB_CACHE} ({e.strerror}): make it writable, or set HF_HOME."
        case OSError():  # huggingface_hub's check of the size, and Xet's errors
            return f"{what} could not be transferred ({reason}): try again."
        case json.JSONDecodeError():
            return f"The Hub's answer about {what} cannot be read: try again later, or check HF_ENDPOINT."
    return f"{what}: {reason}; check the names and the file."


def _explain_status(e: hub_errors.HfHubHTTPError, repo: str, what: str) -> str:
    """What a status code of the Hub means for the user."""
    status = e.response.status_code
    answer = textwrap.shorten(f"{status} {e.server_message or e.response.reason_phrase}", 200)
    if status == 401:
        return f"The Hub denies access to {repo} ({answer}): check the name, or run `hf auth login`."
    if status == 403:
        return f"You may not do this with {what} ({answer}): use a token that may, or ask its owner."
    if status in (409, 412):
        return f"Someone else has changed {what} in the meantime ({answer}): try again."
    if status == 429 or status >= 500:
        return f"The Hub cannot serve {what} now ({answer}): try again later."
    return f"The Hub refuses {what} ({answer}): check the name and the revision."
