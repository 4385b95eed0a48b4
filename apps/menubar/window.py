"""The app's windows: the menu as a form, for when the menu-bar icon is hidden, and the choice of a download."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import Awaitable, Callable
from typing import Any

import toga
from toga.style import Pack

from glass_mlx.loading import ALIASES

from .menu import Item

WIDTH, MARGIN = 500, 16
OTHER = "Another one:"

_NOT_SHOWN = ("window", "quit")  # entries that a window needs no button for


class StatusWindow:
    """The menu in a window: lines become labels, submenus selections, entries that are on or off switches, and all
    others buttons."""

    def __init__(self, perform: Callable[[str], Awaitable[None]], call_soon: Callable[..., Any]):
        """
        Args:
            perform: does what the entry of a key stands for.
            call_soon: calls a function once the event loop runs again.
        """
        self._perform, self._call_soon = perform, call_soon
        self._window: toga.Window | None = None
        self._items: tuple[Item, ...] = ()
        self._shape: list = []
        self._widgets: dict[str, Any] = {}
        self._updating = False  # widgets also report changes that the app itself makes

    def show(self) -> None:
        """Show the window. A closed one is made again."""
        if self._window is None or self._window.closed:
            self._window = toga.Window(title="GLASS", size=(WIDTH, 440))
            self._shape = []
        self.update(self._items)
        self._window.show()

    def update(self, items: tuple[Item, ...]) -> None:
        """Show these items now, or when the window is shown next."""
        self._items = tuple(item for item in items if item.key not in _NOT_SHOWN)
        if self._window is None or self._window.closed:
            return
        self._updating, fresh = True, False
        try:
            shape = [(item.key, item.section, item.share is None, item.action == "") for item in self._items]
            if shape != self._shape:
                self._shape, self._widgets = shape, {}
                self._window.content = self._form()
                fresh = True
            for item in self._items:
                self._fill(item)
            if fresh:
                self._call_soon(self._fit)  # when the widgets have their sizes
        finally:
            self._updating = False

    def _fit(self) -> None:
        if not self._window.closed:
            fit_to_content(self._window)

    def _form(self) -> toga.Box:
        form = toga.Box(style=Pack(direction="column", margin=MARGIN, gap=10, width=WIDTH - 2 * MARGIN))
        for section in sorted({item.section for item in self._items}):
            rows = toga.Box(style=Pack(direction="column", gap=6))
            buttons = toga.Box(style=Pack(gap=8))
            for item in (item for item in self._items if item.section == section):
                widget = self._widgets[item.key] = self._widget(item)
                if isinstance(widget, toga.Button):
                    buttons.add(widget)
                elif item.items is not None:
                    label = toga.Label(item.key.capitalize(), style=Pack(width=70, margin_top=4))
                    rows.add(toga.Box(children=[label, widget], style=Pack(gap=8)))
                else:
                    rows.add(widget)
                if item.share is not None:
                    self._widgets[f"{item.key} bar"] = bar = toga.ProgressBar(max=1.0, style=Pack(flex=1))
                    rows.add(bar)
            if buttons.children:
                rows.add(buttons)
            if form.children:
                form.add(toga.Divider())
            form.add(rows)
        return form

    def _widget(self, item: Item) -> toga.Widget:
        def act(widget: Any, **kwargs: Any) -> None:
            if not self._updating:
                asyncio.ensure_future(self._perform(item.key))

        def choose(widget: Any, **kwargs: Any) -> None:
            if not self._updating and widget.value is not None:
                asyncio.ensure_future(self._perform(widget.value.key))

        if item.items is not None:
            return toga.Selection(accessor="text", on_change=choose, style=Pack(flex=1))
        if item.ticked is not None:
            return toga.Switch(item.text, on_change=act)
        if item.key == "status":
            return toga.Label(item.text, style=Pack(font_size=13, font_weight="bold"))
        return toga.Button(item.text, on_press=act) if item.action else toga.Label(item.text)

    def _fill(self, item: Item) -> None:
        widget = self._widgets[item.key]
        if isinstance(widget, toga.Selection):
            choices = [{"text": short(choice.text), "key": choice.key} for choice in item.items or ()]
            if choices != [{"text": row.text, "key": row.key} for row in widget.items]:
                widget.items = choices
            ticked = next((row for row, choice in zip(widget.items, item.items or ()) if choice.ticked), None)
            if ticked is not None and widget.value is not ticked:
                widget.value = ticked
            return
        if widget.text != item.text:
            widget.text = item.text
        if isinstance(widget, toga.Switch) and widget.value != item.ticked:
            widget.value = item.ticked
        if not isinstance(widget, toga.Label) and widget.enabled != item.enabled:
            widget.enabled = item.enabled
        if item.share is not None:
            self._widgets[f"{item.key} bar"].value = item.share


def fit_to_content(window: toga.Window) -> None:
    """Give a window the height of its content."""
    window.size = (WIDTH, window.content.layout.min_content_height + 2 * MARGIN)


def short(text: str, most: int = 50) -> str:
    """A text short enough for a widget of the window."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 + 1 :]}"


class DownloadWindow:
    """Asks which model to download: one with a short name, or any repository. Says how large it is before."""

    def __init__(
        self,
        download: Callable[[str], Awaitable[None]],
        describe: Callable[[str], Awaitable[str]],
        call_soon: Callable[..., Any],
    ):
        """
        Args:
            download: downloads the model of a name.
            describe: what that takes, in words.
            call_soon: calls a function once the event loop runs again.
        """
        self._download, self._describe, self._call_soon = download, describe, call_soon
        self._window: toga.Window | None = None

    def show(self) -> None:
        """Show the window. A closed one is made again."""
        if self._window is None or self._window.closed:
            self._window = toga.Window(title="Download a model", size=(WIDTH, 170))
            self._window.content = self._form()
        self._window.show()
        self._call_soon(fit_to_content, self._window)  # when the widgets have their sizes
        self._look()

    def _form(self) -> toga.Box:
        column = Pack(width=110, margin_top=4)
        self.choice = toga.Selection(
            items=[OTHER, *ALIASES], value="qwen3-4b", on_change=self._chosen, style=Pack(flex=1)
        )
        self.name = toga.TextInput(
            placeholder="owner/name, or the address of its page",
            on_confirm=self.download,
            on_lose_focus=self._look,
            style=Pack(flex=1),
        )
        self.name.value = ALIASES[self.choice.value]
        self.takes = toga.Label("")
        buttons = [
            toga.Button("Cancel", on_press=lambda button, **_: self._window.close(), style=Pack(width=110)),
            toga.Button("Download", on_press=self.download, style=Pack(width=110)),
        ]
        rows = [
            toga.Box(children=[toga.Label("Model", style=column), self.choice], style=Pack(gap=8)),
            toga.Box(children=[toga.Label("Hub repository", style=column), self.name], style=Pack(gap=8)),
            self.takes,
            toga.Box(children=[toga.Box(style=Pack(flex=1)), *buttons], style=Pack(gap=8)),
        ]
        return toga.Box(children=rows, style=Pack(direction="column", margin=MARGIN, gap=10, width=WIDTH - 2 * MARGIN))

    def _chosen(self, widget: toga.Selection, **kwargs: Any) -> None:
        self.name.value = ALIASES.get(widget.value, "")
        self._look()

    def _look(self, *args: Any, **kwargs: Any) -> None:
        asyncio.ensure_future(self.look())

    async def look(self) -> None:
        """Say what the download of the chosen model takes."""
        name = self.name.value
        self.takes.text = f"Asking the Hub for the size of {short(name)}…" if name else ""
        words = await self._describe(name) if name else ""
        if not self._window.closed and self.name.value == name:  # another one may have been chosen meanwhile
            self.takes.text = "\n".join(textwrap.wrap(words, 66))
            fit_to_content(self._window)

    async def download(self, widget: toga.Widget, **kwargs: Any) -> None:
        """Close the window and download what was chosen. The menu shows the progress."""
        chosen = self.choice.value
        name = chosen if ALIASES.get(chosen) == self.name.value else self.name.value
        self._window.close()
        await self._download(name)
