"""Jobs the conformance suite wants to see as tasks: they sleep, fail and ask. The extension is the one of runs."""

import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
from anyio.abc import TaskGroup
from mcp.server import MCPServer
from mcp.server.mcpserver import Context, require_client_extension
from mcp.server.mcpserver.exceptions import ToolError
from mcp.shared.exceptions import MCPError
from mcp_types import (
    INTERNAL_ERROR,
    CallToolResult,
    ElicitRequest,
    ElicitRequestFormParams,
    ElicitResult,
    InputRequests,
    InputRequiredResult,
    TextContent,
)

from mcp_tools.tasks import EXTENSION_ID, RequestContext, TaskSource, TaskState, TaskStatus, answer_with_task
from orchestrator.store import now_us

POLL_MS = 100
TTL_MS = 600_000


def form(message: str, **properties: str) -> ElicitRequest:
    """A question to the user; ``properties`` are names and JSON types of the fields."""
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: {"type": kind} for name, kind in properties.items()},
        "required": list(properties),
    }
    return ElicitRequest(params=ElicitRequestFormParams(message=message, requested_schema=schema))


def answered(ctx: Context, key: str, name: str) -> Any:
    """What the user entered into the field of the form, None if the call does not say."""
    response = (ctx.input_responses or {}).get(key)
    if isinstance(response, ElicitResult) and response.content:
        return response.content.get(name)
    return None


def text(words: str, *, is_error: bool = False) -> CallToolResult:
    return CallToolResult(content=[TextContent(type="text", text=words)], is_error=is_error)


@dataclass
class Job:
    """Work in the background that may ask its client."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_us: int = field(default_factory=now_us)
    updated_us: int = field(default_factory=now_us)
    status: TaskStatus = "working"
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    asked: InputRequests = field(default_factory=dict)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    all_answered: anyio.Event = field(default_factory=anyio.Event)

    async def run(self, work: "Work") -> None:
        with self.scope:
            try:
                self._end("completed", result=await work(self))
            except ToolError as error:
                self._end("completed", result=text(str(error), is_error=True))
            except MCPError as error:
                self.error = {"code": error.code, "message": str(error)}
                self._end("failed")
        if self.scope.cancelled_caught:
            self._end("cancelled")

    def _end(self, status: TaskStatus, result: CallToolResult | None = None) -> None:
        self.status, self.updated_us, self.asked = status, now_us(), {}
        self.result = result and result.model_dump(by_alias=True, mode="json", exclude_none=True)

    async def ask(self, requests: InputRequests) -> None:
        """Wait until the client has answered all of them."""
        self.status, self.asked, self.all_answered = "input_required", dict(requests), anyio.Event()
        await self.all_answered.wait()
        self.status = "working"

    def hear(self, responses: Mapping[str, Any]) -> None:
        self.asked = {key: request for key, request in self.asked.items() if key not in responses}
        if self.status == "input_required" and not self.asked:
            self.all_answered.set()

    def state(self) -> TaskState:
        inputs = {
            key: request.model_dump(by_alias=True, mode="json", exclude_none=True)
            for key, request in self.asked.items()
        }
        return TaskState(
            id=self.id,
            status=self.status,
            created_us=self.created_us,
            updated_us=self.updated_us,
            poll_ms=POLL_MS,
            ttl_ms=TTL_MS,
            result=self.result,
            error=self.error,
            inputs=inputs,
        )


Work = Callable[[Job], Awaitable[CallToolResult]]


class Jobs:
    """A ``TaskSource`` of jobs; whatever is none, ``others`` may know."""

    def __init__(self, others: TaskSource, task_group: TaskGroup) -> None:
        self._others = others
        self._task_group = task_group
        self._jobs: dict[str, Job] = {}

    def answer(self, ctx: Context, work: Work) -> Awaitable[CallToolResult]:
        """The answer to a call: a task if the client knows tasks, or else the result of the work."""
        job = Job()
        if not answer_with_task(ctx, job.id):
            return work(job)
        self._jobs[job.id] = job
        self._task_group.start_soon(job.run, work)
        return _nothing()

    async def get(self, ctx: RequestContext, task_id: str) -> TaskState:
        job = self._jobs.get(task_id)
        return await self._others.get(ctx, task_id) if job is None else job.state()

    async def update(self, ctx: RequestContext, task_id: str, responses: Mapping[str, Any]) -> None:
        if (job := self._jobs.get(task_id)) is None:
            return await self._others.update(ctx, task_id, responses)
        return job.hear(responses)

    async def cancel(self, ctx: RequestContext, task_id: str) -> None:
        if (job := self._jobs.get(task_id)) is None:
            return await self._others.cancel(ctx, task_id)
        return job.scope.cancel()


async def _nothing() -> CallToolResult:
    return CallToolResult(content=[])


def add_jobs(server: MCPServer, jobs: Jobs) -> None:  # noqa: C901  # one small tool after the other
    """The tools of the suite's ``tasks-*`` scenarios."""

    async def greet(name: str) -> CallToolResult:
        """Greets, at once."""
        return text(f"Hello, {name}!")

    async def slow_compute(seconds: float, ctx: Context, label: str = "") -> CallToolResult:
        """Takes its time."""

        async def work(_: Job) -> CallToolResult:
            await anyio.sleep(seconds)
            return text(f"computed {label}")

        return await jobs.answer(ctx, work)

    async def failing_job(ctx: Context) -> CallToolResult:
        """Fails, as a task only."""
        require_client_extension(ctx.request_context, EXTENSION_ID)

        async def work(_: Job) -> CallToolResult:
            raise ToolError("the job failed")

        return await jobs.answer(ctx, work)

    async def protocol_error_job(ctx: Context) -> CallToolResult:
        """Ends with a JSON-RPC error."""

        async def work(_: Job) -> CallToolResult:
            raise MCPError(code=INTERNAL_ERROR, message="the job broke the protocol")

        return await jobs.answer(ctx, work)

    async def confirm_delete(filename: str, ctx: Context) -> CallToolResult:
        """Asks first, as a task only."""
        require_client_extension(ctx.request_context, EXTENSION_ID)

        async def work(job: Job) -> CallToolResult:
            await job.ask({"confirm-1": form(f"Delete {filename}?", confirm="boolean")})
            return text(f"{filename} was deleted")

        return await jobs.answer(ctx, work)

    async def multi_input(ctx: Context) -> CallToolResult:
        """Asks two things at a time, as a task only."""
        require_client_extension(ctx.request_context, EXTENSION_ID)

        async def work(job: Job) -> CallToolResult:
            await job.ask({"name-1": form("Who?", name="string"), "confirm-1": form("Sure?", confirm="boolean")})
            return text("both were answered")

        return await jobs.answer(ctx, work)

    async def test_tool_with_task(ctx: Context) -> CallToolResult | InputRequiredResult:
        """Asks before it becomes a task."""
        name = answered(ctx, "user_name", "name")
        if name is None:
            return InputRequiredResult(input_requests={"user_name": form("What is your name?", name="string")})

        async def work(_: Job) -> CallToolResult:
            return text(f"Hello, {name}!")

        return await jobs.answer(ctx, work)

    for tool in (greet, slow_compute, failing_job, protocol_error_job, confirm_delete, multi_input):
        server.add_tool(tool)
    server.add_tool(test_tool_with_task)
