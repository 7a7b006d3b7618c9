"""What callers get to read: answers, failures and traces, shaped for a model. Pure."""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NotRequired, cast

from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

from orchestrator.agents import Agent, AgentProblem
from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.outcome import Outcome
from orchestrator.store import Run

PARTIAL_CHARS = 2000
PROMPT_CHARS = 200
TEXT_CHARS = 500
DESCRIPTION_CHARS = 300
#: Broken agent files told of.
PROBLEMS = 20

# What the errors advise is for a terminal; a model has tools instead.
_ADVICE = {
    "agent_not_found": "Choose one of the known agents; list_agents describes them.",
    "run_not_found": "Find runs with query_traces.",
    "session_not_found": "Find sessions with list_sessions, or start a fresh one.",
}

_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_EPOCH = datetime.fromtimestamp(0, UTC)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class TraceRow(TypedDict, total=False):
    """``resumes``: when a waiting run goes on."""

    run_id: str
    parent_id: str
    agent: str
    step: str
    status: str
    resumes: str
    model: str
    prompt: str
    text: str
    cost_usd: float
    tokens: int
    started: str
    duration_ms: int
    session_id: str
    trace_id: str
    caller: dict[str, Any]
    error: str


class AgentRow(TypedDict, total=False):
    """``model``: unless a call names another."""

    name: str
    description: str
    model: str
    tools: list[str]


class Agents(TypedDict):
    """``problems``: of files that give no agent. ``next``: cursor of more agents."""

    agents: list[AgentRow]
    problems: list[str]
    next: NotRequired[str]


def answer(outcome: Outcome, tree: Sequence[Run] = ()) -> str:
    """All the agent has said, as it said it, then one line of facts."""
    said = compact(outcome.structured) if outcome.has_structured else outcome.text
    return "\n".join([said, facts(outcome, tree)] if said else [facts(outcome, tree)])


def report(outcome: Outcome, tree: Sequence[Run] = ()) -> str:
    """``answer``, and for a run that did not succeed one more line: its error as JSON."""
    if outcome.ok:
        return answer(outcome, tree)
    error = outcome.error or {}
    return f"{answer(outcome, tree)}\n{_details(error, {'message': _reason(error)})}"


def facts(outcome: Outcome, tree: Sequence[Run] = ()) -> str:
    """``[run_id=… status=… session=… cost=… tokens=… 4.2s]``

    ``tree`` is the run and all below it, from the store: what an agent has started is not in its own cost.
    """
    cost = _dollars(outcome.cost_usd)
    if len(tree) > 1 and tree[0].kind == "agent":
        costs = [outcome.cost_usd, *(run.cost_usd for run in tree[1:])]
        cost += f" (with what it started: {_dollars(_total(costs))})"
    parts = [f"run_id={outcome.run_id}", f"status={outcome.status}"]
    if outcome.session_id:
        parts.append(f"session={outcome.session_id}")
    parts += [f"cost={cost}", f"tokens={outcome.usage.total_tokens}"]
    if outcome.duration_ms is not None:
        parts.append(f"{outcome.duration_ms / 1000:.1f}s")
    return f"[{' '.join(parts)}]"


def _dollars(cost: float | None) -> str:
    return "unknown" if cost is None else f"${cost:.4f}"


def _total(costs: Sequence[float | None]) -> float | None:
    """The sum, unknown if a part is."""
    known = [cost for cost in costs if cost is not None]
    return sum(known) if len(known) == len(costs) else None


def pending(run: Run, doing: str, seconds: float) -> str:
    """A run that is not done yet is no error: what it does, and how to go on waiting."""
    doing = parked(run) or doing
    return f"run_id={run.id} still running ({doing}, {seconds:.0f} s); {_wait_for(run.id)}"


def parked(run: Run) -> str | None:
    """What a run waits for that has met a usage limit of the provider; None if it does not."""
    if run.status != "waiting" or run.resume_at_us is None:
        return None
    return f"{run.name}: waiting until {iso(run.resume_at_us)} for the end of a usage limit"


def failure(name: str, outcome: Outcome) -> str:
    """A run that did not succeed: one sentence for people, one line of JSON to decide from.

    Clients cut the text of errors, so of what the agent had said there is the end, and how to have the whole.
    """
    error, said = outcome.error or {}, outcome.text
    more: dict[str, Any] = {"run_id": outcome.run_id, "session_id": outcome.session_id, "partial_text": said}
    if len(said) > PARTIAL_CHARS:
        more["partial_text"] = said[-PARTIAL_CHARS:]
        more |= {"partial_text_chars": len(said), "whole_text": _wait_for(outcome.run_id)}
    return f"{name} {outcome.status.replace('_', ' ')}: {_reason(error)}\n{_details(error, more)}"


def refusal(error: OrchestratorError) -> str:
    """An error that is not about a run's end, in the same form."""
    return f"{error.message}\n{_details(error.to_dict(), {})}"


def _wait_for(run_id: str) -> str:
    return f"call run_wait({compact([run_id])})"


def _reason(error: dict[str, Any]) -> str:
    return str(error.get("message", "no reason was recorded"))


def _details(error: dict[str, Any], more: dict[str, Any]) -> str:
    """What can be decided from, in one line of JSON."""
    details = {key: _cut_value(value) for key, value in error.get("details", {}).items()}
    main = {name: error.get(name) for name in ("code", "retryable", "retry_after", "advice")}
    main["advice"] = _ADVICE.get(error.get("code", ""), main["advice"])
    return compact({name: value for name, value in (main | details | more).items() if value not in (None, "")})


def _cut_value(value: Any) -> Any:
    return value[-PARTIAL_CHARS:] if isinstance(value, str) else value


def several(parts: Sequence[tuple[Run, str]]) -> str:
    """Texts about several runs, each under a line that names its run."""
    return "\n\n".join(f"--- {run.name} {run.id} ---\n{text}" for run, text in parts)


def trace_row(run: Run) -> TraceRow:
    row = {
        "run_id": run.id,
        "parent_id": run.parent_id,
        "agent": run.name,
        "step": run.step,
        "status": run.status,
        "resumes": iso(run.resume_at_us) if run.status == "waiting" and run.resume_at_us else None,
        "model": run.model_used or run.model_requested,
        "prompt": cut(run.prompt or "", PROMPT_CHARS),
        "text": cut(run.text, TEXT_CHARS),
        "cost_usd": None if run.cost_usd is None else round(run.cost_usd, 6),
        "tokens": run.usage.total_tokens,
        "started": iso(run.started_us or run.created_us),
        "duration_ms": run.duration_ms,
        "session_id": run.session_id,
        "trace_id": run.trace_id,
        "caller": run.caller,
        "error": f"{run.error.get('code')}: {cut(run.error.get('message', ''), TEXT_CHARS)}" if run.error else None,
    }
    return cast("TraceRow", {name: value for name, value in row.items() if value not in (None, "")})


def agent_row(agent: Agent, model: str | None) -> AgentRow:
    row: AgentRow = {"name": agent.id, "description": cut(agent.description, DESCRIPTION_CHARS)}
    if model:
        row["model"] = model
    if agent.tools is not None:
        row["tools"] = list(agent.tools)
    return row


def problem_lines(problems: Sequence[AgentProblem]) -> list[str]:
    """``path:line: reason`` of each; if they are many, of the first."""
    lines = [f"{each.path}:{each.line or 1}: {cut(each.reason, DESCRIPTION_CHARS)}" for each in problems[:PROBLEMS]]
    left = len(problems) - PROBLEMS
    return [*lines, f"{left} more: `orchestrator agents list` has all"] if left > 0 else lines


def cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def iso(us: int) -> str:
    """Microseconds since 1970 as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(us / 1e6, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def instant(text: str, now_us: int) -> int:
    """``2026-11-20T09:00``, or how long ago (``30m``, ``2h``, ``3d``), as microseconds since 1970.

    A time without a zone is UTC, like the times we give. Raises ConfigError.
    """
    try:
        if match := _SPAN.fullmatch(text.strip().lower()):
            ago = timedelta(**{_UNITS[match[2]]: float(match[1])})
            return max(0, now_us - ago // timedelta(microseconds=1))
        moment = datetime.fromisoformat(text.strip())
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return max(0, (moment - _EPOCH) // timedelta(microseconds=1))
    except (ValueError, OverflowError):
        raise ConfigError(
            f"{text!r} is no time", advice="Give ISO 8601 (2026-11-20T09:00) or how long ago (30m, 2h, 3d)."
        ) from None


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
