"""The app's state at one moment, and the words for it. Pure functions: a snapshot goes in, text comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glass_mlx.sizes import fit, size  # noqa: F401

from .settings import Settings

if TYPE_CHECKING:
    from glass_mlx.serving.engine import EngineStatus


@dataclass(frozen=True)
class Model:
    """A model to choose from; ``fit`` is "fits", "tight" or "too large" for this machine's memory."""

    name: str
    size: int
    fit: str = "fits"


@dataclass(frozen=True)
class Task:
    """A running download (in bytes) or measurement of ranks (in tokens). ``total`` is 0 while it is unknown."""

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
        download, ranks: the running download and measurement of ranks.
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
    ranks: Task | None = None
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
    def busy(self) -> bool:
        """Whether something is being loaded, answered, measured or downloaded."""
        working = self.engine.state in ("loading", "generating") or self.engine.queued > 0
        return working or self.ranks is not None or self.download is not None


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
    if s.ranks is not None:
        return Status("measuring", f"{model} · {progress(s.ranks)}", "Requests wait until it is done.")
    if e.state == "loading":
        return Status("loading", f"{model} · loading…", choice(s))
    if e.state == "generating":
        waiting = f" · {e.queued} waiting" if e.queued else ""
        return Status("generating", f"{model} · answering · {speed(e.tokens_per_second)}{waiting}", choice(s))
    detail = ". ".join(filter(None, [choice(s), e.error]))
    if server.state == "stopped":
        return Status("stopped", f"{model} · server stopped", detail)
    if e.state == "ready":
        measured = dict(s.speeds).get(s.settings.effective_density)
        last = f" · {speed(measured)}" if measured else ""
        return Status("ready", f"{model} · ready{last}", detail)
    return Status("unloaded", f"{model} · ready, loads when asked", detail)


def needs_attention(s: Snapshot) -> bool:
    """Whether the icon should show that something is wrong."""
    return status(s).fix is not None or bool(s.notices)


def choice(s: Snapshot) -> str:
    """Which neurons the model decodes with, and how much memory it takes."""
    loaded = s.engine.state in ("ready", "generating")
    parts = [f"{s.settings.density:.0%} of the neurons" if s.settings.glass else "All neurons (dense)"]
    if s.settings.glass and loaded and not s.engine.has_ranks:
        parts.append("no ranks: the prompt alone chooses them")
    if loaded and s.engine.memory_bytes:
        parts.append(f"{size(s.engine.memory_bytes)} in memory")
    return ", ".join(parts)


def progress(task: Task) -> str:
    """The progress of a measurement."""
    if task.stopping:
        return "stopping the measurement…"
    return f"measuring ranks · {task.share:.0%}" if task.done else "measuring ranks…"


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
