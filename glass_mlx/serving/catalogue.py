"""Which models may be served, and where they are. A name that a client sends is never used as a path.

Served are the bundled demo, the aliases, Hub repositories in the local cache (any repository if downloads are allowed),
the default model, and models below the directories that the operator allows. What is not a whole text model of mlx-lm's
is not listed; a repository that was downloaded in part counts as not downloaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants, scan_cache_dir, try_to_load_from_cache
from huggingface_hub.errors import CacheNotFound, HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..hub.model_files import problem
from ..loading import ALIASES, DEFAULT_MODEL, DEMO_PATH, resolve_model
from .errors import UnknownModel

DEFAULT_NAME = "default_model"


@dataclass(frozen=True)
class Source:
    """A model that may be loaded.

    Attributes:
        id: the name to show.
        key: identifies the model: all of its names have the same key.
        locate: returns its directory, after downloading it if necessary.
        name: what it was asked for by.
    """

    id: str
    key: str
    locate: Callable[[], Path]
    name: str = ""


@dataclass(frozen=True)
class ModelInfo:
    """A model that requests may name; ``kind`` is "demo", "alias", "hub", "local" or "default"."""

    id: str
    kind: str
    size_bytes: int = 0
    downloaded: bool = True


class Catalogue:
    """Resolves and lists model names."""

    def __init__(self, default: str = DEFAULT_MODEL, allow_paths: tuple[Path, ...] = (), allow_download: bool = False):
        self.default, self.allow_download = default, allow_download
        self.allow_paths = tuple(Path(p).expanduser().resolve() for p in allow_paths)

    def resolve(self, name: str) -> Source:
        """Find the model that a name stands for.

        Raises:
            UnknownModel: no model of this name may be served. The message contains no path except what the client sent.
        """
        return replace(self._find(name), name=name)

    def _find(self, name: str) -> Source:
        if name in ("", DEFAULT_NAME, self.default, self._default_id()):
            return self._default()
        if name == DEFAULT_MODEL:
            return Source(DEFAULT_MODEL, DEFAULT_MODEL, lambda: DEMO_PATH)
        repo = ALIASES.get(name, name)
        if (local := self._local(name)) is not None:
            return Source(local.name, str(local), lambda: local)
        if not _is_repo(repo):
            raise UnknownModel(f"The model {name[:100]!r} does not exist; GET /v1/models lists the models.")
        if (cached := _cached(repo)) is not None:
            return Source(name, repo, lambda: cached)
        if not self.allow_download:
            raise UnknownModel(
                f"The model {name!r} is not in the Hub cache. Download it with `hf download {repo}`, or start the "
                "server with --allow-download."
            )
        return Source(name, repo, lambda: _download(repo))

    def models(self) -> list[ModelInfo]:
        """All models that requests may name, with their sizes on disk; the default model first."""
        cached = {
            repo.repo_id: repo.size_on_disk
            for repo in _scan()
            if repo.repo_type == "model" and _cached(repo.repo_id) is not None
        }
        local = {
            path: str(path.relative_to(root))
            for root in self.allow_paths
            for path in sorted(p.parent for depth in ("*", "*/*") for p in root.glob(f"{depth}/config.json"))
            if self._local(str(path)) is not None
        }
        aliases = [
            ModelInfo(alias, "alias", cached.get(repo, 0), repo in cached)
            for alias, repo in ALIASES.items()
            if repo in cached or self.allow_download
        ]
        found = [
            ModelInfo(DEFAULT_MODEL, "demo", _size(DEMO_PATH)),
            *aliases,
            *(ModelInfo(repo, "hub", size) for repo, size in sorted(cached.items())),
            *(ModelInfo(name, "local", _size(path)) for path, name in local.items()),
        ]
        default = self._default_id()
        if default not in {model.id for model in found}:
            path = Path(self.default).expanduser()
            found.append(ModelInfo(default, "default", _size(path), path.is_dir() and problem(path) is None))
        return sorted(found, key=lambda model: model.id != default)

    def _default_id(self) -> str:
        """The default model's name to show; for a local directory only its last part."""
        path = Path(self.default).expanduser()
        return path.resolve().name if self.default not in (DEFAULT_MODEL, *ALIASES) and path.is_dir() else self.default

    def _default(self) -> Source:
        """The default model. The operator chose it, so it may be anything that ``load`` takes."""
        name = self.default
        if name == DEFAULT_MODEL:
            return Source(name, name, lambda: DEMO_PATH)
        path = Path(name).expanduser()
        key = str(path.resolve()) if path.is_dir() and name not in ALIASES else ALIASES.get(name, name)
        return Source(self._default_id(), key, lambda: resolve_model(name))

    def _local(self, name: str) -> Path | None:
        """The model's directory that a name means below one of the allowed ones. Links are followed first: neither the
        directory nor a file in it may be elsewhere."""
        for root in self.allow_paths:
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # names that cannot be paths
                path = (root / name).resolve()
                inside = path.is_relative_to(root) and path != root
                if inside and problem(path) is None and all(f.resolve().is_relative_to(root) for f in path.iterdir()):
                    return path
        return None


def _is_repo(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _cached(repo: str) -> Path | None:
    """The directory of a repository in the Hub cache, if all of the model is there."""
    config = try_to_load_from_cache(repo, "config.json", cache_dir=constants.HF_HUB_CACHE)
    if not isinstance(config, str):
        return None
    path = Path(config).parent
    return path if problem(path) is None else None


def _download(repo: str) -> Path:
    if Path(repo).exists():  # resolve_model would take the name as a path
        raise UnknownModel(
            f"{repo} is also a directory where the server runs: start it elsewhere to download the model."
        )
    return resolve_model(repo)


def _scan() -> list:
    try:
        return list(scan_cache_dir(constants.HF_HUB_CACHE).repos)
    except CacheNotFound:
        return []


def _size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.glob("*") if f.is_file()) if path.is_dir() else 0
