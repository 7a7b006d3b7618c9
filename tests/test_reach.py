"""What is configured or asked for reaches the model request of the real CLI."""

import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import anyio
import yaml

from orchestrator.config import load_config
from orchestrator.delegation import delegate
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
