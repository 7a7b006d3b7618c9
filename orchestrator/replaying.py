"""A run of the record asked for again: what it was asked, from where it started, perhaps of another model."""

from typing import Any

from orchestrator.admission import MAX_TURNS
from orchestrator.errors import ConfigError
from orchestrator.runtime import Runtime
from orchestrator.store import Run
from orchestrator.task import Task

#: Options of a run that its task does not have.
_NOT_OF_THE_TASK = ("limits", "session", "fork", "fork_turn", "model", "step", "cwd")


async def replay_task(
    rt: Runtime,
    run: Run,
    *,
    onwards: bool = False,
    prompt: str | None = None,
    agent: str | None = None,
    model: str | None = None,
    **more: Any,
) -> Task:
    """The task that repeats a run, or goes on from its end (``onwards``). The run and its session stay as they are.

    A run that went on with a session is repeated in a copy of it that ends where the run began. ``prompt``,
    ``agent`` and ``model`` replace what it had; ``more`` are further fields of the task.

    Raises ConfigError for what cannot be repeated: a plan, and ``onwards`` without a prompt or a session.
    """
    if run.kind != "agent" or run.prompt is None:
        raise ConfigError(
            f"run {run.id} is a {run.kind}", advice="Repeat a run of an agent, or run the plan again."
        )
    if onwards and (prompt is None or run.session_id is None):
        lacks = "no session to go on from" if run.session_id is None else "no prompt for what comes next"
        raise ConfigError(f"run {run.id} has {lacks}", advice="Repeat it from its beginning, or give a prompt.")
    kept = {name: value for name, value in run.options.items() if name not in _NOT_OF_THE_TASK}
    return Task(
        **{**kept, **more},
        **(await _end_of(rt, run) if onwards else await _beginning_of(rt, run)),
        agent=agent or run.name,
        prompt=run.prompt if prompt is None else prompt,
        model=model or run.options.get("model"),
        cwd=run.cwd,
    )


async def _end_of(rt: Runtime, run: Run) -> dict[str, Any]:
    return {"session": run.session_id, "fork": True, "fork_turn": await _turn_of(rt, run)}


async def _beginning_of(rt: Runtime, run: Run) -> dict[str, Any]:
    """Which part of which session the run began with."""
    if run.session_mode == "fork":
        return {"session": run.source_session_id, "fork": True, "fork_turn": run.options.get("fork_turn")}
    if run.session_mode == "continue" and (before := await _turn_of(rt, run) - 1):
        return {"session": run.session_id, "fork": True, "fork_turn": before}
    return {}


async def _turn_of(rt: Runtime, run: Run) -> int:
    """Which turn of its session the run was, counted from 1."""
    assert run.session_id is not None
    earlier = await rt.store.runs(session_id=run.session_id, before_us=run.created_us, limit=MAX_TURNS)
    return sum(each.num_turns > 0 for each in earlier) + 1
