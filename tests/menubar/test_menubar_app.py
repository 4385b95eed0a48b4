"""The menu-bar app's view on Toga's dummy backend: the menu is built, its entries act, and it follows what happens."""

import asyncio
import os
import plistlib
import subprocess
import sys
import tomllib
import types

os.environ["TOGA_BACKEND"] = "toga_dummy"  # before Toga chooses one

import pytest
import toga
from servers import CHAT, QUESTION
from toga_dummy.utils import EventLog

import glass_mlx
from apps.menubar import __main__ as entry
from apps.menubar import app as app_module
from apps.menubar import instance as instance_module
from apps.menubar import login, macos
from apps.menubar.app import RESOURCES, GlassApp
from apps.menubar.controller import Controller
from apps.menubar.instance import Instance
from apps.menubar.menu import TICK, find, flat
from apps.menubar.settings import Settings, save_settings
from apps.menubar.state import Model
from glass_mlx.errors import GlassError


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


@pytest.fixture
def app(tmp_path, monkeypatch):
    """The app, started, with its window."""
    monkeypatch.setattr(app_module, "INTERVAL", 0.05)
    EventLog.reset()  # in which the backend looks for the value of each widget: the longer it is, the longer that takes
    path = tmp_path / "settings.json"
    save_settings(path, Settings(port=0))
    log = tmp_path / "menubar.log"
    log.write_text("")
    app = GlassApp(Controller(path), log)
    yield app
    app.request_exit()
    during(app, lambda: not app.controller._engine.alive)
    app._workers.shutdown()
    app.loop.close()
    asyncio.set_event_loop(None)


def during(app: GlassApp, condition, seconds: float = 60) -> None:
    """Let the app run until something is so."""

    async def wait() -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.01)

    app.loop.run_until_complete(wait())


def texts(app: GlassApp) -> dict[str, str]:
    return {command.id: command.text for command in app.status_icons.commands if isinstance(command, toga.Command)}


def choose(app: GlassApp, key: str) -> None:
    """What happens when the user chooses an entry of the menu."""
    command = app.status_icons.commands[key]

    async def press() -> None:
        await command.action()

    assert command.enabled
    app.loop.run_until_complete(press())


def running(app: GlassApp) -> None:
    during(app, lambda: "Stop server" in texts(app)["server"])


def test_the_menu_is_the_data(app):
    running(app)
    items = [item for item in flat(app._menu) if item.items is None]
    shown = [command for command in app.status_icons.commands if isinstance(command, toga.Command)]
    assert [command.id for command in shown] == [item.key for item in items]
    assert [command.text for command in shown] == [item.label for item in items]
    assert [command.enabled for command in shown] == [item.enabled for item in items]
    assert app.status_icons.commands["model demo"].group.text == "Model: demo"
    assert app.status_icons.commands["model demo"].group.parent is app.status_icon
    assert texts(app)["status"] == "demo · ready, loads when asked"


def test_it_follows_what_happens(app):
    import httpx

    running(app)
    url = app.controller.snapshot().server.url
    body = {"messages": QUESTION, "max_tokens": 5}

    async def ask() -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            assert (await client.post(url + CHAT, json=body)).status_code == 200

    app.loop.run_until_complete(ask())
    during(app, lambda: "tok/s" in texts(app)["density 0.5"])
    assert "demo · ready ·" in texts(app)["status"]
    assert app.window._widgets["status"].text == texts(app)["status"]
    choose(app, "unload")
    during(app, lambda: "loads when asked" in texts(app)["status"])


def test_only_what_has_changed_is_shown_again(app, monkeypatch):
    running(app)
    rebuilt, icons = [], []
    monkeypatch.setattr(app.status_icons.commands, "on_change", lambda: rebuilt.append(texts(app)["glass"]))
    monkeypatch.setattr(app.status_icon._impl, "set_icon", icons.append)
    app.loop.run_until_complete(asyncio.sleep(0.2))
    assert not rebuilt and not icons
    choose(app, "glass")
    assert rebuilt and rebuilt[-1] == "GLASS"
    app.controller.notify("The disk is full.")
    app.refresh()
    assert icons == [app.icons[True]]
    choose(app, "dismiss")
    assert icons == [app.icons[True], app.icons[False]]


def test_a_failure_to_look_is_not_the_end(app, monkeypatch, caplog):
    def fail():
        raise RuntimeError("injected")

    running(app)
    with monkeypatch.context() as patch:
        patch.setattr(app.controller, "tick", fail)
        during(app, lambda: "cannot be brought up to date" in caplog.text)
    app.controller.stop_server()
    during(app, lambda: texts(app)["server"] == "Start server")


def test_an_app_that_cannot_start_ends(tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("injected")

    monkeypatch.setattr(app_module, "StatusWindow", fail)
    controller = Controller(tmp_path / "settings.json")
    with pytest.raises(RuntimeError, match="injected"):
        GlassApp(controller)
    assert "the app cannot start" in caplog.text
    controller.close()


def test_an_open_menu_stays_as_it_is(app, monkeypatch):
    running(app)
    retitled = []
    with monkeypatch.context() as patch:
        patch.setattr(macos, "menu_is_open", lambda: True)
        patch.setattr(macos, "retitle", lambda command: retitled.append(command.id))
        app.controller.notify("Something new.")
        app.refresh()
        assert "dismiss" not in texts(app)
        app.controller.dismiss()
        app.controller.stop_server()
        app.refresh()
        assert "server" in retitled
        app.controller.notify("Something new.")
    app.refresh()
    assert "dismiss" in texts(app)


def test_choosing(app):
    running(app)
    choose(app, "density 0.3")
    assert texts(app)["density 0.3"].startswith(TICK)
    assert app.controller.settings.density == 0.3
    choose(app, "density 1.0")
    assert texts(app)["glass"] == "GLASS"
    choose(app, "glass")
    assert texts(app)["glass"] == f"{TICK}GLASS"
    choose(app, "server")
    assert texts(app)["server"] == "Start server"
    assert not app.status_icons.commands["chat"].enabled
    choose(app, "server")
    assert "Stop server" in texts(app)["server"]
    choose(app, "model demo")
    during(app, lambda: app.controller.snapshot().engine.state == "ready")


def test_the_view_s_own_actions(app, monkeypatch):
    running(app)
    opened, copied, started = [], [], []
    monkeypatch.setattr(app_module.webbrowser, "open", opened.append)
    monkeypatch.setattr(macos, "copy", lambda text: copied.append(text) or True)
    monkeypatch.setattr(app_module.shutil, "which", lambda name: name)
    monkeypatch.setattr(app_module.subprocess, "Popen", lambda command, **options: started.append(command[-1]))
    url = app.controller.snapshot().server.url
    for key in ("chat", "copy", "log", "about", "status"):
        choose(app, key)
    choose(app, "settings")
    app.settings_window._open(None)
    assert opened == [url]
    assert copied == [f"{url}/v1"]
    assert started == [str(app.log), str(app.controller.path)]
    assert not app.controller.snapshot().notices
    monkeypatch.setattr(macos, "copy", lambda text: False)
    monkeypatch.setattr(app_module.shutil, "which", lambda name: None)
    choose(app, "copy")
    choose(app, "log")
    assert app.controller.snapshot().notices == (f"The endpoint is {url}/v1", f"The path is {app.log}")


def test_the_window_does_what_the_menu_does(app):
    running(app)
    widgets = app.window._widgets
    assert isinstance(widgets["glass"], toga.Switch) and widgets["glass"].value
    assert widgets["model"].value.key == "model demo"
    widgets["glass"]._impl.simulate_toggle()
    during(app, lambda: not app.controller.settings.glass)
    during(app, lambda: widgets["density"].value.key == "density 1.0")
    widgets["density"].value = widgets["density"].items[0]
    during(app, lambda: app.controller.settings == Settings(density=0.3, port=0))
    widgets["server"]._impl.simulate_press()
    during(app, lambda: widgets["server"].text == "Start server")
    assert not widgets["chat"].enabled
    app.window._window.close()
    app.controller.set_glass(False)
    app.refresh()
    choose(app, "window")
    assert not app.window._widgets["glass"].value


def test_the_window_shows_progress(app):
    from apps.menubar.jobs import Job

    running(app)
    job = app.controller._download = Job("qwen3-4b", 200)
    job.done = 50
    app.refresh()
    assert app.window._widgets["download bar"].value == 0.25
    app.window._widgets["cancel download"]._impl.simulate_press()
    during(app, lambda: job.cancelled)
    during(app, lambda: not app.window._widgets["cancel download"].enabled)


def test_downloading(app, monkeypatch):
    running(app)
    asked = []
    monkeypatch.setattr(app.controller, "download", asked.append)
    choose(app, "download")
    window = app.download_window
    app.loop.run_until_complete(window.download(None))
    assert asked == ["qwen3-4b"]
    choose(app, "download")
    window.choice.value = "phi-4"
    assert window.name.value == "mlx-community/phi-4-4bit"
    window.name.value = "me/mine"
    app.loop.run_until_complete(window.download(None))
    assert asked[1:] == ["me/mine"]


def test_the_size_is_said_before_a_download(app, monkeypatch):
    running(app)
    monkeypatch.setattr(app.controller, "describe_download", lambda name: f"{name}: 2.3 GB; fits this machine")
    choose(app, "download")
    window = app.download_window
    during(app, lambda: window.takes.text == "mlx-community/Qwen3-4B-4bit: 2.3 GB; fits this machine")
    window.name.value = "me/mine"
    window._look()
    during(app, lambda: window.takes.text.startswith("me/mine:"))


def test_settings_as_a_form(app, monkeypatch):
    running(app)
    choose(app, "settings")
    form = app.settings_window
    assert (form.model.value.key, form.way.value.key, form.port.value) == ("demo", 0.5, 0)
    assert not form.login.enabled and not form.delete_button.enabled  # no Mac, and nothing downloaded
    form.way.value = next(row for row in form.way.items if row.key == "fast")
    form.idle.value, form.server.value = 3, False
    app.loop.run_until_complete(form.save(None))
    assert app.controller.settings == Settings(quality="fast", port=0, idle_minutes=3, start_server=False)
    for way, settings in ((1.0, {"glass": False, "quality": "fast"}), (0.3, {"density": 0.3})):
        choose(app, "settings")
        form.way.value = next(row for row in form.way.items if row.key == way)
        form.port.value = None  # emptied: as it was
        app.loop.run_until_complete(form.save(None))
        assert app.controller.settings == Settings(port=0, idle_minutes=3, start_server=False, **settings)


def test_deleting_asks_first(app, monkeypatch):
    running(app)
    deleted = []
    monkeypatch.setattr(app.controller, "delete_model", deleted.append)
    app.controller._models = (Model("qwen3-4b", 2_280_000_000, downloaded=True),)
    for answer in (False, True):
        choose(app, "settings")
        form = app.settings_window
        form._window._impl.dialog_responses["ConfirmDialog"] = [answer]
        app.loop.run_until_complete(form.delete(None))
        assert deleted == ["qwen3-4b"] * answer


def test_a_second_start_shows_the_first(app, tmp_path, monkeypatch, capsys):
    first = Instance(tmp_path / "only.lock")
    assert first.is_first and not first.is_called()
    second = Instance(tmp_path / "only.lock")
    assert not second.is_first
    second.close()
    monkeypatch.setattr(instance_module, "settings_path", lambda: tmp_path / "only.json")
    monkeypatch.setattr(app, "_is_called", first.is_called)
    running(app)
    app.window._window.close()
    entry.run(False)
    assert "runs already" in capsys.readouterr().out
    during(app, lambda: not app.window._window.closed)
    first.close()
    assert Instance(tmp_path / "only.lock").is_first
    assert Instance(tmp_path / "log" / "no").is_first  # made
    (tmp_path / "file").write_text("")
    assert Instance(tmp_path / "file" / "no").is_first  # it cannot be told


def test_quitting_closes_everything(app):
    running(app)
    server = app.controller._server.server
    app.request_exit()
    during(app, lambda: not server.alive and not app.controller._engine.alive)
    assert "freeing the memory" in texts(app)["status"]
    assert not app.status_icons.commands["quit"].enabled


def test_launch_at_login(app, monkeypatch, tmp_path):
    assert not find(app._menu, "login").enabled
    monkeypatch.setattr(macos, "ON_MAC", True)
    monkeypatch.setattr(login.Path, "home", lambda: tmp_path)
    app.set_login(True)
    agent = plistlib.loads(login.agent_path().read_bytes())
    assert agent["ProgramArguments"] == [sys.executable, "-m", "apps.menubar"]
    assert os.path.isdir(os.path.join(agent["WorkingDirectory"], "apps", "menubar"))
    app.refresh()
    assert find(app._menu, "login").ticked
    choose(app, "login")
    assert not login.agent_path().exists()
    (tmp_path / "Library").rename(tmp_path / "moved")
    (tmp_path / "Library").write_text("")
    app.set_login(True)
    assert "cannot be written" in app.controller.snapshot().notices[0]


def test_nothing_of_the_mac_raises(monkeypatch):
    functions = {
        macos.style_status_icon: (None, ""),
        macos.activate: (None,),
        macos.menu_is_open: (),
        macos.copy: ("",),
    }
    functions |= {
        macos.show_busy: (True,),
        macos.retitle: (None,),
        macos.on_reopen: (None,),
        macos._set_service: (True,),
    }
    monkeypatch.setitem(sys.modules, "rubicon", None)
    for on in (False, True):
        monkeypatch.setattr(macos, "ON_MAC", on)
        for function, arguments in functions.items():
            assert not function(*arguments) or function is macos._set_service


def test_the_warning_about_framework_builds(monkeypatch):
    assert macos.framework_warning() == ""
    monkeypatch.setattr(macos, "ON_MAC", True)
    monkeypatch.setattr(sys, "_framework", "Python", raising=False)
    for version, warns in (("26.1", True), ("15.7", False), ("", False)):
        monkeypatch.setattr(macos.platform, "mac_ver", lambda version=version: (version, (), ""))
        assert bool(macos.framework_warning()) == warns
    monkeypatch.setattr(macos.platform, "mac_ver", lambda: ("26.1", (), ""))
    monkeypatch.setattr(sys, "_framework", "")
    assert macos.framework_warning() == ""


def test_macos_hears_of_work_once_and_of_its_end(monkeypatch):
    """As Foundation has it: one activity begins with the first work, and it is the one that ends."""
    calls, token = [], object()

    class Process:
        def beginActivityWithOptions_reason_(self, options, reason):
            calls.append(("begin", options))
            return token

        def endActivity_(self, activity):
            calls.append(("end", activity))

    fake = types.SimpleNamespace(ObjCClass=lambda name: types.SimpleNamespace(processInfo=Process()))
    monkeypatch.setitem(sys.modules, "rubicon", types.ModuleType("rubicon"))
    monkeypatch.setitem(sys.modules, "rubicon.objc", fake)
    monkeypatch.setattr(macos, "ON_MAC", True)
    for busy in (False, True, True, False, False, True, False):
        macos.show_busy(busy)
    assert [what for what, _ in calls] == ["begin", "end"] * 2
    assert calls[1] == ("end", token) and calls[0][1] & 0xFF == 0xFF


def test_entry(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(entry, "run", started.append)
    for arguments in ([], ["--window"]):
        monkeypatch.setattr(sys, "argv", ["menubar", *arguments])
        entry.main()
    assert started == [False, True]
    monkeypatch.setattr(sys, "argv", ["menubar", "--help"])
    entry.main()
    assert "python -m apps.menubar" in capsys.readouterr().out


def test_entry_without_toga_and_as_a_server(tmp_path):
    (tmp_path / "toga.py").write_text("raise ModuleNotFoundError('toga', name='toga')")
    root = os.path.dirname(os.path.dirname(glass_mlx.__file__))
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    for arguments, words in (
        ([], "error: the app needs toga: pip install 'glass_mlx[app]'\n"),
        (["--serve", "-h"], ""),
    ):
        command = [sys.executable, "-m", "apps.menubar", *arguments]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        assert done.stderr == words
        assert (done.returncode, "--port" in done.stdout) == ((1, False) if words else (0, True))


def test_packaging():
    root = RESOURCES.parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    app = project["tool"]["briefcase"]["app"]["menubar"]
    assert f"{project['tool']['briefcase']['bundle']}.menubar" == login.APP_ID
    assert all((root / source).is_dir() for source in app["sources"])
    assert all((root / f"{app['icon']}.{kind}").is_file() for kind in ("icns", "png"))
    assert app["requires"] == project["project"]["optional-dependencies"]["server"]  # dependencies come by themselves
    assert app["macOS"]["info"]["LSUIElement"] and not app["macOS"]["universal_build"]


def test_settings_errors_reach_the_menu(app, monkeypatch):
    def full(*args):
        raise GlassError("The settings cannot be saved (No space left on device). They are kept until you quit.")

    running(app)
    monkeypatch.setattr("apps.menubar.controller.save_settings", full)
    choose(app, "density 0.7")
    assert "No space left on device" in texts(app)["notice 0"] + texts(app)["notice 1"]
    assert texts(app)["density 0.7"].startswith(TICK)
