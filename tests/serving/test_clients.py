"""Other people's programs and libraries at the server, as their users use them.

The demo cannot write JSON; where a client wants some, the server's grammar makes it.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, Field
from servers import CHAT, QUESTION, answered, serving

from glass_mlx.serving.app import ApiOptions

KEY = "s3cret"
SAID = QUESTION[0]["content"]


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


class Stay(BaseModel):
    """A stay at a hotel."""

    size: Literal["small", "large"]
    nights: int = Field(ge=1, le=30)


SCHEMA = Stay.model_json_schema()


@pytest.fixture(scope="module")
def expected(demo) -> tuple[str, int, int]:
    """The answer to the question, and the numbers of prompt and generated tokens."""
    return answered(*demo)


@pytest.fixture(scope="module")
def served(demo):
    """It writes no blanks, which JSON may have any number of."""
    blanks = {i: -100.0 for i in range(len(demo[1])) if demo[1].decode([i]).isspace()}
    with serving(ApiOptions(api_key=KEY, defaults={"max_tokens": 100, "logit_bias": blanks})) as server:
        yield server


@pytest.fixture
def llm(served, tmp_path):
    """Run the ``llm`` command in this process, configured as its documentation says for OpenAI-compatible servers."""
    from click.testing import CliRunner
    from llm.cli import cli

    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: glass\n  model_name: demo\n  api_base: {served.url}/v1\n  api_key_name: glass\n"
        "  supports_schema: true\n"
    )
    (tmp_path / "keys.json").write_text(json.dumps({"glass": KEY}))

    def llm(*args: str) -> str:
        env = {"LLM_USER_PATH": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        done = CliRunner().invoke(cli, args, env=env)
        assert done.exit_code == 0, done.output
        return done.stdout.strip()

    return llm


def test_llm(llm, demo):
    """A conversation: the first answer comes whole, the second one is streamed."""
    system = "You are kind. " * 12
    messages = [{"role": "system", "content": system}, *QUESTION]
    said = llm("-m", "glass", "--no-stream", "-s", system, QUESTION[0]["content"])
    assert said == answered(*demo, messages)[0].strip()
    assert llm("-c", "-o", "max_tokens", "8", "Hello")
    usage = json.loads(json.loads(llm("logs", "-n", "1", "--json"))[0]["token_details"])
    assert usage["prompt_tokens_details"]["cached_tokens"] > 10  # the server has recognised it
    assert usage["glass"]["density"] == 0.5


def test_llm_with_a_schema(llm):
    assert Stay.model_validate_json(llm("-m", "glass", "--schema", json.dumps(SCHEMA), SAID))


def test_llm_without_the_key(llm, tmp_path):
    (tmp_path / "keys.json").write_text(json.dumps({"glass": "wrong"}))
    with pytest.raises(AssertionError, match="API key"):
        llm("-m", "glass", "Hello")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(served, expected):
    body = json.dumps({"messages": QUESTION, "stream": True, "stream_options": {"include_usage": True}})
    headers = ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
    command = ["curl", "-sSN", "--fail", "--noproxy", "*", served.url + CHAT, *headers, "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *events, end = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line]
    chunks = [json.loads(event) for event in events]
    said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert end == "[DONE]" and (said, chunks[-1]["usage"]["completion_tokens"]) == expected[::2]


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_openai_structured_output(client):
    options = {"model": "demo", "messages": QUESTION, "response_format": Stay}
    parsed = client.chat.completions.parse(**options).choices[0].message.parsed
    with client.chat.completions.stream(**options) as stream:
        *_, last = stream
        assert stream.get_final_completion().choices[0].message.parsed == parsed == last.parsed


def test_openai_tools(client):
    """A forced call, streamed or not; what it says is accepted back with the tool's result."""
    tools = [openai.pydantic_function_tool(Stay)]
    options = {"model": "demo", "messages": QUESTION, "tools": tools, "tool_choice": "required"}
    answer = client.chat.completions.parse(**options).choices[0]
    (call,) = answer.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Stay) and answer.finish_reason == "tool_calls"
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
    streamed = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [c.function.arguments for c in streamed] == [call.function.arguments]
    result = {"role": "tool", "tool_call_id": call.id, "content": "Booked."}
    messages = [*QUESTION, answer.message.model_dump(), result]
    assert client.chat.completions.create(model="demo", messages=messages, tools=tools).choices[0].message.content


def test_openai_responses(client, expected):
    answer = client.responses.create(model="demo", input=SAID)
    assert (answer.output_text, answer.usage.input_tokens, answer.usage.output_tokens) == expected
    assert (answer.status, answer.output[0].status) == ("completed", "completed")
    raw = json.loads(client.responses.with_raw_response.create(model="demo", input=SAID).text)
    assert raw["object"] == "response" and {"error", "incomplete_details", "usage", "tools"} <= raw.keys()
    cut = client.responses.create(model="demo", input=SAID, max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    events = list(client.responses.create(model="demo", input=QUESTION, stream=True, top_logprobs=2))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == events[-1].response.output_text == answer.output_text
    assert all(len(event.logprobs[0].top_logprobs) == 2 for event in deltas)
    assert client.responses.parse(model="demo", input=SAID, text_format=Stay).output_parsed


def test_openai_responses_with_tools(client):
    tools = [{"type": "function", "name": "book", "parameters": SCHEMA, "strict": True}]
    options = {"model": "demo", "input": QUESTION, "tools": tools, "tool_choice": "required"}
    (call,) = client.responses.create(**options).output
    assert call.name == "book" and Stay.model_validate_json(call.arguments)
    with client.responses.stream(**options) as stream:
        *_, last = stream
        assert stream.get_final_response().output[0].arguments == call.arguments == last.response.output[0].arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Booked."}
    again = client.responses.create(model="demo", input=[*QUESTION, call.model_dump(), result], tools=tools)
    assert again.output_text


def test_errors_of_openai_responses(client):
    with pytest.raises(openai.BadRequestError) as e:
        client.responses.create(model="demo", input=SAID, previous_response_id="resp_1")
    assert e.value.param == "previous_response_id"
    with pytest.raises(openai.BadRequestError, match="function_call_output"):
        client.responses.create(model="demo", input=[{"type": "item_reference", "id": "x"}])


def test_instructor(client):
    instructor = pytest.importorskip("instructor")
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.RESPONSES_TOOLS):
        patched = instructor.from_openai(client, mode=mode)
        options = {"model": "demo", "response_model": Stay, "messages": QUESTION, "max_retries": 0}
        made = patched.chat.completions.create(**options)
        *_, last = patched.chat.completions.create_partial(**options)
        # the two ask with schemas of their own, which the prompt has in some modes
        assert isinstance(made, Stay) and Stay.model_validate(last.model_dump())


@pytest.mark.parametrize("api", ["OpenAIChatModel", "OpenAIResponsesModel"])
def test_pydantic_ai(served, demo, api):
    pydantic_ai = pytest.importorskip("pydantic_ai")
    models = pytest.importorskip("pydantic_ai.models.openai")
    provider = pytest.importorskip("pydantic_ai.providers.openai").OpenAIProvider
    model = getattr(models, api)("demo", provider=provider(base_url=f"{served.url}/v1", api_key=KEY))

    async def streamed(agent) -> str:
        async with agent.run_stream(SAID) as run:
            return await run.get_output()

    async def all_of_them() -> None:
        agent, expected = pydantic_ai.Agent(model), answered(*demo)[0]
        assert (await agent.run(SAID)).output == expected == await streamed(agent)
        for output in (pydantic_ai.ToolOutput(Stay), pydantic_ai.NativeOutput(Stay)):
            agent = pydantic_ai.Agent(model, output_type=output)
            made = (await agent.run(SAID)).output
            assert isinstance(made, Stay) and made == await streamed(agent)

    asyncio.run(all_of_them())


@pytest.mark.parametrize("responses", [False, True])
def test_langchain(served, demo, responses):
    langchain = pytest.importorskip("langchain_openai", reason="pip install 'glass_mlx[clients]'")
    from langchain_core.messages import HumanMessage, ToolMessage

    options = {"base_url": f"{served.url}/v1", "api_key": KEY, "use_responses_api": responses}
    model, expected = langchain.ChatOpenAI(model="demo", temperature=0, **options), answered(*demo)[0]
    assert model.invoke(SAID).text == expected == "".join(chunk.text for chunk in model.stream(SAID))
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Stay, method=method).invoke(SAID), Stay)
    called = model.bind_tools([Stay], tool_choice="any").invoke(SAID)
    (call,) = called.tool_calls
    messages = [HumanMessage(SAID), called, ToolMessage("Booked.", tool_call_id=call["id"])]
    assert Stay(**call["args"]) and model.bind_tools([Stay]).invoke(messages).text


def test_litellm(served, demo, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the network for prices
    litellm = pytest.importorskip("litellm", reason="pip install 'glass_mlx[clients]'")
    options = {"model": "openai/demo", "api_base": f"{served.url}/v1", "api_key": KEY, "messages": QUESTION}
    expected = answered(*demo)[0]
    assert litellm.completion(**options).choices[0].message.content == expected
    chunks = litellm.completion(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    structured = litellm.completion(**options, response_format=Stay).choices[0].message.content
    tools = [{"type": "function", "function": {"name": "book", "parameters": SCHEMA}}]
    called = litellm.completion(**options, tools=tools, tool_choice="required").choices[0].message.tool_calls[0]
    assert Stay.model_validate_json(structured) and Stay.model_validate_json(called.function.arguments)
