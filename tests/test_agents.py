"""The catalog: which agents there are, what is wrong with the others, and that edits arrive while it watches."""

import ctypes
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest
from anyio.streams.memory import MemoryObjectReceiveStream

from orchestrator.agents import Catalog, CatalogChange, Root, parse_agent, resolve_model, validate_tree
from orchestrator.errors import AgentNotFoundError

OUR_AGENTS = Path(__file__).parent.parent / "agents"


def write(path: Path, *lines: str, name: str | None = None, body: str = "You help.") -> Path:
    """Write an agent file the way careful editors do: complete, then moved into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(["---", f"name: {name or path.stem}", "description: Helps.", *lines, "---", body])
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text)
    unfinished.replace(path)
    return path


def loaded(*roots: Root) -> Catalog:
    catalog = Catalog(roots)
    catalog.load()
    return catalog


def project(path: Path) -> Root:
    return Root(path, "project")


# --- loading ---------------------------------------------------------------------------------------------


def test_agents_of_all_roots_are_found_in_subfolders_too(tmp_path: Path) -> None:
    write(tmp_path / "agents" / "worker.md")
    write(tmp_path / "agents" / "team" / "writer.md")
    write(tmp_path / "user" / "mine.md")
    write(tmp_path / "shop" / ".claude" / "agents" / "seller.md")
    catalog = loaded(
        Root(tmp_path / "shop" / ".claude" / "agents", "workspace", "shop"),
        Root(tmp_path / "user", "user"),
        project(tmp_path / "agents"),
    )
    assert [agent.id for agent in catalog.agents()] == ["worker", "writer", "mine", "shop:seller"]
    assert catalog.problems() == []


def test_precedence_is_project_user_workspace_and_no_name_is_lost(tmp_path: Path) -> None:
    roots = [
        Root(tmp_path / "w", "workspace", "shop"),
        Root(tmp_path / "u", "user"),
        Root(tmp_path / "p", "project"),
    ]
    paths = {root.source: write(root.path / "worker.md", body=f"From the {root.source}.") for root in roots}
    catalog = loaded(*roots)
    assert catalog.get("worker").system_prompt == "From the project."
    assert catalog.get("shop:worker").system_prompt == "From the workspace."
    problems = {problem.path: problem for problem in catalog.problems()}
    assert set(problems) == {paths["user"], paths["workspace"]}
    assert {problem.kind for problem in problems.values()} == {"shadowed"}
    assert str(paths["project"]) in problems[paths["user"]].reason
    assert "say 'shop:worker'" in problems[paths["workspace"]].reason


def test_a_workspace_agent_answers_to_its_plain_name_while_that_is_clear(tmp_path: Path) -> None:
    write(tmp_path / "a" / "seller.md")
    write(tmp_path / "a" / "buyer.md")
    write(tmp_path / "b" / "seller.md")
    catalog = loaded(Root(tmp_path / "a", "workspace", "a"), Root(tmp_path / "b", "workspace", "b"))
    assert catalog.get("buyer").id == "a:buyer"
    with pytest.raises(AgentNotFoundError, match="say 'a:seller' or 'b:seller'"):
        catalog.get("seller")


def test_an_unknown_name_is_answered_with_near_and_known_ones(tmp_path: Path) -> None:
    write(tmp_path / "worker.md")
    write(tmp_path / "writer.md")
    with pytest.raises(AgentNotFoundError, match="did you mean 'worker'") as caught:
        loaded(project(tmp_path)).get("wroker")
    assert caught.value.details["known"] == ["worker", "writer"]


def test_asking_for_an_agent_whose_file_is_broken_says_so(tmp_path: Path) -> None:
    write(tmp_path / "worker.md", "permissionMode: delegate")
    with pytest.raises(AgentNotFoundError, match=r"worker\.md:4: permissionMode"):
        loaded(project(tmp_path)).get("worker")


def test_a_broken_edit_keeps_the_last_good_version_until_mended(tmp_path: Path) -> None:
    path = write(tmp_path / "worker.md", body="One.")
    catalog = loaded(project(tmp_path))
    write(path, "tools: {write: true}", body="Two.")
    catalog.load()
    assert catalog.get("worker").system_prompt == "One."
    (problem,) = catalog.problems()
    assert (problem.kind, problem.path, problem.line, problem.kept, problem.agent) == (
        "broken",
        path,
        4,
        True,
        "worker",
    )
    write(path, "tools: Read", body="Three.")
    catalog.load()
    assert catalog.get("worker").system_prompt == "Three."
    assert catalog.problems() == []


def test_a_file_that_was_never_good_is_a_problem_and_no_agent(tmp_path: Path) -> None:
    (tmp_path / "idea.md").write_text("some thoughts")
    catalog = loaded(project(tmp_path))
    assert catalog.agents() == []
    assert [(problem.kept, problem.line) for problem in catalog.problems()] == [(False, 1)]


def test_a_deleted_file_takes_its_agent_along(tmp_path: Path) -> None:
    path = write(tmp_path / "worker.md")
    catalog = loaded(project(tmp_path))
    path.unlink()
    catalog.load()
    assert catalog.agents() == []


def test_files_that_did_not_change_are_not_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "worker.md")
    catalog = loaded(project(tmp_path))
    before = catalog.get("worker")
    catalog.load()
    assert catalog.get("worker") is before
    os.utime(path, ns=(1, 1))
    catalog.load()
    assert catalog.get("worker") is not before
    assert catalog.get("worker") == before


def test_readmes_and_lock_files_of_editors_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Our agents")
    (tmp_path / ".#worker.md").symlink_to("someone@somewhere.1234")
    assert loaded(project(tmp_path)).problems() == []


def test_roots_that_do_not_exist_are_empty_and_a_file_is_no_root(tmp_path: Path) -> None:
    assert loaded(project(tmp_path / "later")).problems() == []
    (tmp_path / "file").write_text("")
    (problem,) = loaded(project(tmp_path / "file")).problems()
    assert "cannot be listed" in problem.reason


def test_its_repr_says_how_it_stands(tmp_path: Path) -> None:
    write(tmp_path / "worker.md")
    assert repr(loaded(project(tmp_path))) == "<Catalog agents=1 problems=0>"


# --- the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "preference", "frontmatter", "default", "expected"),
    [
        ("a", "b", "c", "d", ("a", "argument")),
        (None, "b", "c", "d", ("b", "preference")),
        (None, None, "c", "d", ("c", "agent")),
        (None, None, "inherit", "d", ("d", "config")),
        (None, None, "inherit", None, (None, "cli")),
        ("", "", "c", "d", ("c", "agent")),
    ],
)
def test_the_model_is_argument_else_preference_else_frontmatter_else_config(
    argument: str | None, preference: str | None, frontmatter: str, default: str | None, expected: tuple[str, str]
) -> None:
    text = f"---\nname: x\nmodel: {frontmatter}\n---\n"
    agent = parse_agent(text, path=Path("x.md"), source="project")
    assert resolve_model(argument, preference, agent, default) == expected


# --- watching --------------------------------------------------------------------------------------------


class Changes:
    """The changes a watching catalog reports, waited for with a deadline."""

    def __init__(self, stream: MemoryObjectReceiveStream[CatalogChange]) -> None:
        self._stream = stream

    async def until(self, seen: Callable[[CatalogChange], bool]) -> CatalogChange:
        with anyio.fail_after(5):
            while True:
                change = await self._stream.receive()
                if seen(change):
                    return change


@asynccontextmanager
async def watching(catalog: Catalog) -> AsyncIterator[Changes]:
    send, receive = anyio.create_memory_object_stream[CatalogChange](100)
    with send, receive:
        async with anyio.create_task_group() as tg:
            await tg.start(partial(catalog.watch, on_change=send.send_nowait))
            yield Changes(receive)
            tg.cancel_scope.cancel()


async def test_an_agent_is_live_from_its_file_s_creation_to_its_deletion(tmp_path: Path) -> None:
    catalog = loaded(project(tmp_path))
    path = tmp_path / "worker.md"
    async with watching(catalog) as changes:
        write(path, body="One.")
        assert (await changes.until(lambda change: bool(change.added))).added == ("worker",)

        write(path, body="Two.")
        await changes.until(lambda change: change.changed == ("worker",))
        assert catalog.get("worker").system_prompt == "Two."

        write(path, "permissionMode: delegate", body="Three.")
        broken = await changes.until(lambda change: bool(change.problems))
        assert broken.problems[0].kept
        assert (broken.changed, broken.removed) == ((), ())
        assert catalog.get("worker").system_prompt == "Two."

        write(path, body="Four.")
        mended = await changes.until(lambda change: change.changed == ("worker",))
        assert mended.problems == ()
        assert catalog.get("worker").system_prompt == "Four."

        path.unlink()
        await changes.until(lambda change: change.removed == ("worker",))
        assert catalog.agents() == []


async def test_a_file_written_in_place_is_seen_as_well(tmp_path: Path) -> None:
    path = write(tmp_path / "worker.md", body="One.")
    catalog = loaded(project(tmp_path))
    async with watching(catalog) as changes:
        path.write_text(path.read_text().replace("One.", "Two."))
        await changes.until(lambda change: change.changed == ("worker",) and not change.problems)
        assert catalog.get("worker").system_prompt == "Two."


async def test_a_folder_created_later_is_watched_from_then_on(tmp_path: Path) -> None:
    catalog = loaded(project(tmp_path / "later" / "agents"))
    async with watching(catalog) as changes:
        write(tmp_path / "later" / "agents" / "worker.md")
        await changes.until(lambda change: change.added == ("worker",))
        write(tmp_path / "later" / "agents" / "writer.md")
        await changes.until(lambda change: change.added == ("writer",))


async def test_a_folder_that_is_removed_and_comes_back_is_watched_again(tmp_path: Path) -> None:
    folder = tmp_path / "agents"
    write(folder / "worker.md")
    catalog = loaded(project(folder))
    async with watching(catalog) as changes:
        shutil.rmtree(folder)
        await changes.until(lambda change: change.removed == ("worker",))
        write(folder / "worker.md", body="Back.")
        await changes.until(lambda change: change.added == ("worker",))
        write(folder / "worker.md", body="Still here.")
        await changes.until(lambda change: change.changed == ("worker",))
        assert catalog.get("worker").system_prompt == "Still here."


async def test_new_subfolders_are_watched(tmp_path: Path) -> None:
    catalog = loaded(project(tmp_path))
    async with watching(catalog) as changes:
        path = write(tmp_path / "team" / "worker.md")
        await changes.until(lambda change: change.added == ("worker",))
        write(path, body="Two.")
        await changes.until(lambda change: change.changed == ("worker",))


async def test_files_kept_elsewhere_and_linked_to_are_watched(tmp_path: Path) -> None:
    original = write(tmp_path / "dotfiles" / "worker.md")
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "worker.md").symlink_to(original)
    catalog = loaded(project(tmp_path / "agents"))
    async with watching(catalog) as changes:
        write(original, body="Two.")
        await changes.until(lambda change: change.changed == ("worker",))


async def test_a_change_between_loading_and_watching_is_not_missed(tmp_path: Path) -> None:
    catalog = loaded(project(tmp_path))
    write(tmp_path / "worker.md")
    async with watching(catalog) as changes:
        await changes.until(lambda change: change.added == ("worker",))


async def test_what_changes_no_agent_is_not_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "worker.md")
    catalog = loaded(project(tmp_path))
    async with watching(catalog) as changes:
        (tmp_path / "notes.txt").write_text("unrelated")
        path.touch()
        write(tmp_path / "writer.md")
        first = await changes.until(lambda _: True)
        assert (first.added, first.changed) == (("writer",), ())


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """While it lasts, nothing can be opened: neither files nor the system's watches."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_running_out_of_descriptors_loses_no_agent_and_ends_by_itself(tmp_path: Path) -> None:
    write(tmp_path / "worker.md")
    catalog = loaded(project(tmp_path))
    async with watching(catalog) as changes:
        with no_more_descriptors():
            exhausted = await changes.until(lambda change: bool(change.problems))
            assert "cannot be listed" in exhausted.problems[0].reason
            assert catalog.get("worker")
        await changes.until(lambda change: change.problems == ())
        assert catalog.get("worker")


async def test_where_nothing_can_be_watched_folders_are_looked_at_instead(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    catalog = loaded(project(tmp_path))
    async with AsyncExitStack() as stack:
        with no_more_descriptors():
            changes = await stack.enter_async_context(watching(catalog))
            await changes.until(lambda change: bool(change.problems))
        assert caplog.text.count("cannot be watched") == 1
        write(tmp_path / "worker.md")
        await changes.until(lambda change: change.added == ("worker",))


async def closed_while_watching(base: Path) -> None:
    folder = base / "outer" / "agents"
    write(folder / "worker.md", body="One.")
    (folder / "linked.md").symlink_to(write(base / "linked.md"))
    write(base / "user" / "other.md")
    catalog = loaded(project(folder), Root(base / "user", "user"))
    async with watching(catalog) as changes:
        folder.parent.chmod(0)
        closed = await changes.until(lambda change: bool(change.problems))
        assert {problem.kind for problem in closed.problems} == {"broken"}
        assert closed.problems[0].path == folder
        assert closed.problems[0].reason == "cannot be listed: Permission denied"
        assert (catalog.get("worker").system_prompt, len(catalog.agents())) == ("One.", 3)
        write(base / "user" / "other.md", body="Two.")
        await changes.until(lambda change: change.changed == ("other",))
        assert catalog.get("worker")

        folder.parent.chmod(0o755)
        await changes.until(lambda change: change.problems == ())
        write(folder / "worker.md", body="Two.")
        await changes.until(lambda change: change.changed == ("worker",))
        write(base / "linked.md", body="Two.")
        await changes.until(lambda change: change.changed == ("linked",))


async def closed_from_the_start(base: Path) -> None:
    folder = base / "outer" / "agents"
    write(folder / "worker.md")
    folder.parent.chmod(0)
    catalog = loaded(project(folder))
    assert [(problem.kind, problem.path) for problem in catalog.problems()] == [("broken", folder)]
    async with watching(catalog) as changes:
        folder.parent.chmod(0o755)
        opened = await changes.until(lambda change: change.added == ("worker",))
        assert opened.problems == ()
        write(folder / "writer.md")
        await changes.until(lambda change: change.added == ("writer",))


async def closed_itself(base: Path) -> None:
    """A watch that began at a closed folder sees nothing of it later: another one has to begin."""
    folder = base / "agents"
    write(folder / "worker.md")
    write(folder / "team" / "writer.md", body="One.")
    (folder / "team").chmod(0)
    catalog = loaded(project(folder))
    async with watching(catalog) as changes:
        (folder / "team").chmod(0o755)
        await changes.until(lambda change: change.added == ("writer",))
        write(folder / "team" / "writer.md", body="Two.")
        await changes.until(lambda change: change.changed == ("writer",))


async def names_without_files(base: Path) -> None:
    """A folder that may be listed and not searched: what is in it can be named and not read."""
    folder = base / "agents"
    write(folder / "worker.md")
    (folder / "linked.md").symlink_to(write(base / "linked.md"))
    catalog = loaded(project(folder))
    async with watching(catalog) as changes:
        folder.chmod(0o444)
        closed = await changes.until(lambda change: len(change.problems) == 2)
        assert {(problem.agent, problem.kept) for problem in closed.problems} == {
            ("worker", True),
            ("linked", True),
        }
        assert "cannot be read: Permission denied" in closed.problems[0].reason
        folder.chmod(0o755)
        await changes.until(lambda change: change.problems == ())


async def closed_and_validated(base: Path) -> None:
    folder = base / "outer" / "agents"
    write(folder / "worker.md")
    folder.parent.chmod(0)
    [report] = validate_tree(folder)
    assert report.status == "refused"
    assert "Permission denied" in (report.reason or "")


def as_nobody_special() -> None:
    """Give up root's privilege of going where it likes. For an ordinary user it changes nothing."""
    # capset(2), version 3, of this thread and those it starts: no capability at all.
    number = {"x86_64": 126, "aarch64": 91}[os.uname().machine]
    ctypes.CDLL(None).syscall(number, (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())


@pytest.mark.skipif(sys.platform != "linux", reason="root's privileges are given up in Linux's way")
@pytest.mark.parametrize(
    "scenario",
    [closed_while_watching, closed_from_the_start, closed_itself, names_without_files, closed_and_validated],
)
def test_folders_that_may_not_be_searched(tmp_path: Path, scenario: Callable[[Path], Awaitable[None]]) -> None:
    code = (
        "import sys, anyio; from pathlib import Path; from tests import test_agents;"
        "test_agents.as_nobody_special();"
        f"anyio.run(test_agents.{scenario.__name__}, Path(sys.argv[1]))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path],
            cwd=Path(__file__).parent.parent,
            env={"PATH": os.defpath},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    finally:
        for folder in ("outer", "agents", "agents/team"):
            if (tmp_path / folder).exists():
                (tmp_path / folder).chmod(0o755)
    assert done.returncode == 0, done.stderr


async def test_a_catalog_can_be_watched_without_a_listener(tmp_path: Path) -> None:
    catalog = loaded(project(tmp_path))
    async with anyio.create_task_group() as tg:
        await tg.start(catalog.watch)
        tg.cancel_scope.cancel()


# --- our own agents --------------------------------------------------------------------------------------


def test_the_project_s_own_agents_load_without_a_warning() -> None:
    reports = validate_tree(OUR_AGENTS)
    assert [(report.name, report.status, report.warnings) for report in reports] == [
        ("coordinator", "loaded", []),
        ("manager", "loaded", []),
        ("reviewer", "loaded", []),
        ("worker", "loaded", []),
        ("writer", "loaded", []),
    ]


@pytest.mark.parametrize(
    ("name", "tools", "delegates"),
    [
        ("manager", ("Read", "Grep", "Glob", "Bash"), False),
        ("worker", ("Read", "Grep", "Bash", "Write"), False),
        ("reviewer", ("Read", "Write"), False),
        ("writer", ("Read",), False),
        ("coordinator", ("Read", "Grep", "Glob", "mcp__orchestrator"), True),
    ],
)
def test_our_own_agents_may_do_no_more_than_they_need(name: str, tools: tuple[str, ...], delegates: bool) -> None:
    agent = loaded(project(OUR_AGENTS)).get(name)
    assert agent.tools == tools
    assert agent.may_delegate() is delegates
    assert not agent.may_use_subagents()
    assert agent.permission_mode in (None, "acceptEdits")
    assert (agent.permission_mode == "acceptEdits") == ("Write" in tools)
    assert agent.model
    assert agent.system_prompt
