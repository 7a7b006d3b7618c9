"""The Tasks extension of MCP: a call is answered with a task at once, and its client polls for the result.

A client that declares the extension need not hold a request open while an agent works, and finds the task again
after either side was restarted. What a task is, a ``TaskSource`` knows; here is only how tasks look on the wire.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.extension import Extension, MethodBinding
from mcp.server.mcpserver import Context, require_client_extension
from mcp.shared.exceptions import MCPError
from mcp.shared.inbound import MCP_NAME_HEADER, decode_header_value
from mcp_types import HEADER_MISMATCH, INVALID_PARAMS, CallToolRequestParams, RequestParams
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import Field

from mcp_tools.results import iso

EXTENSION_ID = "io.modelcontextprotocol/tasks"
#: Claude Code refuses an answer whose task has a longer id, and what was begun would be lost to it.
MAX_ID_CHARS = 128

TaskStatus = Literal["working", "input_required", "completed", "failed", "cancelled"]
Json = dict[str, Any]
RequestContext = ServerRequestContext[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskState:
    """A task as it is now. Times are microseconds since 1970 UTC.

    ``ttl_ms`` is how long after its creation it may be asked for, None for ever; ``poll_ms`` when to ask next.
    ``result`` is what the call would have been answered with, errors of the tool included; ``error`` the JSON-RPC
    error of a ``failed`` task; ``inputs`` the requests to the client that an ``input_required`` one waits for.
    """

    id: str
    status: TaskStatus
    created_us: int
    updated_us: int
    poll_ms: int
    ttl_ms: int | None = None
    message: str | None = None
    result: Json | None = None
    error: Json | None = None
    inputs: Json | None = None

    def handle(self) -> Json:
        """The task in the answer to the call that began it."""
        told = {
            "taskId": self.id,
            "status": self.status,
            "createdAt": iso(self.created_us),
            "lastUpdatedAt": iso(max(self.created_us, self.updated_us)),
            "ttlMs": self.ttl_ms,
            "pollIntervalMs": self.poll_ms,
        }
        return told if self.message is None else {**told, "statusMessage": self.message}

    def wire(self) -> Json:
        """The task in the answer to tasks/get: with what its status calls for."""
        payloads = {"result": self.result, "error": self.error, "inputRequests": self.inputs}
        due = {"completed": "result", "failed": "error", "input_required": "inputRequests"}.get(self.status)
        return self.handle() if due is None else {**self.handle(), due: payloads[due]}


class TaskSource(Protocol):
    """Where tasks are. Each method raises MCPError (``unknown_task``) for one that this request may not see."""

    async def get(self, ctx: RequestContext, task_id: str) -> TaskState:
        """The task as it is now."""

    async def update(self, ctx: RequestContext, task_id: str, responses: Mapping[str, Any]) -> None:
        """Take in answers to ``TaskState.inputs``. Those that nobody waits for are ignored."""

    async def cancel(self, ctx: RequestContext, task_id: str) -> None:
        """Ask for its end. A task that has ended stays as it is."""


@dataclass(kw_only=True)
class TaskRequest(RequestContext):
    """A tools/call that may be answered with a task; ``task_id`` says that it is."""

    task_id: str | None = None

    @classmethod
    def of(cls, ctx: RequestContext) -> "TaskRequest":
        return cls(**{each.name: getattr(ctx, each.name) for each in fields(ServerRequestContext)})


def answer_with_task(ctx: Context, task_id: str) -> bool:
    """From within a tool: have its call answered with this task, if the client can do with one of this name.

    What the tool then returns is dropped. The task must be on record already: the client may ask for it at once.
    """
    request = ctx.request_context
    if not isinstance(request, TaskRequest) or len(task_id) > MAX_ID_CHARS:
        return False
    request.task_id = task_id
    return True


def unknown_task(task_id: str, advice: str = "") -> MCPError:
    """The answer for a task that does not exist, or is none of the caller's business."""
    message = f"no task {task_id!r} is known here" + (f". {advice}" if advice else "")
    return MCPError(code=INVALID_PARAMS, message=message, data={"taskId": task_id})


class TaskParams(RequestParams):
    """Parameters of tasks/get and tasks/cancel."""

    task_id: str = Field(alias="taskId")


class UpdateParams(TaskParams):
    """Parameters of tasks/update."""

    input_responses: dict[str, Any] = Field(alias="inputResponses")


class Tasks(Extension):
    """The extension, over the tasks of ``source``. Which calls become tasks, their tools decide."""

    identifier = EXTENSION_ID

    def __init__(self, source: TaskSource) -> None:
        self._source = source

    def methods(self) -> Sequence[MethodBinding]:
        versions = frozenset(MODERN_PROTOCOL_VERSIONS)
        return [
            MethodBinding("tasks/get", TaskParams, self._get, versions),
            MethodBinding("tasks/update", UpdateParams, self._update, versions),
            MethodBinding("tasks/cancel", TaskParams, self._cancel, versions),
        ]

    async def intercept_tool_call(
        self,
        params: CallToolRequestParams,  # noqa: ARG002  # the SDK's
        ctx: RequestContext,
        call_next: CallNext,
    ) -> HandlerResult:
        if not _declared(ctx):
            return await call_next(ctx)
        request = TaskRequest.of(ctx)
        answer = await call_next(request)
        if request.task_id is None:
            return answer
        state = await self._source.get(ctx, request.task_id)
        return {"resultType": "task", **state.handle()}

    async def _get(self, ctx: RequestContext, params: TaskParams) -> HandlerResult:
        _check(ctx, params)
        return (await self._source.get(ctx, params.task_id)).wire()

    async def _update(self, ctx: RequestContext, params: UpdateParams) -> HandlerResult:
        _check(ctx, params)
        await self._source.update(ctx, params.task_id, params.input_responses)
        return {}

    async def _cancel(self, ctx: RequestContext, params: TaskParams) -> HandlerResult:
        _check(ctx, params)
        await self._source.cancel(ctx, params.task_id)
        return {}


async def check_listening(ctx: RequestContext, call_next: CallNext) -> HandlerResult:
    """Middleware: only who has declared the extension may ask to be told of tasks. Raises MCPError.

    Nobody is told, which is allowed: what the server agrees to tell of has no tasks in it, and clients poll.
    """
    asked = (ctx.params or {}).get("notifications") if ctx.method == "subscriptions/listen" else None
    if isinstance(asked, dict) and asked.get("taskIds"):
        require_client_extension(ctx, EXTENSION_ID)
    return await call_next(ctx)


def _declared(ctx: RequestContext) -> bool:
    """Whether this request says that its client knows tasks. Older protocols have no form for them."""
    capabilities = ctx.session.client_capabilities
    declared = capabilities.extensions if capabilities else None
    return EXTENSION_ID in (declared or {}) and ctx.protocol_version in MODERN_PROTOCOL_VERSIONS


def _check(ctx: RequestContext, params: TaskParams) -> None:
    """Raises MCPError for a client that has not declared the extension, or whose header names another task."""
    require_client_extension(ctx, EXTENSION_ID)
    headers: Mapping[str, str] | None = getattr(ctx.request, "headers", None)
    # The SDK checks the header of its own methods only. Whoever routes by it must not be told otherwise than we.
    if headers is not None and decode_header_value(headers.get(MCP_NAME_HEADER)) != params.task_id:
        raise MCPError(
            code=HEADER_MISMATCH,
            message=f"the {MCP_NAME_HEADER} header does not match the request body's 'taskId' parameter",
        )
