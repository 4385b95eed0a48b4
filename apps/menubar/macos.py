"""All that only a Mac has: the app's few touches of AppKit, beyond what Toga offers.

Elsewhere each function does nothing. On a Mac one that fails is logged, and the app goes on without: none of them may
keep it from running.
"""

from __future__ import annotations

import functools
import logging
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import login

logger = logging.getLogger("glass_mlx")

ON_MAC = sys.platform == "darwin"

_kept: list[Any] = []  # what AppKit refers to and does not own


def _touch(default: Any = None) -> Callable:
    """Make a function safe: ``default`` elsewhere than on a Mac, and where it fails."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def safe(*args: Any) -> Any:
            if not ON_MAC:
                return default
            try:
                return function(*args)
            except Exception:
                logger.exception("macos.%s", function.__name__)
                return default

        return safe

    return decorate


@_touch()
def dress(icon: Any, tooltip: str) -> None:
    """Let the system colour a status icon as its menu bar wants it, which Toga does not ask for; and its tooltip."""
    button = icon._impl.native.button
    button.image.setTemplate(True)
    button.toolTip = tooltip


@_touch()
def activate(app: Any) -> None:
    """Bring the app's windows to the front: an app without a Dock icon has to ask."""
    app._impl.native.activateIgnoringOtherApps(True)


@_touch(False)
def menu_is_open() -> bool:
    """Whether a menu is being used. Rebuilding it would take it from under the pointer."""
    from rubicon.objc import ObjCClass

    mode = _value(_value(ObjCClass("NSRunLoop"), "mainRunLoop"), "currentMode")
    return str(mode) == "NSEventTrackingRunLoopMode"


@_touch()
def retitle(command: Any) -> None:
    """Change the text of a command in the open menu."""
    for item in command._impl.native:
        item.title = command.text


@_touch(False)
def copy(text: str) -> bool:
    """Put text on the pasteboard."""
    from rubicon.objc import ObjCClass

    pasteboard = _value(ObjCClass("NSPasteboard"), "generalPasteboard")
    pasteboard.clearContents()
    return bool(pasteboard.setString_forType_(text, "public.utf8-plain-text"))


@_touch()
def on_reopen(handler: Callable[[], None]) -> None:
    """Call ``handler`` when the user opens the app that is already running: in Finder, Spotlight or the terminal."""
    from rubicon.objc import SEL, NSObject, ObjCClass, objc_method

    class GlassReopenHandler(NSObject):
        @objc_method
        def reopen_withReply_(self, event, reply) -> None:
            handler()

    target = GlassReopenHandler.alloc().init()
    _kept.append(target)
    manager = _value(ObjCClass("NSAppleEventManager"), "sharedAppleEventManager")
    manager.setEventHandler_andSelector_forEventClass_andEventID_(
        target, SEL("reopen:withReply:"), int.from_bytes(b"aevt", "big"), int.from_bytes(b"rapp", "big")
    )


def is_bundled() -> bool:
    """Whether this is the packaged app, not a checkout."""
    return ON_MAC and ".app/Contents/" in sys.executable and "Python.app" not in Path(sys.executable).parts


def framework_warning() -> str:
    """What to say if this Python is one whose status icons macOS 26 does not draw; "" if it is not."""
    if not ON_MAC or is_bundled() or not getattr(sys, "_framework", ""):
        return ""
    if int(platform.mac_ver()[0].split(".")[0] or 0) < 26:
        return ""
    return (
        "macOS 26 may not draw the menu-bar icon of this Python, which is a framework build (Homebrew's and "
        "python.org's are). Use uv's Python, or this window."
    )


@_touch()
def login_state() -> bool | None:
    """Whether the app starts at login; None where that cannot be had."""
    return _service().status == 1 if is_bundled() else login.is_agent()


def set_login(on: bool) -> str:
    """Start at login, or do not. Returns what there is to say about it."""
    if not ON_MAC:
        return "Only macOS has login items."
    if not is_bundled():
        try:
            login.set_agent(on)
        except OSError as e:
            return f"The login item cannot be written ({e.strerror})."
        return ""
    return _set_service(on)


@_touch("The login item cannot be changed: the log says why. System Settings > General > Login Items can.")
def _set_service(on: bool) -> str:
    service = _service()
    done = service.registerAndReturnError_(None) if on else service.unregisterAndReturnError_(None)
    if on and service.status == 2:
        return "macOS asks for your approval: System Settings > General > Login Items."
    return "" if done else "macOS does not change the login item: see System Settings > General > Login Items."


def _service() -> Any:
    from rubicon.objc import ObjCClass
    from rubicon.objc.runtime import load_library

    load_library("ServiceManagement")
    return _value(ObjCClass("SMAppService"), "mainAppService")


def _value(thing: Any, name: str) -> Any:
    """A value that Objective-C has as a property or as a method without arguments; rubicon tells them apart."""
    value = getattr(thing, name)
    return value() if type(value).__name__ == "ObjCBoundMethod" else value
