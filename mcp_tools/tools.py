"""All tools of the server, and what it says of itself."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from mcp.server import MCPServer
from mcp_types import ToolAnnotations

from mcp_tools.reading import ReadingTools
from mcp_tools.running import RunningTools
from mcp_tools.strict import StrictTool
from orchestrator import __version__
from orchestrator.runtime import Runtime

INSTRUCTIONS = """\
Hands work to agents. Each agent is a process of its own with its own tools, instructions and context: it knows \
nothing of this conversation, so put everything it needs into the prompt.

delegate starts a run and waits for its answer. Calls of delegate in one message run one after another; to work \
on several things at once, start each with wait_s=0 and collect the answers with one run_wait.

A run goes on when its caller stops waiting, is interrupted or goes away. run_wait picks its answer up; \
query_traces finds its run_id. run_cancel stops it.

The last line of each answer names the session. delegate(session=…) goes on with it, fork_session tries another \
way from the same point and leaves the session as it is.

An error ends with a line of JSON: code, retryable, retry_after (seconds), advice. Do not repeat a call whose \
error is not retryable without changing it."""

# Claude Code hides tools behind a search unless told otherwise, and moves long results to a file.
_ALWAYS = {"anthropic/alwaysLoad": True, "anthropic/maxResultSizeChars": 500_000}


def build_server(rt: Runtime) -> MCPServer:
    """An MCP server whose tools work in ``rt``."""
    with _logging_left_alone():
        return MCPServer(
            "orchestrator",
            title="Orchestrator",
            instructions=INSTRUCTIONS,
            version=__version__,
            tools=list(_tools(RunningTools(rt), ReadingTools(rt))),
        )


def _tools(running: RunningTools, reading: ReadingTools) -> Iterator[StrictTool]:
    reads = ToolAnnotations(read_only_hint=True)
    # Not read-only: Claude Code then runs these one by one. The agents it starts may well change files.
    acts = ToolAnnotations(read_only_hint=False, destructive_hint=True)
    stops = ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=True)
    yield StrictTool.of(running.delegate, annotations=acts, meta=_ALWAYS)
    yield StrictTool.of(running.run_wait, annotations=reads, meta=_ALWAYS)
    yield StrictTool.of(running.run_cancel, annotations=stops)
    yield StrictTool.of(running.fork_session, annotations=acts)
    yield StrictTool.of(reading.query_traces, annotations=reads, structured=True)
    yield StrictTool.of(reading.list_agents, annotations=reads, structured=True)


@contextmanager
def _logging_left_alone() -> Iterator[None]:
    """MCPServer configures the root logger where nobody has; whether and how to log is not for us to say."""
    placeholder = logging.NullHandler()
    logging.getLogger().addHandler(placeholder)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(placeholder)
