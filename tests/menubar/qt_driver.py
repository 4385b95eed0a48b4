"""Runs the menu-bar app on Qt, uses its menu and window, and writes what they showed to ``seen.json``.

TOGA_BACKEND=toga_qt QT_QPA_PLATFORM=offscreen python tests/menubar/qt_driver.py DIRECTORY

Pictures of what was drawn are written to the directory as well.
"""

from __future__ import annotations

import asyncio
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import httpx

try:
    import toga_qt  # noqa: F401
    from PySide6.QtGui import QGuiApplication, QImage
    from PySide6.QtWidgets import QMenu, QPushButton, QWidget
except ImportError as e:
    sys.exit(f"no Qt: {e}")
from servers import CHAT, QUESTION

from apps.menubar.app import GlassApp
from apps.menubar.controller import Controller
from apps.menubar.settings import Settings, save_settings

WHERE = Path(sys.argv[1])


class Driven(GlassApp):
    """The app, and a user at it."""

    seen: dict = {}
    failed = False

    async def on_running(self) -> None:
        asyncio.ensure_future(self.use())
        await super().on_running()

    async def use(self) -> None:
        try:
            await self._use()
        except Exception:
            self.failed = True
            traceback.print_exc()
        self.request_exit()

    async def _use(self) -> None:
        seen, native = self.seen, self.status_icon._impl.native
        await until(lambda: self.find("Stop server"))
        url = self.controller.snapshot().server.url
        seen["port"] = int(url.rpartition(":")[2])
        seen["menu"], seen["submenus"] = entries(self.menu), {m.title(): entries(m) for m in submenus(self.menu)}
        picture(self.menu, "menu")
        await self.choose("Copy endpoint URL")
        await until(lambda: QGuiApplication.clipboard().text())
        seen["clipboard"] = QGuiApplication.clipboard().text()
        await self.choose("✓ GLASS")
        await until(lambda: self.find("GLASS") == "GLASS")
        seen["glass off"], seen["density off"] = self.find("GLASS"), self.find("Density")
        await self.choose("GLASS")
        await self.choose("Stop server")
        await until(lambda: self.find("Start server"))
        seen["stopped"] = [self.menu.actions()[0].text(), self.find("Start server")]
        await self.choose("Start server")
        await until(lambda: self.find("Stop server"))
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            url = self.controller.snapshot().server.url
            await client.post(url + CHAT, json={"messages": QUESTION, "max_tokens": 8})
        await until(lambda: self.menu.actions()[0].text().startswith("demo · ready · "))
        seen["answered"] = self.menu.actions()[0].text()
        await asyncio.sleep(0.2)  # until it is drawn
        seen["window"] = look(self.window._window._impl.native.centralWidget())
        seen["window"]["status"] = self.window._widgets["status"].text
        await self.choose("Settings…")
        await asyncio.sleep(0.2)
        seen["settings"] = look(self.settings_window._window._impl.native.centralWidget(), "settings")
        self.settings_window._window.close()
        icon = native.icon().cacheKey()
        self.controller.notify("The disk is full.")
        await until(lambda: self.find("Dismiss"))
        seen["trouble"], seen["icon changed"] = entries(self.menu), native.icon().cacheKey() != icon
        await asyncio.sleep(0.2)
        picture(self.window._window._impl.native, "window")

    @property
    def menu(self) -> QMenu:
        return self.status_icon._impl.native.contextMenu()

    def find(self, text: str) -> str | None:
        """The text of the menu's first entry that begins so."""
        return next((t for t, _ in entries(self.menu) if t.startswith(text)), None)

    async def choose(self, text: str) -> None:
        next(a for a in self.menu.actions() if a.text().startswith(text)).trigger()
        await asyncio.sleep(0.1)


async def until(condition: Callable[[], object], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.05)


def entries(menu: QMenu) -> list[tuple[str, bool]]:
    return [(a.text(), a.isEnabled()) for a in menu.actions() if not a.isSeparator()]


def submenus(menu: QMenu) -> list[QMenu]:
    return [a.menu() for a in menu.actions() if a.menu() is not None]


def picture(widget: QWidget, name: str) -> QImage:
    image = widget.grab().toImage()
    image.save(str(WHERE / f"{name}.png"))
    return image


def look(form: QWidget, name: str = "form") -> dict:
    """Which widgets are drawn outside of their window, or are too small for their text."""
    shown = [w for w in form.findChildren(QWidget) if w.isVisible() and not w.findChildren(QWidget)]
    within = form.rect()
    image = picture(form, name)
    step = range(0, min(image.width(), image.height()), 2)
    return {
        "outside": [
            repr(w) for w in shown if not within.contains(w.rect().translated(w.mapTo(form, w.rect().topLeft())))
        ],
        "cut": [w.text() for w in shown if isinstance(w, QPushButton) and w.width() < w.sizeHint().width()],
        "colours": len({image.pixel(x, y) for x in step for y in step}),
    }


def main() -> None:
    save_settings(WHERE / "settings.json", Settings(port=0))
    log = WHERE / "menubar.log"
    log.write_text("")
    app = Driven(Controller(WHERE / "settings.json"), log, True)
    app.main_loop()
    server = app.controller._server.server
    app.seen["ended"] = {"engine": app.controller._engine.alive, "server": server is not None and server.alive}
    (WHERE / "seen.json").write_text(json.dumps(app.seen))
    sys.exit(app.failed)


if __name__ == "__main__":
    main()
