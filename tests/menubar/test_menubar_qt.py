"""The menu-bar app as a real widget tree: Toga on Qt, drawn off the screen, in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import processes
import pytest

DRIVER = Path(__file__).with_name("qt_driver.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    """What the app showed, step by step."""
    where = tmp_path_factory.mktemp("qt")
    qt = {"TOGA_BACKEND": "toga_qt", "QT_QPA_PLATFORM": "offscreen", "QT_SCALE_FACTOR": "1"}
    own = {name: str(where / "cache") for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "GLASS_CACHE_DIR")}
    env = processes.environment(DRIVER.parents[1], **qt, **own)
    done = processes.run([DRIVER, where], where, env, timeout=180)
    if done.stderr.startswith("no Qt: "):
        pytest.skip(f"{done.stderr.strip()}: pip install '.[app]', and the libraries of .ci/run")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads((where / "seen.json").read_text())


def test_the_menu(seen):
    menu = dict(seen["menu"])
    assert [text for text, _ in seen["menu"] if text.startswith(("Open", "Copy", "Stop", "Download", "Quit"))] == [
        "Open chat",
        "Copy endpoint URL",
        f"Stop server (port {seen['port']})",
        "Download another…",
        "Open log",
        "Quit GLASS",
    ]
    assert menu["✓ GLASS"] and menu["Show window"] and not menu["Launch at login"]  # that is a Mac's
    assert [text.strip("\u2003\u200a") for text, _ in seen["submenus"]["Density: 50%"]] == [
        "30% of the neurons",
        "✓ 50% of the neurons",
        "70% of the neurons",
        "All neurons (dense)",
        *(f"{quality} quality" for quality in ("High", "Balanced", "Fast")),
    ]
    (model,) = seen["submenus"]["Model: demo"]
    assert model[0].startswith("✓ demo · ") and model[1]


def test_entries_act(seen):
    assert seen["clipboard"] == f"http://127.0.0.1:{seen['port']}/v1"
    assert seen["glass off"] == "GLASS" and seen["density off"] == "Density: 100%"
    assert seen["stopped"] == ["demo · server stopped", "Start server"]
    assert seen["answered"].startswith("demo · ready · ") and seen["answered"].endswith(" tok/s")


def test_the_window(seen):
    """It says what the menu says, and everything in it is drawn where it can be seen."""
    assert seen["window"]["status"] == seen["answered"]
    for window in ("window", "settings"):
        assert seen[window]["outside"] == []
        assert seen[window]["cut"] == []
        assert seen[window]["colours"] > 20  # there is more on it than a ground


def test_trouble_in_words(seen):
    assert "The disk is full." in " ".join(text for text, _ in seen["trouble"])
    assert seen["icon changed"]


def test_quitting_frees_everything(seen):
    assert seen["ended"] == {"engine": False, "server": False}
