"""Other people's programs at the server, as their users start them: llm, and curl where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from servers import CHAT, QUESTION, answered, serving

from glass_mlx.serving.app import ApiOptions

KEY = "s3cret"


@pytest.fixture(scope="module")
def served():
    with serving(ApiOptions(api_key=KEY)) as server:
        yield server


@pytest.fixture
def llm(served, tmp_path):
    """Run the ``llm`` command, configured as its documentation says for OpenAI-compatible servers."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: glass\n  model_name: demo\n  api_base: {served.url}/v1\n  api_key_name: glass\n"
    )
    (tmp_path / "keys.json").write_text(json.dumps({"glass": KEY}))

    def llm(*args: str) -> str:
        env = os.environ | {"LLM_USER_PATH": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-m", "llm", *args]
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return llm


def test_llm(llm, demo):
    messages = [{"role": "system", "content": "You are kind."}, *QUESTION]
    said = llm("-m", "glass", "-s", "You are kind.", QUESTION[0]["content"])
    assert said == answered(*demo, messages)[0].strip()


def test_llm_goes_on_with_a_conversation(llm, demo):
    """The first answer comes whole, the second one is streamed."""
    system = "You are kind. " * 12
    messages = [{"role": "system", "content": system}, *QUESTION]
    said = llm("-m", "glass", "--no-stream", "-s", system, QUESTION[0]["content"])
    assert said == answered(*demo, messages)[0].strip()
    assert llm("-c", "-o", "max_tokens", "8", "Italian, please.")
    usage = json.loads(json.loads(llm("logs", "-n", "1", "--json"))[0]["token_details"])
    assert usage["prompt_tokens_details"]["cached_tokens"] > 10  # the server has recognised it
    assert usage["glass"]["density"] == 0.5


def test_llm_without_the_key(llm, tmp_path):
    (tmp_path / "keys.json").write_text(json.dumps({"glass": "wrong"}))
    with pytest.raises(AssertionError, match="API key"):
        llm("-m", "glass", "Hello")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(served, demo):
    body = json.dumps({"messages": QUESTION, "stream": True, "stream_options": {"include_usage": True}})
    headers = ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
    command = ["curl", "-sSN", "--fail", "--noproxy", "*", served.url + CHAT, *headers, "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *events, end = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line]
    chunks = [json.loads(event) for event in events]
    said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert end == "[DONE]" and (said, chunks[-1]["usage"]["completion_tokens"]) == answered(*demo)[::2]
