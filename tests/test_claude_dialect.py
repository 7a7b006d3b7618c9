"""The Claude Code dialect: pure, and held against the installed CLI, which is asked for help but given no work."""

import dataclasses
import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import __version__
from orchestrator.backends import DIALECTS
from orchestrator.backends.claude import (
    EFFORTS,
    FLAGS,
    PERMISSION_MODES,
    answer_control,
    argv,
    encode_control,
    encode_prompt,
    environment,
)
from orchestrator.backends.claude_binary import find_binary
from orchestrator.backends.claude_errors import error_of, fatal
from orchestrator.conversation import Dialect, McpEndpoint, Spec
from orchestrator.errors import (
    AuthenticationError,
    BackendError,
    BillingError,
    BudgetExceededError,
    ConfigError,
    ConnectionFailedError,
    InvalidRequestError,
    MaxTurnsError,
    ModelNotFoundError,
    OrchestratorError,
    OverloadedError,
    PermissionDeniedError,
    PromptError,
    RateLimitError,
    RefusalError,
    RunCancelledError,
    ServerError,
    SessionNotFoundError,
    StalledError,
    StructuredOutputError,
)
from orchestrator.messages import (
    ApiRetry,
    AssistantMessage,
    ControlResponse,
    Message,
    RateLimitEvent,
    ResultMessage,
    parse_message,
)

ONE = "5b5cda78-282b-4a57-a81f-6efe699fa224"
OTHER = "6b5cda78-282b-4a57-a81f-6efe699fa225"
TRANSCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("*.ndjson"))

#: A value for every field of a spec that ends up on the command line.
FULL: dict[str, Any] = {
    "model": "haiku",
    "fallback_model": "sonnet,opus",
    "system_prompt": "-p --version\n$(id) `id` \"'",
    "append_system_prompt": "--help",
    "tools": ("Bash", "Read"),
    "allowed_tools": ("Bash(git *)", "Bash(echo a, b)", "mcp__x__*"),
    "disallowed_tools": ("Bash(rm *)", "WebFetch"),
    "permission_mode": "plan",
    "effort": "max",
    "max_turns": 3,
    "budget_usd": 0.5,
    "add_dirs": (Path("/usr"), Path("/usr/lib")),
    "output_schema": {"type": "object", "title": "Grüße"},
    "mcp": (McpEndpoint("orchestrator", "http://127.0.0.1:9/mcp", "RUN_TOKEN"),),
    "mcp_servers": {"other": {"command": "/bin/false", "args": ["-x"]}},
    "setting_sources": ("user", "project"),
    "settings": {"permissions": {"allow": ["Bash(echo (x), y)"]}},
    "asks": True,
}


def spec(**fields: Any) -> Spec:
    return Spec(**{"cwd": Path("/"), "env": {}, "session_id": ONE, **fields})


def values(option: str, **fields: Any) -> list[str]:
    """What is written for ``option``, once for each time it is."""
    return [text.removeprefix(f"{option}=") for text in argv(spec(**fields)) if text.startswith(f"{option}=")]


def messages_of(path: Path) -> list[Message]:
    return [parse_message(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


# --- The command line


def test_the_module_is_a_dialect() -> None:
    dialect: Dialect = DIALECTS["claude"]
    assert dialect.argv(spec()) == argv(spec())


def test_a_plain_spec() -> None:
    assert argv(spec()) == [
        "-p",
        "--input-format=stream-json",
        "--output-format=stream-json",
        "--verbose",
        "--include-partial-messages",
        "--strict-mcp-config",
        "--system-prompt-snapshot=off",
        f"--session-id={ONE}",
    ]


def test_every_field_reaches_the_command_line_or_is_known_not_to() -> None:
    elsewhere = {"cwd", "env", "session_id", "session_mode", "source_session_id", "source_message_id"}
    assert {field.name for field in dataclasses.fields(Spec)} == FULL.keys() | elsewhere
    for field, value in FULL.items():
        assert len(argv(spec(**{field: value}))) > len(argv(spec())), field


def test_every_flag_is_used_by_the_full_spec() -> None:
    used = {argument.partition("=")[0] for argument in argv(spec(**FULL))}
    assert {flag.option for flag in FLAGS} <= used


def test_texts_are_verbatim() -> None:
    assert values("--system-prompt", **FULL) == [FULL["system_prompt"]]
    assert values("--append-system-prompt", **FULL) == ["--help"]


def test_sessions() -> None:
    assert argv(spec(session_mode="continue"))[-1:] == [f"--resume={ONE}"]
    fork = argv(spec(session_mode="fork", source_session_id=OTHER))
    assert fork[-3:] == [f"--resume={OTHER}", "--fork-session", f"--session-id={ONE}"]
    part = argv(spec(session_mode="fork", source_session_id=OTHER, source_message_id=ONE))
    assert part == [*fork, f"--resume-session-at={ONE}"]
    with pytest.raises(ConfigError, match="source_message_id must be a UUID"):
        argv(spec(session_mode="fork", source_session_id=OTHER, source_message_id="the second"))


@pytest.mark.parametrize("bad", ["", "latest", "5b5cda78", ONE.replace("-", ""), "{" + ONE + "}", f"{ONE}\n"])
@pytest.mark.parametrize("mode", ["fresh", "continue", "fork"])
def test_session_ids_are_uuids(mode: str, bad: str) -> None:
    with pytest.raises(ConfigError, match="session_id must be a UUID"):
        argv(spec(session_id=bad, session_mode=mode, source_session_id=OTHER))


def test_a_fork_needs_its_source() -> None:
    with pytest.raises(ConfigError, match="source_session_id must be a UUID, not None"):
        argv(spec(session_mode="fork"))


def test_no_tools_is_not_the_default_tools() -> None:
    assert values("--tools", tools=None) == []
    assert values("--tools", tools=()) == [""]
    assert values("--tools", tools=("Bash", "Read")) == ["Bash,Read"]
    assert values("--setting-sources", setting_sources=()) == [""]
    assert values("--setting-sources", setting_sources=("user", "local")) == ["user,local"]


def test_a_rule_is_not_a_tool() -> None:
    with pytest.raises(ConfigError, match=r"'Bash\(git \*\)' is not the name of a tool"):
        argv(spec(tools=("Read", "Bash(git *)")))


def test_rules_are_written_one_by_one() -> None:
    rules = ("Bash(git *)", "Bash(echo a, b)", "Bash(f(x)y)", "-odd", "mcp__a__*", "Read(/a b/c)")
    assert values("--allowedTools", allowed_tools=rules) == list(rules)
    assert values("--disallowedTools", disallowed_tools=rules) == list(rules)


@pytest.mark.parametrize("rule", ["", "Read,Write", "Read Write", "Bash(echo (x), y)", "Bash(a) Edit", " Read"])
def test_a_rule_the_cli_would_split_is_refused(rule: str) -> None:
    with pytest.raises(ConfigError, match="disallowed_tools: the CLI would not read"):
        argv(spec(disallowed_tools=(rule,)))


@pytest.mark.parametrize("mode", PERMISSION_MODES)
def test_permission_modes(mode: str) -> None:
    assert values("--permission-mode", permission_mode=mode) == [mode]


def test_default_mode_has_a_new_name() -> None:
    assert values("--permission-mode", permission_mode="default") == ["manual"]


@pytest.mark.parametrize(("field", "value"), [("permission_mode", "delegate"), ("effort", "ultra"), ("effort", "")])
def test_unknown_words_are_refused_with_the_known_ones(field: str, value: str) -> None:
    known = EFFORTS if field == "effort" else PERMISSION_MODES
    with pytest.raises(ConfigError, match=f"{field} '{value}' is none of {', '.join(known)}"):
        argv(spec(**{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_turns", 0),
        ("max_turns", -1),
        ("budget_usd", 0.0),
        ("budget_usd", math.inf),
        ("budget_usd", math.nan),
    ],
)
def test_amounts_are_positive(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be more than 0"):
        argv(spec(**{field: value}))


def test_mcp_servers_are_merged_and_the_token_stays_in_the_environment() -> None:
    (config,) = values("--mcp-config", **FULL)
    assert json.loads(config) == {
        "mcpServers": {
            "orchestrator": {
                "type": "http",
                "url": "http://127.0.0.1:9/mcp",
                "headers": {"Authorization": "Bearer ${RUN_TOKEN}"},
                "alwaysLoad": True,
            },
            "other": {"command": "/bin/false", "args": ["-x"]},
        }
    }
    assert values("--mcp-config") == []


def test_a_server_cannot_take_the_orchestrators_name() -> None:
    with pytest.raises(ConfigError, match="the name 'orchestrator' is taken"):
        argv(spec(**{**FULL, "mcp_servers": {"orchestrator": {}}}))


def test_json_values() -> None:
    assert [json.loads(text) for text in values("--json-schema", **FULL)] == [FULL["output_schema"]]
    assert [json.loads(text) for text in values("--settings", **FULL)] == [FULL["settings"]]
    for bad in ({"a": {1, 2}}, {"a": float("nan")}):
        with pytest.raises(ConfigError, match="settings cannot be written as JSON"):
            argv(spec(settings=bad))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a\0b", "NUL character at 1"),
        ("\ud800", "cannot be encoded"),
        ("x" * 131_072, "bytes; the system takes 131071"),
    ],
)
def test_what_cannot_be_an_argument_is_refused_by_name(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"--system-prompt.* {problem}"):
        argv(spec(system_prompt=text))


# --- Lines for stdin


def decoded(line: bytes | None) -> dict[str, Any]:
    assert line is not None
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert line.isascii()
    value: dict[str, Any] = json.loads(line)
    return value


@settings(max_examples=100)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_prompts_arrive_unchanged_as_data(prompt: str) -> None:
    assert decoded(encode_prompt(prompt, ONE)) == {
        "type": "user",
        "uuid": ONE,
        "text_not_typed": True,
        "message": {"role": "user", "content": prompt},
        "parent_tool_use_id": None,
    }


@pytest.mark.parametrize(("prompt", "position"), [("ab\0", 2), ("\udc00", 0), ("a\U0001f600\ud83d", 2)])
def test_prompts_that_would_be_altered_are_refused(prompt: str, position: int) -> None:
    with pytest.raises(PromptError, match=f"at position {position}$"):
        encode_prompt(prompt, ONE)


def test_control_requests() -> None:
    assert decoded(encode_control("r1", {"subtype": "interrupt", "cancel_queued": True})) == {
        "type": "control_request",
        "request_id": "r1",
        "request": {"subtype": "interrupt", "cancel_queued": True},
    }


def answer_to(request: Any) -> dict[str, Any]:
    line = json.dumps({"type": "control_request", "request_id": "r1", "request": request})
    response = decoded(answer_control(parse_message(line)))
    assert response["type"] == "control_response"
    assert response["response"]["request_id"] == "r1"
    body: dict[str, Any] = response["response"]
    return body


def test_permission_is_denied_with_the_reason() -> None:
    answer = answer_to({"subtype": "can_use_tool", "tool_name": "Bash", "input": {}})
    assert (answer["subtype"], answer["response"]["behavior"]) == ("success", "deny")
    assert "Nobody is there to ask" in answer["response"]["message"]


def test_other_questions() -> None:
    assert answer_to({"subtype": "elicitation"})["response"] == {"action": "cancel"}
    assert answer_to({"subtype": "hook_callback"})["response"] == {}


@pytest.mark.parametrize(
    "request_", [{"subtype": "mcp_message"}, {"subtype": "brand_new"}, {}, None, {"subtype": 3}]
)
def test_what_we_do_not_handle_is_answered_with_an_error(request_: Any) -> None:
    answer = answer_to(request_)
    assert answer["subtype"] == "error"
    assert "does not handle" in answer["error"]


def test_every_recorded_request_is_answered_and_nothing_else_is() -> None:
    for path in TRANSCRIPTS:
        for message in messages_of(path):
            assert (answer_control(message) is not None) == (message.raw()["type"] == "control_request")


# --- The environment

PARENT = {
    "HOME": "/home/a",
    "PATH": "/bin",
    "LC_ALL": "C.UTF-8",
    "https_proxy": "http://127.0.0.1:8080",
    "XDG_CONFIG_HOME": "/home/a/.config",
    "CLAUDECODE": "1",
    "CLAUDE_CODE_SESSION_ID": ONE,
    "ANTHROPIC_API_KEY": "sk-ant-test-loopback",
    "ANTHROPIC_MODEL": "haiku",
    "OTEL_SERVICE_NAME": "parent",
    "MCP_TIMEOUT": "1",
    "TRACEPARENT": "00-1-1-01",
    "AWS_REGION": "eu",
    "AWS_PROFILE": "p",
    "LD_PRELOAD": "x.so",
}
OURS = {
    "CLAUDE_CODE_ENTRYPOINT": "sdk-py",
    "CLAUDE_AGENT_SDK_CLIENT_APP": f"orchestrator/{__version__}",
    "DISABLE_AUTOUPDATER": "1",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "1",
    "CLAUDE_CODE_SDK_READS_SESSION_STATE": "1",
}


def inherited(*pass_env: str, home: Path | None = None) -> set[str]:
    return environment(PARENT, home=home, pass_env=pass_env, extra={}).keys() - OURS.keys()


def test_only_the_listed_variables_are_inherited() -> None:
    result = environment(PARENT, home=None, pass_env=(), extra={})
    kept = {name: PARENT[name] for name in ("HOME", "PATH", "LC_ALL", "https_proxy", "XDG_CONFIG_HOME")}
    around = {"NO_PROXY": "127.0.0.1,localhost,::1", "no_proxy": "127.0.0.1,localhost,::1"}
    assert result == {**kept, **around, **OURS}


def test_a_proxy_leaves_out_loopback_and_what_was_left_out_before() -> None:
    parent = {"HOME": "/h", "http_proxy": "http://proxy", "no_proxy": "intern.example"}
    result = environment(parent, home=None, pass_env=(), extra={})
    assert result["NO_PROXY"] == result["no_proxy"] == "intern.example,127.0.0.1,localhost,::1"
    assert "NO_PROXY" not in environment({"HOME": "/h"}, home=None, pass_env=(), extra={})


def test_pass_env_takes_names_and_patterns() -> None:
    usual = inherited()
    assert inherited("AWS_*") == usual | {"AWS_REGION", "AWS_PROFILE"}
    assert inherited("ANTHROPIC_API_KEY") == usual | {"ANTHROPIC_API_KEY"}
    assert inherited("ANTHROPIC_*", "MCP_TIMEOUT") == usual | {
        "ANTHROPIC_API_KEY",
        "ANTHROPIC_MODEL",
        "MCP_TIMEOUT",
    }
    assert inherited("aws_*") == usual


def test_a_pattern_for_everything_does_not_pass_what_changes_the_cli() -> None:
    guarded = {name for name in PARENT if name.startswith(("CLAUDE", "ANTHROPIC", "OTEL", "MCP"))}
    assert inherited("*") == (PARENT.keys() | {"NO_PROXY", "no_proxy"}) - guarded


def test_another_home_leaves_the_places_of_the_first_behind() -> None:
    result = environment(PARENT, home=Path("/srv/agents"), pass_env=(), extra={})
    assert result["HOME"] == "/srv/agents"
    assert "XDG_CONFIG_HOME" not in result
    assert "XDG_CONFIG_HOME" in inherited(home=Path("/home/a"))


def test_extra_has_the_last_word() -> None:
    extra = {"CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "0", "PATH": "/opt/bin", "NEW": "1"}
    result = environment(PARENT, home=None, pass_env=("*",), extra=extra)
    assert extra.items() <= result.items()


@pytest.mark.parametrize("parent", [{}, {"HOME": ""}])
def test_there_must_be_a_home(parent: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="no HOME"):
        environment(parent, home=None, pass_env=("*",), extra={})
    assert environment(parent, home=Path("/h"), pass_env=(), extra={})["HOME"] == "/h"


# --- What a failed turn means

#: Of every recording with a failed turn: the error of each of its turns.
FAILED: dict[str, list[type[OrchestratorError] | None]] = {
    "f400": [InvalidRequestError],
    "f400_credit": [BillingError],
    "f400_ctx": [InvalidRequestError],
    "f401": [AuthenticationError],
    "f403": [PermissionDeniedError],
    "f404_model": [ModelNotFoundError],
    "f413": [InvalidRequestError],
    "f429": [RateLimitError],
    "f429_noretry": [RateLimitError],
    "f429_ra7200": [RateLimitError],
    "f429_ra90": [RateLimitError],
    "f429_unified": [RateLimitError],
    "f500": [ServerError],
    "f500_retries0": [ServerError],
    "f500_retries2": [ServerError],
    "f529": [OverloadedError],
    "fcaprefuse": [ConnectionFailedError],
    "fconnrefused": [ConnectionFailedError],
    "fconnrefused_env": [ConnectionFailedError],
    "fctx_exceeded": [InvalidRequestError],
    "fnonjson200": [ConnectionFailedError],
    "fslow_head_timeout": [StalledError],
    "fstall_all_byte10": [StalledError],
    "ftls": [ConnectionFailedError],
    "ftls_default": [ConnectionFailedError],
    "fwatchdog529": [OverloadedError],
    "s05-can_use_tool": [RunCancelledError, None],
    "s08-interrupt_stream": [RunCancelledError, None],
    "s09-interrupt_tool": [RunCancelledError, None],
    "s20-refusal": [RefusalError],
    "s22-max_tokens_always": [InvalidRequestError],
    "s23-max_turns": [MaxTurnsError],
    "s24-budget": [BudgetExceededError, BudgetExceededError],
    "s26-json_schema_fail": [StructuredOutputError],
    "s42-spare_unclaimed_prompt": [BackendError],
    "s47-mcp_interrupt": [RunCancelledError, None],
    "s54-sigint": [RunCancelledError],
    "s56-resume_missing": [SessionNotFoundError],
    "s58-oauth_ratelimit": [None, RateLimitError],
    "s60-queue_cancel": [RunCancelledError, None],
    "s63-permission_host_silent_interrupt": [RunCancelledError],
}


def turns(path: Path, **known: Any) -> list[OrchestratorError | None]:
    """The error of each turn of a recording, decided from what a reader of it knows by then."""
    found: list[OrchestratorError | None] = []
    retry: ApiRetry | None = None
    named: str | None = None
    for message in messages_of(path):
        if isinstance(message, ApiRetry):
            retry = message
        elif isinstance(message, AssistantMessage):
            named = message.error or named
        elif isinstance(message, ResultMessage):
            found.append(error_of(message, retry, named, **known))
            retry, named = None, None
    return found


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_every_recorded_turn_is_classified(path: Path) -> None:
    kinds = [type(error) if error else None for error in turns(path)]
    assert kinds == FAILED.get(path.stem, [None] * len(kinds))


def test_the_table_of_failures_names_recordings() -> None:
    assert FAILED.keys() <= {path.stem for path in TRANSCRIPTS}


def failure(**fields: Any) -> ResultMessage:
    body = {"type": "result", "subtype": "success", "is_error": True, **fields}
    message = parse_message(json.dumps(body))
    assert isinstance(message, ResultMessage)
    return message


def retry_of(**fields: Any) -> ApiRetry:
    message = parse_message(json.dumps({"type": "system", "subtype": "api_retry", **fields}))
    assert isinstance(message, ApiRetry)
    return message


@pytest.mark.parametrize(
    ("fields", "name", "kind"),
    [
        ({"api_error_status": 402}, None, BillingError),
        ({"api_error_status": 404}, None, InvalidRequestError),
        ({"api_error_status": 409}, None, ServerError),
        ({"api_error_status": 422}, None, InvalidRequestError),
        ({"api_error_status": 503}, "unknown", ServerError),
        ({"api_error_status": 429}, "server_error", RateLimitError),
        ({"api_error_type": "overloaded_error"}, "server_error", OverloadedError),
        ({}, "authentication_failed", AuthenticationError),
        ({}, "account_on_hold", PermissionDeniedError),
        ({}, "overloaded", OverloadedError),
        ({"result": "Not logged in · Please run /login"}, None, AuthenticationError),
        ({"result": "API Error: 529 Overloaded"}, None, OverloadedError),
        ({"result": "API Error: 503 oops"}, "unknown", ServerError),
        ({"result": "You've hit your weekly limit"}, None, RateLimitError),
        ({"result": "the author of this authorisation form is unknown"}, None, BackendError),
        ({"result": "the bottle of 500 limited editions is overloadedly nice"}, None, BackendError),
        ({"result": None}, None, BackendError),
        ({"subtype": "error_brand_new", "is_error": False}, None, BackendError),
        ({"subtype": "error_during_execution", "errors": ["No conversation found with session ID"]}, None,
         SessionNotFoundError),
        ({"api_error_status": 200, "result": "?"}, None, BackendError),
    ],
)  # fmt: skip
def test_failures_not_recorded(fields: dict[str, Any], name: str | None, kind: type[OrchestratorError]) -> None:
    assert type(error_of(failure(**fields), None, name)) is kind


def test_the_last_retry_decides_when_the_result_says_nothing() -> None:
    assert type(error_of(failure(), retry_of(error_status=529, error="overloaded"))) is OverloadedError
    assert type(error_of(failure(), retry_of(error_status=None, error="unknown"))) is ConnectionFailedError
    got_over = failure(terminal_reason="hook_stopped")
    assert type(error_of(got_over, retry_of(error_status=529, error="overloaded"))) is BackendError


def test_an_error_carries_the_words_and_what_it_was_decided_from() -> None:
    (error,) = turns(next(path for path in TRANSCRIPTS if path.stem == "f429"))
    assert error is not None
    assert error.message == "API Error: Request rejected (429) · Number of requests has exceeded your rate limit"
    assert error.details == {
        "subtype": "success",
        "terminal_reason": "api_error",
        "status": 429,
        "reason": "rate_limit",
    }


def test_what_is_special_about_some_failures() -> None:
    (untrusted,) = turns(next(path for path in TRANSCRIPTS if path.stem == "ftls"))
    assert untrusted is not None
    assert (untrusted.retryable, "NODE_EXTRA_CA_CERTS" in untrusted.advice) == (False, True)
    unnamed = error_of(failure())
    assert unnamed is not None
    assert unnamed.scope == "request"


def test_when_to_come_back_is_said_where_it_is_known() -> None:
    path = next(path for path in TRANSCRIPTS if path.stem == "s58-oauth_ratelimit")
    rejected = [message for message in messages_of(path) if isinstance(message, RateLimitEvent)][-1]
    error = turns(path, rate_limit=rejected, now=1795166718 - 60.0)[-1]
    assert error is not None
    assert error.retry_after == 60
    late = turns(path, rate_limit=rejected, now=1795166718 + 60.0)[-1]
    assert late is not None
    assert late.retry_after == 0
    unknown = turns(path)[-1]
    assert unknown is not None
    assert unknown.retry_after is None


@pytest.mark.parametrize(
    ("words", "seconds"),
    [("retry after 90 seconds", 90), ("Try again in 2 minutes.", 120), ("try again in 2 months", None)],
)
def test_when_to_come_back_from_words(words: str, seconds: float | None) -> None:
    error = error_of(failure(api_error_status=429, result=words))
    assert error is not None
    assert error.retry_after == seconds


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"error_status": 401, "error": "authentication_failed", "attempt": 2}, AuthenticationError),
        ({"error_status": 400, "error": "billing_error", "attempt": 1}, BillingError),
        ({"error_status": 403, "error": "account_on_hold", "attempt": 1}, PermissionDeniedError),
        ({"error_status": 401, "error": "authentication_failed", "attempt": 1}, None),
        ({"error_status": 429, "error": "rate_limit", "attempt": 5}, None),
        ({"error_status": 529, "error": "overloaded", "attempt": 5}, None),
        ({"error_status": 500, "error": "server_error", "attempt": 5}, None),
        ({"error_status": None, "error": "unknown", "attempt": 5}, None),
    ],
)
def test_retries_that_cannot_help(fields: dict[str, Any], kind: type[OrchestratorError] | None) -> None:
    error = fatal(retry_of(**fields))
    assert (type(error) if error else None) is kind
    assert fatal(None) is None


# --- Against the installed CLI


@pytest.fixture(scope="session")
def binary() -> Path:
    path = find_binary(None, {}, Path("/nonexistent")).path
    assert path is not None
    return path


@pytest.fixture
def cli_env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "home").mkdir()
    loopback = {"ANTHROPIC_API_KEY": "sk-ant-test-loopback", "ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}
    parent = {"PATH": "/usr/bin:/bin"}
    return environment(parent, home=tmp_path / "home", pass_env=(), extra={**loopback, "RUN_TOKEN": "secret-1"})


def run(binary: Path, arguments: list[str], env: dict[str, str], lines: bytes = b"") -> tuple[str, str]:
    """stdout and stderr of the CLI given these lines and no more."""
    done = subprocess.run(
        [str(binary), *arguments],
        input=lines,
        capture_output=True,
        env=env,
        cwd=env["HOME"],
        timeout=60,
        check=False,
    )
    return done.stdout.decode(), done.stderr.decode()


def control(binary: Path, env: dict[str, str], subtype: str, fields: dict[str, Any]) -> Any:
    """What a CLI started for such a spec answers to one control request. It is sent no prompt."""
    lines = encode_control("r1", {"subtype": "initialize"}) + encode_control("r2", {"subtype": subtype})
    out, err = run(binary, argv(spec(**fields)), env, lines)
    messages = map(parse_message, out.split("\n")[:-1])
    responses = [message for message in messages if isinstance(message, ControlResponse)]
    (answer,) = [response for response in responses if response.request_id == "r2"]
    assert answer.ok, err
    return answer.response.response


@pytest.fixture
def help_text(binary: Path, cli_env: dict[str, str]) -> str:
    out, err = run(binary, ["--help"], cli_env)
    assert err == ""
    return out


def test_help_lists_every_flag_that_is_not_hidden(help_text: str) -> None:
    listed = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", help_text, re.MULTILINE))
    hidden = {flag.option for flag in FLAGS if flag.hidden}
    forked = argv(spec(session_mode="fork", source_session_id=OTHER))
    used = {text.partition("=")[0] for text in [*argv(spec(**FULL)), *forked]} - {"-p"}
    assert used - listed == hidden


def test_help_lists_our_permission_modes_and_efforts(help_text: str) -> None:
    text = " ".join(help_text.split())
    modes = re.search(r"--permission-mode <mode> .*?\(choices: ([^)]*)\)", text)
    efforts = re.search(r"--effort <level> .*?\(([^)]*)\)", text)
    assert modes is not None
    assert efforts is not None
    assert tuple(mode.strip('"') for mode in modes[1].split(", ")) == PERMISSION_MODES
    assert tuple(efforts[1].split(", ")) == EFFORTS


@pytest.mark.parametrize("mode", ["fresh", "continue", "fork"])
def test_the_cli_accepts_the_full_command_line(binary: Path, cli_env: dict[str, str], mode: str) -> None:
    """Hidden options included: the CLI names the first option it does not know, and that must be ours."""
    arguments = argv(spec(**FULL, session_mode=mode, source_session_id=OTHER))
    out, err = run(binary, [*arguments, "--no-such-option"], cli_env)
    assert (out, err.strip()) == ("", "error: unknown option '--no-such-option'")


def test_rules_reach_the_cli_verbatim(binary: Path, cli_env: dict[str, str]) -> None:
    allowed = ("Bash(git *)", "Bash(echo a, b)", "mcp__x__*", "-odd", "Read(/a b/c)")
    denied = ("Bash(rm *)", "WebFetch")
    fields = {"allowed_tools": allowed, "disallowed_tools": denied, "settings": FULL["settings"]}
    rules = control(binary, cli_env, "list_permission_rules", fields)["state"]["rules"]
    found = [(rule["source"], rule["behavior"], rule["rule"]) for rule in rules]
    assert {rule for source, behavior, rule in found if (source, behavior) == ("cliArg", "allow")} == {*allowed}
    assert {rule for source, behavior, rule in found if (source, behavior) == ("cliArg", "deny")} == {*denied}
    # What argv refuses can be said in settings, as the error advises; the CLI shows it escaped.
    assert ("flagSettings", "allow", r"Bash(echo \(x\), y)") in found


def test_the_cli_puts_the_token_into_the_header(binary: Path, cli_env: dict[str, str]) -> None:
    (server,) = control(binary, cli_env, "mcp_status", {"mcp": FULL["mcp"]})["mcpServers"]
    assert server["config"]["headers"] == {"Authorization": "Bearer secret-1"}
