"""All tools of the server, and what it says of itself."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from mcp.server import MCPServer
from mcp_types import ToolAnnotations

from mcp_tools.asking import AskingTools
from mcp_tools.catalog import CatalogServer
from mcp_tools.many import ManyTools
from mcp_tools.reading import ReadingTools
from mcp_tools.run_tasks import RunTasks
from mcp_tools.running import RunningTools
from mcp_tools.slim import slimmed
from mcp_tools.strict import StrictTool
from mcp_tools.tasks import Tasks, TaskSource, check_listening
from orchestrator import __version__
from orchestrator.runtime import Runtime

INSTRUCTIONS = """\
Hands work to agents. Each agent is a process of its own with its own tools, instructions and context: it knows \
nothing of this conversation, so put everything it needs into the prompt.

delegate starts a run and waits for its answer. Calls of delegate in one message run one after another; \
delegate_many has several things worked on at once. With wait_s=0 a call returns at once; run_wait has the answers.

A run goes on when its caller stops waiting, is interrupted or goes away. run_wait picks its answer up; \
query_traces finds its run_id. run_cancel stops it. Where a run asks something, run_answer lets it go on.

The last line of each answer names the session. continue_session goes on with it, fork_session tries another way \
from the same point, or an earlier one, and leaves the session as it is; replay repeats a run.

An error ends with a line of JSON: code, retryable, retry_after (seconds), advice. Do not repeat a call whose \
error is not retryable without changing it."""

# Claude Code hides tools behind a search unless told otherwise, and moves long results to a file.
_LONG = {"anthropic/maxResultSizeChars": 500_000}
_ALWAYS = {"anthropic/alwaysLoad": True, **_LONG}


def build_server(rt: Runtime, tasks: TaskSource | None = None) -> MCPServer:
    """An MCP server whose tools work in ``rt``. ``tasks`` are those clients may ask for, the runs by default."""
    with _logging_left_alone():
        return CatalogServer(
            rt,
            "orchestrator",
            title="Orchestrator",
            instructions=INSTRUCTIONS,
            version=__version__,
            tools=[slimmed(tool) for tool in _tools(rt)],
            extensions=[Tasks(tasks or RunTasks(rt))],
            middleware=[check_listening],
        )


def _tools(rt: Runtime) -> Iterator[StrictTool]:
    running, many, reading, asking = RunningTools(rt), ManyTools(rt), ReadingTools(rt), AskingTools(rt)
    reads = ToolAnnotations(read_only_hint=True)
    # Not read-only: Claude Code then runs these one by one. The agents it starts may well change files.
    acts = ToolAnnotations(read_only_hint=False, destructive_hint=True)
    stops = ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=True)
    yield StrictTool.of(running.delegate, annotations=acts, meta=_ALWAYS)
    yield StrictTool.of(many.delegate_many, annotations=acts, meta=_ALWAYS)
    yield StrictTool.of(running.run_wait, annotations=reads, meta=_ALWAYS)
    yield StrictTool.of(running.run_cancel, annotations=stops)
    yield StrictTool.of(asking.run_answer, annotations=acts)
    yield StrictTool.of(running.continue_session, annotations=acts)
    yield StrictTool.of(running.fork_session, annotations=acts)
    yield StrictTool.of(running.replay, annotations=acts)
    yield StrictTool.of(many.run_plan, annotations=acts)
    yield StrictTool.of(reading.run_status, annotations=reads, structured=True)
    yield StrictTool.of(reading.query_traces, annotations=reads, structured=True)
    yield StrictTool.of(reading.get_trace, annotations=reads, meta=_LONG)
    yield StrictTool.of(reading.list_sessions, annotations=reads, structured=True)
    yield StrictTool.of(reading.usage, annotations=reads, structured=True)
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
