"""The menu-bar app without its view: a real engine, a real server, a Hub on loopback."""

import errno
import json
import os
import shutil
import socket
import time

import httpx
import pytest
from hub_server import HubServer
from servers import CHAT, QUESTION, serving

from apps.menubar import controller as controller_module
from apps.menubar import jobs
from apps.menubar.controller import Controller
from apps.menubar.jobs import repo_name
from apps.menubar.settings import Settings, load_settings, save_settings
from apps.menubar.state import status
from glass_mlx import GlassError
from glass_mlx.hub.sizes import size
from glass_mlx.ranks import measure
from glass_mlx.ranks.lookup import cache_dir
from glass_mlx.serving.measuring import Measurement
from glass_mlx.serving.server import Server

REPO = "mlx-community/tiny"


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


@pytest.fixture
def make(tmp_path):
    """Makes a started controller; all are closed in the end."""
    made = []

    def make(settings: Settings | None = None) -> Controller:
        path = tmp_path / "settings.json"
        if settings is not None or not path.exists():
            save_settings(path, settings or Settings(port=0))
        made.append(Controller(path))
        made[-1].start()
        return made[-1]

    yield make
    for controller in made:
        controller.close()


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as server:
        server.use(monkeypatch)
        yield server


def until(condition, seconds: float = 60):
    """Wait for something; fails if it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def key(controller: Controller) -> str:
    return status(controller.snapshot()).key


def ask(controller: Controller, **body) -> dict:
    url = controller.snapshot().server.url
    answer = httpx.post(url + CHAT, json={"messages": QUESTION, "max_tokens": 5, **body}, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()


def files_of(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_start_chat_and_stop(make):
    controller = make()
    assert key(controller) == "unloaded"
    assert [model.name for model in controller.snapshot().models] == ["demo"]
    assert ask(controller)["usage"]["glass"]["density"] == 0.5
    assert key(controller) == "ready"
    controller.set_glass(False)
    assert ask(controller)["usage"]["glass"]["density"] == 1
    controller.tick()
    controller.set_density(0.3)
    assert ask(controller)["usage"]["glass"]["density"] == 0.3
    assert ask(controller, density=0.7)["usage"]["glass"]["density"] == 0.7  # a client's own choice
    controller.tick()
    speeds = dict(controller.snapshot().speeds)
    assert speeds.keys() == {1.0, 0.7} and all(speeds.values())
    controller.set_density(1.0)
    assert (controller.settings.glass, controller.settings.density) == (False, 0.3)
    controller.unload()
    until(lambda: key(controller) == "unloaded")
    url = controller.snapshot().server.url
    controller.stop_server()
    assert key(controller) == "stopped"
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)
    controller.start_server()
    assert key(controller) == "unloaded"
    assert load_settings(controller.path)[0] == controller.settings


def test_a_port_in_use(make):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        controller = make(Settings(port=port))
        assert key(controller) == "no port"
        assert status(controller.snapshot()).detail == "Another program on this machine uses it."
        controller.use_another_port()
        assert key(controller) == "unloaded"
        assert controller.snapshot().server.port == controller.settings.port == load_settings(controller.path)[0].port
        assert controller.settings.port > port


def test_another_one_of_us_in_the_port(make):
    with serving() as server:
        controller = make(Settings(port=server.port))
        assert status(controller.snapshot()).detail == "Another glass_mlx on this machine uses it."
    controller.start_server()
    assert key(controller) == "unloaded"


def test_a_port_that_may_not_be_used_and_missing_libraries(make, monkeypatch):
    def refuse(self):
        raise GlassError("no") from OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Server, "start", refuse)
    controller = make(Settings(port=80))
    assert status(controller.snapshot()).detail == "The system reports: Permission denied."

    def lack(self):
        raise GlassError("the server needs uvicorn: pip install 'glass_mlx[server]'")

    monkeypatch.setattr(Server, "start", lack)
    controller.start_server()
    assert key(controller) == "server failed"
    assert "needs uvicorn" in status(controller.snapshot()).detail


def test_a_server_that_ends_by_itself(make):
    controller = make()
    controller._server.server._uvicorn.should_exit = True
    until(lambda: key(controller) == "server failed")
    controller.start_server()
    assert key(controller) == "unloaded"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_crash_of_the_engine_and_restart(make, monkeypatch):
    controller = make()
    engine = controller._engine

    def crash():
        raise SystemError("injected")

    monkeypatch.setattr(engine, "_next", crash)
    engine.unload()
    until(lambda: key(controller) == "crashed")
    controller.load()  # nothing that is chosen now may raise
    controller.build_ranks()
    assert "The engine is closed." in controller.snapshot().notices
    controller.restart()
    assert key(controller) == "unloaded"
    assert ask(controller)["choices"]


def test_a_model_that_cannot_be_loaded(make, tiny_dir, hub):
    hub.repo(REPO, files_of(tiny_dir) | {"config.json": b'{"model_type": "llama"}'})
    controller = make()
    controller.download(REPO)
    until(lambda: key(controller) == "load failed")
    assert "See the log." in status(controller.snapshot()).detail
    controller.select_model("demo")
    until(lambda: key(controller) == "ready")


def test_a_download_that_is_no_text_model(make, tiny_dir, hub):
    hub.repo(REPO, files_of(tiny_dir) | {"config.json": b'{"model_type": "no such"}'})
    controller = make()
    controller.download(REPO)
    until(lambda: any("which mlx-lm does not have" in notice for notice in controller.snapshot().notices))
    assert [model.name for model in controller.snapshot().models] == ["demo"]


def test_download_and_use(make, tiny_dir, hub):
    hub.repo(REPO, files_of(tiny_dir) | {"model.gguf": b"left where it is"})
    controller = make()
    controller.download(f"https://huggingface.co/{REPO}/tree/main")
    until(lambda: controller.snapshot().engine.model == REPO and key(controller) == "ready")
    assert controller.snapshot().notices == (f"{REPO} is downloaded.",)
    assert [model.name for model in controller.snapshot().models] == ["demo", REPO]
    assert controller.settings.model == REPO
    assert ask(controller)["model"] == REPO
    assert not hub.sent("gguf")
    controller.dismiss()
    assert not controller.snapshot().notices


def test_download_progress_and_cancelling(make, tiny_dir, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.repo(REPO, files_of(tiny_dir))
    hub.fail("GET .*model.safetensors", stall=1.0)
    controller = make()
    controller.download(REPO)
    until(lambda: controller.snapshot().download is not None and controller.snapshot().download.total)
    controller.download("other/model")
    assert f"{REPO} is still being downloaded" in controller.snapshot().notices[-1]
    controller.dismiss()
    assert controller.snapshot().download.total == sum(
        len(data) for name, data in files_of(tiny_dir).items() if name != "README.md"
    )
    controller.cancel_download()
    assert controller.snapshot().download.stopping
    until(lambda: controller.snapshot().download is None)
    assert controller.snapshot().notices == ()
    assert controller.settings.model == "demo"
    controller.download(REPO)
    until(lambda: controller.settings.model == REPO)


def test_downloads_that_fail_say_why(make, tiny_dir, hub, monkeypatch):
    controller = make()

    def said(name: str, words: str) -> None:
        controller.dismiss()
        controller.download(name)
        until(lambda: controller.snapshot().download is None)
        assert words in "".join(controller.snapshot().notices)

    said("nonsense", "neither a short name nor a Hub repository")
    said("no/model", "The Hub has no repository no/model")
    hub.repo("some/dataset", {"data.csv": b"1"})
    said("some/dataset", "not a model for mlx-lm")
    hub.repo(REPO, files_of(tiny_dir))
    usage = shutil.disk_usage("/")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        said(REPO, "only 1 kB are free on the disk")

    def full(repo, dry_run=False, **options):
        if dry_run:
            return real(repo, dry_run=True, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    real = jobs.snapshot_download
    monkeypatch.setattr(jobs, "snapshot_download", full)
    said(REPO, f"No space left for {REPO}")

    def break_(*args, **options):
        raise KeyError("unheard of")

    monkeypatch.setattr(jobs, "snapshot_download", break_)
    said(REPO, "Something went wrong (KeyError)")
    assert key(controller) == "unloaded"


def test_the_size_before_a_download_and_deleting(make, tiny_dir, hub, monkeypatch):
    hub.repo(REPO, files_of(tiny_dir))
    total = size(sum(len(data) for name, data in files_of(tiny_dir).items() if name != "README.md"))
    controller = make()
    words = controller.describe_download(f"https://huggingface.co/{REPO}")
    assert words.startswith(f"{total}; fits this machine; ") and words.endswith(" are free on the disk.")
    assert "The Hub has no repository" in controller.describe_download("no/model")
    assert "neither a short name" in controller.describe_download("nonsense")
    controller.download(REPO)
    until(lambda: key(controller) == "ready" and controller.settings.model == REPO)
    assert f"{total}, 0 kB of it still to come; fits" in controller.describe_download(REPO)
    monkeypatch.setattr(controller_module, "usable_memory", lambda: 1000)
    assert "is too large for this memory" in controller.describe_download(REPO)
    controller.dismiss()
    controller.delete_model(REPO)
    assert controller.snapshot().notices == (f"{REPO} was deleted.",)
    assert [model.name for model in controller.snapshot().models] == ["demo"]
    assert (controller.settings.model, key(controller)) == ("demo", "unloaded")
    controller.delete_model(REPO)
    assert f"{REPO} could not be deleted" in controller.snapshot().notices[-1]


def test_other_settings(make):
    """The server moves to another port, and a quality is a density once the model is known."""
    controller = make()
    before = controller.snapshot().server.port
    controller.change(Settings(port=0, quality="high"))
    assert controller.snapshot().server.port == before  # nothing about the server has changed
    assert ask(controller)["usage"]["glass"]["density"] == 0.5
    controller.tick()
    density = controller.snapshot().density
    assert density == controller.snapshot().engine.facts.qualities["high"] > 0.5
    assert ask(controller)["usage"]["glass"]["density"] == density
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    controller.change(Settings(port=port))
    assert controller.snapshot().server.port == port
    assert ask(controller)["usage"]["glass"]["density"] == 0.5


def test_no_network(make):
    with HubServer() as gone, pytest.MonkeyPatch.context() as patch:
        gone.use(patch)
        gone._http.server_close()
        patch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))
        controller = make()
        controller.download("qwen3-0.6b")
        until(lambda: controller.snapshot().download is None)
        assert "check the network" in controller.snapshot().notices[0]
        assert ask(controller)["choices"]


def test_too_large_a_model_is_not_loaded(make, tiny_dir, hub, monkeypatch):
    monkeypatch.setattr(controller_module, "usable_memory", lambda: 100_000)
    hub.repo(REPO, files_of(tiny_dir))
    controller = make()
    controller.download(REPO)
    until(lambda: controller.snapshot().notices)
    assert controller.snapshot().notices == (f"{REPO} is downloaded, but too large for this memory.",)
    assert controller.settings.model == "demo"


@pytest.fixture
def without_ranks(make, tiny_dir, hub, small_steps):
    """A controller that has a model without ranks, which are measured in several small steps."""
    hub.repo(REPO, files_of(tiny_dir))
    controller = make()
    controller.download(REPO)
    until(lambda: key(controller) == "ready")
    assert not controller.snapshot().engine.has_ranks
    return controller


def test_measure_ranks(without_ranks):
    controller = without_ranks
    controller.build_ranks()
    controller.build_ranks()  # once is enough
    until(lambda: controller.snapshot().ranks is None and key(controller) == "ready")
    assert controller.snapshot().engine.has_ranks
    assert controller.snapshot().ranked == {"demo"}
    controller.tick()
    assert controller.snapshot().ranked == {"demo", controller.settings.model}
    assert controller.snapshot().notices == (f"{REPO} is downloaded.",)
    assert len(list(cache_dir().glob("*.safetensors"))) == 1
    assert ask(controller)["usage"]["glass"]["density"] == 0.5


def test_cancel_measuring(without_ranks, monkeypatch):
    controller, real = without_ranks, Measurement._on_step

    def on_step(measurement, *step):
        real(measurement, *step)
        controller.cancel_ranks()

    monkeypatch.setattr(Measurement, "_on_step", on_step)
    controller.build_ranks()
    until(lambda: controller.snapshot().ranks is None)
    assert not controller.snapshot().engine.has_ranks
    assert controller.snapshot().notices == (f"{REPO} is downloaded.",)  # what was measured is kept, silently


def test_ranks_on_a_full_disk(without_ranks, monkeypatch):
    def full(*args, **options):
        raise GlassError("Cannot write the ranks: [Errno 28] No space left on device")

    monkeypatch.setattr(measure, "build_ranks", full)
    without_ranks.build_ranks()
    until(lambda: len(without_ranks.snapshot().notices) > 1)
    assert "The ranks could not be measured. Cannot write" in without_ranks.snapshot().notices[-1]


def test_settings_on_a_full_disk(make, monkeypatch):
    controller = make()
    before = controller.path.read_text()

    def full(path, write):
        raise GlassError("no") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("apps.menubar.settings.write_atomically", full)
    controller.set_density(0.7)
    assert controller.settings.density == 0.7
    assert "No space left on device" in controller.snapshot().notices[0]
    assert controller.path.read_text() == before


def test_damaged_settings(make, tmp_path):
    (tmp_path / "settings.json").write_text("{ port:")
    controller = make()
    assert "settings file was damaged" in controller.snapshot().notices[0]
    assert controller.settings == Settings()


def test_a_model_that_is_gone(make):
    controller = make(Settings(model="mlx-community/gone", port=0))
    assert controller.settings.model == "demo"
    assert "mlx-community/gone is not on this machine: using demo." in controller.snapshot().notices[0]
    controller.select_model("also/gone")
    assert controller.settings.model == "demo"
    assert key(controller) == "unloaded"


def test_the_settings_file_is_edited(make):
    controller = make()
    controller.path.write_text(json.dumps({"density": 0.25, "idle_minutes": 0, "port": 0}))
    os.utime(controller.path, ns=(1, 1))
    controller.tick()
    assert controller.settings == Settings(density=0.25, idle_minutes=0, port=0)
    assert ask(controller)["usage"]["glass"]["density"] == 0.25
    assert controller._engine.options.idle_timeout is None


def test_idle_unloading(make):
    controller = make(Settings(port=0, idle_minutes=0.005))
    ask(controller)
    until(lambda: key(controller) == "unloaded")


def test_closing_frees_everything(make):
    controller = make()
    ask(controller)
    url = controller.snapshot().server.url
    controller.close()
    assert key(controller) == "closing"
    assert controller.snapshot().engine.state == "unloaded"
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)
    controller.tick()


def test_a_server_that_is_not_to_start(make):
    assert key(make(Settings(start_server=False))) == "stopped"


@pytest.mark.parametrize(
    "text", ["a/b", " a/b ", "https://huggingface.co/a/b", "http://hf.co/a/b?x=1", "huggingface.co/a/b/blob/main/x"]
)
def test_names_as_people_paste_them(text):
    assert repo_name(text) == "a/b"
    assert repo_name("qwen3-4b") == "qwen3-4b"
