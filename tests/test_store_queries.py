"""Questions about many runs: filters, sums and pages of the store, against what Python counts in the same rows."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.store import GroupBy, Run, SessionRow, Store, open_store
from orchestrator.tracing import new_run_id, new_trace_id

NOW = 1_800_000_000_000_000
DAY = 86_400_000_000


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_store(tmp_path / "runs.db") as opened:
        yield opened


def a_run(store: Store, **fields: Any) -> Run:
    run_id = fields.pop("id", None) or new_run_id()
    defaults = {
        "id": run_id,
        "trace_id": new_trace_id(),
        "root_id": run_id,
        "depth": 1,
        "kind": "agent",
        "name": "helper",
        "status": "succeeded",
        "prompt": "do it",
        "project": "/srv/project",
        "cwd": "/srv/project",
        "created_us": NOW,
        "instance_id": store.instance_id,
    }
    return Run(**{**defaults, **fields})


async def created(store: Store, **fields: Any) -> Run:
    run = a_run(store, **fields)
    await store.create_run(run)
    return run


def a_session(session_id: str, **fields: Any) -> SessionRow:
    defaults = {"backend": "claude", "agent": "helper", "cwd": "/srv", "home": "/home", "created_us": 1, "turns": 1}
    return SessionRow(**{"id": session_id, "updated_us": 1, **defaults, **fields})


async def ids(store: Store, **filters: Any) -> list[str]:
    return [run.id for run in await store.find_runs(NOW, 50, **filters)]


# -- filters ------------------------------------------------------------------------------------------------


async def test_runs_by_what_they_cost(store: Store) -> None:
    cheap, dear = await created(store, cost_usd=0.0), await created(store, cost_usd=2.5)
    unknown = await created(store, cost_usd=None)

    assert await ids(store, min_cost_usd=1) == [dear.id]
    assert await ids(store, max_cost_usd=1) == [cheap.id]
    assert await ids(store, min_cost_usd=2.5, max_cost_usd=2.5) == [dear.id]
    assert sorted(await ids(store)) == sorted([cheap.id, dear.id, unknown.id])


async def test_runs_by_how_long_they_took_and_those_that_go_on_until_now(store: Store) -> None:
    second = 1_000_000
    quick = await created(store, started_us=NOW - 90 * second, ended_us=NOW - 89 * second)
    slow = await created(store, started_us=NOW - 90 * second, ended_us=NOW - 30 * second)
    going = await created(store, status="running", started_us=NOW - 20 * second)
    await created(store, status="queued")

    assert await ids(store, max_duration_us=10 * second) == [quick.id]
    assert sorted(await ids(store, min_duration_us=20 * second)) == sorted([slow.id, going.id])
    assert await ids(store, min_duration_us=21 * second) == [slow.id]


async def test_runs_of_a_project_and_of_a_kind(store: Store) -> None:
    plan = await created(store, kind="plan", project="/a")
    agent = await created(store, project="/b")

    assert await ids(store, project="/a") == [plan.id]
    assert await ids(store, kind="agent") == [agent.id]
    assert await ids(store, project="/") == []


async def test_pages_go_on_behind_a_row_however_many_share_its_time(store: Store) -> None:
    for number in range(40):
        await created(store, created_us=NOW + number // 25)
    everything = await ids(store)

    paged: list[str] = []
    past: tuple[int, str] | None = None
    while page := await store.find_runs(NOW, 7, past=past):
        paged += [run.id for run in page]
        past = (page[-1].created_us, page[-1].id)

    assert paged == everything
    assert len(paged) == 40


# -- sums ---------------------------------------------------------------------------------------------------

STATUSES = ["queued", "running", "waiting", "succeeded", "failed", "cancelled", "timed_out", "interrupted"]
ENDED = STATUSES[3:]
ROWS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["helper", "worker", "Zoë's"]),
        "kind": st.sampled_from(["agent", "agent", "plan"]),
        "status": st.sampled_from(STATUSES),
        "model_used": st.sampled_from([None, "opus", "haiku"]),
        "model_requested": st.sampled_from([None, "haiku"]),
        "project": st.sampled_from(["/a", "/b"]),
        "cost_usd": st.none() | st.integers(0, 1000).map(lambda cents: cents / 64),
        "input_tokens": st.integers(0, 10**6),
        "output_tokens": st.integers(0, 10**6),
        "cache_read_tokens": st.integers(0, 10**6),
        "cache_write_tokens": st.integers(0, 10**6),
        "created_us": st.integers(NOW - 3 * DAY, NOW),
        "took_us": st.integers(0, DAY),
    }
)


def key_of(by: GroupBy | None, run: Run) -> str:
    keys = {
        None: "",
        "agent": run.name,
        "model": run.model_used or run.model_requested or "",
        "project": run.project,
        "status": run.status,
        "day": datetime.fromtimestamp(run.created_us / 1e6, UTC).date().isoformat(),
    }
    return keys[by]


@asynccontextmanager
async def store_of(rows: list[dict[str, Any]]) -> AsyncIterator[tuple[Store, list[Run]]]:
    with TemporaryDirectory() as folder:
        async with open_store(Path(folder) / "runs.db") as store:
            runs = []
            for row in rows:
                took, begun = row.pop("took_us"), None if row["status"] == "queued" else row["created_us"]
                ended = row["created_us"] + took if row["status"] in ENDED else None
                runs.append(await created(store, **row, started_us=begun, ended_us=ended))
            yield store, runs


@given(st.lists(ROWS, max_size=12), st.sampled_from([None, "agent", "model", "project", "status", "day"]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_sums_are_what_one_would_count(rows: list[dict[str, Any]], by: GroupBy | None) -> None:
    async with store_of(rows) as (store, runs):
        found = await store.sums(by, NOW + DAY)

    keys = {key_of(by, run) for run in runs} if by else {""}
    assert [each.key for each in found] == sorted(keys, reverse=by == "day")
    for each in found:
        group = [run for run in runs if key_of(by, run) == each.key]
        agents = [run for run in group if run.kind == "agent"]
        assert each.runs == len(group)
        assert each.ok == sum(run.status == "succeeded" for run in group)
        assert each.failed == sum(run.status in ("failed", "timed_out", "interrupted") for run in group)
        assert each.cancelled == sum(run.status == "cancelled" for run in group)
        assert each.unfinished == sum(not run.ended for run in group)
        assert each.ok + each.failed + each.cancelled + each.unfinished == each.runs
        assert each.cost_usd == sum(run.cost_usd or 0 for run in agents)
        assert each.unknown_cost == sum(run.cost_usd is None and run.started_us is not None for run in agents)
        for name in ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens"):
            assert getattr(each, name) == sum(getattr(run, name) for run in agents)
        until = NOW + DAY
        took = [(run.ended_us or until) - run.started_us for run in group if run.started_us is not None]
        assert each.duration_us == sum(took)


async def test_sums_of_what_matches_a_page_at_a_time(store: Store) -> None:
    for name in ("a", "b", "c", "d"):
        await created(store, name=name, status="failed" if name == "b" else "succeeded")

    first = await store.sums("agent", NOW, limit=2, status="succeeded")
    rest = await store.sums("agent", NOW, limit=2, status="succeeded", past_key=first[-1].key)

    assert [each.key for each in (*first, *rest)] == ["a", "c", "d"]
    [total] = await store.sums(None, NOW, status="succeeded")
    assert total.runs == 3


async def test_days_are_paged_from_the_last(store: Store) -> None:
    for days in range(3):
        await created(store, created_us=NOW - days * DAY)

    [last] = await store.sums("day", NOW, limit=1)
    [before] = await store.sums("day", NOW, limit=1, past_key=last.key)

    assert last.key > before.key


async def test_sums_keep_to_a_tree(store: Store) -> None:
    root = await created(store, cost_usd=1.0)
    await created(store, parent_id=root.id, root_id=root.id, cost_usd=2.0)
    await created(store, cost_usd=4.0)

    [total] = await store.sums(None, NOW, within=root.id)

    assert (total.runs, total.cost_usd) == (2, 3.0)


HOSTILE = "'; DROP TABLE runs; --"


async def test_a_hostile_value_is_a_value(store: Store) -> None:
    run = await created(store)

    assert await ids(store, project=HOSTILE) == []
    assert await store.sums("agent", NOW, past_key=HOSTILE) != []
    assert await store.labels(starts=HOSTILE) == []
    assert await store.session_views(agent=HOSTILE, project=HOSTILE, ids=[HOSTILE], below=[HOSTILE]) == []
    assert await ids(store) == [run.id]


# -- labels and names ---------------------------------------------------------------------------------------


async def test_labels_are_found_by_how_an_id_starts(store: Store) -> None:
    first = await created(store, id="aa00000000000000", name="one", created_us=NOW)
    second = await created(store, id="aaff000000000000", name="two", created_us=NOW + 1, parent_id=first.id)
    await created(store, id="ab00000000000000", created_us=NOW + 2)

    assert [label.id for label in await store.labels(starts="aa")] == [second.id, first.id]
    assert [label.id for label in await store.labels(starts="aaf")] == [second.id]
    assert [label.name for label in await store.labels(starts="", within=second.id)] == ["two"]
    assert [label.status for label in await store.labels(limit=1)] == ["succeeded"]


async def test_names_of_all_that_ran(store: Store) -> None:
    root = await created(store, name="boss")
    await created(store, name="helper", parent_id=root.id)
    await created(store, name="helper", parent_id=root.id)
    await created(store, name="stranger")

    assert await store.names() == ["boss", "helper", "stranger"]
    assert await store.names(within=root.id) == ["boss", "helper"]


# -- sessions -----------------------------------------------------------------------------------------------


async def test_sessions_with_what_was_said_last(store: Store) -> None:
    run = await created(store, prompt="x" * 500, project="/a", session_id="s1")
    await store.begin_session(a_session("s1", last_run_id=run.id, updated_us=5))
    await store.begin_session(a_session("s2", updated_us=9, agent="worker"))

    last, first = await store.session_views(prompt_chars=10)

    assert (last.id, last.run_id, last.project, last.prompt) == ("s2", None, None, None)
    assert (first.id, first.run_id, first.project, first.prompt) == ("s1", run.id, "/a", "x" * 10)
    assert [view.id for view in await store.session_views(agent="worker")] == ["s2"]
    assert [view.id for view in await store.session_views(project="/a")] == ["s1"]
    assert [view.id for view in await store.session_views(ids=["s1", "s3"])] == ["s1"]
    assert [view.id for view in await store.session_views(past=(9, "s2"))] == ["s1"]


async def test_the_last_run_of_a_session_in_use_is_the_one_that_holds_it(store: Store) -> None:
    before, now = await created(store, prompt="before"), await created(store, prompt="now")
    await store.begin_session(a_session("s1", last_run_id=before.id, locked_by=now.id))

    [view] = await store.session_views()

    assert (view.run_id, view.locked_by, view.prompt) == (now.id, now.id, "now")


async def test_sessions_of_runs_and_of_all_below_them(store: Store) -> None:
    root = await created(store, session_id="own")
    child = await created(store, session_id="child", parent_id=root.id)
    await created(store, session_id="grandchild", parent_id=child.id)
    other = await created(store, session_id="other")
    for name in ("own", "child", "grandchild", "other"):
        await store.begin_session(a_session(name))

    async def below(*runs: Run) -> set[str]:
        return {view.id for view in await store.session_views(below=[run.id for run in runs])}

    assert await below(root) == {"own", "child", "grandchild"}
    assert await below(child, other) == {"child", "grandchild", "other"}
    assert await below() == set()
