"""What a caller may read, found by what it says: ids, starts of ids, names. If nothing is, what is near is told.

Reading reaches one step further than touching (``context.visible``): an agent may read its own run too.
"""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from mcp_tools.context import Caller
from orchestrator.endings import cost_of
from orchestrator.errors import AgentNotFoundError, ConfigError, RunNotFoundError, SessionNotFoundError
from orchestrator.outcome import Usage
from orchestrator.runtime import Runtime
from orchestrator.store import Run, RunLabel, SessionView

#: Turns of a conversation that are looked through for what it began, newest first.
_TURNS = 1000
#: How alike ids are for one to be taken for a slip of the other: three wrong digits of sixteen.
_ALIKE = 0.8
_NEAR = 3
#: Names told where one was wrong.
_KNOWN = 50


def own_tree(caller: Caller) -> str | None:
    """The run below which a caller may read; None: it may read everything."""
    return caller.run.id if caller.run else None


async def readable(rt: Runtime, caller: Caller, run_id: str) -> Run:
    """The run of that id, or of the only id that starts so, if the caller may read it.

    Raises RunNotFoundError, which says the same of runs elsewhere as of none, and names near ones.
    """
    within, starts = own_tree(caller), run_id.lower()
    found = await rt.store.labels(starts=starts, within=within, limit=_NEAR) if starts else []
    exact = [run for run in found if run.id == starts] or found
    if len(exact) == 1:
        return as_now(rt, await rt.store.run(exact[0].id))
    if exact:
        raise _not_found(f"{run_id!r} is the start of several run ids", exact)
    known = await rt.store.labels(within=within)
    among = " among those you started" if caller.run else ""
    raise _not_found(f"no run {run_id!r}{among}", near_runs(run_id, known))


def near_runs(wanted: str, known: Sequence[RunLabel]) -> list[RunLabel]:
    """The runs that may be meant: with an id like it, or of an agent that is called so."""
    alike = difflib.get_close_matches(wanted.lower(), [run.id for run in known], _NEAR, _ALIKE)
    return [run for run in known if run.id in alike or run.name == wanted][:_NEAR]


def _not_found(reason: str, near: Sequence[RunLabel]) -> RunNotFoundError:
    named = " or ".join(f"{run.id} ({run.name}, {run.status})" for run in near)
    return RunNotFoundError(
        f"{reason}; did you mean {named}?" if named else reason,
        details={"near": [run.id for run in near]} if near else None,
    )


def as_now(rt: Runtime, run: Run) -> Run:
    """The run with what is known of it while it goes on here, and is stored when it ends."""
    live = rt.live.get(run.id)
    if live is None or run.ended or run.kind == "plan":
        return rt.unwritten.get(run.id, run)  # its end could not be stored yet
    progress, (cost, basis) = live.progress, cost_of(live)
    return run.model_copy(
        update={
            "text": rt.store.redact.text(progress.text) or run.text,
            "model_used": progress.model or run.model_used,
            "cost_usd": cost,
            "cost_basis": basis,
            "num_turns": sum(each.num_turns for each in live.attempts),
            **sum((each.usage for each in live.attempts), Usage()).model_dump(),
        }
    )


async def check_name(rt: Runtime, caller: Caller, name: str) -> None:
    """Whether there is, or was, an agent or a plan of that name. Raises AgentNotFoundError naming near ones."""
    ran = await rt.store.names(within=own_tree(caller))
    if name in ran:
        return
    catalog = await rt.agents_of(caller.project or rt.config.project_dir)
    known = {*(agent.id for agent in catalog.agents()), *ran}
    if name in known:
        return
    near = difflib.get_close_matches(name, sorted(known))
    meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise AgentNotFoundError(
        f"no agent or plan is called {name!r}{meant}", details={"known": sorted(known)[:_KNOWN]}
    )


async def sessions_below(rt: Runtime, caller: Caller) -> list[str] | None:
    """The runs whose sessions, and those of the runs below them, are the caller's; None: it may read all.

    As for going on with a session: all turns of an agent's conversation are its own.
    """
    if caller.run is None:
        return None
    session_id = caller.run.session_id
    turns = await rt.store.runs(session_id=session_id, limit=_TURNS) if session_id else []
    return list({caller.run.id, *(run.id for run in turns)})


async def readable_session(rt: Runtime, caller: Caller, session_id: str) -> SessionView:
    """The session of that id, if the caller may read it. Raises SessionNotFoundError."""
    found = await rt.store.session_views(ids=[session_id], below=await sessions_below(rt, caller), limit=1)
    if not found:
        raise SessionNotFoundError(f"no session {session_id!r} is known here")
    return found[0]


def project_of(rt: Runtime, caller: Caller, named: str) -> str:
    """A project as runs have it, from a path seen from the caller's own project. Raises ConfigError."""
    if "\0" in named:
        raise ConfigError("project has a NUL character in it", advice="Give the path of a project's directory.")
    # realpath takes whatever it gets, links that lead round in circles included.
    return os.path.realpath(Path(caller.project or rt.config.project_dir, named))
