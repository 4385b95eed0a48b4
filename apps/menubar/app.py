"""The view: Toga's status icon and its menu, made from the menu as data and refreshed every second."""

from __future__ import annotations

import asyncio
import logging
import shutil
import subprocess
import sys
import webbrowser
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import toga

import glass_mlx
from glass_mlx.serving.logs import log_dir

from . import macos
from .controller import Controller
from .login import APP_ID
from .menu import Item, find, flat, menu
from .state import needs_attention, status
from .window import DownloadWindow, StatusWindow

logger = logging.getLogger("glass_mlx")

RESOURCES = Path(__file__).parent / "resources"
INTERVAL = 1.0  # seconds between two refreshes


class GlassApp(toga.App):
    """The menu-bar app."""

    def __init__(self, controller: Controller, log: Path | None = None, show_window: bool = False):
        """
        Args:
            controller (Controller): does the work. The app closes it when quitting.
            log (Path, optional): the log file.
            show_window (bool): whether to show the window at the start.
        """
        self.controller, self.log = controller, log
        self._show_at_start = show_window
        self._workers = ThreadPoolExecutor(2, "action")
        self._menu: tuple[Item, ...] = ()
        self._built: list = []  # the structure of the menu that Toga has
        self._icon_state: tuple[bool, str] | None = None
        self._login = macos.login_state()
        self._view_actions: dict[str, Callable] = {
            "open_chat": self.open_chat,
            "copy_endpoint": self.copy_endpoint,
            "show_window": self.show_window,
            "show_download": self.show_download,
            "set_login": self.set_login,
            "open_log": self.open_log,
            "open_settings": self.open_settings,
            "about": self.show_about,
            "quit": self.request_exit,
        }
        super().__init__(
            "GLASS",
            APP_ID,
            icon=RESOURCES / "glass",
            version=glass_mlx.__version__,
            description="Local models that decode with only the neurons that your prompt calls for",
        )

    def startup(self) -> None:
        try:
            self._startup_menu()
        except Exception:  # a process without a menu and a window would be useless, and hard to end
            logger.exception("the app cannot start")
            self.exit()
            raise

    def _startup_menu(self) -> None:
        self.main_window = toga.App.BACKGROUND  # before the icon, because macOS 26 expects an accessory app by then
        self.icons = {on: toga.Icon(RESOURCES / name) for on, name in ((False, "menu"), (True, "menu-attention"))}
        self.status_icon = toga.MenuStatusIcon("glass", self.icons[False])
        self.status_icons.add(self.status_icon)
        self.window = StatusWindow(self.perform, self._call_soon)
        self.download_window = DownloadWindow(self._download, self._call_soon)
        macos.on_reopen(self.show_window)
        warning = macos.framework_warning()
        if warning:
            self.controller.notify(warning)
        self.refresh()
        if self._show_at_start or warning or not macos.ON_MAC:  # many other desktops show no status icons
            self.show_window()

    async def on_running(self) -> None:
        await self.run_in_background(self.controller.start)
        while not self.controller.closing:
            try:
                self.controller.tick()
                self.refresh()
            except Exception:  # or the menu would never change again
                logger.exception("the menu cannot be brought up to date")
            await asyncio.sleep(INTERVAL)

    async def on_exit(self) -> bool:
        """Free the memory before quitting."""
        closing = asyncio.ensure_future(self.run_in_background(self.controller.close))
        await asyncio.sleep(0.05)  # until the controller is closing, so that the menu can show it
        self.refresh()
        await closing
        return True

    async def run_in_background(self, action: Callable, *arguments: Any) -> None:
        """Run something that may take a moment on another thread, so that the menu stays alive."""
        await asyncio.get_running_loop().run_in_executor(self._workers, action, *arguments)

    async def perform(self, key: str) -> None:
        """Do what an entry of the menu stands for."""
        item = find(self._menu, key)
        if not item.enabled or not item.action:
            return
        arguments = () if item.argument is None else (item.argument,)
        if item.action in self._view_actions:
            self._view_actions[item.action](*arguments)
        else:  # these may wait for a thread to end
            await self.run_in_background(getattr(self.controller, item.action), *arguments)
        self.refresh()

    async def _download(self, name: str) -> None:
        await self.run_in_background(self.controller.download, name)
        self.refresh()

    def _call_soon(self, function: Callable, *arguments: Any) -> None:
        self.loop.call_soon(function, *arguments)

    def refresh(self) -> None:
        """Show the controller's present state, where it has changed."""
        snapshot = self.controller.snapshot(self._login)
        macos.show_busy(snapshot.busy)
        items = menu(snapshot)
        if items != self._menu:
            self._menu = items
            self._show_menu()
            self.window.update(items)
        attention, headline = needs_attention(snapshot), status(snapshot).headline
        if (attention, headline) != self._icon_state:
            self._icon_state = attention, headline
            self.status_icon.icon = self.icons[attention]
            macos.style_status_icon(self.status_icon, headline)

    def _show_menu(self) -> None:
        commands, is_open = self.status_icons.commands, macos.menu_is_open()
        shape = [(item.key, item.section, item.items and item.text) for item in flat(self._menu)]
        if shape == self._built:
            for item in flat(self._menu):
                if item.items is None:
                    command = commands[item.key]
                    command.text, command.enabled = item.label, item.enabled
                    if is_open:
                        macos.retitle(command)
        elif is_open:
            self._menu = ()  # try again at the next refresh
        else:
            self._built = shape
            redraw, commands.on_change = commands.on_change, None  # redraw once, with all commands
            commands.clear()
            commands.add(*self._make_commands(self._menu, self.status_icon))
            commands.on_change = redraw
        if commands.on_change and not is_open:
            commands.on_change()

    def _make_commands(self, items: tuple[Item, ...], group: toga.Group) -> list[toga.Command]:
        made = []
        for order, item in enumerate(items):
            if item.items is not None:
                submenu = toga.Group(item.text, parent=group, section=item.section, order=order)
                made += self._make_commands(item.items, submenu)
                continue
            made.append(
                toga.Command(
                    self._handler(item.key),
                    item.label,
                    group=group,
                    section=item.section,
                    order=order,
                    enabled=item.enabled,
                    id=item.key,
                )
            )
        return made

    def _handler(self, key: str) -> Callable:
        async def handler(command: Any, **kwargs: Any) -> None:
            await self.perform(key)

        return handler

    # Actions of the view itself. The others are the controller's.

    def show_window(self) -> None:
        """Show the window, which is the menu as a form."""
        self.window.show()
        macos.activate(self)

    def show_download(self) -> None:
        """Ask which model to download."""
        self.download_window.show()
        macos.activate(self)

    def show_about(self) -> None:
        self.about()
        macos.activate(self)

    def open_chat(self) -> None:
        webbrowser.open(self.controller.snapshot().server.url)

    def copy_endpoint(self) -> None:
        """Copy the endpoint's URL for clients. Where there is no clipboard, show it."""
        url = f"{self.controller.snapshot().server.url}/v1"
        if not (macos.copy(url) or _copy_in_qt(url)):
            self.controller.notify(f"The endpoint is {url}")

    def set_login(self, on: bool) -> None:
        if message := macos.set_login(on):
            self.controller.notify(message)
        self._login = macos.login_state()

    def open_log(self) -> None:
        self._open(self.log or log_dir())

    def open_settings(self) -> None:
        self.controller.save()
        self._open(self.controller.path)

    def _open(self, path: Path) -> None:
        """Open a file in the user's editor. If that is not possible, show its path."""
        command = ["open", *(["-t"] if path.is_file() else [])] if macos.ON_MAC else ["xdg-open"]
        if not path.exists():
            self.controller.notify(f"{path} does not exist.")
        elif shutil.which(command[0]) is None:
            self.controller.notify(f"The path is {path}")
        else:
            subprocess.Popen([*command, str(path)], stdin=subprocess.DEVNULL, start_new_session=True)


def _copy_in_qt(text: str) -> bool:
    gui = sys.modules.get("PySide6.QtGui")  # loaded if Toga runs on Qt, which has a clipboard; Toga itself has none
    if gui is None:
        return False
    gui.QGuiApplication.clipboard().setText(text)
    return True
