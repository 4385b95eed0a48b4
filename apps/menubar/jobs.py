"""Downloads: how large they are, and jobs that show their progress and can be cancelled."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from tqdm import tqdm

from glass_mlx.downloads import Download, plan_download
from glass_mlx.errors import GlassError
from glass_mlx.hub.access import hub_access
from glass_mlx.hub.model_files import problem
from glass_mlx.hub.sizes import size
from glass_mlx.loading import ALIASES, MODEL_FILES

from .state import Task


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


def plan(name: str) -> Download:
    """Ask the Hub what the download of a model takes.

    Raises:
        GlassError: it is not a model, or the Hub refuses it.
    """
    repo = ALIASES.get(name, name)
    planned = plan_download(repo)
    if "config.json" not in planned.names or not any(name.endswith(".safetensors") for name in planned.names):
        raise GlassError(f"{repo} is not a model for mlx-lm. Look for a conversion of it in mlx-community.")
    return planned


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
