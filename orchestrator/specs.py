"""From an agent's file, a task and the settings to what is fixed when the agent's process starts."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.agents import Agent
from orchestrator.backends.claude import environment
from orchestrator.config import ClaudeConfig
from orchestrator.conversation import McpEndpoint, SessionMode, Spec
from orchestrator.errors import AgentError
from orchestrator.killing import RUN_ID_ENV
from orchestrator.questions import ASK_TOOL, Policy
from orchestrator.runtime import LiveRun, Runtime
from orchestrator.sandbox import run_settings, setting_sources
from orchestrator.store import Run
from orchestrator.task import Task
from orchestrator.telemetry import cli_environment
from orchestrator.tokens import TOKEN_ENV
from orchestrator.tracing import SpanContext

HEADERS_ENV = "ANTHROPIC_CUSTOM_HEADERS"
MCP_NAME = "orchestrator"
SERVER = f"mcp__{MCP_NAME}"
# The tools of that server, which this package does not import; a test holds the list against it.
OUR_TOOLS = (
    *("delegate", "delegate_many", "continue_session", "fork_session", "replay", "run_plan"),
    *("run_wait", "run_status", "run_cancel", "query_traces", "get_trace", "usage", "list_sessions", "list_agents"),
    "run_answer",
)
RUN_ANSWER = f"{SERVER}__run_answer"

# Parts of an MCP server's configuration whose values are often keys.
SECRET_PARTS = ("headers", "env")

# The CLI's own ways to start agents: outside our depth, budget and record, so only on the file's explicit word.
SUBAGENT_TOOLS = ("Agent", "Task", "Workflow")


def can_answer(agent: Agent) -> bool:
    """Whether an agent can answer what the runs it starts ask."""
    return agent.names(RUN_ANSWER) and RUN_ANSWER not in agent.disallowed_tools


async def build_spec(rt: Runtime, live: LiveRun, agent: Agent, task: Task) -> Spec:
    """The process specification of a run. Raises what ``permission_mode`` raises."""
    row = live.row
    url = await rt.endpoint() if agent.may_delegate() else None
    sandboxed = agent.sandbox is not None
    servers, secrets = hide_values(agent.mcp_servers)
    tools, rules = split_tools(agent.tools)
    asks = _policy(rt, live) == "ask"
    mode: SessionMode = row.session_mode  # type: ignore[assignment]  # written by session_mode(), read from our own row
    return Spec(
        cwd=Path(row.cwd),
        env=secrets | _environ(rt, row, searchable=tools is None or "ToolSearch" in tools),
        session_id=row.session_id or str(uuid.uuid4()),
        session_mode=mode,
        source_session_id=row.source_session_id,
        source_message_id=live.fork_at,
        model=row.model_requested,
        fallback_model=task.fallback_model,
        system_prompt=agent.system_prompt or None,
        append_system_prompt=task.append_system_prompt,
        tools=(*tools, ASK_TOOL) if asks and tools and ASK_TOOL not in tools else tools,
        allowed_tools=(*rules, *task.allowed_tools),
        disallowed_tools=_disallowed(agent),
        permission_mode=permission_mode(rt, agent, task),
        effort=task.effort or agent.effort,
        max_turns=task.max_turns or agent.max_turns or rt.config.limits.max_turns,
        # Ours counts what streams; what sub-agents spend is told with the result, so there the CLI counts too.
        budget_usd=live.budget.left.usd if agent.may_use_subagents() else None,
        add_dirs=task.add_dirs,
        output_schema=task.output_schema,
        mcp=(McpEndpoint(MCP_NAME, url, TOKEN_ENV),) if url else (),
        mcp_servers=servers,
        setting_sources=setting_sources(_setting_sources(rt, row), sandboxed=sandboxed),
        settings=run_settings(
            task.settings, sandboxed=sandboxed, allow_bypass=rt.config.claude.allow_bypass_permissions
        ),
        asks=asks,
    )


def _policy(rt: Runtime, live: LiveRun) -> Policy:
    """What becomes of the run's questions: the word of its own task, of the nearest above, of the settings."""
    said = (each.policy for each in live.lineage() if each.policy is not None)
    return next(said, rt.config.questions.policy)


def _disallowed(agent: Agent) -> tuple[str, ...]:
    """What the file forbids, sub-agents it does not ask for, and those of our own tools it does not name."""
    ours = [f"{SERVER}__{tool}" for tool in OUR_TOOLS] if agent.may_delegate() else []
    return (
        *agent.disallowed_tools,
        *(() if agent.may_use_subagents() else SUBAGENT_TOOLS),
        *(tool for tool in ours if not agent.names(tool)),
    )


def _setting_sources(rt: Runtime, row: Run) -> tuple[str, ...]:
    """Which Claude Code settings are loaded: those of a directory only where its owner started us.

    Settings can run hooks and send requests elsewhere. In a copy of somebody's repository, or wherever a model
    asked to work, they are not the user's word.
    """
    sources = rt.config.claude.setting_sources
    cwd = Path(row.cwd)  # its links were followed at admission
    trusted = (Path(row.project), *map(rt.config.resolve, rt.config.claude.trusted_dirs))
    # Of a path without links its beginnings have none either: most need not be followed to be compared.
    if any(cwd.is_relative_to(each) or cwd.is_relative_to(each.resolve()) for each in trusted):
        return sources
    return tuple(source for source in sources if source not in ("project", "local"))


def hide_values(servers: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """An agent's MCP servers without the values of their headers and variables, and variables that hold those.

    The servers go on the command line, which every user of the machine can read; they are often keys.
    """
    variables: dict[str, str] = {}

    def hidden(value: Any) -> Any:
        if not isinstance(value, str) or "${" in value:
            return value  # the CLI fills it in itself
        name = f"ORCHESTRATOR_MCP_VALUE_{len(variables)}"
        variables[name] = value
        return f"${{{name}}}"

    found = {
        name: {
            key: {k: hidden(v) for k, v in part.items()} if key in SECRET_PARTS and isinstance(part, dict) else part
            for key, part in server.items()
        }
        if isinstance(server, dict)
        else server
        for name, server in servers.items()
    }
    return found, variables


def split_tools(tools: tuple[str, ...] | None) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """A file's tools → (built-in tools to offer, permission rules to grant).

    ``Bash(git *)`` offers Bash and grants just that; a plain ``Bash`` offers it and grants nothing beyond the
    permission mode. Tools of MCP servers are not built in: they are granted, their server offers them.
    """
    if tools is None:
        return None, ()
    offered = tuple(dict.fromkeys(tool.split("(")[0].strip() for tool in tools if not tool.startswith("mcp__")))
    rules = tuple(tool for tool in tools if tool.startswith("mcp__") or "(" in tool)
    return offered, rules


def permission_mode(rt: Runtime, agent: Agent, task: Task) -> str:
    """The mode asked for, always said: left out, settings of the directory would choose it.

    Raises AgentError for one the operator has not allowed.
    """
    mode = task.permission_mode or agent.permission_mode or "default"
    if mode == "bypassPermissions" and not rt.config.claude.allow_bypass_permissions:
        raise AgentError(
            f"agent {agent.name!r} asks for bypassPermissions, which the operator has not allowed",
            advice="Set claude.allow_bypass_permissions in orchestrator.yaml, in a sandbox only.",
        )
    return mode


def turn_environ(row: Run, env: Mapping[str, str]) -> dict[str, str]:
    """Variables that tell a turn's run: for the spans of the CLI, the headers of its requests, and its shells.

    ``env`` is the environment of its process, whose own headers stay.
    """
    headers = filter(None, (env.get(HEADERS_ENV), f"X-Orchestrator-Run-Id: {row.id}"))
    return {
        "TRACEPARENT": SpanContext(row.trace_id, row.id).traceparent,
        HEADERS_ENV: "\n".join(headers),
        RUN_ID_ENV: row.id,
    }


def _environ(rt: Runtime, row: Run, *, searchable: bool) -> dict[str, str]:
    claude = rt.config.claude
    spans = cli_environment(rt.config, rt.environ, SpanContext(row.trace_id, row.id), row.name)
    # What differs from run to run comes with the turn: the process may serve others, or wait for one.
    extra = {**_patience(claude), **{name: value for name, value in spans.items() if name != "TRACEPARENT"}}
    if claude.base_url:
        extra["ANTHROPIC_BASE_URL"] = claude.base_url
    if not searchable:
        # The CLI would offer a placeholder for deferred tools, which an agent without the search tool never has.
        extra["ENABLE_TOOL_SEARCH"] = "false"
    return environment(rt.environ, home=rt.home, pass_env=claude.pass_env, extra={**extra, **claude.env})


def _patience(claude: ClaudeConfig) -> dict[str, str]:
    """The CLI's own retries and time-outs; by default it hides a failing provider for three minutes."""

    def ms(seconds: float) -> str:
        return str(int(seconds * 1000))

    values: dict[str, Any] = {
        "CLAUDE_CODE_MAX_RETRIES": claude.max_retries,
        "API_TIMEOUT_MS": ms(claude.request_timeout_s),
        "CLAUDE_BYTE_STREAM_IDLE_TIMEOUT_MS": ms(claude.stream_idle_timeout_s),
        "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "1",
    }
    return {name: str(value) for name, value in values.items()}
