"""The store: what was acknowledged is on disk, what is refused harms nothing else, and the dead are found out."""

import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from orchestrator.errors import RunNotFoundError, SessionBusyError, SessionNotFoundError
from orchestrator.store import Run, SessionRow, Store, StoreError, now_us, open_store
from orchestrator.store.database import migrations, open_sqlite, sql_statements
from orchestrator.store.writer import BATCH_SECONDS
from orchestrator.tracing import new_run_id, new_trace_id

ROOT = Path(__file__).parent.parent

INSTANCE_COLUMNS = "(id, kind, host, pid, pid_created, started_us, alive_us, ended_us)"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "runs.db"


def a_run(store: Store, **fields: Any) -> Run:
    run_id = fields.pop("id", None) or new_run_id()
    defaults = {
        "id": run_id,
        "trace_id": new_trace_id(),
        "root_id": run_id,
        "depth": 1,
        "kind": "agent",
        "name": "helper",
        "prompt": "do it",
        "project": "/srv/project",
        "cwd": "/srv/project",
        "created_us": now_us(),
        "instance_id": store.instance_id,
    }
    return Run(**{**defaults, **fields})


def going_on(store: Store, session_id: str) -> Run:
    """A run that goes on with a session."""
    return a_run(store, session_id=session_id, session_mode="continue")


async def created(store: Store, **fields: Any) -> Run:
    run = a_run(store, **fields)
    await store.create_run(run)
    return run


def a_session(session_id: str, **fields: Any) -> SessionRow:
    defaults = {
        "backend": "claude",
        "agent": "helper",
        "cwd": "/srv",
        "home": "/home",
        "created_us": 1,
        "updated_us": 1,
    }
    return SessionRow(**{"id": session_id, **defaults, **fields})


def peek(path: Path, sql: str, *params: Any) -> list[Any]:
    """What another program sees in the file right now."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute(sql, params).fetchall()
    connection.close()
    return rows


def program(body: str) -> str:
    """A program that opens the store named in argv[1] as ``store`` and does what ``body`` says."""
    head = """
    import os, signal, sys
    from pathlib import Path
    import anyio
    from orchestrator.store import Run, SessionRow, StoreError, now_us, open_store
    sys.path.insert(0, str(Path("tests")))

    def a_run(store, run_id, **fields):
        return Run(id=run_id, trace_id="0" * 32, root_id=run_id, depth=1, kind="agent", name="helper",
                   project="/srv", cwd="/srv", created_us=now_us(), instance_id=store.instance_id, **fields)

    async def main(path):
        async with open_store(path) as store:
    """
    indented = textwrap.indent(textwrap.dedent(body), " " * 8)
    return f"{textwrap.dedent(head)}{indented}\nanyio.run(main, Path(sys.argv[1]))\n"


def python(code: str, *args: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": os.defpath, "PYTHONPATH": str(ROOT)},
    )


def ended(process: "subprocess.Popen[str]", *, code: int = 0) -> str:
    """What the program printed, once it has ended well."""
    out, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    return out


# -- the promise --------------------------------------------------------------------------------------------


async def test_a_state_change_is_committed_before_it_is_acknowledged(path: Path) -> None:
    async with open_store(path) as store:
        run = await created(store)
        assert peek(path, "SELECT status FROM runs") == [("queued",)]
        await store.update_run(run.id, status="running", started_us=5)
        assert peek(path, "SELECT status, started_us FROM runs") == [("running", 5)]
        await store.finish_run(run.model_copy(update={"status": "succeeded", "text": "done", "ended_us": 9}))
        assert peek(path, "SELECT status, text, ended_us FROM runs") == [("succeeded", "done", 9)]
        await store.prefer("helper", "haiku")
        assert peek(path, "SELECT agent, model FROM agent_preferences") == [("helper", "haiku")]


async def test_what_was_acknowledged_survives_a_kill(path: Path) -> None:
    killed = python(
        program(
            """
            await store.create_run(a_run(store, "a" * 16))
            await store.update_run("a" * 16, text="half an ans")
            os.kill(os.getpid(), signal.SIGKILL)
            """
        ),
        path,
    )
    ended(killed, code=-signal.SIGKILL)
    async with open_store(path) as store:
        assert (await store.run("a" * 16)).text == "half an ans"


async def test_a_run_comes_back_as_it_was(path: Path) -> None:
    async with open_store(path) as store:
        run = a_run(
            store,
            step="review[2]",
            structured=["ja", {"n": 1}, None],
            agent={"id": "helper", "tools": ["Read"]},
            options={"model": "haiku"},
            caller={"client": "ä"},
            cost_usd=0.25,
            cost_basis="cli",
            text="zwei\nZeilen \U0001f600",
            budget_usd=0,
        )
        await store.create_run(run)
        assert await store.run(run.id) == run


@pytest.mark.parametrize("answer", ["a string", None, "[1]", "null", "", 0, False, [], {"a": "{}"}])
async def test_a_structured_answer_of_any_kind_comes_back(path: Path, answer: Any) -> None:
    async with open_store(path) as store:
        run = a_run(store, structured=answer, has_structured=True)
        await store.create_run(run)
        read = await store.run(run.id)
        assert read.structured == answer
        assert read.outcome().has_structured
        assert Run.model_validate(run.model_dump()) == run


async def test_messages_are_written_soon(path: Path) -> None:
    async with open_store(path) as store:
        run = await created(store)
        for seq in range(3):
            await store.add_message(run.id, seq, "assistant", None, {"n": seq})
        with anyio.fail_after(BATCH_SECONDS * 20):
            while len(await store.messages(run.id)) < 3:  # noqa: ASYNC110  # the file has no event to wait for
                await anyio.sleep(0.01)


async def test_all_queued_messages_are_written_at_close(path: Path) -> None:
    async with open_store(path) as store:
        run = await created(store)
        for seq in range(1500):
            await store.add_message(run.id, seq, "assistant", None, {"text": "é" * (seq % 50)})
    assert peek(path, "SELECT count(*), max(seq) FROM messages") == [(1500, 1499)]


async def test_queued_messages_are_written_although_everything_is_cancelled(path: Path) -> None:
    with anyio.CancelScope() as scope:
        async with open_store(path) as store:
            run = await created(store)
            for seq in range(300):
                await store.add_message(run.id, seq, "user", None, {})
            scope.cancel()
            await anyio.sleep_forever()
    assert peek(path, "SELECT count(*) FROM messages") == [(300,)]
    assert peek(path, "SELECT count(*) FROM instances WHERE ended_us IS NULL") == [(0,)], "nor does it look crashed"


async def test_messages_come_in_order_with_their_body(path: Path) -> None:
    async with open_store(path) as store:
        run = await created(store)
        body = {"type": "system", "subtype": "init", "größe": [1.5, None, "\u2028"]}
        await store.add_message(run.id, 2, "result", "success", {"type": "result"})
        await store.add_message(run.id, 1, "system", "init", body)
        await store.update_run(run.id, text="in order: the writer takes them as they came")
        first, second = await store.messages(run.id)
        assert (first.seq, first.type, first.subtype, first.body) == (1, "system", "init", body)
        assert second.seq == 2


async def test_note_progress_is_overtaken_by_the_end(path: Path) -> None:
    async with open_store(path) as store:
        run = await created(store)
        await store.note_progress(run.id, text="half")
        await store.finish_run(run.model_copy(update={"status": "succeeded", "text": "whole", "ended_us": 1}))
        await store.note_progress(run.id, text="too late")
        await store.prefer("x", "y")  # written after it
        assert (await store.run(run.id)).text == "whole"


# -- one writer, many writes --------------------------------------------------------------------------------


async def test_many_writes_at_once_share_commits(path: Path) -> None:
    """A commit writes at least one page to the log; hundreds of small writes fit in a few."""
    writes = 400
    async with open_store(path) as store:
        run = await created(store)
        before = Path(f"{path}-wal").stat().st_size
        async with anyio.create_task_group() as tg:
            for number in range(writes):
                tg.start_soon(store.prefer, f"agent-{number}", "m")
        assert len(await store.preferences()) == writes
        grown = Path(f"{path}-wal").stat().st_size - before
        assert grown < writes * 4096 / 2, f"{grown} bytes of log for {writes} writes"
        await store.update_run(run.id, status="running")


async def test_a_refused_write_takes_no_neighbour_along(path: Path) -> None:
    async with open_store(path) as store:
        run = await created(store)
        refused: list[str] = []

        async def refuse(write: Callable[[], Any], name: str) -> None:
            with pytest.raises(StoreError, match="could not be written"):
                await write()
            refused.append(name)

        async with anyio.create_task_group() as tg:
            for number in range(20):
                tg.start_soon(store.prefer, f"agent-{number}", "m")
            tg.start_soon(refuse, lambda: store.create_run(run), "a key that exists")
            tg.start_soon(refuse, lambda: store.update_run(run.id, text="\ud800"), "half a surrogate pair")
            tg.start_soon(refuse, lambda: store.update_run(run.id, num_turns=2**70), "a number too large")
            tg.start_soon(refuse, lambda: store.update_run(run.id, text=object()), "no SQL value")
            tg.start_soon(refuse, lambda: store.update_run(run.id, no_such_column=1), "no such column")
            tg.start_soon(refuse, lambda: store.create_run(a_run(store, parent_id="f" * 16)), "no such parent")
            for number in range(20, 40):
                tg.start_soon(store.prefer, f"agent-{number}", "m")
        assert len(refused) == 6
        assert len(await store.preferences()) == 40
        assert (await store.run(run.id)).text == ""
        await store.update_run(run.id, text="the writer lives")
        assert (await store.run(run.id)).text == "the writer lives"


async def test_a_refused_message_takes_no_other_along(path: Path) -> None:
    async with open_store(path) as store:
        run = await created(store)
        for seq in (1, 2, 2, 3):
            await store.add_message(run.id, seq, "user", None, {"seq": seq})
        await store.add_message("0" * 16, 1, "user", None, {"a run": "that does not exist"})
        await store.add_message(run.id, 4, "user", None, {"text": "\ud800"})
        await store.add_message(run.id, 5, "user", None, {})
    assert peek(path, "SELECT seq FROM messages ORDER BY seq") == [(1,), (2,), (3,), (5,)]


async def test_a_write_of_several_statements_is_all_or_nothing(path: Path) -> None:
    async with open_sqlite(path) as database:
        insert = "INSERT INTO agent_preferences VALUES (:agent, 'm', 1)"
        with pytest.raises(StoreError):
            await database.write((insert, {"agent": "one"}), (insert, {"agent": "two"}), (insert, {"agent": "one"}))
        assert await database.all("SELECT * FROM agent_preferences") == []
        assert await database.write((insert, {"agent": "one"}), ("DELETE FROM runs", {})) == [1, 0]
        assert await database.one("SELECT agent FROM agent_preferences") == {"agent": "one"}
        assert await database.one("SELECT agent FROM agent_preferences WHERE agent = 'two'") is None


async def test_a_cancelled_writer_leaves_a_working_store(path: Path) -> None:
    async with open_store(path) as store:
        for number in range(30):
            with anyio.move_on_after(0.0005 * (number % 4)):
                await store.prefer(f"agent-{number}", "m")
        await store.prefer("last", "m")
        assert "last" in await store.preferences()


async def test_a_closed_store_says_so(path: Path) -> None:
    async with open_store(path) as store:
        await store.prefer("a", "m")
    with pytest.raises(StoreError, match="closed") as caught:
        await store.prefer("b", "m")
    assert "async with" in caught.value.advice
    with pytest.raises(StoreError):
        await store.preferences()


async def test_two_processes_write_at_the_same_time_without_loss(path: Path) -> None:
    body = """
    sys.stdin.readline()
    run_id = sys.argv[2] * 16
    await store.create_run(a_run(store, run_id))
    for number in range(200):
        await store.add_message(run_id, number, "user", None, {})
        if number % 4 == 0:
            await store.update_run(run_id, num_turns=number)
    """
    writers = [python(program(body), path, name) for name in "ab"]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    async with open_store(path) as store:  # and a third that reads and writes meanwhile
        for number in range(50):
            await store.prefer(f"agent-{number}", "m")
        for writer in writers:
            await anyio.to_thread.run_sync(ended, writer)
        assert len(await store.preferences()) == 50
        for name in "ab":
            assert len(await store.messages(name * 16)) == 200
            assert (await store.run(name * 16)).num_turns == 196


async def test_another_process_sees_a_change_at_once(path: Path) -> None:
    reader = python(
        program(
            """
            print("ready", flush=True)
            for line in sys.stdin:
                print((await store.run(line.strip())).status, flush=True)
            """
        ),
        path,
    )
    assert reader.stdin is not None
    assert reader.stdout is not None
    stdin, stdout = reader.stdin, reader.stdout

    def ask(run_id: str) -> str:
        stdin.write(f"{run_id}\n")
        stdin.flush()
        return stdout.readline().strip()

    async with open_store(path) as store:
        assert await anyio.to_thread.run_sync(stdout.readline) == "ready\n"
        run = await created(store)
        for status in ("queued", "running", "succeeded"):
            await store.update_run(run.id, status=status)
            assert await anyio.to_thread.run_sync(ask, run.id) == status
        await anyio.to_thread.run_sync(ended, reader)


# -- the file -----------------------------------------------------------------------------------------------


def test_migrations_are_numbered_without_gaps() -> None:
    numbers = [number for number, _ in migrations()]
    assert numbers == list(range(1, len(numbers) + 1))


def test_every_statement_of_a_migration_is_whole() -> None:
    for _, sql in migrations():
        assert all(sqlite3.complete_statement(f"{statement};") for statement in sql_statements(sql))


async def test_migrations_run_once(path: Path) -> None:
    async with open_store(path) as store:
        await store.prefer("helper", "haiku")
    assert peek(path, "PRAGMA user_version") == [(migrations()[-1][0],)]
    async with open_store(path) as store:  # running one again would fail: its tables exist
        assert await store.preferences() == {"helper": "haiku"}


async def test_processes_that_open_a_new_file_at_once_all_get_it(tmp_path: Path) -> None:
    rounds = 15  # each process failed in one round of ten when SQLite's refusal was passed on
    code = """
import sys
from pathlib import Path

import anyio
from orchestrator.store import open_store

async def main(folder, me):
    for line in sys.stdin:
        async with open_store(folder / f"{line.strip()}.db") as store:
            await store.prefer(me, "m")
        print("done", flush=True)

anyio.run(main, Path(sys.argv[1]), sys.argv[2])
"""
    openers = [python(code, tmp_path, number) for number in range(4)]
    for number in range(rounds):
        for opener in openers:
            assert opener.stdin is not None
            opener.stdin.write(f"{number}\n")
            opener.stdin.flush()
        said = [opener.stdout.readline() for opener in openers if opener.stdout]
        if said != ["done\n"] * 4:
            break
    for opener in openers:
        ended(opener)
    assert [peek(tmp_path / f"{n}.db", "SELECT count(*) FROM agent_preferences") for n in range(rounds)] == [
        [(4,)]
    ] * rounds


async def test_a_file_of_a_newer_version_is_refused_and_left_alone(path: Path) -> None:
    async with open_store(path):
        pass
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match=r"newer version \(99\)") as caught:
        async with open_store(path):
            pytest.fail("opened")
    assert "Upgrade" in caught.value.advice
    assert peek(path, "PRAGMA user_version") == [(99,)]


async def test_the_file_is_for_its_owner_alone(path: Path) -> None:
    before = os.umask(0)
    try:
        async with open_store(path) as store:
            await created(store)
            assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {
                "runs.db": 0o600,
                "runs.db-wal": 0o600,
                "runs.db-shm": 0o600,
            }
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    finally:
        os.umask(before)


async def assert_cannot_open(path: Path, *, names: str = "store.path") -> None:
    with pytest.raises(StoreError, match=re.escape(str(path))) as caught:
        async with open_store(path):
            pytest.fail("opened")
    assert names in caught.value.advice


async def test_a_directory_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    await assert_cannot_open(tmp_path)
    assert (tmp_path / "kept").exists()


async def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(b"dear diary " * 1000)
    await assert_cannot_open(file)
    assert file.read_bytes() == b"dear diary " * 1000


async def test_the_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "other.db"
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE runs (distance REAL)")
        connection.execute("INSERT INTO runs VALUES (42.195)")
    connection.close()
    await assert_cannot_open(file)
    assert peek(file, "SELECT name FROM sqlite_master") == [("runs",)]
    assert peek(file, "SELECT * FROM runs") == [(42.195,)]


async def test_a_parent_that_is_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    await assert_cannot_open(tmp_path / "file" / "runs.db")


def test_a_directory_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    """Root may write anywhere, so the program gives up that privilege first."""
    code = """
    import ctypes
    # capset(2), version 3: no capability at all. For an ordinary user it changes nothing.
    ctypes.CDLL(None).syscall({"x86_64": 126, "aarch64": 91}[os.uname().machine],
                              (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    """
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    body = program("raise SystemExit('opened')").replace("import anyio\n", f"import anyio\n{textwrap.dedent(code)}")
    body = body.replace("anyio.run(main, Path(sys.argv[1]))", CATCH)
    assert ended(python(body, folder / "runs.db")).startswith("StoreError cannot open the store")
    assert list(folder.iterdir()) == []


CATCH = """
try:
    anyio.run(main, Path(sys.argv[1]))
except StoreError as error:
    print("StoreError", error, "|", error.advice)
"""


def test_a_full_disk_is_reported_and_survived(path: Path) -> None:
    """A limit on the size of files stands for the full disk: SQLite's write fails in the same place."""
    body = """
    import resource
    await store.create_run(a_run(store, "a" * 16))
    await store.add_message("a" * 16, 1, "user", None, {"kept": "before"})
    await store.update_run("a" * 16, text="before")
    room = Path(f"{path}-wal").stat().st_size + 40_000
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    refused = []

    async def huge():
        try:
            await store.update_run("a" * 16, prompt="x" * 1_000_000)
        except StoreError as error:
            refused.append(error)

    async with anyio.create_task_group() as tg:  # in one batch with a write for which there is room
        tg.start_soon(huge)
        tg.start_soon(store.prefer, "neighbour", "m")
    print(len(refused), "|", refused[0].advice)
    print(sorted(await store.preferences()), (await store.run("a" * 16)).text)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await huge()
    print(len(refused), len((await store.run("a" * 16)).prompt))
    """
    first, second, third = ended(python(program(body), path)).splitlines()
    assert first.startswith("1 | Check that the disk has room")
    assert second == "['neighbour'] before"
    assert third == "1 1000000"
    assert peek(path, "SELECT count(*) FROM messages") == [(1,)]
    assert peek(path, "PRAGMA integrity_check") == [("ok",)]


# -- runs ---------------------------------------------------------------------------------------------------


async def test_a_run_ends_once(path: Path) -> None:
    async with open_store(path) as store:
        run = await created(store)
        await store.finish_run(run.model_copy(update={"status": "succeeded", "text": "first", "ended_us": 5}))
        await store.finish_run(run.model_copy(update={"status": "failed", "text": "second", "ended_us": 9}))
        await store.update_run(run.id, status="running")
        await store.request_cancel(run.id)
        kept = await store.run(run.id)
        assert (kept.status, kept.text, kept.ended_us, kept.cancel_requested) == ("succeeded", "first", 5, False)


async def test_the_end_keeps_that_a_cancel_was_asked_for(path: Path) -> None:
    async with open_store(path) as store:
        run = await created(store)
        await store.request_cancel(run.id)
        await store.finish_run(run.model_copy(update={"status": "cancelled", "ended_us": 5}))
        assert (await store.run(run.id)).cancel_requested


async def test_request_cancel_reaches_the_owner_alone(path: Path) -> None:
    async with open_store(path) as owner, open_store(path) as other:
        run, ended_run = await created(owner), await created(owner)
        theirs = await created(other)
        await owner.finish_run(ended_run.model_copy(update={"status": "succeeded", "ended_us": 1}))
        for each in (run, ended_run, theirs):
            await other.request_cancel(each.id)
        await other.request_cancel("0" * 16)  # nobody's
        assert await owner.cancels_requested() == [run.id]
        assert await other.cancels_requested() == [theirs.id]


async def test_delete_run_takes_only_what_never_began(path: Path) -> None:
    async with open_store(path) as store:
        refused, begun = await created(store), await created(store)
        await store.update_run(begun.id, started_us=1)
        for run in (refused, begun):
            await store.delete_run(run.id)
        assert [run.id for run in await store.runs()] == [begun.id]


async def test_a_run_is_found_by_the_start_of_its_id(path: Path) -> None:
    async with open_store(path) as store:
        for run_id in ("abc0000000000001", "abc0000000000002", "abd0000000000000", "ffffffffffffffff"):
            await created(store, id=run_id)
        assert (await store.run("abd")).id == "abd0000000000000"
        assert (await store.run("ABC0000000000001")).id == "abc0000000000001"
        assert (await store.run("f")).id == "ffffffffffffffff"
        with pytest.raises(RunNotFoundError, match="several"):
            await store.run("abc")
        for nothing in ("", "e", "abc00000000000011", "%", "a%", "*", "g", "'", "\0", "\ud800", "-", "ab_"):
            with pytest.raises(RunNotFoundError, match=re.escape(repr(nothing))):
                await store.run(nothing)


async def test_runs_filters(path: Path) -> None:
    async with open_store(path) as store:
        one = await created(store, created_us=100, name="one", prompt="Find the Needle", session_id="s1")
        two = await created(
            store, created_us=200, name="two", root_id=one.id, parent_id=one.id, depth=2, step="s[0]"
        )
        three = await created(store, created_us=300, name="two", root_id=one.id, parent_id=two.id, depth=3)
        four = await created(store, created_us=400, trace_id="e" * 32)
        await store.finish_run(
            four.model_copy(update={"status": "failed", "text": "hay and NEEDLES", "ended_us": 500})
        )

        async def found(**filters: Any) -> list[str]:
            return [run.id for run in await store.runs(**filters)]

        assert await found() == [four.id, three.id, two.id, one.id], "newest first"
        assert await found(limit=2) == [four.id, three.id]
        assert await found(agent="two") == [three.id, two.id]
        assert await found(session_id="s1") == [one.id]
        assert await found(status="failed") == [four.id]
        assert await found(parent_id=one.id) == [two.id]
        assert await found(step="s[0]") == [two.id]
        assert await found(root_id=one.id) == [three.id, two.id, one.id]
        assert await found(trace_id="e" * 32) == [four.id]
        assert await found(text="needle") == [four.id, one.id], "in the prompt or the answer, in any case"
        assert await found(after_us=200, before_us=400) == [three.id, two.id], "from, and before"
        assert await found(within=two.id) == [three.id, two.id]
        assert await found(ids=[one.id, four.id, "0" * 16]) == [four.id, one.id]
        assert await found(ids=[]) == []
        assert await found(agent="two", parent_id=one.id) == [two.id]
        assert await found(agent="nobody") == []


async def test_tree_gives_the_subtree_parents_first(path: Path) -> None:
    async with open_store(path) as store:
        root = await created(store, created_us=1, depth=0, kind="plan")
        late = await created(store, created_us=9, parent_id=root.id, root_id=root.id)
        early = await created(store, created_us=2, parent_id=root.id, root_id=root.id)
        leaf = await created(store, created_us=3, parent_id=early.id, root_id=root.id, depth=2)
        await created(store)
        assert [run.id for run in await store.tree(root.id)] == [root.id, early.id, late.id, leaf.id]
        assert [run.id for run in await store.tree(early.id)] == [early.id, leaf.id]
        assert await store.tree("0" * 16) == []


HOSTILE = (
    "' OR 1=1 --",
    "'; DROP TABLE runs; --",
    "\0",
    "%",
    '"',
    ":agent",
    "\ud800",
    "x" * 100_000,
    "[1, 2]",
    "\u202e",
)


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: ascii(value[:12]))
async def test_a_hostile_value_in_a_filter_does_nothing(path: Path, value: str) -> None:
    text_filters = ("agent", "session_id", "status", "parent_id", "step", "root_id", "trace_id", "text", "within")
    async with open_store(path) as store:
        run = await created(store)
        for name in text_filters:
            filters: dict[str, Any] = {name: value}
            assert await store.runs(**filters) == []
        assert await store.runs(ids=[value]) == []
        assert await store.tree(value) == []
        assert await store.messages(value) == []
        assert await store.sessions(agent=value) == []
        with pytest.raises(SessionNotFoundError):
            await store.session(value)
        assert [each.id for each in await store.runs()] == [run.id]


async def test_a_number_no_database_holds_is_reported(path: Path) -> None:
    async with open_store(path) as store:
        with pytest.raises(StoreError, match="could not be read"):
            await store.runs(after_us=10**30)


@given(value=st.text(st.characters(exclude_categories=["Cs"])))
@hypothesis_settings(max_examples=25, deadline=None)
def test_any_text_is_kept_verbatim(tmp_path_factory: pytest.TempPathFactory, value: str) -> None:
    path = tmp_path_factory.mktemp("verbatim") / "runs.db"

    async def keep() -> None:
        async with open_store(path) as store:
            run = await created(store, prompt=value, structured={"value": value})
            await store.add_message(run.id, 1, "user", None, {value: value})
            await store.prefer(value, value)
            read = await store.run(run.id)
            assert (read.prompt, read.structured) == (value, {"value": value})
            assert await store.preferences() == {value: value}
            assert [each.id for each in await store.runs(text=value)] == [run.id]
        async with open_store(path) as store:
            assert [message.body for message in await store.messages(run.id)] == [{value: value}]

    anyio.run(keep)


# -- sessions and preferences -------------------------------------------------------------------------------


async def test_a_session_is_held_by_one_run_at_a_time(path: Path) -> None:
    async with open_store(path) as store:
        first, second = await created(store), going_on(store, "s")
        await store.begin_session(a_session("s", locked_by=first.id))
        with pytest.raises(SessionBusyError, match=first.id) as caught:
            await store.create_run(second)
        assert caught.value.details == {"session_id": "s", "run_id": first.id}
        assert caught.value.retryable
        assert [run.id for run in await store.runs()] == [first.id], "nothing is stored of what was refused"
        await store.finish_run(first.model_copy(update={"status": "succeeded", "ended_us": 1}))
        await store.create_run(second)
        assert (await store.session("s")).locked_by == second.id


async def test_of_many_runs_one_gets_the_session(path: Path) -> None:
    async with open_store(path) as store, open_store(path) as other:
        await store.begin_session(a_session("s"))
        taken, busy = [], []

        async def take(which: Store) -> None:
            run = going_on(which, "s")
            try:
                await which.create_run(run)
                taken.append(run.id)
            except SessionBusyError:
                busy.append(run.id)

        async with anyio.create_task_group() as tg:
            for number in range(20):
                tg.start_soon(take, (store, other)[number % 2])
        assert taken == [run.id for run in await store.runs()]
        assert len(taken) == 1
        assert len(busy) == 19


async def test_sessions_are_counted_and_forgotten(path: Path) -> None:
    async with open_store(path) as store:
        await store.begin_session(a_session("used"))
        await store.begin_session(a_session("never"))
        await store.count_turn("used", "r1")
        await store.count_turn("used", "r2")
        for session_id in ("used", "never"):
            await store.forget_session(session_id)
        used = await store.session("used")
        assert (used.turns, used.last_run_id) == (2, "r2")
        assert used.updated_us > 1
        with pytest.raises(SessionNotFoundError, match="never"):
            await store.session("never")
        with pytest.raises(SessionNotFoundError):
            await store.create_run(going_on(store, "never"))
        with pytest.raises(StoreError):
            await store.begin_session(a_session("used"))


async def test_sessions_are_listed_last_used_first(path: Path) -> None:
    async with open_store(path) as store:
        for number, agent in enumerate(("a", "b", "a")):
            await store.begin_session(a_session(f"s{number}", agent=agent, updated_us=number))
        assert [each.id for each in await store.sessions()] == ["s2", "s1", "s0"]
        assert [each.id for each in await store.sessions(agent="a", limit=1)] == ["s2"]


async def test_preferences_are_set_changed_and_forgotten(path: Path) -> None:
    async with open_store(path) as store:
        await store.prefer("helper", "haiku")
        await store.prefer("helper", "opus")
        await store.prefer("worker", "sonnet")
        await store.prefer("nobody", None)
        assert await store.preferences() == {"helper": "opus", "worker": "sonnet"}
        await store.prefer("helper", None)
        assert await store.preferences() == {"worker": "sonnet"}


# -- owners that died ---------------------------------------------------------------------------------------

OWNER = program(
    """
    for run_id in sys.argv[2:]:
        await store.create_run(a_run(store, run_id, session_id=f"s-{run_id}"))
        await store.begin_session(SessionRow(id=f"s-{run_id}", backend="claude", agent="helper", cwd="/", home="/",
                                             locked_by=run_id, created_us=1, updated_us=1))
        await store.update_run(run_id, status="running", started_us=now_us(), text="said so far")
    print("ready", flush=True)
    await anyio.to_thread.run_sync(sys.stdin.readline)
    """
)


def owner_of(path: Path, *run_ids: str) -> "subprocess.Popen[str]":
    owner = python(OWNER, path, *run_ids)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n", owner.communicate()[1]
    return owner


async def test_the_runs_of_a_killed_process_become_interrupted(path: Path) -> None:
    dead, alive = owner_of(path, "a" * 16, "b" * 16), owner_of(path, "c" * 16)
    try:
        dead.kill()
        ended(dead, code=-signal.SIGKILL)
        async with open_store(path) as store:
            mine = await created(store)
            abandoned = await store.interrupt_abandoned()
            assert sorted(run.id for run in abandoned) == ["a" * 16, "b" * 16]
            run = await store.run("a" * 16)
            assert (run.status, run.text) == ("interrupted", "said so far")
            assert run.error is not None
            assert run.error["code"] == "interrupted"
            assert run.error["advice"]
            assert run.ended_us is not None
            assert (await store.session(f"s-{'a' * 16}")).locked_by is None
            assert (await store.run("c" * 16)).status == "running"
            assert (await store.session(f"s-{'c' * 16}")).locked_by == "c" * 16
            assert (await store.run(mine.id)).status == "queued"
            assert await store.interrupt_abandoned() == [], "and only once"
    finally:
        ended(alive)


async def test_a_process_nobody_waited_for_is_dead(path: Path) -> None:
    """Where nothing reaps (a container's first process, say), a killed process stays visible as a zombie."""
    zombie = owner_of(path, "a" * 16)
    zombie.kill()
    await anyio.to_thread.run_sync(os.waitid, os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    async with open_store(path) as store:
        assert [run.id for run in await store.interrupt_abandoned()] == ["a" * 16]
    ended(zombie, code=-signal.SIGKILL)


async def test_a_reused_pid_does_not_keep_runs_alive(path: Path) -> None:
    async with open_store(path) as store:
        gone = await created(store, instance_id="gone")
        await store._db.write(
            (
                f"INSERT INTO instances {INSTANCE_COLUMNS}"
                " SELECT 'gone', kind, host, pid, pid_created - 500, 1, alive_us, NULL"
                " FROM instances",
                {},
            )
        )
        assert [run.id for run in await store.interrupt_abandoned()] == [gone.id]


MINUTE = 60_000_000


async def an_instance_elsewhere(store: Store, *, silent_us: int, now: int | None = None) -> str:
    """An instance of another host, its run at work, the run's session; it was last heard of so long ago."""
    far = await created(store, instance_id="far", status="running")
    await store.begin_session(a_session("s-far", locked_by=far.id))
    alive = (now or now_us()) - silent_us
    await store._db.write(
        (
            f"INSERT INTO instances {INSTANCE_COLUMNS}"
            " VALUES ('far', 'serve', 'another-host', 1, 0, 1, :alive, NULL)",
            {"alive": alive},
        ),
    )
    return far.id


@pytest.mark.parametrize(
    "silent_us", [-10 * MINUTE, 0, MINUTE], ids=["its clock is ahead", "just heard", "a minute"]
)
async def test_runs_of_another_machine_are_left_alone_while_it_is_heard_of(path: Path, silent_us: int) -> None:
    async with open_store(path) as store:
        run_id = await an_instance_elsewhere(store, silent_us=silent_us)
        assert await store.bury_dead_instances() == []
        assert await store.interrupt_abandoned() == []
        assert (await store.run(run_id)).status == "running"
        assert (await store.session("s-far")).locked_by == run_id


async def test_the_runs_of_another_machine_that_fell_silent_become_interrupted(path: Path) -> None:
    """A container that was killed is replaced under a new host name, where its process cannot be looked for."""
    async with open_store(path) as store:
        run_id = await an_instance_elsewhere(store, silent_us=3 * MINUTE)
        assert [run.id for run in await store.interrupt_abandoned()] == [run_id]
        assert (await store.run(run_id)).status == "interrupted"
        await store.create_run(going_on(store, "s-far"))
        assert await store.interrupt_abandoned() == []


async def test_another_machine_that_fell_silent_is_buried_once(path: Path) -> None:
    async with open_store(path) as store:
        await an_instance_elsewhere(store, silent_us=3 * MINUTE)
        assert await store.bury_dead_instances() == ["far"]
        assert await store.bury_dead_instances() == []


async def test_our_own_host_is_judged_by_its_processes_however_silent(path: Path) -> None:
    """A library's program may hold its event loop for minutes; as long as it lives, its runs are its own."""
    async with open_store(path) as busy, open_store(path) as store:
        run = await created(busy)
        await busy._db.write(("UPDATE instances SET alive_us = 1", {}))
        assert await store.bury_dead_instances() == []
        assert await store.interrupt_abandoned() == []
        assert (await store.run(run.id)).status == "queued"


async def test_who_was_asleep_itself_lets_the_others_wake_up_before_it_judges(path: Path) -> None:
    """Laptop and containers sleep and wake together, and one of them looks first."""
    async with open_store(path) as store:
        before = now_us()
        run_id = await an_instance_elsewhere(store, silent_us=0, now=before)
        assert await store.bury_dead_instances(now=before) == []
        awake = before + 60 * MINUTE
        assert await store.bury_dead_instances(now=awake) == []
        assert await store.interrupt_abandoned(now=awake) == []
        for look in range(8):
            assert await store.bury_dead_instances(now=awake + look * MINUTE // 4) == []
        assert await store.bury_dead_instances(now=awake + 2 * MINUTE) == ["far"], "it did not wake up"
        assert [run.id for run in await store.interrupt_abandoned(now=awake + 2 * MINUTE)] == [run_id]


async def test_a_sign_of_life_is_on_disk(path: Path) -> None:
    async with open_store(path) as store:
        await store._db.write(("UPDATE instances SET alive_us = 1", {}))
        before = now_us()
        await store.beat()
        [(alive,)] = peek(path, "SELECT alive_us FROM instances")
        assert before <= alive <= now_us()


async def test_who_was_taken_for_dead_is_alive_again_and_stops_what_is_no_longer_its_own(path: Path) -> None:
    """Its sessions may have been gone on with elsewhere; what it begins from now on is its own."""
    async with open_store(path) as slept, open_store(path) as store:
        lost = await created(slept)
        await slept._db.write(
            (
                "UPDATE instances SET host = 'another-host', alive_us = :then WHERE id = :id",
                {"then": now_us() - 60 * MINUTE, "id": slept.instance_id},
            )
        )
        assert await slept.cancels_requested() == []
        assert await store.bury_dead_instances() == [slept.instance_id]
        assert [run.id for run in await store.interrupt_abandoned()] == [lost.id]
        await slept.beat()
        assert await slept.cancels_requested() == [lost.id]
        new = await created(slept)
        assert await store.interrupt_abandoned() == []
        assert (await store.run(new.id)).status == "queued"
        await slept.request_cancel(new.id)
        assert new.id in await slept.cancels_requested()


async def test_an_instance_that_closed_leaves_nothing_running(path: Path) -> None:
    async with open_store(path) as closed:
        left = await created(closed)
    async with open_store(path) as store:
        assert [run.id for run in await store.interrupt_abandoned()] == [left.id]


async def test_a_file_of_the_first_version_is_brought_up_to_date(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    old = sqlite3.connect(path, isolation_level=None)
    _, first = migrations()[0]
    old.executescript(first)
    old.execute("PRAGMA user_version = 1")
    old.close()
    async with open_store(path) as store:
        run = await created(store)
        await store.update_run(run.id, status="waiting", resume_at_us=5)
        assert (await store.run(run.id)).resume_at_us == 5
