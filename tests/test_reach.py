"""What is configured or asked for reaches the model request of the real CLI; directories within reach of a task."""

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import anyio
import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from orchestrator.config import load_config
from orchestrator.delegation import delegate
from orchestrator.errors import ReachError
from orchestrator.reach import allowed_dirs, asked_by_model, check_reach, check_unmoved, resolved
from orchestrator.runtime import Runtime, open_runtime
from orchestrator.task import Task
from orchestrator.testing import Fault, ModelServer, Reply, Rule, ToolUse
from tests.conftest import DUMMY_KEY, settings, write_agent

Open = Callable[..., AbstractAsyncContextManager[Runtime]]


async def test_an_empty_tools_list_offers_none(project: Path, rt: Runtime, model: ModelServer) -> None:
    write_agent(project, "silent", tools="[]")
    rt.catalog.load()
    model.rules = [Rule("ok")]
    with anyio.fail_after(30):
        assert (await delegate(rt, Task(agent="silent", prompt="go"))).ok
    assert model.journal[0].tools == []


async def test_a_projects_own_mcp_json_is_not_read(project: Path, rt: Runtime, model: ModelServer) -> None:
    marker = project / "started-by-mcp-json"
    server = {"command": "/usr/bin/touch", "args": [str(marker)]}
    (project / ".mcp.json").write_text(yaml.safe_dump({"mcpServers": {"stray": server}}, default_flow_style=True))
    model.rules = [Rule("ok")]
    with anyio.fail_after(30):
        assert (await delegate(rt, Task(agent="helper", prompt="go"))).ok
    assert not marker.exists()


async def test_an_output_limit_is_sent(runtime: Open, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    with anyio.fail_after(30):
        async with runtime(claude__env__CLAUDE_CODE_MAX_OUTPUT_TOKENS="4321") as rt:
            await delegate(rt, Task(agent="helper", prompt="go"))
    assert model.journal[0].body["max_tokens"] == 4321


async def test_the_configured_time_limit_holds_for_tasks_that_name_none(runtime: Open, model: ModelServer) -> None:
    model.rules = [Rule(Reply("never", fault=Fault(stall_at=2)))]
    with anyio.fail_after(30):
        async with runtime(limits__timeout_s=1.5) as rt:
            outcome = await delegate(rt, Task(agent="helper", prompt="go"))
    assert outcome.status == "timed_out"


async def test_a_fallback_model_takes_over(runtime: Open, model: ModelServer) -> None:
    overloaded = Fault(status=529, error_type="overloaded_error", message="Overloaded")
    model.rules = [Rule(Reply(fault=overloaded), when={"model": "opus"}), Rule("from the other model")]
    with anyio.fail_after(30):
        async with runtime(claude__max_retries=3) as rt:
            outcome = await delegate(rt, Task(agent="helper", prompt="go", fallback_model="claude-sonnet-5-5"))
    assert outcome.text == "from the other model", outcome.error
    assert outcome.model == "claude-sonnet-5-5"


async def test_a_prompt_is_appended_and_a_directory_added(
    rt: Runtime, project: Path, model: ModelServer, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "note.txt").write_text("from outside")
    model.rules = [
        Rule("read it", when={"tool_result": "from outside"}),
        Rule(ToolUse("Read", {"file_path": str(outside / "note.txt")}), when={"tool_result": False}),
    ]
    task = Task(agent="helper", prompt="go", append_system_prompt="Be brief, comrade.", add_dirs=(outside,))
    with anyio.fail_after(30):
        outcome = await delegate(rt, task)
    assert outcome.text == "read it", outcome.error
    assert "Be brief, comrade." in model.journal[0].system


async def test_settings_of_one_run_apply(rt: Runtime, model: ModelServer, project: Path) -> None:
    model.rules = [
        Rule("refused", when={"tool_result": True}),
        Rule(ToolUse("Write", {"file_path": str(project / "x.txt"), "content": "x"})),
    ]
    with anyio.fail_after(30):
        await delegate(rt, Task(agent="worker", prompt="go", settings={"permissions": {"deny": ["Write"]}}))
    assert not (project / "x.txt").exists()


async def test_agents_come_from_the_user_and_from_workspaces(
    tmp_path: Path, project: Path, model: ModelServer, environ: dict[str, str]
) -> None:
    """From a configuration file to the system prompt: user agents and workspaces, by name and by id."""
    mine, space = tmp_path / "mine", tmp_path / "space" / ".claude"
    (mine / "agents").mkdir(parents=True)
    (space / "agents").mkdir(parents=True)
    write_agent(mine, "friend", body="You are the user's friend.")
    write_agent(space, "local", body="You live in the workspace.")
    (project / "orchestrator.yaml").write_text(
        yaml.safe_dump({"agents": {"user_path": str(mine / "agents"), "workspaces": [str(tmp_path / "space")]}})
    )
    own = {name: v for name, v in settings(tmp_path, model.base_url).items() if name != "agents.user_path"}
    model.rules = [Rule("ok")]
    with anyio.fail_after(30):
        async with open_runtime(load_config(project_dir=project, environ={}, overrides=own), environ=environ) as rt:
            assert {"friend", "space:local"} <= {agent.id for agent in rt.catalog.agents()}
            await delegate(rt, Task(agent="friend", prompt="Work in /etc/agents please"))
            await delegate(rt, Task(agent="space:local", prompt="go"))
            known = {agent.id for agent in rt.catalog.agents()}
    assert "You are the user's friend." in model.journal[0].system
    assert "You live in the workspace." in model.journal[1].system
    assert known == {"helper", "worker", "friend", "space:local"}, "no prompt chooses what is read"


async def test_the_key_is_nowhere_in_our_data(tmp_path: Path, rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    with anyio.fail_after(30):
        await delegate(rt, Task(agent="helper", prompt="go"))
    files = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if DUMMY_KEY.encode() in path.read_bytes()] == []


async def test_settings_of_a_directory_count_only_inside_the_project(
    rt: Runtime, project: Path, model: ModelServer, tmp_path: Path
) -> None:
    """A repository somebody else made must not run hooks or name another server when an agent works in it."""
    theirs = tmp_path / "theirs"
    for folder in (theirs, project):
        (folder / ".claude").mkdir(parents=True)
        hook = {"type": "command", "command": f"touch {folder}/hooked"}
        settings_of = {"hooks": {"SessionStart": [{"hooks": [hook]}]}}
        (folder / ".claude" / "settings.json").write_text(json.dumps(settings_of))
        (folder / "CLAUDE.md").write_text(f"memory of {folder.name}")
    model.rules = [Rule("ok")]
    with anyio.fail_after(30):
        await delegate(rt, Task(agent="helper", prompt="go"))
        await delegate(rt, Task(agent="helper", prompt="go", cwd=theirs))
    assert (project / "hooked").exists()
    assert "memory of project" in json.dumps(model.journal[0].body)
    assert not (theirs / "hooked").exists()
    assert "memory of theirs" not in json.dumps(model.journal[1].body)


async def test_the_permission_mode_is_the_files_whatever_the_settings_say(
    rt: Runtime, project: Path, model: ModelServer
) -> None:
    write_agent(project, "careful", tools="Write", body="You are careful.")
    rt.catalog.load()
    (project / ".claude").mkdir()
    (project / ".claude" / "settings.json").write_text('{"permissions": {"defaultMode": "acceptEdits"}}')
    model.rules = [
        Rule("done", when={"tool_result": True}),
        Rule(ToolUse("Write", {"file_path": str(project / "x.txt"), "content": "x"})),
    ]
    with anyio.fail_after(30):
        await delegate(rt, Task(agent="careful", prompt="go"))
    assert not (project / "x.txt").exists()


async def test_a_proxy_is_not_in_the_way_to_loopback(runtime: Open, model: ModelServer) -> None:
    model.rules = [Rule("ok")]
    with anyio.fail_after(30):
        async with runtime(env={"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}) as rt:
            outcome = await delegate(rt, Task(agent="helper", prompt="go"))
    assert outcome.ok, outcome.error


# -- where runs may work ------------------------------------------------------------------------------------

PROJECT, AGENT_CWD, WORKSPACES, MORE = map(Path, ("/srv/project", "/srv/other", "/data/workspaces", "/srv/more"))


def allowed(
    *,
    configured: tuple[Path, ...] | None = None,
    project: Path = PROJECT,
    parent_cwd: Path | None = None,
    by_model: bool = True,
) -> tuple[Path, ...] | None:
    return allowed_dirs(
        configured=configured, project_dir=PROJECT, project=project, parent_cwd=parent_cwd, workspaces=WORKSPACES,
        by_model=by_model,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("caller", "parent", "plan_by_model", "expected"),
    [
        (False, None, False, False),
        (True, None, False, True),
        (False, "agent", False, True),
        (False, "plan", False, False),
        (False, "plan", True, True),
    ],
)
def test_who_chose_the_directory(caller: bool, parent: str | None, plan_by_model: bool, expected: bool) -> None:
    assert asked_by_model(caller=caller, parent_kind=parent, plan_by_model=plan_by_model) is expected


def test_people_may_name_any_directory_until_some_are_configured() -> None:
    assert allowed(by_model=False) is None
    check_reach([Path("/anywhere")], allowed(by_model=False))
    with pytest.raises(ReachError) as caught:
        check_reach([Path("/anywhere")], allowed(by_model=False, configured=(MORE,)))
    assert "limits.allowed_dirs" in caught.value.advice
    assert caught.value.details["allowed"] == [str(PROJECT), str(MORE), str(WORKSPACES)]


@pytest.mark.parametrize("inside", [PROJECT, PROJECT / "src", AGENT_CWD / "x", WORKSPACES / "run"])
def test_models_stay_in_the_project_their_own_directory_and_workspaces(inside: Path) -> None:
    check_reach([inside], allowed(parent_cwd=AGENT_CWD))


@pytest.mark.parametrize("outside", [Path("/"), Path("/srv"), Path("/srv/project-2"), MORE, Path("/data")])
def test_models_do_not_get_elsewhere(outside: Path) -> None:
    with pytest.raises(ReachError, match=f"^{outside} is outside"):
        check_reach([PROJECT, outside], allowed(parent_cwd=AGENT_CWD))


def test_a_claimed_project_adds_nothing_to_configured_directories() -> None:
    check_reach([MORE / "x", PROJECT], allowed(configured=(MORE,), project=Path("/")))
    with pytest.raises(ReachError):
        check_reach([Path("/etc")], allowed(configured=(MORE,), project=Path("/"), parent_cwd=Path("/etc")))
    with pytest.raises(ReachError):
        check_reach([MORE], allowed(configured=(), project=MORE))


_NAMES = ("in", "out", "a", "b", "link", "loop", "gone")
_PATHS = st.lists(st.sampled_from((*_NAMES, "..", ".", "")), max_size=7).map("/".join)
_LINKS = st.lists(st.tuples(_PATHS, st.sampled_from(_NAMES), st.booleans(), _PATHS), max_size=6)


def _stands_in(path: Path, folder: Path) -> bool:
    """Whether the directory that ``path`` really is has ``folder`` above it, asked of the system step by step."""
    top, wanted, here = Path("/").stat(), folder.stat(), path.stat()
    while not os.path.samestat(here, wanted):
        if os.path.samestat(here, top):
            return False
        path = path / ".."
        here = path.stat()
    return True


@settings_of_hypothesis(deadline=None)
@given(links=_LINKS, path=_PATHS)
@example(links=[("in", "link", False, "../out")], path="link/a")
@example(links=[("in", "link", True, "out/a")], path="link/../b")
@example(links=[("in", "a", False, "link"), ("in", "link", False, "..")], path="a/out")
def test_no_path_leads_out_by_links_or_dots(links: list[tuple[str, str, bool, str]], path: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        for folder in ("in/b", "out/a", "out/b"):
            (root / folder).mkdir(parents=True)
        for where, link, absolute, target in links:
            place = root / where / link
            # Links beside and below the root alone: what is above is not ours to fill.
            if place.parent.is_dir() and place.parent.resolve().is_relative_to(root) and not os.path.lexists(place):
                place.symlink_to(f"{root}/{target}" if absolute else target or ".")
        try:
            found = resolved(Path(path), root / "in")
            check_reach([found], [root / "in"])
        except ReachError:
            accepted = False
        else:
            accepted = True
        written = root / "in" / path
        if written.is_dir():
            assert accepted == _stands_in(written, root / "in")
        if (
            accepted and found.is_dir()
        ):  # what is gone into is what was resolved, even if the path as written is none
            assert _stands_in(found, root / "in")


def test_what_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    for name in ("one", "a\0b", "x" * 300):
        with pytest.raises(ReachError, match="leads nowhere"):
            resolved(Path(name), tmp_path)
    assert resolved(Path("not/../yet"), tmp_path) == tmp_path.resolve() / "yet"


def test_a_directory_replaced_by_a_link_is_noticed(tmp_path: Path) -> None:
    place = resolved(Path("inside"), tmp_path)
    place.mkdir()
    check_unmoved(place)
    place.rmdir()
    place.symlink_to("/")
    with pytest.raises(ReachError, match="now leads to /"):
        check_unmoved(place)
