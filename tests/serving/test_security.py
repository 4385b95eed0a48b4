"""Tests of what the server does with strangers: other origins, rebound names, wrong keys, harmful requests."""

from __future__ import annotations

import json
import random
import time

import httpx
import pytest
import schemathesis
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import booleans
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from servers import CHAT, QUESTION, connect, raw, serving
from starlette.testclient import TestClient
from test_catalogue import TRAVERSALS

from glass_mlx import GlassError
from glass_mlx.serving import security
from glass_mlx.serving.app import Api, ApiOptions
from glass_mlx.serving.engine import Engine, EngineOptions
from glass_mlx.serving.sockets import parse_origin

# what the model cannot take (unknown tokens, a call's arguments that are no JSON) is valid by the document
EXCLUDED = [positive_data_acceptance]


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


@pytest.fixture(scope="module")
def engine(tiny_dir):
    engine = Engine(EngineOptions(model=str(tiny_dir), load={"stats": False}, max_prompt_tokens=200))
    yield engine
    engine.close()


@pytest.fixture
def client(engine):
    """Make a client of an application with these options."""

    def client(**options) -> TestClient:
        api = Api(engine, ApiOptions(**{"defaults": {"max_tokens": 2}, **options}))
        return TestClient(api.app, base_url="http://localhost:8080", raise_server_exceptions=False)

    return client


def is_error(response: httpx.Response, status: int) -> bool:
    """Whether it is an error of OpenAI's form that tells nothing of the machine."""
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    for secret in ("/tmp", "/home", "/usr", "Traceback", ".py", "site-packages"):
        assert secret not in response.text
    return response.status_code == status


@pytest.mark.few(8)
@pytest.mark.parametrize(
    "host, allowed",
    [
        *(
            (host, True)
            for host in ("localhost", "localhost:1", "127.0.0.1:8080", "[::1]:8080", "192.168.1.5", "Mac.local")
        ),
        *((host, False) for host in ("evil.com", "evil.com:8080", "localhost.evil.com", "127.0.0.1.evil.com", "")),
        *((host, False) for host in ("localhost@evil.com:80:80", "[::1", "evil.com#localhost")),
    ],
)
def test_host(client, host, allowed):
    """A page whose name was made to point at this machine says that name."""
    served = client(hosts=("mac.local",))
    for path in ("/", "/health", "/v1/models"):
        response = served.get(path, headers={"Host": host})
        assert response.status_code == 200 if allowed else is_error(response, 403)


@pytest.mark.parametrize(
    "origin, allowed",
    [
        ("http://localhost:8080", True),
        ("https://my.app", True),
        ("http://localhost:3000", False),
        ("https://evil.com", False),
        ("https://my.app.evil.com", False),
        ("null", False),
        ("", False),
    ],
)
def test_origin(client, origin, allowed):
    served = client(origins=("https://my.app",))
    response = served.post(CHAT, json={"messages": QUESTION}, headers={"Origin": origin})
    assert response.status_code == 200 if allowed else is_error(response, 403)
    shared = response.headers.get("access-control-allow-origin")
    assert shared == ("https://my.app" if origin == "https://my.app" else None)


# What OpenAI's libraries send, and other clients of theirs.
SDK_HEADERS = [
    *(
        "authorization",
        "content-type",
        "user-agent",
        "openai-organization",
        "openai-project",
        "http-referer",
        "x-title",
    ),
    *(f"x-stainless-{name}" for name in ("arch", "async", "helper-method", "lang", "os", "package-version")),
    *(f"x-stainless-{name}" for name in ("retry-count", "runtime", "runtime-version", "timeout")),
]


def preflight(served: TestClient, origin: str, headers: str = "content-type", **more: str) -> httpx.Response:
    ask = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": headers}
    return served.options(CHAT, headers=ask | more)


def test_cors_is_closed(client):
    for options in ({}, {"origins": ("https://my.app",)}, {"origins": ("https://my.app",), "api_key": "k"}):
        response = preflight(client(**options), "https://evil.com")
        assert is_error(response, 403) and "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("allowed", ["https://my.app", "https://MY.app/", "*"])
@pytest.mark.parametrize("key", [None, "k"])
def test_preflight_of_an_allowed_origin(client, allowed, key):
    """Whatever headers the client sends, and without the key, which browsers leave out."""
    served = client(origins=("http://localhost:1", allowed), api_key=key)
    for headers in (", ".join(SDK_HEADERS), *SDK_HEADERS):
        response = preflight(served, "https://my.app", headers)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == ("*" if allowed == "*" else "https://my.app")
        assert response.headers["access-control-allow-headers"] == headers
        assert "POST" in response.headers["access-control-allow-methods"]
    local = preflight(served, "https://my.app", **{"Access-Control-Request-Private-Network": "true"})
    assert (local.status_code, local.headers["access-control-allow-private-network"]) == (200, "true")


@pytest.mark.parametrize(
    ("path", "headers", "body", "status"),
    [
        (CHAT, {"Authorization": "Bearer wrong"}, {"messages": QUESTION}, 401),
        (CHAT, {"Host": "evil.com"}, {"messages": QUESTION}, 403),
        (CHAT, {}, {"messages": [{"role": "user", "content": "x" * 20_000}]}, 413),
        (CHAT, {}, {"messages": QUESTION, "temperature": 9}, 400),
        (CHAT, {}, {"messages": QUESTION, "model": "nope"}, 404),
        ("/nope", {}, {}, 404),
        ("/health", {}, {}, 405),
        (CHAT, {}, {"messages": QUESTION, "user": "crash"}, 500),
    ],
)
@pytest.mark.parametrize("origins", [("https://my.app",), ("*",)])
def test_pages_of_an_allowed_origin_can_read_errors(client, engine, monkeypatch, path, headers, body, status, origins):
    if status == 500:
        monkeypatch.setattr(engine, "submit_all", lambda requests: 1 / 0)
    served = client(origins=origins, api_key="k", max_body_bytes=10_000)
    response = served.post(path, json=body, headers={"Origin": "https://my.app", "Authorization": "Bearer k"} | headers)
    assert is_error(response, status)
    assert response.headers["access-control-allow-origin"] in origins
    assert response.headers["x-content-type-options"] == "nosniff"
    other = served.post(path, json=body, headers={"Origin": "https://evil.com", "Authorization": "Bearer k"} | headers)
    if origins != ("*",):
        assert is_error(other, 403) and "access-control-allow-origin" not in other.headers


@pytest.mark.few(24)
@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/status", "/health", "/openapi.json", "/static/app.js", "/favicon.ico"]
)
@pytest.mark.parametrize(
    ("site", "origin", "allowed"),
    [
        *((None, None, True), ("none", None, True), ("same-origin", None, True)),
        *(("cross-site", None, False), ("same-site", None, False), ("nonsense", None, False)),
        *(("cross-site", "https://my.app", True), ("same-site", "http://localhost:3000", False)),
    ],
)
def test_other_sites(client, path, site, origin, allowed):
    """Pictures and scripts of other pages come without an Origin, but the browser says where from."""
    headers = {"Sec-Fetch-Site": site, "Origin": origin}
    response = client(origins=("https://my.app",)).get(path, headers={k: v for k, v in headers.items() if v})
    assert (response.status_code != 403) if allowed else is_error(response, 403)


def test_links_from_other_sites(client):
    """Lead to the page, and nowhere else; into no frame."""
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert client().get("/", headers=link).status_code == 200
    assert is_error(client().get("/v1/models", headers=link), 403)
    assert is_error(client().get("/", headers=link | {"Sec-Fetch-Dest": "iframe"}), 403)


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        *(("*", "*"), (" https://my.app/ ", "https://my.app"), ("HTTPS://My.App", "https://my.app")),
        *(("http://localhost:3000/", "http://localhost:3000"), ("https://my.app:443", "https://my.app")),
        *(("http://[::1]:8000", "http://[::1]:8000"), ("chrome-extension://abc", "chrome-extension://abc")),
        *((text, None) for text in ("", "my.app", "localhost:3000", "https://", "https://my.app/x", "https://a b")),
        *(
            (text, None)
            for text in ("https://*.app", "http://a:99999", "http://a:x", "null", "http://u@a", "http://[::1")
        ),
        *((text, None) for text in ("javascript:alert(1)", "http://a?x", "http://a#x", "http://a\\b", "http://\x1b")),
    ],
)
def test_origins_of_the_operator(text, origin):
    if origin is not None:
        assert parse_origin(text) == origin
        return
    with pytest.raises(GlassError, match="is not a web origin: give one such as"):
        parse_origin(text)


@pytest.mark.parametrize(
    "given, allowed",
    [
        ("Bearer s3cret", True),
        ("bearer s3cret", True),
        *((given, False) for given in ("", "Bearer", "Bearer ", "Bearer s3cre", "Bearer s3cret2", "Basic s3cret")),
        *((given, False) for given in ("s3cret", "Bearer \xe4", "Bearer s3cret,s3cret")),
    ],
)
def test_key(client, given, allowed):
    served = client(api_key="s3cret")
    for method, path in (("GET", "/v1/models"), ("GET", "/v1/status"), ("POST", CHAT), ("POST", "/v1/unload")):
        headers = {"Authorization": given.encode("latin-1")}
        response = served.request(method, path, headers=headers, json={"messages": QUESTION} if path == CHAT else None)
        assert response.status_code == 200 if allowed else is_error(response, 401)
    for path in ("/", "/health", "/openapi.json"):
        assert served.get(path).status_code == 200


@pytest.mark.parametrize(("key", "coding"), [("schlüssel", "utf-8"), ("schlüssel", "latin-1"), ("鍵", "utf-8")])
def test_a_key_beyond_ascii(client, key, coding):
    served = client(api_key=key)
    assert served.get("/v1/models", headers={"Authorization": b"Bearer " + key.encode(coding)}).status_code == 200
    wrong = {"Authorization": b"Bearer " + key.encode(coding)[:-1]}
    assert is_error(served.get("/v1/models", headers=wrong), 401)


def test_headers(client):
    for path in ("/", "/v1/models", "/nope"):
        headers = client().get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers


@pytest.mark.parametrize(
    "method, path, status", [("GET", "/nope", 404), ("GET", CHAT, 405), ("DELETE", "/health", 405)]
)
def test_what_is_not_there(client, method, path, status):
    assert is_error(client().request(method, path), status)


@pytest.mark.parametrize("name", [name for name in TRAVERSALS if len(name) < 300])
def test_no_name_is_a_path(client, name):
    assert is_error(client().post(CHAT, json={"model": name, "messages": QUESTION}), 404)


def test_sizes(client):
    served = client(max_body_bytes=10_000)
    large = {"messages": [{"role": "user", "content": "x" * 20_000}]}
    assert is_error(served.post(CHAT, json=large), 413)
    chunks = (json.dumps(large)[i : i + 1000].encode() for i in range(0, 20_000, 1000))
    assert is_error(served.post(CHAT, content=chunks), 413)  # without a Content-Length
    response = served.post(CHAT, json={"messages": [{"role": "user", "content": "x y " * 200}]})
    assert is_error(response, 400) and "at most 200" in response.text


def test_a_crash_tells_nothing(client, engine, monkeypatch):
    def crash(request):
        raise RuntimeError("/home/me/secret")

    monkeypatch.setattr(engine, "submit_all", crash)
    response = client().post(CHAT, json={"messages": QUESTION})
    assert is_error(response, 500) and "secret" not in response.text


def test_mangled_bodies(client):
    """Valid requests with bytes changed, cut and doubled: whatever comes back is an answer or says what is wrong."""
    served, chance = client(), random.Random(0)
    body = {
        "messages": QUESTION,
        "temperature": 0.5,
        "stop": ["x"],
        "logit_bias": {"5": 1},
        "max_tokens": 1,
        "density": 0.5,
    }
    valid = json.dumps(body).encode()
    seen = set()
    for _ in range(examples(60, 200)):
        mangled = bytearray(valid)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(mangled))
            match chance.randrange(4):
                case 0:
                    mangled[at] = chance.randrange(256)
                case 1:
                    del mangled[at : at + chance.randint(1, 30)]
                case 2:
                    mangled[at:at] = mangled[at : at + chance.randint(1, 30)]
                case 3:
                    mangled[at:at] = chance.choice(
                        [b"null", b"1e999", b"-1", b"[[[[", b"{}", b"\\ud800", b"\x00", b"NaN"]
                    )
        response = served.post(CHAT, content=bytes(mangled))
        seen.add(response.status_code)
        assert response.status_code == 200 or is_error(response, response.status_code)
    assert seen <= {200, 400, 404}


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_the_published_document_is_kept(client, mode):
    """Requests that schemathesis makes of it, valid and not."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", client(hosts=("testserver",)).app)
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and operation.method == "get" or "unload" in operation.path:
            continue  # they take nothing that could be wrong
        if "measure" in operation.path:
            continue  # it would measure for minutes

        @settings(max_examples=examples(2, 8), deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=mode), booleans())
        def keeps(case, stream):
            if isinstance(case.body, dict):
                for limit in ("max_tokens", "max_completion_tokens"):
                    if isinstance(case.body.get(limit), int):
                        case.body[limit] = min(case.body[limit], 2)
                if mode is GenerationMode.POSITIVE:
                    case.body["stream"] = stream  # left to chance, few are streamed
            case.call_and_validate(excluded_checks=EXCLUDED)

        keeps()


def test_slow_headers(tiny_dir, monkeypatch):
    """Connections that never finish their headers cost nobody else anything, and are closed."""
    monkeypatch.setattr(security.HeaderTimeoutProtocol, "HEADER_TIMEOUT", 3.0)
    with serving(model=str(tiny_dir), load={"stats": False}) as server:
        slow = [connect(server) for _ in range(50)]
        for connection in slow:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\n")
        silent = connect(server)
        answer = httpx.post(server.url + CHAT, json={"messages": QUESTION, "max_tokens": 2}, timeout=60)
        assert answer.status_code == 200
        for connection in (*slow, silent):
            while connection.recv(1000):
                pass
            connection.close()


def test_slow_headers_on_a_used_connection(tiny_dir, monkeypatch):
    monkeypatch.setattr(security.HeaderTimeoutProtocol, "HEADER_TIMEOUT", 2.0)
    with serving(model=str(tiny_dir)) as server:
        server._uvicorn.config.timeout_keep_alive = 600  # uvicorn's own timeout, for silence
        with connect(server) as connection:
            for _ in range(2):
                connection.sendall(raw("/health", method="GET"))
                while b'"ok"' not in (answer := connection.recv(10_000)):
                    assert answer, "it was closed"
            connection.sendall(b"GET /hea")
            assert connection.recv(10_000) == b""


def test_a_long_answer_outlives_the_header_timeout(tiny_dir, monkeypatch):
    monkeypatch.setattr(security.HeaderTimeoutProtocol, "HEADER_TIMEOUT", 0.1)
    with serving(model=str(tiny_dir), load={"stats": False}) as server:
        body = {"messages": QUESTION, "max_tokens": 1_000_000, "stream": True}
        with httpx.stream("POST", server.url + CHAT, json=body, timeout=300) as response:  # a first graph is slow
            lines, start = response.iter_lines(), time.perf_counter()
            while time.perf_counter() - start < 4 * security.HeaderTimeoutProtocol.HEADER_TIMEOUT:
                assert "error" not in next(lines)


def test_slow_body(tiny_dir):
    with serving(ApiOptions(body_timeout=0.3), model=str(tiny_dir)) as server, connect(server) as connection:
        connection.sendall(raw(body={"messages": QUESTION})[:-10])
        answer = connection.recv(10_000)
        assert b"408 Request Timeout" in answer and b"connection: close" in answer.lower()


@pytest.fixture(scope="module")
def served(tiny_dir):
    """A server that listens."""
    with serving(model=str(tiny_dir), load={"stats": False}) as server:
        yield server


def test_half_closed(served):
    """A client that has shut its side is taken for gone, and the next one is served."""
    for cut in (30, len(raw(body={"messages": QUESTION, "max_tokens": 1_000_000}))):
        with connect(served) as connection:
            connection.sendall(raw(body={"messages": QUESTION, "max_tokens": 1_000_000})[:cut])
            connection.shutdown(1)
            answer = httpx.post(served.url + CHAT, json={"messages": QUESTION, "max_tokens": 2}, timeout=60)
            assert answer.status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 100_000,
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n",
        b"\r\n" * 1000,
    ],
)
def test_no_http(served, data):
    with connect(served) as connection:
        connection.sendall(data)
        connection.shutdown(1)
        answer = connection.recv(10_000)
        assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 403"))
    assert httpx.get(served.url + "/health").status_code == 200
