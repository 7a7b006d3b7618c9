"""Rows of the store as typed objects."""

import json
from collections.abc import Collection, Mapping
from typing import Any, Literal, Self, TypedDict

from pydantic import BaseModel, ConfigDict

from orchestrator.outcome import ENDED, Outcome, RunStatus, Usage
from orchestrator.redaction import Redactor


class Run(BaseModel):
    """One run. Times are microseconds since 1970 UTC; ``cost_usd`` None means unknown.

    ``resume_at_us`` is when a ``waiting`` run goes on; ``fallback`` the CLI's error if the API answered instead.
    """

    model_config = ConfigDict(extra="forbid")

    id: str
    trace_id: str
    parent_id: str | None = None
    parent_span_id: str | None = None
    root_id: str
    depth: int
    kind: Literal["agent", "plan"]
    name: str
    step: str | None = None
    status: RunStatus = "queued"
    prompt: str | None = None
    text: str = ""
    structured: Any = None
    has_structured: bool = False
    error: dict[str, Any] | None = None
    agent: dict[str, Any] | None = None
    options: dict[str, Any] = {}
    source: str | None = None
    model_requested: str | None = None
    model_used: str | None = None
    project: str
    cwd: str
    session_id: str | None = None
    session_mode: str | None = None
    source_session_id: str | None = None
    caller: dict[str, Any] | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cost_usd: float | None = None
    cost_basis: Literal["cli", "estimate"] | None = None
    num_turns: int = 0
    budget_usd: float | None = None
    created_us: int
    started_us: int | None = None
    ended_us: int | None = None
    resume_at_us: int | None = None
    cancel_requested: bool = False
    fallback: dict[str, Any] | None = None
    instance_id: str

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """The run in a row of the database."""
        return cls(**{**row, **{name: json.loads(row[name]) for name in _JSON if row[name] is not None}})

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def duration_ms(self) -> int | None:
        """Time from start to end; None while the run goes on or if it never started."""
        if self.started_us is None or self.ended_us is None:
            return None
        return (self.ended_us - self.started_us) // 1000

    @property
    def usage(self) -> Usage:
        return Usage(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            cache_read_tokens=self.cache_read_tokens,
            cache_write_tokens=self.cache_write_tokens,
        )

    def outcome(self) -> Outcome:
        """What came of the run, as it stands now."""
        return Outcome(
            run_id=self.id,
            status=self.status,
            text=self.text,
            structured=self.structured,
            has_structured=self.has_structured,
            session_id=self.session_id,
            usage=self.usage,
            cost_usd=self.cost_usd,
            num_turns=self.num_turns,
            duration_ms=self.duration_ms,
            model=self.model_used or self.model_requested,
            error=self.error,
        )

    def columns(self, redact: Redactor) -> dict[str, Any]:
        """The row as SQL parameters, without secrets."""
        return to_columns(self.model_dump(), redact)


class RunFilters(TypedDict, total=False):
    """What ``Store.runs`` can be asked for. Times are microseconds since 1970 UTC.

    ``text`` is looked for in prompt and answer, ``within`` keeps to the subtree of that run, itself included.
    A run whose cost is unknown has none that could be compared; one that goes on has taken the time until now.
    ``past`` is ``created_us`` and id of the last row of the page before.
    """

    ids: Collection[str] | None
    kind: Literal["agent", "plan"] | None
    agent: str | None
    project: str | None
    session_id: str | None
    status: str | None
    parent_id: str | None
    step: str | None
    root_id: str | None
    trace_id: str | None
    text: str | None
    after_us: int | None
    before_us: int | None
    min_cost_usd: float | None
    max_cost_usd: float | None
    min_duration_us: float | None
    max_duration_us: float | None
    within: str | None
    past: tuple[int, str] | None


#: Columns that hold JSON.
_JSON = ("fallback", "structured", "error", "agent", "options", "caller")
#: Columns that hold what people and models wrote. Not ``source``: a plan that is resumed runs from it once more,
#: and with a marker in place of a value it would be another plan. Nor ids, names and paths: they find things.
_TEXTS = ("prompt", "text")


class StoredMessage(BaseModel):
    """One message of a run, ``body`` as the backend printed it."""

    seq: int
    at_us: int
    type: str
    subtype: str | None
    body: dict[str, Any]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        return cls(**{**row, "body": json.loads(row["body"])})


class SessionRow(BaseModel):
    """A conversation the backend keeps. ``locked_by`` is the run that holds it now."""

    id: str
    backend: str
    agent: str
    cwd: str
    home: str
    parent_id: str | None = None
    turns: int = 0
    last_run_id: str | None = None
    locked_by: str | None = None
    created_us: int
    updated_us: int


class SessionView(SessionRow):
    """A session with its last run: id, project and the beginning of its prompt. ``run_id`` None: none is known."""

    run_id: str | None = None
    project: str | None = None
    prompt: str | None = None


class RunLabel(BaseModel):
    """What people know a run by."""

    id: str
    name: str
    status: RunStatus


class Sums(BaseModel):
    """Runs added up: plans are counted, but cost and tokens are those of agents alone, which plans only pass on.

    ``failed`` are those that timed out or were interrupted too. ``cost_usd`` adds what is known, ``unknown_cost``
    says of how many runs that began it is not. ``duration_us`` adds times of work, which may have overlapped.
    """

    key: str
    runs: int
    ok: int
    failed: int
    cancelled: int
    unfinished: int
    cost_usd: float
    unknown_cost: int
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    duration_us: int


def to_columns(fields: Mapping[str, Any], redact: Redactor) -> dict[str, Any]:
    """Fields of a run as SQL parameters, without secrets."""
    texts = {name: redact.text(fields[name]) for name in _TEXTS if isinstance(fields.get(name), str)}
    documents = {name: to_json(fields[name]) for name in _JSON if name in fields}
    return {**fields, **texts, **{name: text and redact.json(text) for name, text in documents.items()}}


def to_json(value: Any) -> str | None:
    """Compact JSON, or None for None (SQL NULL)."""
    return None if value is None else json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=str)
