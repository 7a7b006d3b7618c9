"""Messages: every recording is read and given back exactly, and nothing a CLI may say can raise."""

import json
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from orchestrator import messages
from orchestrator.messages import (
    ApiRetry,
    AssistantMessage,
    CommandLifecycle,
    CompactBoundary,
    ControlCancelRequest,
    ControlRequest,
    ControlResponse,
    ConversationReset,
    KeepAlive,
    Message,
    ModelFallback,
    PermissionDenied,
    RateLimitEvent,
    ResultMessage,
    SessionStateChanged,
    StreamEvent,
    SystemInit,
    TaskNotification,
    TaskStarted,
    ToolProgress,
    ToolResultBlock,
    UnknownBlock,
    UnknownMessage,
    UnknownSystemMessage,
    UserMessage,
    collect_text,
    collect_thinking,
    extract_thinking_tokens,
    pair_tools,
    parse_message,
)

M = TypeVar("M")

TRANSCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("*.ndjson"))

#: Kinds the recordings hold that we do not name because nothing reads them.
UNNAMED = {("prompt_suggestion", None), ("transcript_mirror", None)} | {
    ("system", subtype)
    for subtype in (
        "background_tasks_changed",
        "commands_changed",
        "hook_response",
        "hook_started",
        "informational",
        "model_refusal_no_fallback",
        "notification",
        "session_title_changed",
        "status",
        "task_progress",
        "task_updated",
        "thinking_tokens",
        "ui_invalidate",
    )
}


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def transcript(name: str) -> list[Message]:
    """The messages of the one recording whose name begins so."""
    (path,) = [path for path in TRANSCRIPTS if path.name.startswith((f"{name}-", f"{name}."))]
    return [parse_message(line) for line in lines_of(path)]


def of_kind(kind: type[M], name: str) -> list[M]:
    found: list[M] = [message for message in transcript(name) if isinstance(message, kind)]
    assert found, f"{name} has no {kind.__name__}"
    return found


def result_with(**fields: Any) -> ResultMessage:
    message = parse_message(json.dumps({"type": "result", "subtype": "success", **fields}))
    assert isinstance(message, ResultMessage)
    return message


# --- Recordings


def test_all_recordings_are_here() -> None:
    assert len(TRANSCRIPTS) == 118


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_recordings_are_given_back_exactly(path: Path) -> None:
    for line in lines_of(path):
        message = parse_message(line)
        assert message.raw() == json.loads(line)
        assert message.model_dump(by_alias=True, exclude_unset=True) == json.loads(line)


def test_only_the_listed_kinds_are_unknown() -> None:
    found = set()
    for path in TRANSCRIPTS:
        for message in map(parse_message, lines_of(path)):
            if isinstance(message, UnknownMessage | UnknownSystemMessage):
                found.add((message.type, message.subtype))
    assert found == UNNAMED


def test_no_recorded_content_block_is_unknown() -> None:
    for path in TRANSCRIPTS:
        for message in map(parse_message, lines_of(path)):
            if isinstance(message, AssistantMessage | UserMessage):
                content = message.message.content
                assert not [block for block in content if isinstance(block, UnknownBlock)]


# --- One look at each kind


def test_init() -> None:
    init = of_kind(SystemInit, "s01")[0]
    assert (init.cwd, init.model, init.permission_mode) == ("/srv/lab/rec", "claude-opus-5-5", "default")
    assert init.claude_code_version == "2.1.327"
    assert init.tools is not None
    assert "Bash" in init.tools


def test_init_names_a_server_that_failed() -> None:
    servers = of_kind(SystemInit, "s49")[0].mcp_servers
    assert servers is not None
    assert {server["name"]: server["status"] for server in servers} == {"dead": "failed", "nohttp": "failed"}


def test_api_retry() -> None:
    first = of_kind(ApiRetry, "f529")[0]
    assert (first.attempt, first.max_retries, first.error_status, first.error) == (1, 10, 529, "overloaded")
    assert of_kind(ApiRetry, "fconnrefused")[0].error_status is None


def test_compact_boundary() -> None:
    metadata = of_kind(CompactBoundary, "s12")[0].compact_metadata
    assert metadata is not None
    assert metadata["trigger"] == "manual"


def test_permission_denied() -> None:
    denied = of_kind(PermissionDenied, "s04")[0]
    assert (denied.tool_name, denied.tool_use_id) == ("Write", "toolu_0001_0")
    assert [entry["tool_name"] for entry in of_kind(ResultMessage, "s04")[0].permission_denials or ()] == ["Write"]


def test_session_state() -> None:
    states = [message.state for message in of_kind(SessionStateChanged, "s51")]
    assert (states[0], states[-1]) == ("running", "idle")


def test_tasks() -> None:
    started, ended = of_kind(TaskStarted, "s16")[0], of_kind(TaskNotification, "s16")[0]
    assert (started.task_type, started.is_backgrounded) == ("local_agent", True)
    assert (ended.task_id, ended.status, ended.summary) == (started.task_id, "completed", "SUB DONE")


@pytest.mark.parametrize(
    ("name", "trigger", "fallback"),
    [("f529_fallback", "overloaded", "claude-sonnet-5-5"), ("s20", "refusal", "claude-opus-4-8")],
)
def test_model_fallback(name: str, trigger: str, fallback: str) -> None:
    message = of_kind(ModelFallback, name)[0]
    assert (message.trigger, message.original_model) == (trigger, "claude-opus-5-5")
    assert message.fallback_model == fallback


def test_an_answer_comes_as_one_message_per_block() -> None:
    said = of_kind(AssistantMessage, "s03")
    assert [message.text_content for message in said] == ["running", "", "", "done"]
    assert [len(message.tool_uses) for message in said] == [0, 1, 1, 0]
    assert len({message.message.id for message in said[:3]}) == 1
    assert said[0].message.usage is not None
    assert said[0].message.usage.input_tokens == 100


def test_assistant_errors_and_cuts() -> None:
    assert of_kind(AssistantMessage, "f401")[0].error == "authentication_failed"
    cut = of_kind(AssistantMessage, "s08")[0]
    assert cut.aborted is True
    assert cut.error is None


def test_sub_agents_name_the_tool_use_that_started_them() -> None:
    main, sub = "main done", "SUB DONE"
    parents = {message.text_content: message.parent_tool_use_id for message in of_kind(AssistantMessage, "s15")}
    assert parents[main] is None
    assert parents[sub] == "toolu_0001_1"


def test_user_messages_hold_tool_results() -> None:
    results = [result for message in of_kind(UserMessage, "s03") for result in message.tool_results]
    assert [result.text for result in results] == ["Exit code 3\nout\nerr", "two"]
    assert [bool(result.is_error) for result in results] == [True, False]
    assert of_kind(UserMessage, "s20")[0].is_synthetic is True


def test_stream_events() -> None:
    events = of_kind(StreamEvent, "s02")
    assert [event.text_delta for event in events if event.text_delta] == ["one t", "wo th", "ree"]
    assert [event.thinking_delta for event in events if event.thinking_delta] == ["hmm let me see"]
    usages = [event.usage for event in events if event.usage]
    assert [usage["output_tokens"] for usage in usages] == [1, 5]


def test_result() -> None:
    result = of_kind(ResultMessage, "s01")[0]
    assert (result.subtype, result.is_error, result.result) == ("success", False, "hi there")
    assert (result.terminal_reason, result.num_turns, result.result_index) == ("completed", 1, 0)
    assert result.usage is not None
    assert result.usage.output_tokens == 5
    assert result.model_usage is not None
    assert result.model_usage["claude-opus-5-5"].cost_usd == 0.0005
    assert result.subagent_stats is not None
    assert result.subagent_stats["spawned"] == 0


def test_a_failed_request_is_a_success_with_is_error() -> None:
    result = of_kind(ResultMessage, "f429")[0]
    assert (result.subtype, result.is_error, result.api_error_status) == ("success", True, 429)


def test_turn_cost_is_not_the_running_total() -> None:
    first, second = of_kind(ResultMessage, "s57")
    assert second.total_cost_usd != second.turn_cost_usd
    assert first.turn_cost_usd == second.turn_cost_usd == 0.0005


def test_turn_cost_is_the_sum_over_models_or_unknown() -> None:
    assert result_with().turn_cost_usd is None
    assert result_with(model_usage_since_last_result={}).turn_cost_usd == 0.0
    assert result_with(model_usage_since_last_result={"a": {"costUSD": 1}, "b": {}}).turn_cost_usd is None
    guessed = {"a": {"costUSD": 1, "costBasis": "unknown"}}
    assert result_with(model_usage_since_last_result=guessed).turn_cost_usd is None
    two = {"a": {"costUSD": 0.5}, "b": {"costUSD": 1}}
    assert result_with(model_usage_since_last_result=two).turn_cost_usd == 1.5


def test_structured_output_is_there_if_its_key_is() -> None:
    assert of_kind(ResultMessage, "s25")[0].structured_output == {"name": "bob"}
    assert of_kind(ResultMessage, "s25")[0].has_structured_output
    assert not of_kind(ResultMessage, "s27")[0].has_structured_output
    assert result_with(structured_output=None).has_structured_output


def test_deferred_tool_use() -> None:
    deferred = of_kind(ResultMessage, "s68")[-1].deferred_tool_use
    assert deferred is not None
    assert deferred["name"] == "Bash"


def test_rate_limit_event() -> None:
    statuses = [event.rate_limit_info["status"] for event in of_kind(RateLimitEvent, "s58")]
    assert statuses == ["allowed_warning", "rejected"]


def test_control_messages() -> None:
    assert {request.subtype for request in of_kind(ControlRequest, "s05")} == {"can_use_tool"}
    assert of_kind(ControlResponse, "s01")[0].ok
    refused = of_kind(ControlResponse, "s30")[0]
    assert (refused.ok, refused.request_id) == (False, "a1")
    assert refused.response.error_code == "unsupported_request"
    withdrawn = of_kind(ControlCancelRequest, "s63")[0].request_id
    assert withdrawn in {request.request_id for request in of_kind(ControlRequest, "s63")}


def test_small_kinds() -> None:
    assert of_kind(CommandLifecycle, "s28")[0].state == "queued"
    assert of_kind(ConversationReset, "s43")[0].trigger == "clear"
    assert (of_kind(KeepAlive, "s65")[0].model_extra or {}).keys() == {"startup_mark"}
    assert of_kind(ToolProgress, "s36")[0].elapsed_time_seconds == 30


# --- What follows from several messages


def test_collected_text_is_the_main_threads() -> None:
    assert collect_text(transcript("s01")) == "hi there"
    assert collect_text(transcript("s15")) == "delegating\n\nmain done"


def test_collected_text_has_no_error_words_and_nothing_taken_back() -> None:
    assert collect_text(transcript("f401")) == ""
    said = [message.text_content for message in of_kind(AssistantMessage, "s20")]
    assert said[:3] == ["I can't"] * 3
    assert collect_text(transcript("s20")) == "I can't\n\nI can't"


def assistant(message_id: str, *blocks: dict[str, Any]) -> Message:
    body = {"type": "assistant", "message": {"id": message_id, "content": list(blocks)}}
    return parse_message(json.dumps(body))


def test_text_of_one_answer_is_joined_unless_something_stands_between() -> None:
    text, thought = {"type": "text", "text": "a"}, {"type": "thinking", "thinking": "t"}
    assert collect_text([assistant("m1", text), assistant("m1", text)]) == "aa"
    assert collect_text([assistant("m1", text, thought, text)]) == "a\n\na"
    assert collect_text([assistant("m1", text), assistant("m2", text)]) == "a\n\na"


def test_collected_thinking() -> None:
    assert collect_thinking(transcript("s02")) == "hmm let me see"


def test_thinking_tokens_are_a_part_of_the_output_tokens() -> None:
    usage = {"output_tokens": 50, "output_tokens_details": {"thinking_tokens": 30}}
    turn = result_with(usage=usage)
    assert extract_thinking_tokens([turn, turn]) == 60
    assert turn.usage is not None
    assert turn.usage.output_tokens == 50
    assert extract_thinking_tokens(transcript("s01")) == 0
    assert extract_thinking_tokens([result_with(), result_with(usage={"output_tokens": 3})]) is None


def test_tools_are_paired_by_id() -> None:
    messages = transcript("s03")
    uses = [message for message in messages if isinstance(message, AssistantMessage)]
    results = [message for message in messages if isinstance(message, UserMessage)]
    swapped: list[Message] = [*uses, *reversed(results)]
    assert pair_tools(swapped) == pair_tools(messages)
    first, second = pair_tools(messages)
    assert (first.name, first.result, first.is_error) == ("Bash", "Exit code 3\nout\nerr", True)
    assert (second.result, second.is_error) == ("two", False)


def test_a_tool_still_running_has_no_result() -> None:
    (call,) = pair_tools([assistant("m", {"type": "tool_use", "id": "t", "name": "X", "input": {}})])
    assert (call.result, call.is_error) == (None, None)


def test_tool_result_text_is_flattened() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "image", "source": {}}, {"type": "text", "text": "b"}, 3]
    block = ToolResultBlock(type="tool_result", tool_use_id="t", content=content)
    assert block.text == "a\nb"
    assert ToolResultBlock(type="tool_result", tool_use_id="t").text == ""


# --- What we do not know


def test_unknown_things_are_kept() -> None:
    body = {"type": "brand_new", "subtype": "x", "n": [1, None]}
    message = parse_message(json.dumps(body))
    assert isinstance(message, UnknownMessage)
    assert (message.type, message.problem, message.raw()) == ("brand_new", None, body)

    system = parse_message('{"type": "system", "subtype": "brand_new"}')
    assert isinstance(system, UnknownSystemMessage)

    block = {"type": "hologram", "data": 1}
    said = assistant("m", block)
    assert isinstance(said, AssistantMessage)
    assert isinstance(said.message.content[0], UnknownBlock)

    assert isinstance(result_with(subtype="error_brand_new"), ResultMessage)


def test_a_known_type_of_another_shape_says_what_did_not_fit() -> None:
    message = parse_message('{"type": "assistant", "message": {"content": 5}, "problem": "of its own"}')
    assert isinstance(message, UnknownMessage)
    assert message.problem is not None
    assert "message.content" in message.problem
    assert message.raw()["problem"] == "of its own"


def test_a_known_block_of_another_shape_does_not_lose_the_message() -> None:
    said = assistant("m", {"type": "text", "text": 5}, {"type": "text", "text": "ok"})
    assert isinstance(said, AssistantMessage)
    assert said.text_content == "ok"
    assert said.raw()["message"]["content"][0] == {"type": "text", "text": 5}


def test_values_are_not_converted() -> None:
    message = parse_message('{"type": "result", "subtype": "success", "is_error": "false"}')
    assert isinstance(message, UnknownMessage)


@pytest.mark.parametrize("line", ["", "nonsense", "[1]", "null", '"text"', '{"a": NaN}', '{"a": 1', "[" * 100_000])
def test_what_is_no_json_object_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_message(line)


@pytest.mark.parametrize(
    ("escaped", "read"),
    [
        (r"a\ud800b", "a\ufffdb"),
        (r"\uDC00\ud83d", "\ufffd\ufffd"),
        (r"\ud83d\ude00", "\U0001f600"),
        (r"\\ud800", r"\ud800"),
        (r"\\\ud800", "\\\ufffd"),
        (r"\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
    ],
)
def test_half_surrogates_are_replaced(escaped: str, read: str) -> None:
    message = parse_message('{"type": "x", "' + escaped + '": "' + escaped + '"}')
    assert message.raw() == {"type": "x", read: read}
    message.model_dump_json().encode()


def test_bad_utf8_is_replaced() -> None:
    assert parse_message(b'{"type": "x", "a": "\xff"}').raw()["a"] == "\ufffd"
    assert parse_message('{"type": "x", "a": "\ud800"}').raw()["a"] == "\ufffd"


# --- Properties

_leaf = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
_json = st.recursive(
    _leaf, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=8
)
_TYPES = ["system", "assistant", "user", "result", "stream_event", "control_request", "control_response", "other"]
_FIELDS = [
    "subtype", "message", "event", "request", "response", "session_id", "uuid", "usage", "modelUsage", "errors",
    "model_usage", "_problem", "problem", "raw", "request_id", "content", "permissionMode", "permission_mode",
]  # fmt: skip
_blocks = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "tool_use", "tool_result", "thinking"]) | _json},
        optional={"text": _json, "id": st.text(), "name": st.text(), "input": _json, "content": _json},
    ),
    max_size=3,
)
_message = st.fixed_dictionaries({"content": _blocks | _json}, optional={"id": _json, "usage": _json})
_objects = st.builds(
    lambda kind, fields, message: {"type": kind, **fields, **message},
    st.sampled_from(_TYPES) | _json,
    st.dictionaries(st.sampled_from(_FIELDS) | st.text(), _json, max_size=5),
    st.just({}) | _message.map(lambda message: {"message": message}),
)


@settings(max_examples=300, deadline=None)
@given(_objects | st.dictionaries(st.text(), _json))
def test_any_object_is_read_and_given_back(value: dict[str, Any]) -> None:
    message = parse_message(json.dumps(value))
    assert message.raw() == value
    assert collect_text([message]) is not None
    assert pair_tools([message]) is not None


def test_the_union_works_as_an_annotation() -> None:
    adapter: TypeAdapter[list[Message]] = TypeAdapter(list[Message])
    line = lines_of(TRANSCRIPTS[0])[0]
    (message,) = adapter.validate_python([json.loads(line)])
    assert adapter.validate_python([message]) == [message]
    assert set(messages.__all__) <= set(vars(messages))
