"""What exists only on a Mac: the few things that the app asks of AppKit because Toga does not offer them.

Elsewhere these functions do nothing. On a Mac, failures are logged and the app goes on: none of this may keep it from
running.
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

_retained: list[Any] = []  # objects that AppKit refers to without owning them
_activities: list[Any] = []  # what this app has told macOS that it is doing: one thing at most

# NSActivityUserInitiated (Foundation/NSProcessInfo.h): no App Nap, and the machine does not go to sleep by itself.
_USER_INITIATED = 0x00FFFFFF | 1 << 20


def _mac_only(default: Any = None) -> Callable:
    """Make a function return ``default`` where it fails, and everywhere but on a Mac."""

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


@_mac_only()
def style_status_icon(icon: Any, tooltip: str) -> None:
    """Let macOS colour a status icon to suit the menu bar, and set its tooltip."""
    button = icon._impl.native.button
    button.image.setTemplate(True)
    button.toolTip = tooltip


@_mac_only()
def activate(app: Any) -> None:
    """Bring the app's windows to the front, which an app without a Dock icon has to ask for."""
    app._impl.native.activateIgnoringOtherApps(True)


@_mac_only()
def show_busy(busy: bool) -> None:
    """Tell macOS whether the app is working, so that it is not put to sleep in the middle (App Nap). An app without
    windows in front is, whatever its server is doing."""
    if busy == bool(_activities):
        return
    from rubicon.objc import ObjCClass

    process = _value(ObjCClass("NSProcessInfo"), "processInfo")
    if busy:
        _activities.append(process.beginActivityWithOptions_reason_(_USER_INITIATED, "computing an answer"))
    else:
        process.endActivity_(_activities.pop())


@_mac_only(False)
def menu_is_open() -> bool:
    """Whether a menu is open. Rebuilding it would take it away from under the pointer."""
    from rubicon.objc import ObjCClass

    mode = _value(_value(ObjCClass("NSRunLoop"), "mainRunLoop"), "currentMode")
    return str(mode) == "NSEventTrackingRunLoopMode"


@_mac_only()
def retitle(command: Any) -> None:
    """Change the text of a command in the open menu."""
    for item in command._impl.native:
        item.title = command.text


@_mac_only(False)
def copy(text: str) -> bool:
    """Put text on the pasteboard."""
    from rubicon.objc import ObjCClass

    pasteboard = _value(ObjCClass("NSPasteboard"), "generalPasteboard")
    pasteboard.clearContents()
    return bool(pasteboard.setString_forType_(text, "public.utf8-plain-text"))


@_mac_only()
def on_reopen(handler: Callable[[], None]) -> None:
    """Call ``handler`` when the user opens the app while it is running, from Finder, Spotlight or the terminal."""
    from rubicon.objc import SEL, NSObject, ObjCClass, objc_method

    class GlassReopenHandler(NSObject):
        @objc_method
        def reopen_withReply_(self, event, reply) -> None:
            handler()

    target = GlassReopenHandler.alloc().init()
    _retained.append(target)
    manager = _value(ObjCClass("NSAppleEventManager"), "sharedAppleEventManager")
    manager.setEventHandler_andSelector_forEventClass_andEventID_(
        target, SEL("reopen:withReply:"), int.from_bytes(b"aevt", "big"), int.from_bytes(b"rapp", "big")
    )


def is_bundled() -> bool:
    """Whether this is the packaged app, not a checkout."""
    return ON_MAC and ".app/Contents/" in sys.executable and "Python.app" not in Path(sys.executable).parts


def framework_warning() -> str:
    """A warning if macOS 26 may not draw the status icons of this Python; "" otherwise."""
    if not ON_MAC or is_bundled() or not getattr(sys, "_framework", ""):
        return ""
    if int(platform.mac_ver()[0].split(".")[0] or 0) < 26:
        return ""
    return (
        "macOS 26 may not draw the menu-bar icon, because this Python is a framework build (as Homebrew's and "
        "python.org's are). Use uv's Python, or this window."
    )


@_mac_only()
def login_state() -> bool | None:
    """Whether the app starts at login; None where that is not supported."""
    return _service().status == 1 if is_bundled() else login.is_agent()


def set_login(on: bool) -> str:
    """Start at login, or not. Returns a message for the user, or ""."""
    if not ON_MAC:
        return "Only macOS has login items."
    if not is_bundled():
        try:
            login.set_agent(on)
        except OSError as e:
            return f"The login item cannot be written ({e.strerror})."
        return ""
    return _set_service(on)


@_mac_only("The login item could not be changed (see the log). Try System Settings > General > Login Items.")
def _set_service(on: bool) -> str:
    service = _service()
    done = service.registerAndReturnError_(None) if on else service.unregisterAndReturnError_(None)
    if on and service.status == 2:
        return "macOS asks for your approval: System Settings > General > Login Items."
    return "" if done else "macOS did not change the login item: see System Settings > General > Login Items."


def _service() -> Any:
    from rubicon.objc import ObjCClass
    from rubicon.objc.runtime import load_library

    load_library("ServiceManagement")
    return _value(ObjCClass("SMAppService"), "mainAppService")


def _value(thing: Any, name: str) -> Any:
    """A value that is a property or a method without arguments in Objective-C; rubicon handles them differently."""
    value = getattr(thing, name)
    return value() if type(value).__name__ == "ObjCBoundMethod" else value
