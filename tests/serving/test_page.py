"""The chat page: its files, and in a headless Chromium what it does with a real server on a small model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from servers import CHAT, serving

from glass_mlx.serving import app
from glass_mlx.serving.app import PAGE, ApiOptions
from glass_mlx.serving.operations import Operations
from glass_mlx.serving.server import Server

if TYPE_CHECKING:  # only who runs these tests needs to load it
    from playwright.sync_api import Browser, Page, Playwright, Route

ROOT = Path(__file__).parents[2]
ASSETS = sorted(path for path in PAGE.rglob("*") if path.is_file())
SHELLS = ["chromium-headless-shell", "chrome-headless-shell"]  # have no windows to draw, and cost half
NAMES = [*SHELLS, "chromium", "google-chrome", "google-chrome-stable", "chromium-browser", "chrome", "microsoft-edge"]
PATIENCE = 60_000  # milliseconds: a busy machine takes some
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


def expect(*arguments):
    """Playwright's."""
    from playwright import sync_api

    return sync_api.expect(*arguments)


def find_browser(playwright: Playwright) -> str | None:
    """GLASS_BROWSER's, Playwright's own, or an installed Chromium that runs."""
    if named := os.environ.get("GLASS_BROWSER"):
        return named
    own = playwright.chromium.executable_path
    if Path(own).is_file():
        return own
    return next(filter(_runs, [path for name in (*NAMES, MAC) if (path := shutil.which(name))]), None)


def _runs(path: str) -> bool:
    """Whether it is a browser: some distributions have a script there which says how to get one."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run([path, "--version"], capture_output=True, timeout=30).returncode == 0
    return False


# ---- The files


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            self.inline.append(data)


def test_index_keeps_to_the_policy():
    page = Tags((PAGE / "index.html").read_text())
    assert not page.inline and not [tag for tag, _ in page.tags if tag == "style"]
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name == "style" or name.startswith("on")], tag
        for name in ("src", "href"):
            where = attributes.get(name, "#")
            assert where.startswith("#") or (PAGE / where.removeprefix("/static/")).is_file(), where


def test_scripts_and_styles_are_the_pages_own():
    for path in PAGE.glob("*.*"):
        text = path.read_text()
        assert not re.search(r"(?:https?:)?//[a-z]+\.|@import|url\(", re.sub(r"http://www.w3.org/2000/svg", "", text))
        assert not re.search(r"\beval\(|innerHTML|insertAdjacentHTML|document\.write|new Function", text), path
        for imported in re.findall(r'^import .*?"([^"]+)";', text, re.M):
            assert imported.startswith("./") and (PAGE / imported).is_file(), imported


def test_vendored_files_are_as_released_and_licensed():
    notes = (PAGE / "vendor/README.md").read_text()
    listed = dict(re.findall(r"^\| `([^`]+)` \|.*\| `([0-9a-f]{64})` \|$", notes, re.M))
    assert listed.keys() == {path.name for path in PAGE.glob("vendor/*js")}
    for name, digest in listed.items():
        assert hashlib.sha256((PAGE / "vendor" / name).read_bytes()).hexdigest() == digest
    for library in re.findall(r"\[([^]]+)\]\(https://github.com", notes):
        licence = (PAGE / "vendor/licenses" / f"{library.lower()}.txt").read_text()
        assert "copyright" in licence.lower() and len(licence) > 900, library


def test_files_are_in_the_wheel():
    installed = {str(file) for file in distribution("glass_mlx").files or ()}
    if "glass_mlx/__init__.py" in installed:  # from a wheel
        assert {f"glass_mlx/serving/page/{path.relative_to(PAGE)}" for path in ASSETS} <= installed
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "glass_mlx" in wheel["packages"] and not wheel.keys() & {"exclude", "only-include"}
    ignored = [line.strip("/\n*") for line in (ROOT / ".gitignore").read_text().splitlines()]
    assert not [path for path in ASSETS for part in path.relative_to(ROOT).parts if part in ignored]


@pytest.fixture(scope="module")
def server():
    with serving(ApiOptions(defaults={"max_tokens": 12})) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/static/style.css", "text/css"),
        ("/static/app.js", "javascript"),
        ("/static/vendor/purify.min.js", "javascript"),
        ("/static/icon.svg", "image/svg+xml"),
    ],
)
def test_served_with_type_and_policy(server, path, kind):
    response = httpx.get(server.url + path)
    assert response.status_code == 200 and kind in response.headers["content-type"]
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert response.headers["cache-control"] == "no-cache"  # or a new page would run with old scripts


# ---- In the browser

# A visit begins at "/?new": the browser forgets who was there before. At "/?full" it also has no room to keep anything,
# and at "/?off" nothing to keep it in.
BEGINNING = """{
  const how = location.search.slice(1);
  if (how) {
    localStorage.clear();
    sessionStorage.clear();
    history.replaceState(null, "", "/");
  }
  if (how === "full") Storage.prototype.setItem = () => { throw new DOMException("", "QuotaExceededError") };
  if (how === "off")
    for (const name of ["localStorage", "sessionStorage"])
      Object.defineProperty(window, name, { get() { throw new Error("off") } });
}"""
SCREEN = {"width": 1000, "height": 600}


class Visit:
    """A page that is open, and what happened on it."""

    def __init__(self, page: Page, url: str):
        self.page, self.url = page, url
        self.problems: list[str] = []  # what the console complained of
        self.asked: list[dict] = []  # bodies of requests for answers
        self.strangers: list[str] = []  # requests to others
        page.on("console", lambda m: m.type in ("error", "warning") and self.problems.append(m.text))
        page.on("pageerror", lambda e: self.problems.append(str(e)))
        page.on("request", self._requested)
        page.on("dialog", lambda dialog: (self.problems.append("a dialog"), dialog.dismiss()))

    def _requested(self, request):
        if not request.url.startswith((self.url, "blob:")):
            self.strangers.append(request.url)
        if request.url.endswith(CHAT):
            self.asked.append(json.loads(request.post_data))

    def open(self, how: str = "new") -> Visit:
        """By someone new (``BEGINNING``)."""
        self.page.goto(f"{self.url}/?{how}")
        expect(self.page.locator("#model option")).not_to_have_count(0)
        return self

    @property
    def message(self):
        return self.page.get_by_role("textbox", name="Message")

    @property
    def answers(self):
        return self.page.locator(".answer")

    @property
    def last(self):
        return self.answers.last

    def say(self, text: str) -> None:
        """Send a message with Enter."""
        self.message.fill(text)
        self.message.press("Enter")

    def ask(self, text: str) -> str:
        """Send a message, wait for the answer and give its text."""
        count = self.page.locator(".turn").count()
        self.say(text)
        expect(self.page.locator(".turn")).to_have_count(count + 1)
        self.finish()
        return self.last.locator("> .markdown").inner_text()

    def finish(self) -> None:
        expect(self.page.get_by_role("button", name="Send")).to_be_visible()

    def leave(self) -> None:
        """Nothing may have been complained of, and nobody else asked."""
        problems, strangers = self.problems, self.strangers
        self.problems, self.asked, self.strangers = [], [], []
        self.page.unroute_all(behavior="ignoreErrors")
        self.page.context.set_offline(False)
        assert not problems and not strangers

    def mode(self, name: str) -> None:
        self.page.get_by_role("radio", name=name).check(force=True)

    def expect_notice(self, words: str) -> None:
        expect(self.page.get_by_role("alert")).to_contain_text(words)

    def refused(self) -> None:
        """Take the browser's own complaints about answers with an error's status off the list."""
        self.problems = [text for text in self.problems if not text.startswith("Failed to load resource")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with contextlib.ExitStack() as stack:
        try:
            from playwright.sync_api import expect, sync_playwright

            playwright = stack.enter_context(sync_playwright())
        except Exception as e:  # its driver may lack a library of the system's
            pytest.skip(f"Playwright does not start: {e}")
        if (path := find_browser(playwright)) is None:
            pytest.skip(
                "no browser: install the test dependencies and chromium (or `playwright install chromium`), or set "
                "GLASS_BROWSER to the path of one"
            )
        expect.set_options(timeout=PATIENCE)
        # The suggestions of an address bar that nobody sees are pages, too, in processes of their own.
        unseen = "--disable-features=WebUIOmniboxPopup,WebUIOmniboxAimPopup"
        browser = playwright.chromium.launch(executable_path=path, args=["--disable-dev-shm-usage", unseen])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def window(browser, server) -> Iterator[Visit]:
    """A window that is open all the time, since a browser takes longest to open one, and asks for each file once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(app.NO_CACHE, "Cache-Control", "max-age=3600")
        context = browser.new_context(viewport=SCREEN, permissions=["clipboard-read", "clipboard-write"])
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.add_init_script(BEGINNING)
        page.emulate_media(reduced_motion="reduce")  # drawing takes longest
        yield Visit(page, server.url)
        context.close()


@pytest.fixture
def visit(window, request) -> Iterator[Visit]:
    """A visit by someone new; its parameter, if any, says how it begins."""
    yield window.open(getattr(request, "param", "new"))
    window.leave()


@pytest.fixture
def guarded(window, server) -> Iterator[Visit]:
    """A visit to a server that asks for a key."""
    options = ApiOptions(api_key="open sesame", defaults={"max_tokens": 8})
    other = Server(server.engine, "127.0.0.1", 0, options).start()
    own, window.url = window.url, other.url
    window.page.goto(f"{other.url}/?new")
    yield window
    window.page.goto("about:blank")  # while its server is there
    window.url = own
    other.stop()
    window.leave()


@pytest.fixture
def touched(visit) -> Iterator[Visit]:
    """A visit with a screen that is touched, and may be made smaller."""
    devtools = visit.page.context.new_cdp_session(visit.page)
    devtools.send("Emulation.setTouchEmulationEnabled", {"enabled": True})
    yield visit
    visit.page.set_viewport_size(SCREEN)
    devtools.detach()


def events(*pieces: str, end: bool = True) -> str:
    """A streamed answer."""
    said = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    lines = [json.dumps(event) for event in said]
    if end:
        lines += [json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}), "[DONE]"]
    return "".join(f"data: {line}\n\n" for line in lines)


def ended(text: str, reason: str) -> str:
    """A streamed answer that ends for a reason."""
    return events(text).replace('"stop"', json.dumps(reason))


def answer_with(visit: Visit, status: int = 200, body: str | dict = "") -> None:
    """Have this answered instead of what the server would say."""
    text = body if isinstance(body, str) else json.dumps(body)
    kind = "text/event-stream" if status == 200 else "application/json"
    visit.page.route(f"**{CHAT}", lambda route: route.fulfill(status=status, body=text, content_type=kind))


@pytest.fixture
def endless(visit, monkeypatch) -> None:
    """Answers of the server go on for a long time: the model is not let end them, and takes its time."""

    def longer(route: Route):
        body = {**json.loads(route.request.post_data), "logit_bias": {"2": -100}, "max_tokens": 1900}
        route.continue_(post_data=json.dumps(body))

    def slowly(*arguments, **options):
        with contextlib.closing(answer(*arguments, **options)) as stream:
            for response in stream:
                yield response
                time.sleep(0.02)

    answer = Operations.answer
    monkeypatch.setattr(Operations, "answer", slowly)
    visit.page.route(f"**{CHAT}", longer)


def test_opens_quietly_and_answers_with_its_speed(visit):
    expect(visit.page).to_have_title("glass_mlx")
    expect(visit.page.get_by_role("heading", name="What is on your mind?")).to_be_visible()
    expect(visit.message).to_be_focused()
    expect(visit.page.get_by_label("Model")).to_have_value("demo")
    text = visit.ask("I want to find a restaurant in San Jose.")
    assert len(text) > 5
    expect(visit.last.locator(".figures")).to_have_text(
        re.compile(r"^[\d.,]+ tokens/s · demo · 50 % of neurons · same top token about \d+ % · \d+ tokens?( · cut.*)?$")
    )
    expect(visit.page.locator("#spoken")).to_contain_text(text[:20])  # once, when it is complete
    expect(visit.page.locator("#state")).to_contain_text("demo is ready")
    (asked,) = visit.asked
    assert asked["model"] == "demo" and "density" not in asked and asked["stream"]  # it is the server's
    assert asked["messages"] == [{"role": "user", "content": "I want to find a restaurant in San Jose."}]
    second = visit.ask("Italian, please.")
    assert [m["role"] for m in visit.asked[1]["messages"]] == ["user", "assistant", "user"]
    assert second and visit.asked[1]["messages"][1]["content"].strip() == text


def test_markdown(visit):
    """Code has colours, formulas are formulas, and what arrives in pieces becomes what it is."""
    said = "It is $E=mc^2$, not \\(\\frac{a}{b}\\), for $5 and $6.\n\n"
    said += "$$\n\\begin{aligned}a&=b\\\\\n=c\\end{aligned}\n$$\n\n"
    said += "$\\nothing{$ \\[x^2\\] `$y$`\n\n```python\ndef f(x): return 'a' # b\n```\n\n```odd\n<b>x</b>\n```"
    answer_with(visit, body=events(*(said[i : i + 5] for i in range(0, len(said), 5))))
    visit.ask("Show me.")
    text = visit.last.locator("> .markdown")
    expect(text.locator("math")).to_have_count(4)
    expect(text.locator("math[display=block]")).to_have_count(2)
    expect(text.locator("p").first).to_contain_text("for $5 and $6.")
    expect(text.locator("code")).to_contain_text(["$\\nothing{$", "$y$", "def f(x)", "<b>x</b>"])
    expect(text.locator(".hljs-keyword")).to_have_text(["def", "return"])
    colours = text.locator("pre span").evaluate_all("all => all.map(e => getComputedStyle(e).color)")
    assert len(set(colours)) > 2
    visit.page.unroute(f"**{CHAT}")
    answer_with(
        visit, body=events("# A ti", "tle\n\n- o", "ne\n- two\n\n```py", "thon\nprint(", "1)\n```\n\n|a|\n|-|\n|b|")
    )
    visit.ask("Show me.")
    text = visit.last.locator("> .markdown")
    expect(text.get_by_role("heading", name="A title")).to_have_attribute("aria-level", "4")
    expect(text.get_by_role("listitem")).to_have_count(2)
    expect(text.locator(".code")).to_contain_text("python")
    expect(text.get_by_role("cell", name="b")).to_be_visible()
    visit.page.get_by_role("button", name="Copy code").last.click()
    copied = "beginning => navigator.clipboard.readText().then(text => text.startsWith(beginning) && text)"
    assert visit.page.wait_for_function(copied, arg="print").json_value() == "print(1)\n"
    visit.page.get_by_role("button", name="Copy answer").last.click()
    visit.page.wait_for_function(copied, arg="# A title\n\n- one")


def test_stop_reaches_the_server(visit, server, endless):
    for stop in (visit.page.get_by_role("button", name="Stop").click, lambda: visit.page.keyboard.press("Escape")):
        visit.say("Tell me a long story.")
        expect(visit.last.locator("> .markdown")).to_contain_text(re.compile(r"\S+ \S+ \S+"))
        stop()
        expect(visit.last.locator(".figures")).to_have_text(re.compile("stopped$"))
        visit.finish()
        expect(visit.message).to_be_focused()
        deadline = time.monotonic() + 60
        while server.engine.status().state == "generating" and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.engine.status().state == "ready"
        assert server.engine.status().usage.completion_tokens < 1500
    visit.page.unroute(f"**{CHAT}")
    visit.ask("Hello")  # what had been said stays in the conversation
    assert [m["role"] for m in visit.asked[-1]["messages"]] == ["user", "assistant"] * 2 + ["user"]


def test_side_by_side(touched):
    """And on small screens below each other, with everything within reach."""
    visit = touched
    visit.mode("Side by side")
    visit.ask("I need a hotel in London.")
    sparse, dense = (visit.answers.nth(i) for i in (0, 1))
    expect(visit.answers).to_have_count(2)
    left, right = sparse.bounding_box(), dense.bounding_box()
    assert left["x"] + left["width"] <= right["x"] and left["y"] == right["y"]
    expect(sparse.locator(".figures")).to_have_text(
        re.compile(r"tokens/s · \d+\.\d\d× dense · demo · 50 % of neurons · same top token about \d+ % · \d+ token")
    )
    expect(dense.locator(".figures")).to_have_text(re.compile(r"tokens/s · 1× dense · demo · all neurons · \d+ token"))
    assert [body.get("density") for body in visit.asked] == [None, 1]
    visit.ask("For two people.")  # each column goes on with its own answers
    said = [body["messages"][1]["content"].strip() for body in visit.asked[2:]]
    assert said == [answer.locator("> .markdown").inner_text().strip() for answer in (sparse, dense)]
    assert visit.asked[2]["user"] != visit.asked[3]["user"]  # and with a cache of its own
    assert visit.page.evaluate("matchMedia('(hover: none)').matches")
    for width in (390, 320):
        fits_screen(visit, width)
    assert not violations(visit.page)


def fits_screen(visit: Visit, width: int) -> None:
    page = visit.page
    page.set_viewport_size({"width": width, "height": 640})
    upper, lower = (visit.answers.nth(i).bounding_box() for i in (0, 1))
    assert upper["y"] + upper["height"] <= lower["y"] and upper["x"] == lower["x"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    controls = page.locator("header :visible, #foot button:visible, #foot input:visible")
    boxes = controls.evaluate_all("all => all.map(e => e.getBoundingClientRect())")
    assert len(boxes) > 9 and all(box["left"] >= 0 and box["right"] <= width for box in boxes)
    chats = page.get_by_role("complementary", name="Conversations")
    expect(chats).to_be_hidden()
    page.get_by_role("button", name="Conversations").click()
    expect(chats).to_be_visible()
    page.keyboard.press("Escape")
    expect(chats).to_be_hidden()


def test_how_to_answer_is_sent_and_kept(visit):
    page = visit.page
    page.get_by_role("button", name="Fast").click()
    visit.ask("Hello")
    density = int(re.search(r"(\d+) % of neurons", visit.last.inner_text())[1])
    expect(page.locator("#density-words")).to_have_text(f"{density} %")  # once the model is loaded
    expect(page.locator("#agreement")).to_have_text(re.compile(r"same top token about \d\d %"))
    page.get_by_label("Density", exact=True).fill("65")
    page.get_by_label("Verified").check()
    expect(page.locator("#agreement")).to_have_text("the dense model's answer")
    visit.ask("Hello")
    expect(visit.last.locator(".figures")).to_have_text(re.compile(r"dense model's own words, \d+ % of them drafted"))
    visit.mode("Dense")
    expect(page.get_by_label("Density", exact=True)).to_be_disabled()
    visit.ask("Hello")
    how = [[body.get(name) for name in ("quality", "density", "verify")] for body in visit.asked]
    assert how == [["fast", None, None], [None, 0.65, True], [None, 1, False]]
    page.reload()
    expect(page.get_by_role("radio", name="Dense")).to_be_checked()
    expect(page.locator("#density-words")).to_have_text("65 %")
    expect(page.get_by_role("checkbox", name="Verified")).to_be_checked()


def test_conversations_are_kept(visit):
    """And tabs know of each other's."""
    page = visit.page
    first = visit.ask("I want to find a restaurant in San Jose.")
    page.keyboard.press("Control+Shift+O")
    expect(visit.answers).to_have_count(0)
    visit.ask("What is the weather like today?")
    page.reload()
    expect(page.locator(".said")).to_have_text(re.compile("What is the weather like today?"))
    chats = page.get_by_role("navigation", name="Past conversations").locator(".open")
    expect(chats).to_have_count(2)
    chats.nth(1).click()
    expect(visit.last.locator("> .markdown")).to_have_text(first)
    assert "tokens/s" in visit.last.inner_text()
    page.get_by_role("button", name="Delete I want to find").click(force=True)
    expect(chats).to_have_count(1)
    page.get_by_role("button", name="Undo").click()
    expect(visit.last.locator("> .markdown")).to_have_text(first)
    expect(chats).to_have_count(2)
    with page.context.expect_page() as opened:
        page.evaluate("window.open('/', '_blank', 'noopener')")
    other = Visit(opened.value, visit.url)
    expect(other.page.locator("#model option")).not_to_have_count(0)
    other.ask("Hello from the other tab")
    expect(chats).to_have_count(3)
    expect(chats.first).to_have_text("Hello from the other tab")
    other.page.close()
    assert not other.problems


def test_settings(visit):
    page = visit.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Answer like a pirate.")
    page.get_by_label("Temperature").fill("0.1")
    page.get_by_label("Longest answer").fill("2")  # which now and then an answer has by itself
    page.keyboard.press("Escape")
    expect(page.locator(".system")).to_have_text("System prompt: Answer like a pirate.")
    visit.ask("I need a hotel in London.")
    (asked,) = visit.asked
    assert asked["messages"][0] == {"role": "system", "content": "Answer like a pirate."}
    assert (asked["temperature"], asked["max_tokens"]) == (0.1, 2)
    expect(visit.last.locator(".figures")).to_have_text(re.compile(r"\b2 tokens( · cut at the length limit)?$"))
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Delete all conversations").click()
    page.get_by_role("button", name="Yes, delete all of them").click()
    expect(page.locator("#chats .open")).to_have_count(0)
    expect(visit.answers).to_have_count(0)


HOSTILE = r"""<img src=x onerror="window.harmed=1"><script>window.harmed=1</script><iframe src="//evil.test"></iframe>
<svg onload="window.harmed=1"><style>@import "//evil.test"</style><form action="//evil.test"><input name=x></form>
<a href="javascript:window.harmed=1" onclick="window.harmed=1">a</a> <b id="turns" style="position:fixed">b</b>

[script](javascript:window.harmed=1) [spaced]( java%0ascript:window.harmed=1) [data](data:text/html,<script>1</script>)
[vb](vbscript:x) [file](file:///etc/passwd) [blob](blob:x) [local](/v1/status) [upper](JAVASCRIPT:window.harmed=1)
[entity](java&#115;cript:window.harmed=1) <javascript:window.harmed=1> [quote](https://a.test/"onmouseover="window.harmed=1)

![picture](https://evil.test/p.png) ![x" onerror="window.harmed=1](https://evil.test/q.png)
![d](data:image/png;base64,AA)
[good](https://example.org/ "a \" onclick=\"window.harmed=1") <https://example.org/two> https://example.org/three

[ref]: javascript:window.harmed=1
[ref] <math><mtext><table><mglyph><style><img src=x onerror=window.harmed=1>

```html"onmouseover="window.harmed=1
</code></pre><img src=x onerror=window.harmed=1>
```

$\href{javascript:window.harmed=1}{x}$ \(\text{<img src=x onerror=window.harmed=1>}\) $\class{a" onclick="x}{b}$
$$\html{<script>window.harmed=1</script>}$$

| <img src=x onerror=window.harmed=1> | b |
|:-:|--:|
| [x](javascript:1) | <script>window.harmed=1</script> |
"""


def test_markdown_can_do_no_harm(visit):
    answer_with(visit, body=events(*(HOSTILE[i : i + 7] for i in range(0, len(HOSTILE), 7))))
    visit.ask("<img src=x onerror=window.harmed=1>")
    page = visit.page
    page.evaluate("document.querySelectorAll('.turn *').forEach(e => e.dispatchEvent(new MouseEvent('mouseover')))")
    assert page.evaluate("window.harmed") is None
    tags, attributes, links = page.evaluate(
        """() => { const all = [...document.querySelectorAll(".said *, .answer > .markdown *")];
        return [all.map(e => e.localName), all.flatMap(e => e.getAttributeNames()), [...document.querySelectorAll(
        ".markdown a[href]")].map(a => [a.protocol, a.rel, a.target])] }"""
    )
    assert not set(tags) & {"img", "script", "iframe", "style", "svg", "form", "input", "b", "object", "base"}
    assert not [name for name in attributes if name.startswith("on") or name in ("style", "id", "src", "name")]
    assert page.locator(".markdown [href]:not(a)").count() == 0
    assert {tuple(link) for link in links} == {("https:", "noopener noreferrer", "_blank")} and len(links) >= 6
    expect(visit.last.get_by_role("link", name="picture")).to_have_attribute("href", "https://evil.test/p.png")
    assert "<script>window.harmed=1</script>" in visit.last.inner_text()  # shown, as what it is
    page.reload()  # from the history it is no more harmful
    expect(visit.last.get_by_role("link", name="good")).to_be_visible()
    assert page.evaluate("window.harmed") is None


FAILURES = [
    (429, {"error": {"message": "The queue is full"}}, "The server is busy"),
    (413, {"error": {"message": "too large"}}, "has become too large"),
    (404, {"error": {"message": "The model 'x' is not in the Hub cache."}}, "The model 'x' is not in the Hub cache."),
    (500, {"error": {"message": "demo cannot be loaded. See the log."}}, "demo cannot be loaded"),
    (502, "<html>Bad gateway</html>", "The server answered with status 502."),
    (200, events("Half an ans", end=False), "broke in the middle"),
    (200, 'data: {"error": {"message": "Generation failed: ValueError."}}\n\n', "Generation failed: ValueError."),
    (200, "data: {nonsense\n\n", "something that is not an answer"),
]


def test_failures_have_words(visit):
    """Answers that the server refuses or breaks, and a server that goes and comes back."""
    page, context = visit.page, visit.page.context
    for status, body, words in FAILURES:
        answer_with(visit, status, body)
        visit.ask("Hello")
        expect(visit.last.locator(".error")).to_contain_text(words)
        expect(page.locator("#spoken")).to_contain_text(words)
        page.unroute(f"**{CHAT}")
    context.set_offline(True)
    visit.ask("Hello")
    expect(visit.last.locator(".error")).to_contain_text("The server cannot be reached")
    visit.expect_notice("looks again every few seconds")
    expect(page.locator("#state")).to_contain_text("not reachable")
    context.set_offline(False)
    expect(page.get_by_role("alert")).to_be_empty()
    expect(page.locator("#state")).to_contain_text("ready")
    visit.refused()
    page.get_by_role("button", name="Answer again").last.click()
    visit.finish()
    expect(visit.last.locator(".error")).to_be_hidden()
    expect(visit.last.locator(".figures")).to_contain_text("tokens/s")
    said = [message["content"] for message in visit.asked[-1]["messages"]]
    assert said == ["Hello", "Half an ans", "Hello"]  # turns without any answer are left out


def test_asks_for_the_key(guarded):
    visit, page = guarded, guarded.page
    visit.expect_notice("This server asks for an API key.")
    for key, outcome in (("wrong", "does not accept this API key"), ("open sesame", "")):
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use key").click()
        visit.expect_notice(outcome) if outcome else expect(page.get_by_role("alert")).to_be_empty()
    expect(page.get_by_label("API key")).to_be_hidden()
    assert visit.ask("Hello")
    page.reload()
    assert visit.ask("Hello again")  # kept for the session, and nowhere else
    assert page.evaluate("Object.values(localStorage).join().includes('sesame')") is False
    visit.refused()


def test_waits_with_words(visit):
    """A model that is downloaded and loads slowly, a queue, a measurement, and a model that cannot be loaded."""
    page, held, changes = visit.page, [], []
    facts = {"context_tokens": 2048, "density": 0.6, "densities": [], "qualities": None}
    state = {"state": "loading", "model": "big", "queued": 0, "place": None, "tokens_per_second": 0, "error": None}
    state |= {"facts": None, "measuring": None, "has_ranks": True}

    def changed(route: Route) -> None:
        method = route.request.method
        changes.append((method, route.request.url.removeprefix(visit.url)))
        begun = method == "POST"
        state.update(state="measuring" if begun else "ready", measuring=measuring if begun else None)
        route.fulfill(json=state)

    page.route("**/v1/status?*", lambda route: route.fulfill(json=state))
    page.route("**/v1/measure*", changed)
    page.route(f"**{CHAT}", lambda route: held.append(route))
    head = page.locator("#state")
    visit.say("Hello")
    expect(visit.last).to_contain_text("Loading big…")
    expect(head).to_contain_text("loading big…")
    page.locator("#model").evaluate("e => { e.append(new Option('big')); e.value = 'big' }")
    measuring = {"model": "big", "phase": "reading", "share": 0.4, "seconds_left": 130, "stopping": False}
    state |= {"state": "generating", "queued": 3, "place": 2, "facts": facts, "measuring": measuring}
    expect(visit.last).to_contain_text("2 answers come first…")
    expect(head).to_contain_text("big is answering, 3 waiting, measuring big goes on when nobody waits: reading 40 %")
    expect(page.get_by_role("button", name="Balanced")).to_be_disabled()  # not measured
    expect(page.locator("#density-words")).to_have_text("60 %")
    state |= {"state": "ready", "queued": 0, "place": 0, "has_ranks": False, "measuring": None}
    expect(head).to_contain_text("big is ready, no ranks yet")
    visit.expect_notice("big has no global ranks yet")
    page.get_by_role("button", name="Measure now").click()
    expect(head).to_contain_text("measuring big, reading 40 % (2 min left)")
    expect(visit.last).to_contain_text("big is being measured, and answers between two steps…")
    expect(page.get_by_role("alert")).to_be_empty()
    page.get_by_role("button", name="Stop measuring").click()
    expect(head).to_contain_text("big is ready, no ranks yet")
    assert changes == [("POST", "/v1/measure?model=big"), ("DELETE", "/v1/measure")]
    state |= {"state": "failed", "measuring": None, "facts": None, "error": "big cannot be loaded. See the log."}
    expect(head).to_contain_text("big cannot be loaded. See the log.")
    held[0].fulfill(body=events("Here I am."), content_type="text/event-stream")
    expect(visit.last.locator("> .markdown")).to_have_text("Here I am.")


def test_two_chats_at_once(visit, endless):
    page = visit.page
    visit.say("Tell me a long story.")
    expect(visit.last.locator("> .markdown")).to_contain_text(re.compile(r"\S+ \S+ \S+"))
    page.get_by_role("button", name="New chat").click()
    expect(visit.answers).to_have_count(0)
    visit.say("And another one.")
    expect(visit.last).to_contain_text("One answer comes first…")
    busy = page.locator("#chats .open.busy")
    expect(busy).to_have_count(2)
    page.keyboard.press("Escape")  # stops what is seen
    expect(visit.last.locator(".figures")).to_have_text("stopped")
    expect(busy).to_have_text(re.compile("Tell me a long story"))
    busy.click()
    before = visit.last.inner_text()
    expect(visit.last).not_to_have_text(before, use_inner_text=True)  # it goes on
    expect(visit.last.locator("> .markdown")).to_contain_text(re.compile(r"(\S+ ){20}"))
    page.get_by_role("button", name="Delete Tell me").click(force=True)  # which stops it, and it stays deleted
    visit.finish()
    expect(busy).to_have_count(0)
    page.reload()
    expect(page.locator("#chats .open")).to_have_text(["And another one."])


def test_what_was_said_is_changed(visit):
    """Edit a message, bring back what was before, answer again, and go on with an answer that was cut."""
    page, texts = visit.page, visit.page.locator(".answer > .markdown")
    bodies = [ended("One", "length"), *map(events, (" two.", "Other", "Again"))]
    page.route(f"**{CHAT}", lambda route: route.fulfill(body=bodies.pop(0), content_type="text/event-stream"))
    visit.ask("Count.")
    page.get_by_role("button", name="Continue this answer").click()
    expect(texts).to_have_text(["One two."])
    asked = visit.asked[1]
    assert asked["messages"][-1] == {"role": "assistant", "content": "One"} and asked["continue_final_message"] is True
    assert asked["add_generation_prompt"] is False and "continue_final_message" not in visit.asked[0]
    expect(page.get_by_role("button", name="Continue this answer")).to_have_count(0)
    page.get_by_role("button", name="Edit this message").click(force=True)
    field = page.get_by_label("Edit your message")
    expect(field).to_have_value("Count.")
    page.keyboard.press("Escape")
    expect(page.locator(".said")).to_contain_text("Count.")
    page.keyboard.press("Enter")  # the button has the focus again
    field.fill("Spell.")
    field.press("Enter")
    expect(texts).to_have_text(["Other"])
    assert [message["content"] for message in visit.asked[2]["messages"]] == ["Spell."]
    visit.page.get_by_label("Density", exact=True).fill("30")
    page.get_by_role("button", name="Answer again").click()
    expect(texts).to_have_text(["Again"])
    assert visit.asked[3]["density"] == 0.3
    page.get_by_role("button", name="Undo").click()
    expect(texts).to_have_text(["One two."])
    expect(page.locator(".said")).to_contain_text("Count.")


def test_chats_are_found_named_and_carried_off(visit, tmp_path):
    page, names = visit.page, visit.page.locator("#chats .open")
    answer_with(visit, body=events("A *rare* word."))
    visit.ask("First")
    page.get_by_role("button", name="New chat").click()
    visit.ask("Second")
    page.get_by_role("button", name="Rename First").click(force=True)
    page.get_by_label("New name of First").fill("Renamed")
    page.keyboard.press("Enter")
    expect(names).to_have_text(["Renamed", "Second"])
    search = page.get_by_label("Search conversations")
    for words, found in (("rare  WORD", ["Renamed", "Second"]), ("second", ["Second"]), ("nowhere", [])):
        search.fill(words)
        expect(names).to_have_text(found)
    expect(page.locator("#none")).to_be_visible()
    search.fill("")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export conversations").click()
    download.value.save_as(file := tmp_path / "chats.json")
    page.get_by_role("button", name="Delete Renamed").click(force=True)
    (wrong := tmp_path / "wrong.json").write_text('["<b>"]')
    for chosen, words in ((wrong, "holds no conversations"), (file, "One conversation was imported.")):
        page.locator("#import-file").set_input_files(chosen)
        visit.expect_notice(words)
    expect(names).to_have_text(["Renamed", "Second"])
    names.first.click()
    expect(visit.last.locator("> .markdown")).to_have_text("A rare word.")


DAMAGED = {
    "glass.settings": '["nonsense"]',
    "glass.chat.cut": '{"id": "cut", "turns": [{"sai',
    "glass.chat.other": '{"id": "not this", "turns": []}',
    "glass.chat.null": "null",
    "glass.chat.odd": """{"id": "odd", "title": 5, "changed": "x", "turns": [7, null, {"said": "Hi", "answers": [
        null, {"text": {"a": 1}, "figures": {"tps": "fast"}, "density": "much"}]}]}""",
    "glass.chat.fine": """{"id": "fine", "title": "Fine", "changed": 1, "turns": [{"said": "Hello", "answers": [
        {"text": "Good day"}]}]}""",
}


def test_damaged_storage(visit):
    page = visit.page
    page.evaluate("items => { for (const [k, v] of Object.entries(items)) localStorage.setItem(k, v) }", DAMAGED)
    page.reload()
    expect(page.locator("#chats .open")).to_have_text(["Fine", "New chat"])
    for i, text in enumerate(("Good day", "Hi")):
        page.locator("#chats .open").nth(i).click()
        expect(page.locator("#turns")).to_contain_text(text)
    visit.ask("Hello")


@pytest.mark.parametrize("visit", ["full", "off"], indirect=True)
def test_no_room_in_the_browser(visit):
    visit.ask("Hello")
    visit.expect_notice("The browser has no room to keep this conversation")
    visit.ask("Hello again")


def test_by_keyboard_alone(visit):
    page = visit.page
    for _ in range(14):  # back from the message, which has the focus at first, to the top
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.className") == "skip":
            break
    skip = page.get_by_role("link", name="Skip to the message field")
    expect(skip).to_be_focused()
    expect(skip).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(visit.message).to_be_focused()
    page.keyboard.type("I need")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("a hotel")
    page.keyboard.press("Enter")
    expect(visit.answers).to_have_count(1)
    visit.finish()
    assert visit.asked[0]["messages"][0]["content"] == "I need\na hotel"
    expect(visit.message).to_be_focused()
    for _ in range(2):  # send, then the ways to answer
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="Dense")).to_be_checked()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#density-words")).to_have_text("45 %")
    focused = "e => getComputedStyle(e).outlineStyle"
    assert page.locator("#density").evaluate(focused) != "none"
    page.keyboard.press("Control+Shift+O")
    expect(visit.message).to_be_focused()
    expect(visit.answers).to_have_count(0)


EVERYTHING = """# T

text `code` [link](https://a.test) $x$

```py
@a
def f(x: int = 1, *y): return 'a', None, print(x)  # b
```

$$x^2$$

|a|b|
|-|-|
|1|2|

> q"""


COLOURS = {"type": "rule", "values": ["color-contrast", "link-in-text-block"]}


def test_accessible(visit):
    page, found = visit.page, []

    def look(within: str, dark: str) -> None:
        """At an element, and in the dark at the colours of another one: nothing else differs."""
        found.extend(violations(page, within))
        page.emulate_media(color_scheme="dark")
        assert not _is_light(page)
        found.extend(violations(page, dark, runOnly=COLOURS))
        page.emulate_media(color_scheme="light")
        assert _is_light(page)

    assert page.locator("#lamp").evaluate("e => getComputedStyle(e).animationName") == "none"
    log = page.get_by_role("log", name="Messages")
    expect(log).to_have_attribute("aria-live", "off")
    look("html", "#welcome")
    answer_with(visit, body=events(EVERYTHING))
    visit.ask("Markdown")
    page.unroute(f"**{CHAT}")
    visit.mode("Side by side")
    visit.ask("Hello")
    answer_with(visit, 500, {"error": {"message": "Broken."}})
    visit.ask("Fail")
    visit.refused()
    page.get_by_role("button", name="Edit this message").first.click(force=True)
    page.get_by_role("button", name="Rename").first.click(force=True)
    look("html", "html")
    page.get_by_role("button", name="Settings").click()
    look("#settings", "#settings")
    assert not found


def _is_light(page: Page) -> bool:
    """Whether the page's ground is."""
    return sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")))) > 600


def violations(page: Page, within: str = "html", **options) -> list[str]:
    """What axe finds wrong with what an element of the page shows now."""
    from axe_playwright_python.sync_playwright import Axe

    axe = Axe("0") if page.evaluate("'axe' in window") else Axe()  # its script is a large one
    found = axe.run(page, within, {"resultTypes": ["violations"], **options}).response["violations"]
    return [f"{rule['id']}: {node['html'][:200]} {node['failureSummary']}" for rule in found for node in rule["nodes"]]
