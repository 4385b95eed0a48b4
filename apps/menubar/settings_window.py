"""The settings as a form, and deleting downloaded models."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import toga
from toga.style import Pack

from glass_mlx.hub.sizes import size
from glass_mlx.model.quality import QUALITIES

from .settings import Settings
from .state import Snapshot
from .window import MARGIN, WIDTH, fit_to_content

DENSITIES = tuple(n / 10 for n in range(1, 10))


class SettingsWindow:
    """Shows the settings of one moment. They hold when they are saved."""

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        save: Callable[[Settings, bool | None], Awaitable[None]],
        delete: Callable[[str], Awaitable[None]],
        open_file: Callable[[], None],
        call_soon: Callable[..., Any],
    ):
        """
        Args:
            snapshot: the app's state now.
            save: uses other settings, and whether the app starts at login, if that can be chosen.
            delete: deletes the model of a name.
            open_file: opens the settings file.
            call_soon: calls a function once the event loop runs again.
        """
        self._snapshot, self._save, self._delete, self._open_file = snapshot, save, delete, open_file
        self._call_soon = call_soon
        self._window: toga.Window | None = None

    def show(self) -> None:
        """Show the window with the present settings."""
        if self._window is None or self._window.closed:
            self._window = toga.Window(title="Settings", size=(WIDTH, 320))
        self._window.content = self._form(self._snapshot())
        self._window.show()
        self._call_soon(fit_to_content, self._window)

    def _form(self, s: Snapshot) -> toga.Box:
        settings, names = s.settings, [model.name for model in s.models if model.fit != "too large"]
        ways = [*QUALITIES, *sorted({*DENSITIES, settings.density}), 1.0]
        chosen = 1.0 if not settings.glass else settings.quality or settings.density
        self.model = _selection({name: name for name in {settings.model: 0, **dict.fromkeys(names)}}, settings.model)
        self.way = _selection({_words(way): way for way in ways}, chosen)
        self.port = toga.NumberInput(min=0, max=65535, step=1, value=settings.port, style=Pack(width=110))
        self.idle = toga.NumberInput(min=0, max=100_000, step=0.5, value=settings.idle_minutes, style=Pack(width=110))
        self.server = toga.Switch("Start the server with the app", value=settings.start_server)
        self.login = toga.Switch("Start the app at login", value=bool(s.login), enabled=s.login is not None)
        downloaded = {f"{model.name} · {size(model.size)}": model.name for model in s.models if model.downloaded}
        self.downloaded = _selection(downloaded or {"none": ""}, None)
        self.delete_button = toga.Button("Delete…", on_press=self.delete, enabled=bool(downloaded))
        rows = [
            _row("Model", self.model),
            _row("Decode with", self.way),
            _row("Port", self.port, toga.Label("of this machine only; 0 takes a free one", style=Pack(margin_top=4))),
            _row("Unload after", self.idle, toga.Label("idle minutes; 0 for never", style=Pack(margin_top=4))),
            self.server,
            self.login,
            toga.Divider(),
            _row("Downloaded", self.downloaded, self.delete_button),
            toga.Divider(),
            toga.Box(
                children=[
                    toga.Button("Open the file", on_press=self._open),
                    toga.Box(style=Pack(flex=1)),
                    toga.Button("Cancel", on_press=self._close, style=Pack(width=110)),
                    toga.Button("Save", on_press=self.save, style=Pack(width=110)),
                ],
                style=Pack(gap=8),
            ),
        ]
        return toga.Box(children=rows, style=Pack(direction="column", margin=MARGIN, gap=10, width=WIDTH - 2 * MARGIN))

    def chosen(self) -> Settings:
        """What the form says."""
        before, way = self._snapshot().settings, self.way.value.key
        if way == 1.0:
            how = {"glass": False}
        elif way in QUALITIES:
            how = {"glass": True, "quality": way}
        else:
            how = {"glass": True, "quality": "", "density": way}
        port = before.port if self.port.value is None else int(self.port.value)
        idle = before.idle_minutes if self.idle.value is None else float(self.idle.value)
        model, start = self.model.value.key, self.server.value
        return replace(before, model=model, port=port, idle_minutes=idle, start_server=start, **how)

    async def save(self, widget: toga.Widget, **kwargs: Any) -> None:
        """Close the window and use what it says."""
        settings, login = self.chosen(), self.login.value if self.login.enabled else None
        self._window.close()
        await self._save(settings, login)

    async def delete(self, widget: toga.Widget, **kwargs: Any) -> None:
        """Delete the chosen model, if that is really wanted."""
        name = self.downloaded.value.key
        question = toga.ConfirmDialog(f"Delete {name}?", "It is removed from this disk, and can be downloaded again.")
        if await self._window.dialog(question):
            self._window.close()
            await self._delete(name)

    def _open(self, widget: toga.Widget, **kwargs: Any) -> None:
        self._window.close()
        self._open_file()

    def _close(self, widget: toga.Widget, **kwargs: Any) -> None:
        self._window.close()


def _selection(choices: dict[str, Any], chosen: Any) -> toga.Selection:
    """A selection of texts, each of which stands for a key."""
    rows = [{"text": text, "key": key} for text, key in choices.items()]
    made = toga.Selection(accessor="text", items=rows, style=Pack(flex=1))
    if (row := next((row for row in made.items if row.key == chosen), None)) is not None:
        made.value = row
    return made


def _row(name: str, *widgets: toga.Widget) -> toga.Box:
    return toga.Box(children=[toga.Label(name, style=Pack(width=100, margin_top=4)), *widgets], style=Pack(gap=8))


def _words(way: str | float) -> str:
    if way in QUALITIES:
        return f"{way.capitalize()} quality: as many neurons as it takes"
    return f"{way:.0%} of the neurons" if way < 1 else "All neurons (dense)"
