"""From an agent's file, a task and the settings to what is fixed when the agent's process starts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.agents import Agent
from orchestrator.backends.claude import environment
from orchestrator.config import ClaudeConfig
from orchestrator.conversation import McpEndpoint, SessionMode, Spec
from orchestrator.errors import AgentError
from orchestrator.killing import RUN_ID_ENV
from orchestrator.runtime import LiveRun, Runtime
from orchestrator.store import Run
from orchestrator.task import Task
from orchestrator.telemetry import cli_environment
from orchestrator.tracing import SpanContext

TOKEN_ENV = "ORCHESTRATOR_RUN_TOKEN"  # noqa: S105  # the variable's name, not a token
MCP_NAME = "orchestrator"
SERVER = f"mcp__{MCP_NAME}"
# The tools of that server, which this package does not import; a test holds the list against it.
OUR_TOOLS = ("delegate", "run_wait", "run_cancel", "fork_session", "query_traces", "list_agents")

# Parts of an MCP server's configuration whose values are often keys.
SECRET_PARTS = ("headers", "env")

# The CLI's own ways to start agents: outside our depth, budget and record, so only on the file's explicit word.
SUBAGENT_TOOLS = ("Agent", "Task", "Workflow")


async def build_spec(rt: Runtime, live: LiveRun, agent: Agent, task: Task) -> Spec:
    """The process specification of a run. Raises what ``permission_mode`` raises."""
    row = live.row
    assert row.session_id is not None
    url = await rt.endpoint() if agent.may_delegate() else None
    servers, secrets = hide_values(agent.mcp_servers)
    tools, rules = split_tools(agent.tools)
    mode: SessionMode = row.session_mode  # type: ignore[assignment]  # written by session_mode(), read from our own row
    return Spec(
        cwd=Path(row.cwd),
        env=secrets | _environ(rt, live, url, searchable=tools is None or "ToolSearch" in tools),
        session_id=row.session_id,
        session_mode=mode,
        source_session_id=row.source_session_id,
        model=row.model_requested,
        fallback_model=task.fallback_model,
        system_prompt=agent.system_prompt or None,
        append_system_prompt=task.append_system_prompt,
        tools=tools,
        allowed_tools=(*rules, *task.allowed_tools),
        disallowed_tools=_disallowed(agent),
        permission_mode=permission_mode(rt, agent, task),
        effort=task.effort or agent.effort,
        max_turns=task.max_turns or agent.max_turns or rt.config.limits.max_turns,
        budget_usd=live.budget.remaining,
        add_dirs=task.add_dirs,
        output_schema=task.output_schema,
        mcp=(McpEndpoint(MCP_NAME, url, TOKEN_ENV),) if url else (),
        mcp_servers=servers,
        setting_sources=_setting_sources(rt, row),
        settings=task.settings,
    )


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
    trusted = (Path(row.project), *map(rt.config.resolve, rt.config.claude.trusted_dirs))
    if any(Path(row.cwd).resolve().is_relative_to(directory.resolve()) for directory in trusted):
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


def _environ(rt: Runtime, live: LiveRun, url: str | None, *, searchable: bool) -> dict[str, str]:
    row, claude = live.row, rt.config.claude
    span = SpanContext(row.trace_id, row.id)
    extra: dict[str, str] = {
        **_patience(claude),
        **cli_environment(rt.config, rt.environ, span, row.name),
        RUN_ID_ENV: row.id,
    }
    if claude.base_url:
        extra["ANTHROPIC_BASE_URL"] = claude.base_url
    if not searchable:
        # The CLI would offer a placeholder for deferred tools, which an agent without the search tool never has.
        extra["ENABLE_TOOL_SEARCH"] = "false"
    if url:
        extra[TOKEN_ENV] = rt.tokens.issue(row.id)
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
