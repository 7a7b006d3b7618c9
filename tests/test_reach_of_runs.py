"""The rules of reach and sandbox as tasks meet them: at admission, and when the CLI starts."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.delegation import delegate
from orchestrator.errors import ConfigError, ReachError
from orchestrator.plan_runs import run_plan
from orchestrator.plans import parse_plan
from orchestrator.runtime import Runtime
from orchestrator.task import Task
from orchestrator.testing import ModelServer, Rule
from tests.conftest import write_agent
from tests.test_sandbox import (
    BYPASS,
    needs_sandbox,
    outside,
    tools_of_the_sandbox,
    touches,
    without_tools,
)

__all__ = ["outside", "without_tools"]

Open = Callable[..., AbstractAsyncContextManager[Runtime]]
CALLER = {"client": "test/1"}


@pytest.fixture
async def someone(rt: Runtime, model: ModelServer) -> str:
    """The id of an agent's run, to delegate from."""
    model.rules = [Rule("ok")]
    with anyio.fail_after(30):
        return (await delegate(rt, Task(agent="helper", prompt="go"))).run_id


# -- tests/test_reach.py


@pytest.mark.parametrize("written", ["../outside", "link", "link/../project/../outside", "/"])
async def test_a_model_does_not_get_out_of_the_project(
    rt: Runtime, project: Path, outside: Path, model: ModelServer, written: str
) -> None:
    (project / "link").symlink_to(outside)
    with anyio.fail_after(30), pytest.raises(ReachError):
        await delegate(rt, Task(agent="helper", prompt="go", cwd=Path(written), caller=CALLER))
    with anyio.fail_after(30), pytest.raises(ReachError):
        await delegate(rt, Task(agent="helper", prompt="go", add_dirs=(Path(written),), caller=CALLER))
    assert await rt.store.runs() == []
    assert model.journal == []


async def test_an_agent_that_works_elsewhere_may_delegate_there_and_no_further(
    runtime: Open, project: Path, outside: Path, tmp_path: Path, model: ModelServer
) -> None:
    model.rules = [Rule("ok")]
    with anyio.fail_after(60):
        async with runtime() as rt:
            first = await delegate(rt, Task(agent="helper", prompt="go", cwd=outside))
            assert first.ok
            row = await rt.store.run(first.run_id)
            live = row.model_copy(
                update={"id": "f" * 16, "root_id": "f" * 16, "status": "running", "ended_us": None}
            )
            await rt.store.create_run(live)
            inside = await delegate(rt, Task(agent="helper", prompt="go on", parent_id=live.id))
            assert (await rt.store.run(inside.run_id)).cwd == str(outside)
            with pytest.raises(ReachError):
                await delegate(rt, Task(agent="helper", prompt="go on", cwd=tmp_path, parent_id=live.id))


async def test_configured_directories_bind_people_too(
    runtime: Open, project: Path, outside: Path, tmp_path: Path, model: ModelServer
) -> None:
    model.rules = [Rule("ok")]
    with anyio.fail_after(60):
        async with runtime(limits__allowed_dirs=[str(outside)]) as rt:
            for cwd in (project, outside):
                assert (await delegate(rt, Task(agent="helper", prompt="go", cwd=cwd))).ok
            with pytest.raises(ReachError, match=str(outside)):
                await delegate(rt, Task(agent="helper", prompt="go", cwd=tmp_path))


async def test_a_plan_of_a_model_copies_nothing_from_elsewhere(
    rt: Runtime, project: Path, outside: Path, model: ModelServer
) -> None:
    text = (
        f"version: 1\nname: p\nworkspace: {{copy: {outside}}}\nsteps:\n  - {{id: a, agent: helper, prompt: go}}\n"
    )
    plan = parse_plan(text, project / "plan.yaml")
    model.rules = [Rule("ok")]
    with anyio.fail_after(60):
        with pytest.raises(ReachError):
            await run_plan(rt, plan, {}, caller=CALLER)
        assert (await run_plan(rt, plan, {})).ok


# -- tests/test_sandbox.py


async def test_a_required_sandbox_that_is_missing_is_named(
    runtime: Open, model: ModelServer, project: Path, without_tools: str
) -> None:
    write_agent(project, "caged", tools="Bash(touch *)", sandbox="required")
    touches(model, project / "made")
    with anyio.fail_after(60):
        async with runtime(env={"PATH": without_tools}) as rt:
            outcome = await delegate(rt, Task(agent="caged", prompt="go"))
    assert outcome.error is not None
    assert (outcome.error["code"], outcome.error["scope"]) == ("sandbox_unavailable", "host")
    assert "bubblewrap" in outcome.error["advice"]
    assert model.journal == []
    assert not (project / "made").exists()


@pytest.mark.parametrize(
    ("agent", "asked"),
    [("caged", {"sandbox": {"enabled": False}}), ("helper", BYPASS)],
)
async def test_settings_that_would_undo_it_are_refused_before_anything_is_spent(
    rt: Runtime, model: ModelServer, project: Path, agent: str, asked: dict[str, Any]
) -> None:
    write_agent(project, "caged", tools="Bash", sandbox="required")
    rt.catalog.load()
    with anyio.fail_after(30), pytest.raises(ConfigError):
        await delegate(rt, Task(agent=agent, prompt="go", settings=asked))
    assert await rt.store.runs() == []


@needs_sandbox
async def test_an_agent_that_requires_one_is_in_it(
    runtime: Open, model: ModelServer, project: Path, tmp_path: Path, outside: Path
) -> None:
    write_agent(project, "caged", tools="Bash(touch *)", sandbox="required")
    (tmp_path / "home" / ".claude").mkdir(parents=True)
    (tmp_path / "home" / ".claude" / "settings.json").write_text('{"sandbox": {"excludedCommands": ["touch *"]}}')
    with anyio.fail_after(60):
        async with runtime(env={"PATH": tools_of_the_sandbox()}) as rt:
            for folder in (project, outside):
                touches(model, folder / "made")
                assert (await delegate(rt, Task(agent="caged", prompt="go"))).ok
    assert (project / "made").exists()
    assert not (outside / "made").exists()
