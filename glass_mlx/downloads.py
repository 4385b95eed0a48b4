"""The models in huggingface-hub's cache, looked at without loading them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import constants, scan_cache_dir, snapshot_download
from huggingface_hub.errors import CacheNotFound, DryRunError

from .errors import GlassError
from .files import read_json
from .hub.access import hub_access
from .hub.model_files import problem
from .hub.names import ALIASES, DEFAULT_MODEL, DEMO_PATH, near_miss
from .hub.sizes import fit, size, usable_memory
from .loading import MODEL_FILES
from .model.config import GlassConfig
from .model.context import context_length
from .ranks.identity import original
from .ranks.lookup import measured_models


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine.

    Attributes:
        id: the shortest name that it is loaded by.
        path: its directory.
        bytes: its size on disk.
        repo: its Hub repository; "" if it is none's.
    """

    id: str
    path: Path
    bytes: int
    repo: str = ""

    @property
    def size(self) -> str:
        return size(self.bytes)

    @property
    def fit(self) -> str:
        """Whether it fits this machine's memory at the default density."""
        return fit(self.bytes, GlassConfig.density, usable_memory())

    @cached_property
    def problem(self) -> str | None:
        """Why it cannot be loaded; None if it can."""
        return problem(self.path)

    @cached_property
    def ranks(self) -> bool:
        """Whether global ranks of it, or of the model that it was converted from, are on this machine, by their names
        alone."""
        names = {self.id, self.repo, original(self.path, self.repo)} - {""}
        return bool(names & measured_models())

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "repo": self.repo,
            "path": str(self.path),
            "downloaded": True,
            "bytes": self.bytes,
            "fits": self.fit,
            "ranks": self.ranks,
            "problem": self.problem,
        }

    def details(self) -> dict[str, Any]:
        """What is known of it, by name."""
        try:
            config = read_json(self.path / "config.json")
        except (OSError, ValueError):
            config = {}
        config = config if isinstance(config, dict) else {}
        text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
        bits = config.get("quantization")
        known = {
            "repository": self.repo,
            "directory": self.path,
            "size": self.size,
            "fits": self.fit,
            "type": config.get("model_type"),
            "layers": text.get("num_hidden_layers"),
            "FFN neurons": text.get("intermediate_size"),
            "quantised": f"{bits.get('bits')} bits, groups of {bits.get('group_size')}"
            if isinstance(bits, dict)
            else "no",
            "context": f"{tokens:,} tokens" if (tokens := context_length(config)) else "unknown",
            "global ranks": "yes" if self.ranks else "no; glass_mlx.stats build measures them",
            "problem": self.problem and f"it {self.problem}",
        }
        return {name: value for name, value in known.items() if value}


def downloaded_models() -> list[LocalModel]:
    """The bundled model, and those in the Hub cache, complete or not."""
    short = {repo: alias for alias, repo in ALIASES.items()}
    found = []
    for repo in sorted(_scan(), key=lambda repo: repo.repo_id):
        if repo.repo_type == "model" and repo.revisions:
            newest = max(repo.revisions, key=lambda revision: ("main" in revision.refs, revision.last_modified))
            name = short.get(repo.repo_id, repo.repo_id)
            found.append(LocalModel(name, newest.snapshot_path, repo.size_on_disk, repo.repo_id))
    return [_bundled(), *found]


def find_model(name: str) -> LocalModel:
    """A model by a name that ``load`` takes; nothing is downloaded.

    Raises:
        GlassError: it is not on this machine.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return LocalModel(path.resolve().name, path, sum(f.stat().st_size for f in path.iterdir() if f.is_file()))
    models = downloaded_models()
    for model in models:
        if name == model.id or ALIASES.get(name, name) == model.repo:
            return model
    raise GlassError(f"The model {name!r} is not on this machine: {_instead(name, models)}")


def removal(names: Iterable[str]) -> tuple[Any, list[str]]:
    """What removes models from the Hub cache.

    Returns:
        tuple: huggingface-hub's strategy, to be executed, and the names of the repositories.

    Raises:
        GlassError: a model is not in the cache.
    """
    repos = {repo.repo_id: repo for repo in _scan() if repo.repo_type == "model"}
    wanted = [ALIASES.get(name, name) for name in names]
    for repo in wanted:
        if repo == DEFAULT_MODEL:
            raise GlassError(f"{DEFAULT_MODEL} comes with the package, and stays.")
        if repo not in repos:
            close = "" if repo in ALIASES.values() else near_miss(repo, {*repos, *ALIASES})
            close = close or "glass_mlx.models lists the models that are."
            raise GlassError(f"{repo} is not in {constants.HF_HUB_CACHE}: {close}")
    theirs = frozenset(repos[repo] for repo in wanted)  # a copy of a repository may have the same commits
    cache = replace(scan_cache_dir(constants.HF_HUB_CACHE), repos=theirs)
    return cache.delete_revisions(*(revision.commit_hash for repo in theirs for revision in repo.revisions)), wanted


@dataclass(frozen=True)
class Download:
    """What a download takes: the names of its files, their bytes, those that are missing here, and the disk's free."""

    names: tuple[str, ...]
    total: int
    missing: int
    free: int


def plan_download(repo: str, revision: str | None = None) -> Download:
    """Ask the Hub what the download of a model takes.

    Raises:
        GlassError: the Hub cannot be asked, or it has no such model.
    """
    with hub_access(repo, revision):
        try:
            files = snapshot_download(repo, revision=revision, allow_patterns=MODEL_FILES, dry_run=True)
        except DryRunError as e:
            raise (e.__cause__ or e) from None  # the error of the Hub or the network
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists() and place != place.parent:
        place = place.parent
    return Download(
        tuple(file.filename for file in files),
        sum(file.file_size for file in files),
        sum(file.file_size for file in files if file.will_download),
        shutil.disk_usage(place).free,
    )


def check_room(repo: str, revision: str | None = None) -> str | None:
    """Check that the disk has room for what is missing of a model, and return its size; None if nothing is.

    Raises:
        GlassError: it has not, the Hub cannot be asked, or it has no such model.
    """
    plan = plan_download(repo, revision)
    if plan.missing > plan.free:
        raise GlassError(f"{repo} needs {size(plan.missing)}, but only {size(plan.free)} are free on the disk.")
    return size(plan.missing) if plan.missing else None


def _instead(name: str, models: list[LocalModel]) -> str:
    if name in ALIASES or name in ALIASES.values():
        return f"glass_mlx.models pull {name} downloads it."
    known = {name for model in models for name in (model.id, model.repo)} - {""} | set(ALIASES)
    return near_miss(name, known) or "glass_mlx.models lists those that are, glass_mlx.models pull downloads one."


def _bundled() -> LocalModel:
    return LocalModel(DEFAULT_MODEL, DEMO_PATH, sum(f.stat().st_size for f in DEMO_PATH.iterdir() if f.is_file()))


def _scan() -> list[Any]:
    try:
        return list(scan_cache_dir(constants.HF_HUB_CACHE).repos)
    except CacheNotFound:
        return []
