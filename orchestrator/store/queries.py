"""What is read over many rows: filters, pages, sums. Every value is a parameter; in the SQL are our own names."""

from collections.abc import Collection, Mapping
from typing import Any, Literal, Unpack

from orchestrator.store.database import Database
from orchestrator.store.rows import Run, RunFilters, RunLabel, SessionView, Sums, to_json

#: What runs can be summed up by. ``model`` is the one that was used, else the one that was asked for; a ``day`` is
#: one of UTC, that on which the run was asked for.
GroupBy = Literal["agent", "model", "project", "status", "day"]

_KEYS: Mapping[GroupBy | None, str] = {
    None: "''",
    "agent": "name",
    "model": "coalesce(model_used, model_requested, '')",
    "project": "project",
    "status": "status",
    "day": "date(created_us / 1000000, 'unixepoch')",
}

SUBTREE = (
    "WITH RECURSIVE below(id) AS"
    " (VALUES (:within) UNION SELECT r.id FROM runs r JOIN below b ON r.parent_id = b.id) SELECT id FROM below"
)
_FOREST = SUBTREE.replace("VALUES (:within)", "SELECT value FROM json_each(:roots)")

# A run that goes on has taken the time until now.
_TOOK_US = "(coalesce(ended_us, :now_us) - started_us)"

_FILTERS = {
    "ids": "id IN (SELECT value FROM json_each(:ids))",
    "kind": "kind = :kind",
    "agent": "name = :agent",
    "project": "project = :project",
    "session_id": "session_id = :session_id",
    "status": "status = :status",
    "parent_id": "parent_id = :parent_id",
    "step": "step = :step",
    "root_id": "root_id = :root_id",
    "trace_id": "trace_id = :trace_id",
    "text": "(instr(lower(prompt), lower(:text)) OR instr(lower(runs.text), lower(:text)))",
    "after_us": "created_us >= :after_us",
    "before_us": "created_us < :before_us",
    "min_cost_usd": "cost_usd >= :min_cost_usd",
    "max_cost_usd": "cost_usd <= :max_cost_usd",
    "min_duration_us": f"{_TOOK_US} >= :min_duration_us",
    "max_duration_us": f"{_TOOK_US} <= :max_duration_us",
    "within": f"id IN ({SUBTREE})",
    "past": "(created_us < :past_us OR (created_us = :past_us AND id > :past_id))",
}

_AGENT = "kind = 'agent'"
_TOKENS = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens")
# What a plan cost is what its steps cost, and these are runs of their own: counted here, it would count twice.
_SUMS = ", ".join(
    [
        "count(*) AS runs",
        "coalesce(sum(status = 'succeeded'), 0) AS ok",
        "coalesce(sum(status IN ('failed', 'timed_out', 'interrupted')), 0) AS failed",
        "coalesce(sum(status = 'cancelled'), 0) AS cancelled",
        "coalesce(sum(ended_us IS NULL), 0) AS unfinished",
        f"coalesce(sum(cost_usd) FILTER (WHERE {_AGENT}), 0.0) AS cost_usd",
        f"coalesce(sum({_AGENT} AND cost_usd IS NULL AND started_us IS NOT NULL), 0) AS unknown_cost",
        *(f"coalesce(sum({name}) FILTER (WHERE {_AGENT}), 0) AS {name}" for name in _TOKENS),
        f"coalesce(sum(max(0, {_TOOK_US})), 0) AS duration_us",
    ]
)


def condition(filters: RunFilters, now_us: int) -> tuple[str, dict[str, Any]]:
    """The filters given (None: not given) as a WHERE clause and its parameters."""
    given: dict[str, Any] = {name: value for name, value in filters.items() if value is not None}
    where = " AND ".join(_FILTERS[name] for name in given) or "1"
    if "ids" in given:
        given["ids"] = to_json(list(given["ids"]))
    if "past" in given:
        given["past_us"], given["past_id"] = given.pop("past")
    return where, {**given, "now_us": now_us}


class Queries:
    """The questions about many runs. ``now_us`` is the time until which runs that go on are counted."""

    _db: Database

    async def find_runs(self, now_us: int, limit: int, **filters: Unpack[RunFilters]) -> list[Run]:
        """Runs that match every filter given, newest first."""
        where, params = condition(filters, now_us)
        rows = await self._db.all(
            f"SELECT * FROM runs WHERE {where} ORDER BY created_us DESC, id LIMIT :limit",
            {**params, "limit": limit},
        )
        return [Run.of(row) for row in rows]

    async def sums(
        self,
        by: GroupBy | None,
        now_us: int,
        *,
        limit: int = 100,
        past_key: str | None = None,
        **filters: Unpack[RunFilters],
    ) -> list[Sums]:
        """The runs that match, summed up by a key: days from the last, all else by name, ``past_key`` left behind.

        With None as key one sum of all, also where there are no runs.
        """
        where, params = condition(filters, now_us)
        key, last_first = _KEYS[by], by == "day"
        if past_key is not None:
            where += f" AND {key} {'<' if last_first else '>'} :past_key"
        grouped = f"GROUP BY 1 ORDER BY 1 {'DESC' if last_first else ''}" if by is not None else ""
        rows = await self._db.all(
            f"SELECT {key} AS key, {_SUMS} FROM runs WHERE {where} {grouped} LIMIT :limit",
            {**params, "past_key": past_key, "limit": limit},
        )
        return [Sums.model_validate(row) for row in rows]

    async def labels(self, *, starts: str = "", within: str | None = None, limit: int = 500) -> list[RunLabel]:
        """Ids of runs that start so (hexadecimal), newest first, with what people know them by."""
        where = f"id IN ({SUBTREE})" if within is not None else "1"
        rows = await self._db.all(
            f"SELECT id, name, status FROM runs WHERE {where} AND id >= :starts AND id < :starts || 'g'"
            " ORDER BY created_us DESC, id LIMIT :limit",
            {"within": within, "starts": starts, "limit": limit},
        )
        return [RunLabel.model_validate(row) for row in rows]

    async def names(self, *, within: str | None = None) -> list[str]:
        """The names of agents and plans that have ever run."""
        where = f"id IN ({SUBTREE})" if within is not None else "1"
        rows = await self._db.all(f"SELECT DISTINCT name FROM runs WHERE {where} ORDER BY name", {"within": within})
        return [row["name"] for row in rows]

    async def session_views(
        self,
        *,
        agent: str | None = None,
        project: str | None = None,
        ids: Collection[str] | None = None,
        below: Collection[str] | None = None,
        past: tuple[int, str] | None = None,
        prompt_chars: int = 200,
        limit: int = 50,
    ) -> list[SessionView]:
        """Sessions with their last run, last used first.

        ``below`` keeps to sessions of these runs and of the runs below them; ``past`` is ``updated_us`` and id of
        the row before. The prompt is the beginning of that of the last run.
        """
        given = {
            "s.agent = :agent": agent,
            "r.project = :project": project,
            "s.id IN (SELECT value FROM json_each(:ids))": ids,
            f"s.id IN (SELECT session_id FROM runs WHERE id IN ({_FOREST}))": below,
            "(s.updated_us < :past_us OR (s.updated_us = :past_us AND s.id > :past_id))": past,
        }
        where = " AND ".join(sql for sql, value in given.items() if value is not None) or "1"
        past_us, past_id = past or (None, None)
        rows = await self._db.all(
            "SELECT s.*, r.id AS run_id, r.project, substr(r.prompt, 1, :chars) AS prompt"
            # The run that holds it is its last one, though it is not counted as a turn yet.
            " FROM sessions s LEFT JOIN runs r ON r.id = coalesce(s.locked_by, s.last_run_id)"
            f" WHERE {where} ORDER BY s.updated_us DESC, s.id LIMIT :limit",
            {
                "agent": agent,
                "project": project,
                "ids": to_json(list(ids)) if ids is not None else None,
                "roots": to_json(list(below)) if below is not None else None,
                "past_us": past_us,
                "past_id": past_id,
                "chars": prompt_chars,
                "limit": limit,
            },
        )
        return [SessionView.model_validate(row) for row in rows]
