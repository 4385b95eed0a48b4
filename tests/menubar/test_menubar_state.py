"""The words and the menu of every state of the menu-bar app. Nothing runs here."""

from dataclasses import replace

import pytest

from apps.menubar.menu import BLANK, LINE, TICK, find, flat, menu
from apps.menubar.settings import Settings, load_settings, save_settings
from apps.menubar.state import Model, ServerView, Snapshot, Task, needs_attention, status
from glass_mlx import GlassError
from glass_mlx.hub.sizes import fit, size
from glass_mlx.model.quality import QualityPoint
from glass_mlx.serving.engine_status import EngineStatus, ModelFacts
from glass_mlx.serving.measuring import Progress

RUNNING = ServerView("running", 8080, "http://127.0.0.1:8080")
READY = EngineStatus("ready", "demo", has_ranks=True, memory_bytes=2_000_000_000)
MODELS = (
    Model("demo", 15_600_000),
    Model("qwen3-4b", 2_280_000_000, "tight"),
    Model("big", 90_000_000_000, "too large"),
)
BASE = Snapshot(Settings(), READY, server=RUNNING, models=MODELS, speeds=((0.5, 133.4), (1.0, 99.04)), login=False)


def engine(state: str, **changes) -> EngineStatus:
    return replace(READY, state=state, **changes)


def measuring(tokens: int, **changes) -> EngineStatus:
    phase = "reading" if tokens else ""
    return engine("measuring", measuring=Progress("demo", phase, tokens, tokens / 64, **changes))


UNLOADED = EngineStatus("unloaded")
GENERATING = engine("generating", tokens_per_second=87.61, queued=2)
TROUBLED = (ServerView("no port", 8080, detail="Another program."), ServerView("failed", 8080, detail="It ended."))


@pytest.mark.parametrize(
    ("changes", "busy"),
    [
        ({}, False),
        ({"engine": UNLOADED}, False),
        ({"engine": GENERATING}, True),
        ({"engine": engine("loading")}, True),
        ({"engine": engine("ready", queued=1)}, True),
        ({"engine": measuring(1)}, True),
        ({"download": Task("demo", 1, 2)}, True),
    ],
)
def test_busy(changes, busy):
    assert replace(BASE, **changes).busy == busy


# changes of the snapshot; the state's key; words in its headline; the fix; what can be chosen and what cannot
STATES = {
    "ready": (dict(), "ready", "demo · ready · 133 tok/s", None, "chat copy server unload quit", "ranks"),
    "unloaded": (dict(engine=UNLOADED), "unloaded", "loads when asked", None, "chat ranks", "unload"),
    "loading": (dict(engine=engine("loading")), "loading", "loading…", None, "chat model", "unload"),
    "generating": (
        dict(engine=GENERATING),
        "generating",
        "answering · 87.6 tok/s · 2 waiting",
        None,
        "unload",
        "ranks",
    ),
    "no model": (
        dict(engine=engine("failed", error="Bad.")),
        "load failed",
        "cannot be loaded",
        "load",
        "chat",
        "unload",
    ),
    "stopped": (dict(server=ServerView()), "stopped", "server stopped", None, "server unload", "chat copy"),
    "no port": (dict(server=TROUBLED[0]), "no port", "Port 8080", "use_another_port", "server unload", "chat copy"),
    "dead server": (dict(server=TROUBLED[1]), "server failed", "not running", "start_server", "server", "chat copy"),
    "crashed": (dict(alive=False), "crashed", "has stopped", "restart", "log quit server", "chat copy unload ranks"),
    "no ranks": (dict(engine=engine("ready", has_ranks=False)), "ready", "ready", None, "ranks", ""),
    "ranked": (dict(engine=UNLOADED, ranked=frozenset({"demo"})), "unloaded", "asked", None, "chat", "unload ranks"),
    "measuring": (
        dict(engine=measuring(32)),
        "measuring",
        "measuring ranks · reading 50%",
        None,
        "chat",
        "unload ranks",
    ),
    "time left": (
        dict(engine=measuring(9, seconds_left=130.0)),
        "measuring",
        "reading 14% (2 min left)",
        None,
        "",
        "ranks",
    ),
    "begun": (dict(engine=measuring(0)), "measuring", "measuring ranks…", None, "chat", "unload ranks"),
    "stopping": (dict(engine=measuring(32, stopping=True)), "measuring", "stopping", None, "chat", "cancel-ranks"),
    "downloading": (dict(download=Task("q", 5, 10)), "ready", "ready", None, "chat cancel-download", "download"),
    "closing": (dict(closing=True), "closing", "freeing the memory", None, "", "chat server unload glass quit window"),
}


@pytest.mark.parametrize("name", STATES)
def test_every_state_has_words_and_the_right_actions(name):
    changes, key, headline, fix, possible, impossible = STATES[name]
    snapshot = replace(BASE, **changes)
    now, items = status(snapshot), menu(snapshot)
    assert now.key == key
    assert headline in now.headline
    assert (now.fix.action if now.fix else None) == fix
    assert needs_attention(snapshot) == (fix is not None)
    assert now.detail or name == "closing"
    assert find(items, "status").text == now.headline
    for item in possible.split():
        assert find(items, item.replace("-", " ")).enabled, item
    for item in impossible.split():
        assert not find(items, item.replace("-", " ")).enabled, item
    if fix:
        assert find(items, "fix").enabled


@pytest.mark.parametrize("name", STATES)
def test_every_menu_is_sound(name):
    items = list(flat(menu(replace(BASE, **STATES[name][0], notices=("It went wrong, and " * 8,)))))
    assert len({item.key for item in items}) == len(items)
    assert all(item.text.strip() and len(item.text) <= LINE + 12 for item in items)
    assert all(item.action or not item.enabled or item.items for item in items)


def test_what_keeps_everything_from_working_comes_first():
    snapshot = replace(BASE, alive=False, server=TROUBLED[0], engine=replace(measuring(1), state="failed"))
    assert status(snapshot).key == "crashed"
    assert status(replace(snapshot, alive=True)).key == "no port"
    assert status(replace(snapshot, closing=True)).key == "closing"


def test_details():
    assert status(BASE).detail == "50% of the neurons, 2.0 GB in memory"
    without = replace(BASE, engine=engine("ready", has_ranks=False, error="Generation failed."))
    assert "no ranks yet: the prompt alone" in status(without).detail
    assert "Generation failed." in status(without).detail
    dense = replace(without, settings=Settings(glass=False))
    assert "All neurons (dense)" in status(dense).detail
    assert "no ranks" not in status(dense).detail


def test_notices_are_wrapped_and_can_be_dismissed():
    items = menu(replace(BASE, notices=("No space left for it on this disk: free some, and then try it again.", "B")))
    lines = [item.text for item in items if item.key.startswith("notice")]
    assert len(lines) == 3
    assert lines[0].startswith("⚠")
    assert find(items, "dismiss").text == "Dismiss all"
    assert needs_attention(replace(BASE, notices=("B",)))


def test_models():
    models = find(menu(BASE), "model")
    assert models.text == "Model: demo"
    assert [item.label for item in models.items] == [
        f"{TICK}demo · 16 MB",
        f"{BLANK}qwen3-4b · 2.3 GB · tight",
        f"{BLANK}big · 90.0 GB · too large for this memory",
    ]
    assert [item.enabled for item in models.items] == [True, True, False]
    assert models.items[1].argument == "qwen3-4b"
    assert find(menu(replace(BASE, models=())), "no models").text


def test_densities():
    density = find(menu(BASE), "density")
    assert [item.label for item in density.items] == [
        f"{BLANK}30% of the neurons",
        f"{TICK}50% of the neurons · 133 tok/s",
        f"{BLANK}70% of the neurons",
        f"{BLANK}All neurons (dense) · 99.0 tok/s",
        *(f"{BLANK}{quality} quality" for quality in ("High", "Balanced", "Fast")),  # known once it is loaded
    ]
    assert find(menu(BASE), "glass").label == f"{TICK}GLASS"
    off = menu(replace(BASE, settings=Settings(glass=False)))
    assert find(off, "glass").label == "GLASS" and find(off, "glass").argument is True
    assert find(off, "density 1.0").ticked and not find(off, "density 0.5").ticked
    own = menu(replace(BASE, settings=Settings(density=0.45)))
    assert find(own, "density 0.45").ticked
    assert find(own, "density 0.3") and not find(own, "density 0.3").ticked


def test_qualities():
    """They are densities where those were measured; else the density holds."""
    points = (QualityPoint(0.4, 0.3, 0.7), QualityPoint(0.8, 0.01, 0.9))
    facts = ModelFacts(2048, 0.5, points, {"high": 0.85, "balanced": 0.6, "fast": 0.41})
    fast = replace(BASE, settings=Settings(quality="fast"), engine=replace(READY, facts=facts))
    assert fast.density == 0.41
    assert status(fast).detail == "41% of the neurons, same top token 70%, 2.0 GB in memory"
    items = menu(fast)
    assert find(items, "quality fast").label == f"{TICK}Fast quality · 41% of the neurons"
    assert not any(item.ticked for item in find(items, "density").items if item.action == "set_density")
    unknown = replace(fast, engine=replace(READY, facts=ModelFacts(2048, 0.5)))
    assert unknown.density == 0.5
    assert not find(menu(unknown), "quality fast").enabled
    assert replace(fast, settings=Settings(quality="fast", glass=False)).density == 1


def test_downloads():
    texts = {
        Task("q"): "Asking the Hub for q…",
        Task("q", 570_000_000, 2_280_000_000): "q: 570 MB of 2.3 GB (25%)",
        Task("q", 1, 2, True): "Stopping the download of q…",
    }
    for task, text in texts.items():
        items = menu(replace(BASE, download=task))
        assert find(items, "download").text == text
        assert find(items, "download").share == task.share
        assert find(items, "cancel download").enabled is not task.stopping


def test_login_where_there_is_none():
    assert not find(menu(replace(BASE, login=None)), "login").enabled
    assert find(menu(replace(BASE, login=True)), "login").ticked


@pytest.mark.parametrize(
    "weights, density, memory, expected",
    [(4, 0.5, 16, "fits"), (12, 1.0, 16, "fits"), (12, 0.5, 16, "tight"), (15, 0.5, 16, "too large")],
)
def test_fit(weights, density, memory, expected):
    assert fit(weights * 10**9, density, memory * 10**9) == expected


def test_sizes():
    assert [size(n) for n in (0, 999, 15_600_000, 2_280_000_000)] == ["0 kB", "1 kB", "16 MB", "2.3 GB"]


def test_settings_are_kept(tmp_path):
    path = tmp_path / "deep" / "settings.json"
    assert load_settings(path) == (Settings(), [])
    mine = Settings("qwen3-4b", False, 0.3, "fast", 8081, 0, False)
    save_settings(path, mine)
    assert load_settings(path) == (mine, [])
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff\xfe", b"", b"null", b"[" * 100_000])
def test_damaged_settings_are_put_aside(tmp_path, data):
    path = tmp_path / "settings.json"
    path.write_bytes(data)
    settings, notices = load_settings(path)
    assert settings == Settings()
    assert "damaged" in notices[0]
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes() == data
    assert kept.name in notices[0]


def test_a_wrong_setting_leaves_the_others(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text('{"density": 3, "port": true, "model": "m", "glass": 0, "idle_minutes": -1, "later": [1]}')
    settings, notices = load_settings(path)
    assert settings == Settings(model="m")
    assert len(notices) == 4
    assert any('"density" must be above 0 and at most 1' in notice for notice in notices)


def test_settings_that_cannot_be_read_or_written(tmp_path):
    (tmp_path / "settings.json").mkdir()
    settings, notices = load_settings(tmp_path / "settings.json")
    assert settings == Settings() and "cannot be read" in notices[0]
    (tmp_path / "file").write_text("")
    with pytest.raises(GlassError, match="cannot be saved"):
        save_settings(tmp_path / "file" / "settings.json", Settings())
