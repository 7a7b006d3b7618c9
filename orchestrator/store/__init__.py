"""The record: runs, their messages, sessions and agent preferences. The journal is the truth; spans are a copy."""

import os
import secrets
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, Unpack

import anyio

from orchestrator.errors import RunInterruptedError, RunNotFoundError, SessionBusyError, SessionNotFoundError
from orchestrator.limits import Budget, Limits, Spent
from orchestrator.outcome import ENDED
from orchestrator.redaction import Redactor
from orchestrator.store.database import Database, StoreError, open_sqlite
from orchestrator.store.liveness import Liveness, started
from orchestrator.store.queries import SUBTREE, GroupBy, Queries
from orchestrator.store.rows import (
    Run,
    RunFilters,
    RunLabel,
    SessionRow,
    SessionView,
    StoredMessage,
    Sums,
    to_columns,
    to_json,
)
from orchestrator.store.writer import Statement

__all__ = [
    "ENDED",
    "GroupBy",
    "Run",
    "RunFilters",
    "RunLabel",
    "SessionRow",
    "SessionView",
    "Store",
    "StoreError",
    "StoredMessage",
    "Sums",
    "now_us",
    "open_store",
]

InstanceKind = Literal["serve", "run", "library"]


def now_us() -> int:
    """Microseconds since 1970 UTC."""
    return time.time_ns() // 1000


@asynccontextmanager
async def open_store(
    path: Path, *, kind: InstanceKind = "library", redact: Redactor | None = None
) -> AsyncIterator["Store"]:
    """Open the store at ``path`` and register this process as an instance that may own runs.

    ``redact`` takes secrets out of what is written; by default it knows only the shapes of keys. Raises StoreError
    when the file cannot be used.
    """
    async with open_sqlite(path) as database:
        store = Store(database, secrets.token_hex(8), redact or Redactor())
        await store.register_instance(kind)
        try:
            yield store
        finally:
            with anyio.CancelScope(shield=True):
                await store.retire_instance()


class Store(Queries):
    """Typed methods over a Database. Everything that changes state returns after it is committed.

    What is written is redacted here, so that no secret reaches the file or its write-ahead log.
    """

    def __init__(self, database: Database, instance_id: str, redact: Redactor) -> None:
        self._db = database
        self.redact = redact
        self.instance_id = instance_id
        self._liveness = Liveness()
        self._given_up: list[str] = []

    # -- instances: who works on which run ---------------------------------------------------------------

    async def register_instance(self, kind: InstanceKind) -> None:
        pid = os.getpid()
        await self._db.write(
            (
                "INSERT INTO instances (id, kind, host, pid, pid_created, started_us, alive_us)"
                " VALUES (:id, :kind, :host, :pid, :created, :now, :now)",
                {
                    "id": self.instance_id,
                    "kind": kind,
                    "host": socket.gethostname(),
                    "pid": pid,
                    "created": started(pid),
                    "now": now_us(),
                },
            )
        )

    async def retire_instance(self) -> None:
        sql = "UPDATE instances SET ended_us = :now WHERE id = :id"
        await self._db.write_soon((sql, {"now": now_us(), "id": self.instance_id}))

    async def beat(self) -> None:
        """Give a sign of life; others take an instance that owns runs for dead after SILENT_US without one.

        Whoever was taken for dead (it slept) is alive again. The runs that were ended for it meanwhile are among
        ``cancels_requested``: their sessions may be in use elsewhere.
        """
        me = {"me": self.instance_id}
        row = await self._db.one("SELECT ended_us FROM instances WHERE id = :me", me)
        sql = "UPDATE instances SET alive_us = :now, ended_us = NULL WHERE id = :me"
        await self._db.write((sql, {**me, "now": now_us()}))
        if row is not None and row["ended_us"] is not None:
            lost = "SELECT id FROM runs WHERE instance_id = :me AND status = 'interrupted'"
            self._given_up = [run["id"] for run in await self._db.all(lost, me)]

    async def bury_dead_instances(self, *, now: int | None = None) -> list[str]:
        """Mark the instances that are gone as ended; returns their ids.

        Those of this host whose process is gone, those of other hosts that fell silent (``store.liveness``).
        """
        now = now or now_us()
        self._liveness.look(now)
        rows = await self._db.all("SELECT * FROM instances WHERE ended_us IS NULL")
        dead = [row["id"] for row in rows if self._liveness.is_gone(row, now)]
        sql = "UPDATE instances SET ended_us = :now WHERE id = :id"
        if dead:
            await self._db.write(*((sql, {"now": now, "id": instance}) for instance in dead))
        return dead

    async def interrupt_abandoned(self, *, now: int | None = None) -> list[Run]:
        """Mark the unfinished runs of instances that are gone as ``interrupted``, and free their sessions.

        What the agent had said stays as the run's text. Returns those runs.
        """
        now = now or now_us()
        self._liveness.look(now)
        rows = await self._db.all(
            "SELECT DISTINCT i.* FROM instances i JOIN runs r ON r.instance_id = i.id WHERE r.ended_us IS NULL"
        )
        gone = [row["id"] for row in rows if self._liveness.is_gone(row, now)]
        return [run for instance in gone for run in await self._interrupt_runs_of(instance)]

    async def _interrupt_runs_of(self, instance_id: str) -> list[Run]:
        where = "instance_id = :instance AND ended_us IS NULL"
        rows = await self._db.all(f"SELECT * FROM runs WHERE {where}", {"instance": instance_id})
        error = RunInterruptedError("the process that worked on this run ended without finishing it")
        # Whoever allowed it to wait is gone: nothing takes it up again by itself.
        parked = RunInterruptedError(
            "the process that kept this run waiting for the end of a usage limit ended; the run was not resumed",
            advice="Continue its session once the limit is over: what was done before it is kept there.",
        )
        params = {
            "instance": instance_id,
            "now": now_us(),
            "error": to_json(error.to_dict()),
            "parked": to_json(parked.to_dict()),
        }
        await self._db.write(
            (
                f"UPDATE sessions SET locked_by = NULL WHERE locked_by IN (SELECT id FROM runs WHERE {where})",
                params,
            ),
            (
                "UPDATE runs SET status = 'interrupted', ended_us = :now,"
                f" error = CASE status WHEN 'waiting' THEN :parked ELSE :error END WHERE {where}",
                params,
            ),
            ("UPDATE instances SET ended_us = coalesce(ended_us, :now) WHERE id = :instance", params),
        )
        return [Run.of(row) for row in rows]

    # -- runs ---------------------------------------------------------------------------------------------

    async def create_run(self, run: Run) -> None:
        """Store a new run. One that goes on with a session takes it in the same transaction.

        Raises SessionBusyError, and stores nothing, while another run holds the session.
        """
        columns = run.columns(self.redact)
        names = ", ".join(columns)
        marks = ", ".join(f":{name}" for name in columns)
        if run.session_mode != "continue" or run.session_id is None:
            await self._db.write((f"INSERT INTO runs ({names}) VALUES ({marks})", columns))
            return
        taken = "EXISTS (SELECT 1 FROM sessions WHERE id = :session_id AND locked_by = :id)"
        counts = await self._db.write(
            _hold_session(run.session_id, run.id),
            (f"INSERT INTO runs ({names}) SELECT {marks} WHERE {taken}", columns),
        )
        if not counts[1]:
            raise await self._busy(run.session_id)

    async def delete_run(self, run_id: str) -> None:
        """Remove the row of a run that was refused before it began."""
        await self._db.write(("DELETE FROM runs WHERE id = :id AND started_us IS NULL", {"id": run_id}))

    async def update_run(self, run_id: str, **fields: Any) -> None:
        """Change columns of an unfinished run; committed when this returns."""
        await self._db.write(_update(run_id, to_columns(fields, self.redact)))

    async def begin_run(self, run: Run, session: SessionRow | None) -> None:
        """Store that the run is at work, and the session it begins if it begins one, in one transaction."""
        fields = {name: getattr(run, name) for name in ("status", "started_us", "session_id", "fallback")}
        statements = [_update(run.id, to_columns(fields, self.redact))]
        await self._db.write(*statements, *([_insert_session(session)] if session else []))

    async def note_progress(self, run_id: str, **fields: Any) -> None:
        """Change columns of an unfinished run soon, without waiting for the disk."""
        await self._db.write_soon(_update(run_id, to_columns(fields, self.redact)))

    async def request_cancel(self, run_id: str) -> None:
        """Ask whichever process works on the run to cancel it."""
        await self._db.write(_update(run_id, {"cancel_requested": 1}))

    async def cancels_requested(self) -> list[str]:
        """Runs of this instance that another process wants cancelled, or has given up (``beat``)."""
        rows = await self._db.all(
            "SELECT id FROM runs WHERE instance_id = :me AND ended_us IS NULL AND cancel_requested",
            {"me": self.instance_id},
        )
        return [*(row["id"] for row in rows), *self._given_up]

    async def finish_run(self, run: Run) -> None:
        """Store a run's end and free its session, in one transaction. A run ends once: later ends are ignored."""
        columns = run.columns(self.redact)
        sets = ", ".join(f"{name} = :{name}" for name in columns if name not in ("id", "cancel_requested"))
        await self._db.write(
            ("UPDATE sessions SET locked_by = NULL WHERE locked_by = :id", {"id": run.id}),
            (f"UPDATE runs SET {sets} WHERE id = :id AND ended_us IS NULL", columns),
        )

    async def run(self, run_id: str) -> Run:
        """The run of that id, or of the only id that starts so. Raises RunNotFoundError."""
        rows = await self._db.all(
            "SELECT * FROM runs WHERE id >= :id AND id < :id || 'g' LIMIT 2", {"id": run_id.lower() or "-"}
        )
        if not rows:
            raise RunNotFoundError(f"no run {run_id!r}")
        exact = [row for row in rows if row["id"] == run_id.lower()]
        if len(rows) > 1 and not exact:
            raise RunNotFoundError(f"{run_id!r} is the start of several run ids; give more of it")
        return Run.of((exact or rows)[0])

    async def runs(self, *, limit: int = 50, **filters: Unpack[RunFilters]) -> list[Run]:
        """Runs that match every filter given (None: not given), newest first."""
        return await self.find_runs(now_us(), limit, **filters)

    async def tree(self, run_id: str) -> list[Run]:
        """The run and everything below it, parents before children, in order of creation."""
        rows = await self._db.all(
            f"SELECT * FROM runs WHERE id IN ({SUBTREE}) ORDER BY depth, created_us, id",
            {"within": run_id},
        )
        return [Run.of(row) for row in rows]

    async def rest_of_budget(self, run_id: str) -> Limits:
        """What the run and those above it have left, by what is recorded now."""
        budget: Budget | None = None
        chain: list[Run] = []
        above: str | None = run_id
        while above is not None:
            chain.append(await self.run(above))
            above = chain[-1].parent_id
        for run in reversed(chain):
            budget = Budget(**{"usd": run.budget_usd, **run.options.get("limits", {})}, parent=budget)
            if run.started_us is not None:
                budget.began = time.monotonic() - (now_us() - run.started_us) / 1e6
            # Each level is charged on its own: the sums over all below are read, not added up the tree.
            below = await self.tree(run.id)
            agents = [each for each in below if each.kind == "agent"]
            budget.spent = Spent(
                sum(each.cost_usd or 0.0 for each in agents),
                sum(each.usage.total_tokens for each in agents),
                sum(each.num_turns for each in agents),
                len(below) - 1,
            )
        assert budget is not None
        return budget.left

    # -- messages -----------------------------------------------------------------------------------------

    async def add_message(self, run_id: str, seq: int, kind: str, subtype: str | None, body: Any) -> None:
        """Keep one message of a run; written within 100 ms."""
        await self._db.write_soon(
            (
                "INSERT INTO messages (run_id, seq, at_us, type, subtype, body)"
                " VALUES (:run_id, :seq, :at, :type, :subtype, :body)",
                {
                    "run_id": run_id,
                    "seq": seq,
                    "at": now_us(),
                    "type": kind,
                    "subtype": subtype,
                    "body": self.redact.json(to_json(body) or "null"),
                },
            )
        )

    async def messages(self, run_id: str) -> list[StoredMessage]:
        """What was said in a run, in order."""
        rows = await self._db.all(
            "SELECT seq, at_us, type, subtype, body FROM messages WHERE run_id = :id ORDER BY seq", {"id": run_id}
        )
        return [StoredMessage.of(row) for row in rows]

    # -- sessions -----------------------------------------------------------------------------------------

    async def begin_session(self, session: SessionRow) -> None:
        """Record a new session, held by the run named in ``locked_by``."""
        await self._db.write(_insert_session(session))

    async def _busy(self, session_id: str) -> SessionBusyError:
        holder = (await self.session(session_id)).locked_by
        return SessionBusyError(
            f"session {session_id} is in use by run {holder}",
            details={"session_id": session_id, "run_id": holder},
        )

    async def count_turn(self, session_id: str, run_id: str) -> None:
        sql = "UPDATE sessions SET turns = turns + 1, last_run_id = :run, updated_us = :now WHERE id = :id"
        await self._db.write_soon((sql, {"id": session_id, "run": run_id, "now": now_us()}))

    async def forget_session(self, session_id: str) -> None:
        """Remove a session that never came to be (its first run ended before the CLI wrote a transcript)."""
        await self._db.write(("DELETE FROM sessions WHERE id = :id AND turns = 0", {"id": session_id}))

    async def session(self, session_id: str) -> SessionRow:
        """Raises SessionNotFoundError."""
        row = await self._db.one("SELECT * FROM sessions WHERE id = :id", {"id": session_id})
        if row is None:
            raise SessionNotFoundError(f"no session {session_id!r} is known here")
        return SessionRow.model_validate(row)

    async def sessions(self, *, agent: str | None = None, limit: int = 50) -> list[SessionRow]:
        where = "agent = :agent" if agent is not None else "1"
        rows = await self._db.all(
            f"SELECT * FROM sessions WHERE {where} ORDER BY updated_us DESC LIMIT :limit",
            {"agent": agent, "limit": limit},
        )
        return [SessionRow.model_validate(row) for row in rows]

    # -- agent preferences --------------------------------------------------------------------------------

    async def prefer(self, agent: str, model: str | None) -> None:
        """Set the model an agent runs with, over its file; None forgets the preference."""
        if model is None:
            await self._db.write(("DELETE FROM agent_preferences WHERE agent = :agent", {"agent": agent}))
            return
        sql = (
            "INSERT INTO agent_preferences (agent, model, updated_us) VALUES (:agent, :model, :now)"
            " ON CONFLICT (agent) DO UPDATE SET model = :model, updated_us = :now"
        )
        await self._db.write((sql, {"agent": agent, "model": model, "now": now_us()}))

    async def preferences(self) -> dict[str, str]:
        """Agent id → preferred model."""
        rows = await self._db.all("SELECT agent, model FROM agent_preferences")
        return {row["agent"]: row["model"] for row in rows}


def _update(run_id: str, fields: dict[str, Any]) -> Statement:
    sets = ", ".join(f"{name} = :{name}" for name in fields)
    return f"UPDATE runs SET {sets} WHERE id = :run_id AND ended_us IS NULL", {**fields, "run_id": run_id}


def _hold_session(session_id: str, run_id: str) -> Statement:
    sql = "UPDATE sessions SET locked_by = :run WHERE id = :id AND locked_by IS NULL"
    return sql, {"id": session_id, "run": run_id}


def _insert_session(session: SessionRow) -> Statement:
    columns = session.model_dump()
    names, marks = ", ".join(columns), ", ".join(f":{name}" for name in columns)
    return f"INSERT INTO sessions ({names}) VALUES ({marks})", columns
