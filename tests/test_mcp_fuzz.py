"""Every tool of the server, with whatever its own schema allows and with what it does not: answered, never broken.

The tools are those the server lists, so a new one is tried without a line here.
"""

import json
from collections.abc import AsyncIterator, Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import pytest
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis_jsonschema import from_schema
from jsonschema import Draft202012Validator
from mcp import Client
from mcp_types import CallToolResult, TextContent, Tool

from mcp_tools import build_server
from orchestrator.config import Config, load_config
from orchestrator.delegation import delegate
from orchestrator.runtime import Runtime, open_runtime
from orchestrator.task import Task
from orchestrator.testing import FakeProcesses

FUZZ = settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
#: A call may wait for a run; each run here is answered at once, so this only ends a test that hangs.
CALL_SECONDS = 30
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture
async def rt(make_config: Callable[..., Config], environ: dict[str, str]) -> AsyncIterator[Runtime]:
    """A runtime whose agents answer at once, with a run and a session in its record."""
    async with open_runtime(make_config(), environ=environ, open_process=FakeProcesses("ok")) as opened:
        await delegate(opened, Task(agent="helper", prompt="the first"))
        yield opened


@pytest.fixture
async def client(rt: Runtime) -> AsyncIterator[Client]:
    async with Client(build_server(rt)) as connected:
        yield connected


@cache
def tools() -> dict[str, Tool]:
    """The tools of a server. Strategies cannot wait for one, so it is asked apart from the tests' own."""

    async def ask() -> dict[str, Tool]:
        with TemporaryDirectory() as folder:
            config = load_config(project_dir=Path(folder), environ={}, overrides={"data_dir": folder})
            opened = open_runtime(config, environ={}, open_process=FakeProcesses(), watch_agents=False)
            async with opened as rt, Client(build_server(rt)) as client:
                return {tool.name: tool for tool in (await client.list_tools()).tools}

    with start_blocking_portal() as portal:
        return portal.call(ask)


#: What may stand in the place of a random string, which would never get past the first look-up. What is not a thing
#: of the runtime stands for itself.
MEANT = ("a run", "a session", "a project", "helper", "worker", "null", "[]", "{}", "1", "1h")
Allowed = tuple[str, dict[str, Any], dict[str, str | None]]


@st.composite
def allowed_calls(draw: st.DrawFn) -> Allowed:
    """A tool, arguments its schema allows, and for some of these a thing to put in their place."""
    name = draw(st.sampled_from(sorted(tools())))
    arguments = draw(_allowed(name))
    return name, arguments, {key: draw(st.none() | st.sampled_from(MEANT)) for key in sorted(arguments)}


@cache
def _allowed(name: str) -> st.SearchStrategy[dict[str, Any]]:
    return from_schema(tools()[name].input_schema)


@st.composite
def any_calls(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A tool, and some of its arguments or others with any values."""
    name = draw(st.sampled_from(sorted(tools())))
    names = st.sampled_from([*tools()[name].input_schema["properties"], "promt", "", "self", "ctx"])
    return name, draw(st.dictionaries(names, JSON, max_size=4))


async def with_what_is_meant(rt: Runtime, call: Allowed) -> dict[str, Any]:
    name, arguments, meant = call
    first = (await rt.store.runs(text="the first"))[-1]  # a replay has the same prompt
    things = {"a run": first.id, "a session": first.session_id, "a project": str(rt.config.project_dir)}
    for key, what in meant.items():
        if what is not None:
            word = things.get(what, what)
            instead = {**arguments, key: [word] if isinstance(arguments[key], list) else word}
            arguments = instead if fits(tools()[name].input_schema, instead) else arguments
    return arguments


def fits(schema: dict[str, Any], arguments: dict[str, Any]) -> bool:
    return Draft202012Validator(schema).is_valid(arguments)


async def call(client: Client, tool: str, arguments: dict[str, Any]) -> tuple[CallToolResult, str]:
    """The answer, and its text. An error of the protocol, such as -32603, is raised by the client."""
    with anyio.fail_after(CALL_SECONDS):
        result = await client.call_tool(tool, arguments)
    texts = [block.text for block in result.content if isinstance(block, TextContent)]
    return result, "\n".join(texts)


def check_answered(tool: str, result: CallToolResult, text: str) -> None:
    """Foreseen: an answer, or an error in words of ours."""
    # The SDK's words for an exception that nobody foresaw.
    assert text.strip() != f"Error executing tool {tool}"
    assert result.content or result.structured_content is not None


def check_told(text: str) -> None:
    """A refusal has one sentence for people and one line of JSON to decide from."""
    told = json.loads(text.splitlines()[-1])
    assert isinstance(told["code"], str)
    assert isinstance(told["retryable"], bool)


@given(allowed_calls())
@FUZZ
async def test_what_a_schema_allows_is_never_refused_as_invalid(rt: Runtime, client: Client, made: Allowed) -> None:
    tool, arguments = made[0], await with_what_is_meant(rt, made)

    result, text = await call(client, tool, arguments)

    check_answered(tool, result, text)
    assert "was not called" not in text, "a call its schema allows was refused as invalid"
    if result.is_error:
        check_told(text)


@given(any_calls())
@FUZZ
async def test_what_a_schema_does_not_allow_is_refused_in_words(
    client: Client, made: tuple[str, dict[str, Any]]
) -> None:
    tool, arguments = made

    result, text = await call(client, tool, arguments)

    check_answered(tool, result, text)
    if set(arguments) - set(tools()[tool].input_schema["properties"]):
        assert result.is_error
        assert text.startswith(f"{tool} was not called: ")


def takes_text(rules: dict[str, Any]) -> bool:
    return any(each.get("type") == "string" and "enum" not in each for each in [rules, *rules.get("anyOf", [])])


async def test_text_that_looks_like_json_stays_text(client: Client) -> None:
    """A task may well be ``["a"]``, and a word to look for ``null``."""
    tried = 0
    for tool in tools().values():
        properties = tool.input_schema["properties"]
        least = {name: "x" for name in tool.input_schema.get("required", []) if takes_text(properties[name])}
        for name in filter(lambda name: takes_text(properties[name]), properties):
            for word in ('["x"]', "{}", "[]", '{"a": 1}', "null", "1", "true"):
                if fits(tool.input_schema, arguments := {**least, name: word}):
                    _, text = await call(client, tool.name, arguments)
                    assert "was not called" not in text, (tool.name, name, word)
                    tried += 1
    assert tried


async def test_the_word_null_is_looked_for(client: Client) -> None:
    result, _ = await call(client, "query_traces", {"text": "null"})
    assert result.structured_content is not None
    assert result.structured_content["runs"] == []


async def test_lists_written_as_text_are_understood(rt: Runtime, client: Client) -> None:
    """Some clients write the JSON of a list into a string."""
    [run] = await rt.store.runs()
    result, text = await call(client, "run_wait", {"run_ids": json.dumps([run.id])})
    assert not result.is_error
    assert text.startswith("ok\n")


async def test_unknown_tools_are_named(client: Client) -> None:
    _, text = await call(client, "no_such_tool", {})
    assert "no_such_tool" in text
