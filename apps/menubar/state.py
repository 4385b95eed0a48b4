"""The app's state at one moment, and the words for it. Pure functions: a snapshot goes in, text comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glass_mlx.hub.sizes import size
from glass_mlx.model.quality import agreement_at

from .settings import Settings

if TYPE_CHECKING:
    from glass_mlx.serving.engine_status import EngineStatus, ModelFacts
    from glass_mlx.serving.measuring import Progress


@dataclass(frozen=True)
class Model:
    """A model to choose from; ``fit`` is "fits", "tight" or "too large" for this machine's memory. A downloaded one can
    be deleted."""

    name: str
    size: int
    fit: str = "fits"
    downloaded: bool = False


@dataclass(frozen=True)
class Task:
    """A running download, in bytes. ``total`` is 0 while it is unknown."""

    model: str
    done: int = 0
    total: int = 0
    stopping: bool = False

    @property
    def share(self) -> float:
        return min(1.0, self.done / self.total) if self.total else 0.0


@dataclass(frozen=True)
class ServerView:
    """The server. ``state`` is "stopped", "running", "no port" or "failed"; ``detail`` says why."""

    state: str = "stopped"
    port: int = 8080
    url: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Snapshot:
    """Everything that the menu and the window show, at one moment.

    Attributes:
        settings: the user's choices.
        engine: the engine's status.
        alive: whether the engine takes requests.
        server: the server.
        models: the models that can be chosen.
        download: the running download.
        speeds: (density, tokens/s) of the chosen model's last answers.
        notices: messages that the user has not dismissed.
        ranked: models that are known to have ranks.
        login: whether the app starts at login; None where that is not supported.
        closing: whether the app is quitting.
    """

    settings: Settings
    engine: EngineStatus
    alive: bool = True
    server: ServerView = ServerView()
    models: tuple[Model, ...] = ()
    download: Task | None = None
    speeds: tuple[tuple[float, float], ...] = ()
    notices: tuple[str, ...] = ()
    ranked: frozenset[str] = frozenset()
    login: bool | None = None
    closing: bool = False

    @property
    def model(self) -> str:
        """The model that is loaded, or else the chosen one."""
        return self.engine.model or self.settings.model

    @property
    def density(self) -> float:
        """The share of the neurons that answers get; 1 is dense."""
        return decoding_density(self.settings, self.engine.facts)

    @property
    def ranks(self) -> Progress | None:
        """The measurement of ranks that is running, or goes on when nobody waits."""
        return self.engine.measuring

    @property
    def busy(self) -> bool:
        """Whether something is being loaded, answered, measured or downloaded."""
        working = self.engine.state in ("loading", "generating") or self.engine.queued > 0
        return working or self.ranks is not None or self.download is not None


def decoding_density(settings: Settings, facts: ModelFacts | None) -> float:
    """The density that settings mean for a model: that of the quality, where its densities were measured."""
    if not settings.glass:
        return 1.0
    measured = facts.qualities if facts is not None else None
    return (measured or {}).get(settings.quality, settings.density)


@dataclass(frozen=True)
class Fix:
    """What to do about a problem: the text of an action, its method, and its argument."""

    text: str
    action: str
    argument: Any = None


@dataclass(frozen=True)
class Status:
    """The state in words: a headline, details, and what to do if it is a problem."""

    key: str
    headline: str
    detail: str = ""
    fix: Fix | None = None


def status(s: Snapshot) -> Status:
    """The state in words. A problem that blocks everything else comes first."""
    e, model, server = s.engine, s.model, s.server
    if s.closing:
        return Status("closing", "Quitting: freeing the memory…")
    if not s.alive:
        detail = "It stopped unexpectedly, and its memory is free again. See the log."
        return Status("crashed", "The engine has stopped", detail, Fix("Restart the engine", "restart"))
    if server.state == "no port":
        fix = Fix("Use another port", "use_another_port")
        return Status("no port", f"Port {server.port} cannot be used", server.detail, fix)
    if server.state == "failed":
        fix = Fix("Start the server again", "start_server")
        return Status("server failed", "The server is not running", server.detail, fix)
    if e.state == "failed":
        detail = e.error or "See the log."
        return Status("load failed", f"{model} · cannot be loaded", detail, Fix("Try again", "load"))
    if e.state == "loading":
        return Status("loading", f"{model} · loading…", choice(s))
    if e.state == "generating":
        waiting = f" · {e.queued} waiting" if e.queued else ""
        return Status("generating", f"{model} · answering · {speed(e.tokens_per_second)}{waiting}", choice(s))
    if s.ranks is not None:
        return Status("measuring", f"{s.ranks.model} · {progress(s.ranks)}", "Answers go first, between two steps.")
    detail = ". ".join(filter(None, [choice(s), e.error]))
    if server.state == "stopped":
        return Status("stopped", f"{model} · server stopped", detail)
    if e.state == "ready":
        measured = dict(s.speeds).get(s.density)
        last = f" · {speed(measured)}" if measured else ""
        return Status("ready", f"{model} · ready{last}", detail)
    return Status("unloaded", f"{model} · ready, loads when asked", detail)


def needs_attention(s: Snapshot) -> bool:
    """Whether the icon should show that something is wrong."""
    return status(s).fix is not None or bool(s.notices)


def choice(s: Snapshot) -> str:
    """Which neurons the model decodes with, how close to the dense model that is, and how much memory it takes."""
    loaded, facts = s.engine.state in ("ready", "generating"), s.engine.facts
    parts = [f"{s.density:.0%} of the neurons" if s.settings.glass else "All neurons (dense)"]
    if s.settings.glass and loaded and not s.engine.has_ranks:
        parts.append("no ranks yet: the prompt alone chooses them, and answers stray further from the dense model's")
    elif s.settings.glass and facts is not None:
        agreement = agreement_at(s.density, list(facts.densities))
        parts += [] if agreement is None else [f"same top token {agreement:.0%}"]
    if loaded and s.engine.memory_bytes:
        parts.append(f"{size(s.engine.memory_bytes)} in memory")
    return ", ".join(parts)


def progress(ranks: Progress) -> str:
    """The progress of a measurement, by phase."""
    if ranks.stopping:
        return "stopping the measurement…"
    if not ranks.phase:
        return "measuring ranks…"
    left = "" if not ranks.seconds_left else f" ({duration(ranks.seconds_left)} left)"
    return f"{'refining' if ranks.refining else 'measuring'} ranks · {ranks.phase} {ranks.share:.0%}{left}"


def duration(seconds: float) -> str:
    """Seconds in words, not more exact than what is left is known."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{round(seconds / 3600)} h"


def download_progress(task: Task) -> str:
    """The progress of a download."""
    if task.stopping:
        return f"Stopping the download of {task.model}…"
    if not task.total:
        return f"Asking the Hub for {task.model}…"
    return f"{task.model}: {size(task.done)} of {size(task.total)} ({task.share:.0%})"


def speed(tokens_per_second: float) -> str:
    """Tokens per second, with a decimal only below 100."""
    return f"{tokens_per_second:.{0 if tokens_per_second >= 100 else 1}f} tok/s"
