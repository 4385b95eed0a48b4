"""The app without its view: an engine and a server in this process, downloads, and measurements of ranks.

All methods may be called from any thread. What can go wrong for a user is not raised: it becomes a state or a notice.
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

from glass_mlx.downloads import Download, removal
from glass_mlx.errors import GlassError
from glass_mlx.hub.sizes import fit, size, usable_memory
from glass_mlx.loading import ALIASES, DEFAULT_MODEL
from glass_mlx.model.config import GlassConfig
from glass_mlx.serving.catalogue import Catalogue
from glass_mlx.serving.engine import Engine, EngineOptions
from glass_mlx.serving.errors import UnknownModel
from glass_mlx.serving.measuring import MeasuringStopped
from glass_mlx.serving.request import Usage

from . import jobs
from .jobs import Cancelled, Job
from .server_control import ServerControl
from .settings import Settings, load_settings, save_settings, settings_path
from .state import Model, Snapshot, decoding_density

logger = logging.getLogger("glass_mlx")

RESCAN = 30.0  # seconds; other programs download models, too


class Controller:
    """Methods for the user's actions, and ``snapshot`` for what the view shows.

    Attributes:
        path: the settings file.
        settings: the user's choices.
        closing: whether the app is quitting.
    """

    def __init__(self, path: Path | None = None):
        """
        Args:
            path (Path, optional): the settings file. Default: the user's own.
        """
        self.path = path or settings_path()
        self._lock = threading.RLock()  # held briefly, never while waiting
        self.settings, notices = load_settings(self.path)
        self._notices = list(notices)
        self._settings_mtime = self._modified()
        self._server = ServerControl({"density": decoding_density(self.settings, None)})
        self._models: tuple[Model, ...] = ()
        self._scanned = -RESCAN
        self._scanning = threading.Lock()
        self._speeds: dict[tuple[str, float], float] = {}
        self._ranked = {DEFAULT_MODEL}  # comes with its ranks; other models show theirs once they are loaded
        self._usage: Usage | None = None
        self._download: Job | None = None
        self.closing = False
        self._engine = self._new_engine()

    def start(self) -> None:
        """Start the server, if the settings say so, and look for models."""
        with self._lock:
            self._apply(self.settings)
        if self.settings.start_server:
            self.start_server()
        self.scan()

    def snapshot(self, login: bool | None = None) -> Snapshot:
        """Everything that the view shows, now."""
        with self._lock:
            engine = self._engine.status()
            speeds = tuple(sorted((d, v) for (m, d), v in self._speeds.items() if m == self.settings.model))
            return Snapshot(
                settings=self.settings,
                engine=engine,
                alive=self._engine.alive or self.closing,
                server=self._server.view(self.settings.port),
                models=self._fitting(),
                download=self._download.task if self._download else None,
                speeds=speeds,
                notices=tuple(self._notices),
                ranked=frozenset(self._ranked),
                login=login,
                closing=self.closing,
            )

    def tick(self) -> None:
        """Notice what has changed: the last answer, the settings file, models. Call it about every second."""
        with self._lock:
            engine = self._engine.status()
            if engine.usage is not None and engine.usage is not self._usage and engine.model is not None:
                self._usage = engine.usage  # of the last answer
                self._speeds[engine.model, engine.usage.density] = engine.usage.generation_tps
            if engine.has_ranks and engine.model is not None:
                self._ranked.add(engine.model)
            self._server.defaults["density"] = self._density()  # a quality's, once the model is known
            if self._modified() != self._settings_mtime and not self.closing:
                self._reload()
            due = time.monotonic() - self._scanned >= RESCAN and not self.closing
        if due:
            threading.Thread(target=self.scan, name="scan", daemon=True).start()

    # The server.

    def start_server(self) -> None:
        """Start serving."""
        self._server.start(self._engine, self.settings.port)

    def stop_server(self) -> None:
        """Stop serving; the model stays loaded."""
        self._server.stop()

    def use_another_port(self) -> None:
        """Serve on the next free port, from now on."""
        port = self._server.start_elsewhere(self._engine, self.settings.port)
        if port is not None:
            self._change(replace(self.settings, port=port))

    # The engine and its model.

    def select_model(self, name: str) -> None:
        """Answer with this model from now on, and load it."""
        with self._lock:
            self._change(replace(self.settings, model=name))
            selected = self.settings.model == name
        if selected:
            self.load()

    def change(self, settings: Settings) -> None:
        """Use other settings: another model is loaded, and a running server moves to another port."""
        with self._lock:
            before = self.settings
            self._change(settings)
            now = self.settings
        if now.port != before.port and self._server.stop():
            self.start_server()
        if now.model != before.model:
            self.load()

    def load(self) -> None:
        """Load the chosen model."""
        self._try(lambda: self._engine.load())

    def unload(self) -> None:
        """Free the model's memory, after the present answer."""
        self._try(lambda: self._engine.unload())

    def restart(self) -> None:
        """Replace an engine that has stopped, and restart the server if it was running."""
        if self._engine.alive:  # restarted already
            return
        was_serving = self._server.stop()
        self._engine.close(timeout=1)
        with self._lock:
            self._engine = self._new_engine()
        if was_serving:
            self.start_server()

    def set_glass(self, on: bool) -> None:
        """Decode with some of the neurons, or with all of them, from the next answer on."""
        self._change(replace(self.settings, glass=on))

    def set_density(self, density: float) -> None:
        """Decode with this share of the neurons. 1 turns GLASS off and keeps its density for later."""
        if density == 1:
            self.set_glass(False)
        else:
            self._change(replace(self.settings, glass=True, density=density, quality=""))

    def set_quality(self, quality: str) -> None:
        """Decode with the density that costs the model what this quality may cost."""
        self._change(replace(self.settings, glass=True, quality=quality))

    def _density(self) -> float:
        return decoding_density(self.settings, self._engine.status().facts)

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
                Model(model.id, model.size_bytes, downloaded=model.kind in ("alias", "hub"))
                for model in sorted(found, key=lambda m: (m.kind != "demo", m.id.lower()))
                if model.downloaded and model.kind != "default" and model.id not in aliased
            )
            with self._lock:
                self._models, self._scanned = models, time.monotonic()

    def download(self, name: str) -> None:
        """Download a model and select it. The name is a short name, a repository or the URL of its page."""
        with self._lock:
            if self._download is not None:
                return self._add_notice(f"{self._download.model} is still being downloaded. Wait for it, or cancel it.")
            try:
                job = self._download = Job(jobs.repo_name(name))
            except GlassError as e:
                return self._add_notice(str(e))

        def work() -> None:
            error = _error_of(lambda: jobs.download(job))
            self.scan()
            with self._lock:
                self._download = None
                if error:
                    self._add_notice(error)
                found = [m for m in self._fitting() if _repo(m.name) == _repo(job.model)]
                if error is not None or not found or self.closing:
                    return
                fits = found[0].fit != "too large"
                self._add_notice(f"{job.model} is downloaded" + ("." if fits else ", but too large for this memory."))
            if fits:
                self.select_model(found[0].name)

        threading.Thread(target=work, name="download", daemon=True).start()

    def describe_download(self, name: str) -> str:
        """What a download takes, in words, or why it is not possible. Asks the Hub."""
        found: list[Download] = []
        error = _error_of(lambda: found.append(jobs.plan(jobs.repo_name(name))))
        if error is not None:
            return error
        (plan,) = found
        words = {"fits": "fits this machine", "tight": "is tight here", "too large": "is too large for this memory"}
        verdict = words[fit(plan.total, self._density(), usable_memory())]
        rest = "" if plan.missing == plan.total else f", {size(plan.missing)} of it still to come"
        return f"{size(plan.total)}{rest}; {verdict}; {size(plan.free)} are free on the disk."

    def delete_model(self, name: str) -> None:
        """Delete a downloaded model. If it is in use, the demo model answers from now on."""
        if self.settings.model == name:
            self._change(replace(self.settings, model=DEFAULT_MODEL))
        if self._engine.status().model == name:
            _error_of(self._engine.unload().result)
        error = _error_of(lambda: removal([name])[0].execute())
        self.scan()
        self.notify(f"{name} could not be deleted. {error}" if error else f"{name} was deleted.")

    def cancel_download(self) -> None:
        """Stop the download. What has arrived is kept for the next attempt."""
        if (job := self._download) is not None:
            job.cancel()

    def build_ranks(self) -> None:
        """Measure the global ranks of the selected model while nobody waits for an answer."""

        def ended(future: Future) -> None:
            if error := _error_of(future.result):
                self.notify(f"The ranks could not be measured. {error}")

        with self._lock:
            if self._engine.status().measuring is None:
                self._try(lambda: self._engine.measure().add_done_callback(ended))

    def cancel_ranks(self) -> None:
        """Stop measuring. What has been measured is kept for the next attempt."""
        self._engine.stop_measuring()

    def _fitting(self) -> tuple[Model, ...]:
        memory, density = usable_memory(), self._density()
        return tuple(replace(model, fit=fit(model.size, density, memory)) for model in self._models)

    # Settings and notices.

    def notify(self, notice: str) -> None:
        """Show a message until the user dismisses it."""
        with self._lock:
            self._add_notice(notice)

    def dismiss(self) -> None:
        """Remove all notices."""
        with self._lock:
            self._notices.clear()

    def _add_notice(self, notice: str) -> None:
        logger.info("notice: %s", notice)
        if notice not in self._notices:
            self._notices.append(notice)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except GlassError as e:
            self.notify(str(e))

    def _change(self, settings: Settings) -> None:
        """Apply and save settings."""
        with self._lock:
            self._apply(settings)
            self.save()

    def save(self) -> None:
        """Write the settings file."""
        with self._lock:
            try:
                save_settings(self.path, self.settings)
            except GlassError as e:
                self._add_notice(str(e))
            self._settings_mtime = self._modified()

    def _apply(self, settings: Settings) -> None:
        """Use settings from now on. A model that is not on this machine is replaced."""
        try:
            Catalogue().resolve(settings.model)
        except UnknownModel:
            other = self.settings.model if self.settings.model != settings.model else DEFAULT_MODEL
            self._add_notice(f"{settings.model} is not on this machine: using {other}. Download it to use it.")
            settings = replace(settings, model=other)
        self.settings = settings
        self._server.defaults["density"] = self._density()
        self._engine.catalogue.default = settings.model
        self._engine.options = replace(self._engine.options, idle_timeout=settings.idle_minutes * 60 or None)

    def _reload(self) -> None:
        """Apply a settings file that was edited by hand. A new port holds when the server starts the next time."""
        settings, notices = load_settings(self.path)
        self._settings_mtime = self._modified()
        for notice in notices:
            self._add_notice(notice)
        self._apply(settings)

    def _modified(self) -> int:
        try:
            return os.stat(self.path).st_mtime_ns
        except OSError:
            return 0

    def close(self) -> None:
        """Stop everything and free the memory."""
        with self._lock:
            self.closing = True
        self.cancel_download()
        self._server.stop()
        self._engine.close()


def _repo(name: str) -> str:
    return ALIASES.get(name, name)


def _error_of(work: Callable[[], Any]) -> str | None:
    """Do some work. Returns None on success, "" if it was cancelled, or else an error message."""
    try:
        work()
    except (Cancelled, CancelledError, MeasuringStopped):
        return ""
    except GlassError as e:
        return str(e)
    except Exception as e:  # nobody else would see the error of a job's thread
        logger.exception("a job failed")
        return f"Something went wrong ({type(e).__name__}). See the log."
    return None
