"""Lists and states as structured results: what clients get as JSON. Pure.

What is not known, or does not apply, is left out of a row.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, cast

from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

from mcp_tools.results import PROMPT_CHARS, TEXT_CHARS, TraceRow, cut, iso, trace_row
from orchestrator.limits import Limits
from orchestrator.store import Run, SessionView, Sums


class Group(TypedDict, total=False):
    """``failed``: timed out and interrupted too. ``unknown_cost``: runs not in ``cost_usd``."""

    key: str
    runs: int
    ok: int
    failed: int
    cancelled: int
    unfinished: int
    cost_usd: float
    unknown_cost: int
    tokens: int
    seconds: float


class Traces(TypedDict):
    """``next``: cursor of the next page."""

    runs: NotRequired[list[TraceRow]]
    groups: NotRequired[list[Group]]
    next: str | None


# As in a group: ``cost_usd`` adds what is known, ``unknown_cost`` counts the runs that are not in it.
class Use(TypedDict, total=False):
    key: str
    runs: int
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    cost_usd: float
    unknown_cost: int


class Left(TypedDict, total=False):
    """What nothing limits is left out."""

    usd: float
    tokens: int
    turns: int
    runs: int
    seconds: float


class UsageReport(TypedDict):
    """``next``: cursor of more groups; ``total`` has all."""

    total: Use
    groups: list[Use]
    left: NotRequired[Left]
    next: str | None


class SessionItem(TypedDict, total=False):
    """``in_use_by``: the run that holds it now."""

    session_id: str
    agent: str
    project: str
    turns: int
    last_used: str
    last_run: str
    in_use_by: str
    forked_from: str
    prompt: str


class Sessions(TypedDict):
    """``next``: cursor of the next page."""

    sessions: list[SessionItem]
    next: str | None


class State(TypedDict, total=False):
    """``seconds`` since it began or was asked for. ``resumes``: when it goes on."""

    run_id: str
    agent: str
    status: str
    activity: str
    resumes: str
    model: str
    tokens: int
    cost_usd: float
    seconds: float
    session_id: str
    error: str


class States(TypedDict):
    """The runs in the order asked for."""

    runs: list[State]


def run_page(runs: Sequence[Run], following: str | None) -> Traces:
    return {"runs": [trace_row(run) for run in runs], "next": following}


def group_row(sums: Sums) -> Group:
    row = {
        "key": sums.key,
        "runs": sums.runs,
        "ok": sums.ok,
        "failed": sums.failed or None,
        "cancelled": sums.cancelled or None,
        "unfinished": sums.unfinished or None,
        "cost_usd": round(sums.cost_usd, 6),
        "unknown_cost": sums.unknown_cost or None,
        "tokens": sums.input_tokens + sums.output_tokens + sums.cache_read_tokens + sums.cache_write_tokens,
        "seconds": round(sums.duration_us / 1e6, 1),
    }
    return cast("Group", _known(row))


def use_row(sums: Sums) -> Use:
    row = {
        "key": sums.key or None,
        **sums.model_dump(include=set(Use.__annotations__) - {"key"}),
        "cost_usd": round(sums.cost_usd, 6),
        "unknown_cost": sums.unknown_cost or None,
    }
    return cast("Use", _known(row))


def left_of(rest: Limits, now: float) -> Left:
    """``now`` in seconds of the monotonic clock, as the limits' deadline."""
    row = {
        "usd": None if rest.usd is None else round(rest.usd, 6),
        "tokens": rest.tokens,
        "turns": rest.turns,
        "runs": rest.runs,
        "seconds": None if rest.deadline is None else round(max(0.0, rest.deadline - now), 1),
    }
    return cast("Left", _known(row))


def session_row(session: SessionView) -> SessionItem:
    row = {
        "session_id": session.id,
        "agent": session.agent,
        "project": session.project,
        "turns": session.turns,
        "last_used": iso(session.updated_us),
        "last_run": session.run_id,
        "in_use_by": session.locked_by,
        "forked_from": session.parent_id,
        "prompt": cut(" ".join((session.prompt or "").split()), PROMPT_CHARS) or None,
    }
    return cast("SessionItem", _known(row))


def state_row(run: Run, activity: str | None, now_us: int) -> State:
    """``activity`` is what a run that goes on does now."""
    row = {
        "run_id": run.id,
        "agent": run.name,
        "status": run.status,
        "activity": None if run.ended else activity,
        "resumes": iso(run.resume_at_us) if run.status == "waiting" and run.resume_at_us else None,
        "model": run.model_used or run.model_requested,
        "tokens": run.usage.total_tokens,
        "cost_usd": None if run.cost_usd is None else round(run.cost_usd, 6),
        "seconds": round(((run.ended_us or now_us) - (run.started_us or run.created_us)) / 1e6, 1),
        "session_id": run.session_id,
        "error": error_line(run),
    }
    return cast("State", _known(row))


def error_line(run: Run) -> str | None:
    """``code: message`` of what ended the run; None if nothing did."""
    return f"{run.error.get('code')}: {cut(str(run.error.get('message', '')), TEXT_CHARS)}" if run.error else None


def _known(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}
