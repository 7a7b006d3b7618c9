"""Claude Code's dialect (CLI 2.1): command line, lines for its stdin, the environment it is given. All pure.

What a failed turn means is in ``claude_errors``.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from uuid import UUID

from orchestrator import __version__
from orchestrator.backends.claude_errors import error_of, fatal, start_refusal
from orchestrator.conversation import McpEndpoint, Spec, Turn
from orchestrator.errors import ConfigError, PromptError
from orchestrator.messages import ControlRequest, Message, UnknownMessage
from orchestrator.questions import readable

__all__ = [
    "EFFORTS",
    "FLAGS",
    "PERMISSION_MODES",
    "Flag",
    "answer_control",
    "argv",
    "encode_answer",
    "encode_control",
    "encode_prompt",
    "environment",
    "error_of",
    "fatal",
    "is_question",
    "requests_of",
    "start_refusal",
]

PERMISSION_MODES = ("acceptEdits", "auto", "bypassPermissions", "manual", "dontAsk", "plan")
EFFORTS = ("low", "medium", "high", "xhigh", "max")

#: What the CLI calls `default` today.
_RENAMED_MODES = {"default": "manual"}

#: Linux refuses to start a program with a longer argument (MAX_ARG_STRLEN, its final NUL included).
_MAX_ARGUMENT_BYTES = 131_072

_ALWAYS = (
    "-p",
    "--input-format=stream-json",
    "--output-format=stream-json",
    "--verbose",
    "--include-partial-messages",
    # What a run may use is what its spec says, whatever lies in the directory it works in.
    "--strict-mcp-config",
    # Else a session keeps the system prompt it began with, whoever continues it and whatever the file says now.
    "--system-prompt-snapshot=off",
)


# --- The command line


@dataclass(frozen=True, slots=True)
class Flag:
    """One option that takes a value, and where its values come from.

    ``values`` gives one string for each time the option is written: none leaves it out. ``hidden`` marks
    options that ``claude --help`` does not list.
    """

    option: str
    values: Callable[[Spec], Iterable[str]]
    hidden: bool = False


def _text(value: str | None) -> list[str]:
    return [] if value is None else [value]


def _joined(values: tuple[str, ...] | None) -> list[str]:
    return [] if values is None else [",".join(values)]


def _tool_names(names: tuple[str, ...] | None) -> list[str]:
    for name in names or ():
        if not re.fullmatch(r"[^\s,()]+", name):
            # The CLI would leave the tool out without a word.
            raise ConfigError(
                f"tools: {name!r} is not the name of a tool; rules such as Bash(git *) belong in allowed_tools"
            )
    return _joined(names)


def _rules(field: str, rules: tuple[str, ...]) -> list[str]:
    for rule in rules:
        if not _is_one_rule(rule):
            raise ConfigError(
                f"{field}: the CLI would not read {rule!r} as one rule",
                advice="Put it under permissions in the agent's settings, where rules are a JSON list.",
            )
    return list(rules)


def _is_one_rule(rule: str) -> bool:
    # The CLI splits at blanks and commas outside parentheses, and any ) ends a parenthesis, nested or not.
    outside = re.sub(r"\([^)]*(?:\)|\Z)", "", rule)
    return bool(rule) and not re.search(r"[\s,]", outside)


def _permission_mode(mode: str | None) -> list[str]:
    mode = _RENAMED_MODES.get(mode or "", mode)
    return _one_of("permission_mode", mode, PERMISSION_MODES)


def _one_of(field: str, value: str | None, known: Sequence[str]) -> list[str]:
    if value is not None and value not in known:
        raise ConfigError(f"{field} {value!r} is none of {', '.join(known)}")
    return _text(value)


def _positive(field: str, value: float | None) -> list[str]:
    if value is None:
        return []
    if not (0 < value < math.inf):
        raise ConfigError(f"{field} must be more than 0, not {value}")
    return [str(value)]


def _json(field: str, value: Mapping[str, Any] | None) -> list[str]:
    if value is None:
        return []
    try:
        return [json.dumps(value, separators=(",", ":"), allow_nan=False)]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{field} cannot be written as JSON: {error}") from error


def _mcp_config(spec: Spec) -> list[str]:
    servers = {endpoint.name: _mcp_server(endpoint) for endpoint in spec.mcp}
    if taken := servers.keys() & spec.mcp_servers.keys():
        raise ConfigError(f"mcp_servers: the name {min(taken)!r} is taken by the orchestrator's own server")
    servers.update(spec.mcp_servers)
    return _json("mcp_servers", {"mcpServers": servers}) if servers else []


def _mcp_server(endpoint: McpEndpoint) -> dict[str, Any]:
    return {
        "type": "http",
        "url": endpoint.url,
        # Expanded by the CLI from its environment, so that the token is in no process list.
        "headers": {"Authorization": f"Bearer ${{{endpoint.token_env}}}"},
        # Otherwise the tools are hidden behind a search of their own, which costs the model a round trip.
        "alwaysLoad": True,
    }


#: Every option with a value. tests/test_claude_dialect.py holds it against `claude --help`.
FLAGS: tuple[Flag, ...] = (
    Flag("--model", lambda spec: _text(spec.model)),
    Flag("--fallback-model", lambda spec: _text(spec.fallback_model)),
    Flag("--system-prompt", lambda spec: _text(spec.system_prompt)),
    Flag("--append-system-prompt", lambda spec: _text(spec.append_system_prompt)),
    Flag("--tools", lambda spec: _tool_names(spec.tools)),
    Flag("--allowedTools", lambda spec: _rules("allowed_tools", spec.allowed_tools)),
    Flag("--disallowedTools", lambda spec: _rules("disallowed_tools", spec.disallowed_tools)),
    Flag("--permission-mode", lambda spec: _permission_mode(spec.permission_mode)),
    # Without it the CLI denies what it would have to ask; its agents have no tool to ask with either.
    Flag("--permission-prompt-tool", lambda spec: ["stdio"] if spec.asks else [], hidden=True),
    Flag("--effort", lambda spec: _one_of("effort", spec.effort, EFFORTS)),
    Flag("--max-turns", lambda spec: _positive("max_turns", spec.max_turns), hidden=True),
    Flag("--max-budget-usd", lambda spec: _positive("budget_usd", spec.budget_usd)),
    Flag("--add-dir", lambda spec: map(str, spec.add_dirs)),
    Flag("--json-schema", lambda spec: _json("output_schema", spec.output_schema)),
    Flag("--mcp-config", _mcp_config),
    Flag("--setting-sources", lambda spec: _joined(spec.setting_sources)),
    Flag("--settings", lambda spec: _json("settings", spec.settings)),
)


def argv(spec: Spec) -> list[str]:
    """Arguments after the binary.

    Values are written ``--flag=value``, which keeps one that begins with a dash a value, and an option with
    several values is repeated, because a list of values would take in whatever follows. Raises ConfigError
    for a value the CLI would refuse or, worse, read as something else.
    """
    arguments = [f"{flag.option}={value}" for flag in FLAGS for value in flag.values(spec)]
    for argument in arguments:
        _check_argument(argument)
    return [*_ALWAYS, *_session(spec), *arguments]


def _session(spec: Spec) -> list[str]:
    own = _uuid("session_id", spec.session_id)
    if spec.session_mode == "fresh":
        return [f"--session-id={own}"]
    if spec.session_mode == "continue":
        return [f"--resume={own}"]
    source = _uuid("source_session_id", spec.source_session_id)
    whole = [f"--resume={source}", "--fork-session", f"--session-id={own}"]
    if spec.source_message_id is None:
        return whole
    return [*whole, f"--resume-session-at={_uuid('source_message_id', spec.source_message_id)}"]


def _uuid(field: str, value: str | None) -> str:
    try:
        valid = value is not None and str(UUID(value)) == value.lower()
    except ValueError:
        valid = False
    if value is None or not valid:
        # Anything else after --resume would be taken as the title of some session.
        raise ConfigError(f"{field} must be a UUID, not {value!r}")
    return value


def _check_argument(argument: str) -> None:
    option, _, value = argument.partition("=")
    if "\0" in value:
        raise ConfigError(f"the value for {option} has a NUL character at {value.index(chr(0))}")
    try:
        size = len(argument.encode())
    except UnicodeEncodeError as error:
        raise ConfigError(f"the value for {option} cannot be encoded in UTF-8: {error.reason}") from error
    if size >= _MAX_ARGUMENT_BYTES:
        raise ConfigError(
            f"the value for {option} has {size} bytes; the system takes {_MAX_ARGUMENT_BYTES - 1} at most",
            advice="Move long material into files that the agent can read.",
        )


# --- Lines for stdin


def encode_prompt(prompt: str, uuid: str) -> bytes:
    """The line that delivers a prompt.

    ``text_not_typed`` has the CLI take it as data: ``/command`` and ``@file`` in it do nothing. A ``uuid``
    must be new every time, the CLI swallows a prompt whose uuid it has seen. Raises PromptError for what
    would not arrive unchanged: NUL characters and halves of surrogate pairs.
    """
    if bad := re.search("[\0\ud800-\udfff]", prompt):
        what = "a NUL character" if bad[0] == "\0" else "half of a surrogate pair"
        raise PromptError(f"the prompt has {what} at position {bad.start()}")
    return _line(
        {
            "type": "user",
            "uuid": uuid,
            "text_not_typed": True,
            "message": {"role": "user", "content": prompt},
            "parent_tool_use_id": None,
        }
    )


def encode_control(request_id: str, request: Mapping[str, Any]) -> bytes:
    """The line that asks something of the CLI, such as ``{"subtype": "interrupt"}``."""
    return _line({"type": "control_request", "request_id": request_id, "request": request})


def requests_of(turn: Turn) -> list[dict[str, Any]]:
    """The requests that make what a turn brings along hold, before its prompt.

    A layer of settings is the one way to give a process that has started variables of its own: ``TRACEPARENT``
    and headers of its model requests, and what its shells see. Raises ConfigError for an unknown mode.
    """
    settings: dict[str, Any] = {}
    if turn.env:
        settings["env"] = dict(turn.env)
    if turn.model is not None:
        settings["model"] = turn.model
    asked: list[dict[str, Any]] = [{"subtype": "apply_flag_settings", "settings": settings}] if settings else []
    modes = _permission_mode(turn.permission_mode)
    return [*asked, *({"subtype": "set_permission_mode", "mode": mode} for mode in modes)]


#: What is answered to each request of the CLI we understand; everything else gets an error.
_ANSWERS: Mapping[str, Mapping[str, Any]] = {
    "can_use_tool": {
        "behavior": "deny",
        "message": "Nobody is there to ask. Do without this tool, or say in your answer what you needed it for.",
    },
    "elicitation": {"action": "cancel"},
    "hook_callback": {},
}


def answer_control(message: Message) -> bytes | None:
    """The answer to a request of the CLI, None if ``message`` is not one. Unanswered, it hangs the turn."""
    asked = _asked(message)
    if asked is None:
        return None
    request_id, subtype = asked
    if subtype is not None and subtype in _ANSWERS:
        return encode_answer(request_id, _ANSWERS[subtype])
    error = f"the orchestrator does not handle {subtype or 'requests like this'}"
    answer = {"subtype": "error", "request_id": request_id, "error": error}
    return _line({"type": "control_response", "response": answer})


def is_question(message: Message) -> bool:
    """Whether it is a permission prompt or a question of the agent, in a shape we understand."""
    return isinstance(message, ControlRequest) and readable(message)


def encode_answer(request_id: str, response: Mapping[str, Any]) -> bytes:
    """The line that answers a request of the CLI, such as ``{"behavior": "allow"}``."""
    answer = {"subtype": "success", "request_id": request_id, "response": response}
    return _line({"type": "control_response", "response": answer})


def _asked(message: Message) -> tuple[str, str | None] | None:
    if isinstance(message, ControlRequest):
        return message.request_id, message.subtype
    # A request of another shape than today's waits for its answer all the same.
    if isinstance(message, UnknownMessage) and message.type == "control_request":
        request_id = (message.model_extra or {}).get("request_id")
        return (request_id, None) if isinstance(request_id, str) else None
    return None


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"


# --- The environment

_INHERITED = (
    *("PATH", "USER", "LOGNAME", "SHELL", "LANG", "LC_*", "TERM", "TZ", "TMPDIR"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "NODE_EXTRA_CA_CERTS"),
)
#: Say where things are in the parent's home; wrong with another one.
_INHERITED_WITH_HOME = ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")

#: They change what a CLI does or tell it that it runs inside another: inherited only by a pattern that says so.
_GUARDED = ("CLAUDE", "ANTHROPIC", "OTEL", "MCP")

_SETTINGS: Mapping[str, str] = {
    "CLAUDE_CODE_ENTRYPOINT": "sdk-py",
    "CLAUDE_AGENT_SDK_CLIENT_APP": f"orchestrator/{__version__}",
    "DISABLE_AUTOUPDATER": "1",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    # One prompt, one result: otherwise the first result may come before the sub-agents have finished.
    "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "1",
    "CLAUDE_CODE_SDK_READS_SESSION_STATE": "1",
}


def environment(
    parent: Mapping[str, str], *, home: Path | None, pass_env: Sequence[str], extra: Mapping[str, str]
) -> dict[str, str]:
    """The whole environment of a CLI process, chosen from its parent's by an allow-list.

    ``home`` replaces the parent's HOME. ``pass_env`` names further variables to inherit, ``*`` and ``?``
    allowed. Then come our own settings, and ``extra`` before all. Raises ConfigError without any HOME: the
    CLI would fall back to the account's home and write there.
    """
    chosen = str(home) if home is not None else parent.get("HOME")
    if not chosen:
        raise ConfigError("there is no HOME for the CLI", advice="Set HOME, or claude.home in orchestrator.yaml.")
    same_home = chosen == parent.get("HOME")
    patterns = (*_INHERITED, *(_INHERITED_WITH_HOME if same_home else ()), *pass_env)
    inherited = {
        name: value for name, value in parent.items() if any(_matches(name, pattern) for pattern in patterns)
    }
    return {**_beside_the_proxy(inherited), "HOME": chosen, **_SETTINGS, **extra}


def _beside_the_proxy(variables: Mapping[str, str]) -> dict[str, str]:
    """With a proxy, loopback addresses go around it: our own door, and the scripted model, are not behind it."""
    if not any(name.upper() in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY") for name in variables):
        return dict(variables)
    named = variables.get("NO_PROXY") or variables.get("no_proxy")
    around = ",".join(filter(None, (named, "127.0.0.1,localhost,::1")))
    return {**variables, "NO_PROXY": around, "no_proxy": around}


def _matches(name: str, pattern: str) -> bool:
    guarded = name.startswith(_GUARDED) and not pattern.startswith(_GUARDED)
    return fnmatchcase(name, pattern) and not guarded
