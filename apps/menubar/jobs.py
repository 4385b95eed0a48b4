"""Downloaded models: how large they are, downloads with progress that can be cancelled, and deleting."""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, scan_cache_dir, snapshot_download
from huggingface_hub.errors import DryRunError
from tqdm import tqdm

from glass_mlx.errors import GlassError
from glass_mlx.hub import hub_access
from glass_mlx.loading import ALIASES, MODEL_FILES
from glass_mlx.model_files import problem

from .state import Task, size


class Cancelled(Exception):
    """The job was cancelled."""


class Job:
    """A running job. The worker reports its progress here and checks for cancellation; the view shows ``task``."""

    def __init__(self, model: str, total: int = 0):
        self.model, self.done, self.total = model, 0, total
        self.cancelled = False

    @property
    def task(self) -> Task:
        return Task(self.model, self.done, self.total, self.cancelled)

    def cancel(self) -> None:
        self.cancelled = True

    def check(self) -> None:
        """Raise :class:`Cancelled` if the job has been cancelled."""
        if self.cancelled:
            raise Cancelled


def repo_name(text: str) -> str:
    """The alias or repository in what a user has typed or pasted, which may be the URL of a Hub page.

    Raises:
        GlassError: it is neither.
    """
    name = text.strip().removeprefix("https://").removeprefix("http://")
    for host in ("huggingface.co/", "hf.co/"):
        if name.startswith(host):
            name = "/".join(name.removeprefix(host).split("?")[0].split("/")[:2])
    if name not in ALIASES and (name.count("/") != 1 or not all(name.split("/"))):
        raise GlassError(f"{text.strip()!r} is neither a short name nor a Hub repository (owner/name).")
    return name


@dataclass(frozen=True)
class Plan:
    """What a download takes: the bytes of the model, those that are not here yet, and those that the disk has free."""

    total: int
    missing: int
    free: int


def plan(name: str) -> Plan:
    """Ask the Hub what the download of a model takes.

    Raises:
        GlassError: it is not a model, or the Hub refuses it.
    """
    repo = ALIASES.get(name, name)
    with hub_access(repo):
        try:
            files = snapshot_download(repo, allow_patterns=MODEL_FILES, dry_run=True)
        except DryRunError as e:
            raise (e.__cause__ or e) from None  # the error of the Hub or the network
    names = [file.filename for file in files]
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise GlassError(f"{repo} is not a model for mlx-lm. Look for a conversion of it in mlx-community.")
    missing = sum(file.file_size for file in files if file.will_download)
    return Plan(sum(file.file_size for file in files), missing, _free())


def download(job: Job) -> None:
    """Download the job's model to the Hub cache. A cancelled download keeps what has arrived.

    Raises:
        Cancelled: the job was cancelled.
        GlassError: it is not a model, the disk is full, or the Hub refuses it.
    """
    repo, planned = ALIASES.get(job.model, job.model), plan(job.model)
    job.check()
    if planned.missing > planned.free:
        raise GlassError(f"{repo} needs {size(planned.missing)}, but only {size(planned.free)} are free on the disk.")
    job.total = planned.total
    with hub_access(repo):
        path = Path(snapshot_download(repo, allow_patterns=MODEL_FILES, tqdm_class=_bar(job)))
    if (reason := problem(path)) is not None:
        raise GlassError(f"{repo} {reason}. Look for a conversion of it in mlx-community.")


def delete(repo: str) -> None:
    """Delete a repository from the Hub cache.

    Raises:
        GlassError: it is not there.
    """
    cache = scan_cache_dir(constants.HF_HUB_CACHE)
    commits = [r.commit_hash for found in cache.repos if found.repo_id == repo for r in found.revisions]
    if not commits:
        raise GlassError("It is not in the Hub cache.")
    cache.delete_revisions(*commits).execute()


def _free() -> int:
    """Bytes that are free where the Hub cache is."""
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def _bar(job: Job) -> type[tqdm]:
    """A class of invisible progress bars, which report to the job and stop the download when it is cancelled."""

    class Bar(tqdm):
        monitor_interval = 0  # starts no monitor thread

        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            job.check()
            super().update(n)
            if self.unit == "B":  # other bars count files
                job.done = max(job.done, min(int(self.n), job.total))

    return Bar
