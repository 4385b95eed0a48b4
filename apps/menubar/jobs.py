"""What takes minutes, can be watched and can be cancelled: downloading a model, measuring its ranks."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import DryRunError
from tqdm import tqdm

from glass_mlx import stats
from glass_mlx.errors import GlassError
from glass_mlx.hub import hub_access
from glass_mlx.loading import ALIASES, MODEL_FILES
from glass_mlx.ranks.format import GlobalStatistics
from glass_mlx.ranks.sources import null_prompt

from .state import Task, size


class Cancelled(Exception):
    """The user has cancelled the job."""


class Job:
    """A job under way. Its worker reports to it and asks it whether to go on; the view asks it for a task to show."""

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
    """The alias or repository that a user has typed or pasted, the address of its Hub page included.

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


def download(job: Job) -> None:
    """Download the files of the job's model to the Hub cache. What a cancelled download has got is kept.

    Raises:
        Cancelled: the job was cancelled.
        GlassError: it is no model, there is no room, or the Hub does not give it.
    """
    repo = ALIASES.get(job.model, job.model)
    with hub_access(repo):
        try:
            files = snapshot_download(repo, allow_patterns=MODEL_FILES, dry_run=True)
        except DryRunError as e:
            raise (e.__cause__ or e) from None  # what the Hub or the network said
        job.check()
        names = [file.filename for file in files]
        if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
            raise GlassError(f"{repo} is no model that mlx-lm reads: look for its conversion in mlx-community.")
        _check_room(repo, sum(file.file_size for file in files if file.will_download))
        job.total = sum(file.file_size for file in files)
        snapshot_download(repo, allow_patterns=MODEL_FILES, tqdm_class=_bar(job))


def build_ranks(job: Job) -> Callable[[Any, Any], None]:
    """The work, for ``Engine.call``, of measuring a model's ranks and letting it use them.

    A cancelled measurement goes on the next time from where it was.
    """

    def work(model: Any, tokenizer: Any) -> None:
        if model.global_ranks is not None:
            return
        source = null_prompt(model, tokenizer)

        def batch(number: int) -> list[list[int]]:
            job.check()
            rows = source.batch(number)
            job.check()
            # of an interrupted run the earlier batches are read already, and were about as long as this one
            job.done = max(job.done, min(job.total, (number + 1) * sum(map(len, rows))))
            return rows

        ranks = GlobalStatistics.read(stats.build_ranks(model, tokenizer, source=replace(source, batch=batch)))
        ranks.use_in(model)

    job.total = stats.DEFAULT_TOKENS
    return work


def _check_room(repo: str, need: int) -> None:
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if need > free:
        raise GlassError(f"No space for {repo}: it takes {size(need)}, and {size(free)} are free on that disk.")


def _bar(job: Job) -> type[tqdm]:
    """A progress bar that nobody sees: it reports to the job, and stops the download when that is cancelled."""

    class Bar(tqdm):
        monitor_interval = 0  # no thread to watch it

        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            job.check()
            super().update(n)
            if self.unit == "B":  # others count files
                job.done = max(job.done, min(int(self.n), job.total))

    return Bar
