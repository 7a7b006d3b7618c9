"""Who calls: from the request's headers and ``_meta`` to the run, the span and the project behind it."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcp.server.mcpserver import Context

from orchestrator.errors import ConfigError, RunNotFoundError, SessionNotFoundError
from orchestrator.runtime import Runtime
from orchestrator.store import Run
from orchestrator.tracing import SpanContext

#: What the stdio shim says of its surroundings, in the ``_meta`` of each tools/call.
CALLER_KEY = "orchestrator/caller"

#: Turns of a conversation that are looked through for what it began, newest first.
_TURNS = 1000
_BEARER = re.compile(r"\s*bearer\s+(\S+)\s*", re.IGNORECASE)
_RUN_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Caller:
    """The other end of a request.

    ``run`` is the run that calls, if an agent does; it may see and touch what is below it. Without one the
    caller has all rights. ``span`` is the exact place a run started now hangs at. ``facts`` are kept with a
    top-level run: ``session_id``, ``project_dir``, ``client``, ``tool_use_id``, as far as known.
    """

    run: Run | None = None
    span: SpanContext | None = None
    facts: dict[str, Any] | None = None

    @property
    def project(self) -> Path | None:
        """The project directory the caller works in, as far as known."""
        if self.run is not None:
            return Path(self.run.project)
        named = (self.facts or {}).get("project_dir")
        return Path(named).resolve() if named else None

    def directory(self, cwd: str | None, *, continues: bool) -> Path | None:
        """Where a task is to work: as asked, seen from the caller's project. None leaves it to the runtime.

        A session that ``continues`` stays where it is: it could not be found from elsewhere. Raises ConfigError.
        """
        if cwd is not None and "\0" in cwd:
            raise ConfigError("cwd has a NUL character in it", advice="Give the path of a directory.")
        project = (self.facts or {}).get("project_dir")
        if cwd is None:
            return Path(project) if project and not continues else None
        return Path(project or "") / cwd


#: Somebody of whom nothing is known: no agent.
PERSON = Caller()


def bearer(headers: Mapping[str, str]) -> str | None:
    """The bearer token in the headers."""
    match = _BEARER.fullmatch(headers.get("authorization", ""))
    return match[1] if match else None


async def caller_of(rt: Runtime, ctx: Context) -> Caller:
    """Who sent this request. An agent's own token says which run it is; anyone else may do everything.

    A trusted client may call on behalf of a run too: a shim started somewhere below an agent must not begin a
    new tree, or nesting would have no limit.
    """
    headers: Mapping[str, str] = ctx.headers or {}
    meta: Mapping[str, Any] = ctx.request_context.meta or {}
    claims = meta.get(CALLER_KEY)
    claims = claims if isinstance(claims, dict) else {}
    span = SpanContext.parse(headers.get("traceparent") or _text(meta.get("traceparent")))
    token = bearer(headers)
    run_id = rt.tokens.run_of(token) if token else None
    if token and run_id is None and rt.tokens.knows(token):
        raise RunNotFoundError("this process works for no run now, so there is nobody to act for")
    run = await rt.store.run(run_id) if run_id else await _claimed(rt, claims.get("run_id"))
    if run is not None:
        return Caller(run, span if span is not None and span.trace_id == run.trace_id else None)
    return Caller(None, span, _facts(ctx, meta, claims) or None)


async def visible(rt: Runtime, caller: Caller, run_id: str) -> Run:
    """The run of that id, or of the only id that starts so, if the caller may touch it. Raises RunNotFoundError."""
    if caller.run is None:
        return await rt.store.run(run_id)
    # Looked for among those alone: other words for runs elsewhere would tell an agent, digit by digit, all ids.
    below = [run for run in await rt.store.tree(caller.run.id) if run.id != caller.run.id]
    starts = run_id.lower()
    found = [run for run in below if starts and run.id.startswith(starts)]
    exact = [run for run in found if run.id == starts] or found
    if len(exact) != 1:
        reason = "is the start of several" if exact else "is none"
        raise RunNotFoundError(f"{run_id!r} {reason} of the runs you started")
    return exact[0]


async def check_session(rt: Runtime, caller: Caller, session_id: str) -> None:
    """Whether the caller may go on with the session or fork it. Raises SessionNotFoundError.

    An agent may with those of its own runs and of the runs below these. Its own are all turns of its conversation:
    what it began in an earlier one it still knows of.
    """
    if caller.run is None:
        return
    own = {caller.run.id}
    if caller.run.session_id is not None:
        own |= {run.id for run in await rt.store.runs(session_id=caller.run.session_id, limit=_TURNS)}
    for run_id in own:
        if await rt.store.runs(session_id=session_id, within=run_id, limit=1):
            return
    # The same error as for an id that does not exist.
    raise SessionNotFoundError(f"no session {session_id!r} is known here")


async def _claimed(rt: Runtime, run_id: Any) -> Run | None:
    if isinstance(run_id, str) and _RUN_ID.fullmatch(run_id):
        with suppress(RunNotFoundError):
            run = await rt.store.run(run_id)
            return None if run.ended else run
    return None


def _facts(ctx: Context, meta: Mapping[str, Any], claims: Mapping[str, Any]) -> dict[str, str]:
    client = ctx.session.client_params
    info = client.client_info if client else None
    found = {
        "session_id": _text(claims.get("session_id")),
        "project_dir": _text(claims.get("project_dir")),
        "client": f"{info.name}/{info.version}" if info else None,
        # The same id is on the client's own tool span: it joins the two traces where no traceparent came.
        "tool_use_id": _text(meta.get("claudecode/toolUseId")),
        # An error of the tool names it, also when it is told later.
        "tool": _text((ctx.request_context.params or {}).get("name")),
    }
    return {name: value for name, value in found.items() if value}


def _text(value: Any) -> str | None:
    # A NUL is in no name or path; the file system would raise on it.
    return value if isinstance(value, str) and value and "\0" not in value else None
