"""The menu as data, computed from a snapshot. The view shows it; nothing here depends on a toolkit."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from glass_mlx.hub.sizes import size
from glass_mlx.model.quality import QUALITIES

from .state import Model, Snapshot, Status, download_progress, progress, speed, status

DENSITIES = (0.3, 0.5, 0.7)
LINE = 58  # characters of a line of text in the menu

TICK, BLANK = "✓ ", "\u2003\u200a"  # the spaces are about as wide as the tick


@dataclass(frozen=True)
class Item:
    """An entry of the menu.

    Attributes:
        key: a stable name.
        text: what it shows.
        action, argument: the method to call, and its argument; "" for a line that cannot be chosen.
        enabled: whether it can be chosen now.
        section: separators are drawn between sections.
        items: the entries of a submenu.
        ticked: whether it is on, for entries that are on or off.
        indent: whether it lines up with the ticked entry of a list.
        share: progress, from 0 to 1, of something that is running.
    """

    key: str
    text: str
    action: str = ""
    argument: Any = None
    enabled: bool = True
    section: int = 0
    items: tuple[Item, ...] | None = None
    ticked: bool | None = None
    indent: bool = False
    share: float | None = None

    @property
    def label(self) -> str:
        """The text with its tick, for Toga's menus, which cannot tick entries."""
        return f"{TICK if self.ticked else BLANK if self.indent else ''}{self.text}"


def menu(s: Snapshot) -> tuple[Item, ...]:
    """The menu for a snapshot."""
    now = status(s)
    open_ = not s.closing
    serving = s.server.state == "running" and s.alive and open_
    return (
        *_status(s, now),
        Item("chat", "Open chat", "open_chat", enabled=serving, section=1),
        Item("copy", "Copy endpoint URL", "copy_endpoint", enabled=serving, section=1),
        _server(s),
        Item("model", f"Model: {s.settings.model}", section=2, items=_models(s)),
        *_download(s),
        Item("glass", "GLASS", "set_glass", not s.settings.glass, open_, 3, ticked=s.settings.glass),
        Item("density", f"Density: {s.density:.0%}", section=3, items=_densities(s)),
        *_ranks(s),
        Item("unload", "Unload now", "unload", enabled=_loaded(s) and s.ranks is None and open_, section=3),
        Item("window", "Show window", "show_window", enabled=open_, section=4),
        _login(s),
        Item("log", "Open log", "open_log", section=4),
        Item("settings", "Settings…", "show_settings", enabled=open_, section=4),
        Item("about", "About GLASS", "about", section=5),
        Item("quit", "Quit GLASS", "quit", enabled=open_, section=5),
    )


def find(items: tuple[Item, ...], key: str) -> Item:
    """The entry of a key, in submenus as well."""
    return next(item for item in flat(items) if item.key == key)


def flat(items: tuple[Item, ...]) -> Iterator[Item]:
    """All entries; those of a submenu follow it."""
    for item in items:
        yield item
        yield from flat(item.items or ())


def _status(s: Snapshot, now: Status) -> Iterator[Item]:
    yield Item("status", now.headline, "show_window", enabled=not s.closing)
    for i, line in enumerate(textwrap.wrap(now.detail, LINE)):
        yield Item(f"detail {i}", line, enabled=False)
    if now.fix is not None:
        yield Item("fix", now.fix.text, now.fix.action, now.fix.argument)
    lines = [line for notice in s.notices for line in textwrap.wrap(f"⚠︎ {notice}", LINE, subsequent_indent="\u2003")]
    for i, line in enumerate(lines):
        yield Item(f"notice {i}", line, enabled=False)
    if lines:
        yield Item("dismiss", "Dismiss" if len(s.notices) == 1 else "Dismiss all", "dismiss")


def _server(s: Snapshot) -> Item:
    if s.server.state == "running":
        return Item("server", f"Stop server (port {s.server.port})", "stop_server", enabled=not s.closing, section=1)
    return Item("server", "Start server", "start_server", enabled=s.alive and not s.closing, section=1)


def _models(s: Snapshot) -> tuple[Item, ...]:
    return tuple(
        Item(
            f"model {model.name}",
            model_text(model),
            "select_model",
            model.name,
            s.alive and not s.closing and model.fit != "too large",
            ticked=model.name == s.settings.model,
            indent=True,
        )
        for model in s.models
    ) or (Item("no models", "Looking for models…", enabled=False),)


def model_text(model: Model) -> str:
    """The line of a model: its name, its size, and whether it fits."""
    extra = {"tight": " · tight", "too large": " · too large for this memory"}.get(model.fit, "")
    return f"{model.name} · {size(model.size)}{extra}"


def _download(s: Snapshot) -> Iterator[Item]:
    if s.download is None:
        yield Item("download", "Download another…", "show_download", enabled=not s.closing, section=2)
        return
    yield Item("download", download_progress(s.download), enabled=False, section=2, share=s.download.share)
    yield Item("cancel download", "Cancel download", "cancel_download", enabled=not s.download.stopping, section=2)


def _densities(s: Snapshot) -> tuple[Item, ...]:
    settings, speeds = s.settings, dict(s.speeds)
    chosen = None if settings.quality and settings.glass else s.density
    presets = sorted({*DENSITIES, settings.density if settings.glass else 1.0, 1.0})

    def preset(density: float) -> Item:
        text = f"{density:.0%} of the neurons" if density < 1 else "All neurons (dense)"
        measured = f" · {speed(speeds[density])}" if speeds.get(density) else ""
        return Item(
            f"density {density}", text + measured, "set_density", density, ticked=density == chosen, indent=True
        )

    return (*map(preset, presets), *(_quality(s, quality) for quality in QUALITIES))


def _quality(s: Snapshot, quality: str) -> Item:
    """A density by what it costs the model, where that was measured."""
    facts, text = s.engine.facts, f"{quality.capitalize()} quality"
    known = facts is None or facts.qualities is not None
    if facts is not None:
        text += f" · {facts.qualities[quality]:.0%} of the neurons" if known else " · not measured for this model"
    ticked = s.settings.glass and s.settings.quality == quality
    return Item(f"quality {quality}", text, "set_quality", quality, known, 1, ticked=ticked, indent=True)


def _ranks(s: Snapshot) -> Iterator[Item]:
    can = s.alive and not s.closing
    if s.ranks is not None:
        yield Item("ranks", progress(s.ranks).capitalize(), enabled=False, section=3, share=s.ranks.share)
        yield Item("cancel ranks", "Cancel measuring", "cancel_ranks", enabled=can and not s.ranks.stopping, section=3)
    elif s.engine.has_ranks if _loaded(s) else s.settings.model in s.ranked:
        yield Item("ranks", f"Ranks of {s.model}: measured", enabled=False, section=3)
    elif _loaded(s):
        yield Item("ranks", f"No ranks for {s.model} yet: measure them, once", "build_ranks", enabled=can, section=3)
    else:
        yield Item("ranks", f"Measure ranks of {s.settings.model}", "build_ranks", enabled=can, section=3)


def _login(s: Snapshot) -> Item:
    can = s.login is not None and not s.closing
    return Item("login", "Launch at login", "set_login", not s.login, can, 4, ticked=bool(s.login))


def _loaded(s: Snapshot) -> bool:
    return s.alive and s.engine.state in ("ready", "generating")
