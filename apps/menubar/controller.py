"""What the app does: an engine and a server in its own process, and the jobs beside them.

All methods may be called from any thread. None of them raises for what a user can meet: it becomes a state or a notice,
in words.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from glass_mlx.errors import GlassError
from glass_mlx.loading import ALIASES, DEFAULT_MODEL
from glass_mlx.model.config import GlassConfig
from glass_mlx.serving.catalogue import Catalogue
from glass_mlx.serving.engine import Engine, EngineOptions
from glass_mlx.serving.errors import UnknownModel
from glass_mlx.serving.request import Usage

from . import jobs
from .jobs import Cancelled, Job
from .serving import Serving
from .settings import Settings, load_settings, save_settings, settings_path
from .state import Model, Snapshot, fit

logger = logging.getLogger("glass_mlx")

RESCAN = 30.0  # seconds; models may come to the Hub cache by other ways than this app


class Controller:
    """The app without its view: methods for the user's actions, ``snapshot`` for what there is to see.

    Attributes:
        path: the settings file.
        settings: the user's choices.
        closing: whether the app is quitting.
    """

    def __init__(self, path: Path | None = None):
        """
        Args:
            path (Path, optional): the settings file, if not the user's.
        """
        self.path = path or settings_path()
        self._lock = threading.RLock()  # held for moments only
        self.settings, notices = load_settings(self.path)
        self._notices = list(notices)
        self._seen = self._modified()
        self._serving = Serving({"density": self.settings.effective_density})
        self._models: tuple[Model, ...] = ()
        self._scanned = -RESCAN
        self._scanning = threading.Lock()
        self._speeds: dict[tuple[str, float], float] = {}
        self._ranked = {DEFAULT_MODEL}  # its ranks come with the package; of others it is known when they are loaded
        self._usage: Usage | None = None
        self._download: Job | None = None
        self._ranks: Job | None = None
        self.closing = False
        self._engine = self._new_engine()

    def start(self) -> None:
        """Begin: the server if it is to start with the app, and a look for models."""
        with self._lock:
            self._use(self.settings)
        if self.settings.start_server:
            self.start_server()
        self.scan()

    def snapshot(self, login: bool | None = None) -> Snapshot:
        """Everything there is to show, now."""
        with self._lock:
            engine = self._engine.status()
            speeds = tuple(sorted((d, v) for (m, d), v in self._speeds.items() if m == self.settings.model))
            return Snapshot(
                settings=self.settings,
                engine=engine,
                alive=self._engine.alive or self.closing,
                server=self._serving.view(self.settings.port),
                models=self._fitting(),
                download=self._download.task if self._download else None,
                ranks=self._ranks.task if self._ranks else None,
                speeds=speeds,
                notices=tuple(self._notices),
                ranked=frozenset(self._ranked),
                login=login,
                closing=self.closing,
            )

    def tick(self) -> None:
        """To be called every second or so: notices what has changed without being told."""
        with self._lock:
            engine = self._engine.status()
            if engine.usage is not None and engine.usage is not self._usage and engine.model is not None:
                self._usage = engine.usage  # of the last answer, which may be of the last model
                self._speeds[engine.model, engine.usage.density] = engine.usage.generation_tps
            if engine.has_ranks and engine.model is not None:
                self._ranked.add(engine.model)
            if self._modified() != self._seen and not self.closing:
                self._reload()
            due = time.monotonic() - self._scanned >= RESCAN and not self.closing
        if due:
            threading.Thread(target=self.scan, name="scan", daemon=True).start()

    # The server.

    def start_server(self) -> None:
        """Start serving."""
        self._serving.start(self._engine, self.settings.port)

    def stop_server(self) -> None:
        """Stop serving; the model stays loaded."""
        self._serving.stop()

    def use_another_port(self) -> None:
        """Serve on the next port that is free, from now on."""
        port = self._serving.start_elsewhere(self._engine, self.settings.port)
        if port is not None:
            self._change(replace(self.settings, port=port))

    # The engine and its model.

    def select_model(self, name: str) -> None:
        """Answer with this model from now on, and load it."""
        with self._lock:
            self._change(replace(self.settings, model=name))
            there = self.settings.model == name
        if there:
            self.load()

    def load(self) -> None:
        """Load the chosen model."""
        self._try(lambda: self._engine.load())

    def unload(self) -> None:
        """Free the model's memory, after the answer under way."""
        self._try(lambda: self._engine.unload())

    def restart(self) -> None:
        """A new engine in place of one that has stopped, and the server again if it was running."""
        if self._engine.alive:  # chosen twice
            return
        was_serving = self._serving.stop()
        self._engine.close(timeout=1)
        with self._lock:
            self._ranks = None
            self._engine = self._new_engine()
        if was_serving:
            self.start_server()

    def set_glass(self, on: bool) -> None:
        """Decode with some of the neurons, or with all; holds from the next answer on."""
        self._change(replace(self.settings, glass=on))

    def set_density(self, density: float) -> None:
        """Decode with this share of the neurons; 1 switches GLASS off and leaves its density."""
        dense = density == 1
        kept = self.settings.density if dense else density
        self._change(replace(self.settings, glass=not dense, density=kept))

    def _new_engine(self) -> Engine:
        settings, idle = self.settings, self.settings.idle_minutes * 60 or None
        return Engine(EngineOptions(settings.model, GlassConfig(settings.density), idle_timeout=idle))

    # Models.

    def scan(self) -> None:
        """Look for models in the Hub cache."""
        with self._scanning:
            try:
                found = self._engine.models()
            except OSError as e:
                logger.warning("the Hub cache cannot be read: %s", e)
                found = []
            aliased = {ALIASES[model.id] for model in found if model.kind == "alias"}
            models = tuple(
                Model(model.id, model.size_bytes)
                for model in sorted(found, key=lambda m: (m.kind != "demo", m.id.lower()))
                if model.downloaded and model.kind != "default" and model.id not in aliased
            )
            with self._lock:
                self._models, self._scanned = models, time.monotonic()

    def download(self, name: str) -> None:
        """Download a model, by its short name, repository or address, and choose it when it is there."""
        with self._lock:
            if self._download is not None:
                return self._say(f"Wait for {self._download.model}, or cancel it: one download at a time.")
            try:
                job = self._download = Job(jobs.repo_name(name))
            except GlassError as e:
                return self._say(str(e))

        def work() -> None:
            error = _outcome(lambda: jobs.download(job))
            self.scan()
            with self._lock:
                self._download = None
                if error:
                    self._say(error)
                found = [m for m in self._fitting() if _repo(m.name) == _repo(job.model)]
                if error is not None or not found or self.closing:
                    return
                fits = found[0].fit != "too large"
                self._say(f"{job.model} is downloaded" + ("." if fits else ", but too large for this memory."))
            if fits:
                self.select_model(found[0].name)

        threading.Thread(target=work, name="download", daemon=True).start()

    def cancel_download(self) -> None:
        """Stop the download; what there is of it is kept for the next time."""
        if (job := self._download) is not None:
            job.cancel()

    def build_ranks(self) -> None:
        """Measure the chosen model's global ranks, on the engine's thread."""
        with self._lock:
            if self._ranks is not None:
                return
            job = Job(self.settings.model)

            def ended(future: Future) -> None:
                error = _outcome(future.result)
                with self._lock:
                    if self._ranks is job:
                        self._ranks = None
                    if error:
                        self._say(f"The ranks are not measured. {error}")

            try:
                future = self._engine.call(jobs.build_ranks(job))
            except GlassError as e:
                return self._say(str(e))
            self._ranks = job
        future.add_done_callback(ended)

    def cancel_ranks(self) -> None:
        """Stop measuring; what has been read is kept for the next time."""
        if (job := self._ranks) is not None:
            job.cancel()

    def _fitting(self) -> tuple[Model, ...]:
        memory, density = memory_size(), self.settings.effective_density
        return tuple(replace(model, fit=fit(model.size, density, memory)) for model in self._models)

    # Settings and notices.

    def say(self, notice: str) -> None:
        """Tell the user something that went wrong elsewhere."""
        with self._lock:
            self._say(notice)

    def dismiss(self) -> None:
        """The user has read the notices."""
        with self._lock:
            self._notices.clear()

    def _say(self, notice: str) -> None:
        logger.info("notice: %s", notice)
        if notice not in self._notices:
            self._notices.append(notice)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except GlassError as e:
            self.say(str(e))

    def _change(self, settings: Settings) -> None:
        """The user has changed a setting: use it, and save it."""
        with self._lock:
            self._use(settings)
            self.save()

    def save(self) -> None:
        """Write the settings file."""
        with self._lock:
            try:
                save_settings(self.path, self.settings)
            except GlassError as e:
                self._say(str(e))
            self._seen = self._modified()

    def _use(self, settings: Settings) -> None:
        """Let settings hold from now on; a model that is not on this machine is not among them."""
        try:
            Catalogue().resolve(settings.model)
        except UnknownModel:
            other = self.settings.model if self.settings.model != settings.model else DEFAULT_MODEL
            self._say(f"{settings.model} is not on this machine: using {other}. Download it to have it here.")
            settings = replace(settings, model=other)
        self.settings = settings
        self._serving.defaults["density"] = settings.effective_density
        self._engine.catalogue.default = settings.model
        self._engine.options = replace(self._engine.options, idle_timeout=settings.idle_minutes * 60 or None)

    def _reload(self) -> None:
        """The settings file was edited by hand: what it says holds. A new port does when the server starts again."""
        settings, notices = load_settings(self.path)
        self._seen = self._modified()
        for notice in notices:
            self._say(notice)
        self._use(settings)

    def _modified(self) -> int:
        try:
            return os.stat(self.path).st_mtime_ns
        except OSError:
            return 0

    def close(self) -> None:
        """Stop everything and free the memory."""
        with self._lock:
            self.closing = True
            under_way = [job for job in (self._download, self._ranks) if job]
        for job in under_way:
            job.cancel()
        self._serving.stop()
        self._engine.close()


def memory_size() -> int:
    """What models may take: on Apple's GPU what the system recommends, elsewhere the machine's memory."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    return int(recommended or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _repo(name: str) -> str:
    return ALIASES.get(name, name)


def _outcome(work: Callable[[], Any]) -> str | None:
    """Do something; returns None if it is done, "" if it was cancelled, else what went wrong in words."""
    try:
        work()
    except (Cancelled, CancelledError):
        return ""
    except GlassError as e:
        return str(e)
    except Exception as e:  # a job's thread has nobody else to tell
        logger.exception("a job failed")
        return f"Something went wrong ({type(e).__name__}). The log says more."
    return None
