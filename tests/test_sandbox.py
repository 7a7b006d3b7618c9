"""``sandbox: required`` and the permission mode nobody gets by a side door: with the real CLI, by what it did.

The sandbox itself needs bubblewrap and socat; where they are missing, the tests of what it keeps in are skipped,
and those that nothing runs without it are not.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.agent_files import parse_agent
from orchestrator.delegation import delegate
from orchestrator.errors import AgentError, ConfigError
from orchestrator.outcome import Outcome
from orchestrator.plan_runs import run_plan
from orchestrator.plans import parse_plan
from orchestrator.runtime import Runtime
from orchestrator.sandbox import REQUIRED, check_settings, run_settings, setting_sources
from orchestrator.task import Task
from orchestrator.testing import ModelServer, Rule, ToolUse
from tests.conftest import write_agent

Open = Callable[..., AbstractAsyncContextManager[Runtime]]

BYPASS = {"permissions": {"defaultMode": "bypassPermissions"}, "skipDangerousModePermissionPrompt": True}
#: As root, the CLI refuses that mode altogether unless told that this is a container.
IN_A_CONTAINER = {"claude__env__IS_SANDBOX": "1"}


def _sandbox_works() -> bool:
    bwrap, socat = shutil.which("bwrap"), shutil.which("socat")
    if sys.platform != "linux" or bwrap is None or socat is None:
        return sys.platform == "darwin"
    tried = [bwrap, "--ro-bind", "/", "/", "--unshare-net", "--unshare-pid", "--proc", "/proc", "true"]
    return subprocess.run(tried, check=False, capture_output=True, stdin=subprocess.DEVNULL).returncode == 0


needs_sandbox = pytest.mark.skipif(not _sandbox_works(), reason="needs bubblewrap and socat that work here")


def tools_of_the_sandbox() -> str:
    """A PATH where they are, if they are anywhere."""
    found = {str(Path(place).parent) for name in ("bwrap", "socat") if (place := shutil.which(name))}
    return os.pathsep.join((*sorted(found), "/usr/local/bin", "/usr/bin", "/bin"))


@pytest.fixture
def without_tools(tmp_path: Path) -> str:
    """A PATH with shells and the like, and without what sandboxes are made of."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for place in ("/usr/bin", "/bin"):
        for program in Path(place).iterdir():
            if program.name not in ("bwrap", "socat") and not (folder / program.name).exists():
                (folder / program.name).symlink_to(program)
    return str(folder)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    return folder


def touches(model: ModelServer, file: Path, **options: Any) -> None:
    """Script a model whose agent creates the file with a shell command, and then ends."""
    command = {"command": f"touch {file}", "description": "Create a file", **options}
    model.rules = [Rule("done", when={"tool_result": True}), Rule(ToolUse("Bash", command))]


async def run_sandboxed(rt: Runtime, asked: dict[str, Any] | None = None) -> Outcome:
    layer = run_settings(asked, sandboxed=True, allow_bypass=False)
    return await delegate(rt, Task(agent="worker", prompt="go", allowed_tools=("Bash",), settings=layer))


# -- the agent's file ---------------------------------------------------------------------------------------


def agent_with(*lines: str) -> Any:
    text = "\n".join(["---", "name: x", "description: An x.", *lines, "---", "You are x."])
    return parse_agent(text, path=Path("x.md"), source="project")


def test_the_file_says_whether_a_sandbox_is_required() -> None:
    assert agent_with("sandbox: required").sandbox == "required"
    assert agent_with("sandbox: required").warnings == ()
    assert agent_with().sandbox is None
    assert agent_with("sandbox:").sandbox is None


@pytest.mark.parametrize("line", ["sandbox: off", "sandbox: true", "sandbox: preferred", "sandbox: [required]"])
def test_a_value_that_might_be_meant_otherwise_refuses_the_file(line: str) -> None:
    with pytest.raises(AgentError, match=r"x\.md:4: sandbox"):
        agent_with(line)


@pytest.mark.parametrize("lines", [("sandox: required",), ("sandbox: required", "sandbox: ")])
def test_a_sandbox_is_never_lost_to_a_slip(lines: tuple[str, ...]) -> None:
    with pytest.raises(AgentError, match="sandbox"):
        agent_with(*lines)


# -- the settings a run is started with ---------------------------------------------------------------------


def test_what_is_required_is_there_whatever_the_task_says() -> None:
    narrower = {"filesystem": {"denyWrite": ["/x"]}, "network": {"deniedDomains": ["a.example"]}}
    layer = run_settings({"sandbox": narrower, "model": "m"}, sandboxed=True, allow_bypass=True)
    assert layer == {"sandbox": {**narrower, **REQUIRED}, "model": "m"}
    assert run_settings(None, sandboxed=True, allow_bypass=True) == {"sandbox": REQUIRED}
    assert run_settings({"sandbox": dict(REQUIRED)}, sandboxed=True, allow_bypass=True) == {"sandbox": REQUIRED}


@pytest.mark.parametrize(
    "asked",
    [
        {"enabled": False},
        {"failIfUnavailable": False},
        {"failIfUnavailable": None},
        {"allowUnsandboxedCommands": True},
        {"excludedCommands": ["touch *"]},
        {"filesystem": {"disabled": True}},
        {"filesystem": {"denyRead": ["/x"], "allowWrite": ["/"]}},
        {"network": {"allowedDomains": ["*"]}},
        {"enableWeakerNestedSandbox": True},
        {"ripgrep": {"command": "/tmp/x"}},
        "off",
        False,
    ],
)
def test_a_task_cannot_loosen_the_sandbox(asked: Any) -> None:
    with pytest.raises(ConfigError, match="would loosen the sandbox"):
        check_settings({"sandbox": asked}, sandboxed=True, allow_bypass=False)
    check_settings({"sandbox": asked}, sandboxed=False, allow_bypass=False)


def test_settings_of_a_run_that_needs_none_are_left_alone() -> None:
    assert run_settings(None, sandboxed=False, allow_bypass=True) is None
    asked = {"sandbox": {"enabled": True}, "hooks": {}}
    assert run_settings(asked, sandboxed=False, allow_bypass=True) == asked


def test_the_users_own_settings_are_left_out_of_a_sandbox_only() -> None:
    assert setting_sources(("user", "project", "local"), sandboxed=True) == ("project", "local")
    assert setting_sources(("user", "project"), sandboxed=False) == ("user", "project")


# -- with the CLI -------------------------------------------------------------------------------------------


async def test_without_a_sandbox_nothing_runs(
    runtime: Open, model: ModelServer, project: Path, without_tools: str
) -> None:
    touches(model, project / "made")
    with anyio.fail_after(60):
        async with runtime(env={"PATH": without_tools}) as rt:
            outcome = await run_sandboxed(rt)
    assert outcome.status == "failed"
    assert outcome.error is not None
    assert "andbox required but unavailable" in outcome.error["message"]
    assert model.journal == []
    assert not (project / "made").exists()


@needs_sandbox
@pytest.mark.parametrize("options", [{}, {"dangerouslyDisableSandbox": True}])
async def test_commands_write_inside_the_project_alone(
    runtime: Open, model: ModelServer, project: Path, outside: Path, options: dict[str, Any]
) -> None:
    with anyio.fail_after(60):
        async with runtime(env={"PATH": tools_of_the_sandbox()}) as rt:
            touches(model, project / "made", **options)
            assert (await run_sandboxed(rt)).ok
            touches(model, outside / "made", **options)
            assert (await run_sandboxed(rt)).ok
    assert (project / "made").exists()
    assert not (outside / "made").exists()
    assert "Read-only file system" in json.dumps(model.journal[-1].body)


@needs_sandbox
async def test_settings_of_the_project_do_not_loosen_it(
    runtime: Open, model: ModelServer, project: Path, outside: Path
) -> None:
    loose = {"enabled": False, "failIfUnavailable": False, "allowUnsandboxedCommands": True}
    loose |= {"excludedCommands": ["touch *"], "filesystem": {"disabled": True, "allowWrite": [str(outside)]}}
    (project / ".claude").mkdir()
    (project / ".claude" / "settings.json").write_text(json.dumps({"sandbox": loose}))
    touches(model, outside / "made")
    with anyio.fail_after(60):
        async with runtime(env={"PATH": tools_of_the_sandbox()}) as rt:
            assert (await run_sandboxed(rt)).ok
    assert not (outside / "made").exists()
    assert "Read-only file system" in json.dumps(model.journal[-1].body)


@needs_sandbox
async def test_the_users_own_settings_would_loosen_it_and_are_not_read(
    runtime: Open, model: ModelServer, tmp_path: Path, outside: Path
) -> None:
    (tmp_path / "home" / ".claude").mkdir(parents=True)
    (tmp_path / "home" / ".claude" / "settings.json").write_text('{"sandbox": {"excludedCommands": ["touch *"]}}')
    every = ("user", "project", "local")
    made = {}
    with anyio.fail_after(90):
        for sources in (every, setting_sources(every, sandboxed=True)):
            touches(model, outside / "made")
            async with runtime(env={"PATH": tools_of_the_sandbox()}, claude__setting_sources=sources) as rt:
                assert (await run_sandboxed(rt)).ok
            made[sources] = (outside / "made").exists()
            (outside / "made").unlink(missing_ok=True)
    assert made == {every: True, ("project", "local"): False}


# -- the mode that asks nobody ------------------------------------------------------------------------------


def test_settings_may_not_ask_for_it_either() -> None:
    with pytest.raises(ConfigError, match="bypassPermissions") as caught:
        check_settings(BYPASS, sandboxed=False, allow_bypass=False)
    assert "claude.allow_bypass_permissions" in caught.value.advice
    check_settings(BYPASS, sandboxed=False, allow_bypass=True)
    assert run_settings(BYPASS, sandboxed=False, allow_bypass=True) == BYPASS


@pytest.mark.parametrize("way", ["task", "file"])
async def test_the_plain_ways_to_it_are_refused(rt: Runtime, project: Path, way: str, model: ModelServer) -> None:
    write_agent(project, "bold", permissionMode="bypassPermissions")
    rt.catalog.load()
    asked = {"file": {"agent": "bold"}, "task": {"agent": "helper", "permission_mode": "bypassPermissions"}}[way]
    with anyio.fail_after(30), pytest.raises(AgentError, match="bypassPermissions"):
        await delegate(rt, Task(prompt="go", **asked))
    assert model.journal == []


async def test_a_plan_cannot_ask_for_it(rt: Runtime, project: Path, model: ModelServer) -> None:
    step = "{id: a, agent: helper, prompt: go, permission_mode: bypassPermissions}"
    plan = parse_plan(f"version: 1\nname: bold\nsteps:\n  - {step}\n", project / "plan.yaml")
    with anyio.fail_after(30):
        outcome = await run_plan(rt, plan, {})
    assert outcome.status == "failed"
    assert outcome.error is not None
    assert "claude.allow_bypass_permissions" in json.dumps(outcome.error)
    assert model.journal == []


@pytest.mark.parametrize("place", ["project", "home", "agent"])
async def test_no_file_of_settings_gives_it(
    runtime: Open, model: ModelServer, project: Path, tmp_path: Path, outside: Path, place: str
) -> None:
    if place == "agent":
        # No key of the format: kept, warned of, and of no effect.
        write_agent(project, "worker", tools="Bash", settings=json.dumps(BYPASS))
    else:
        folder = {"project": project, "home": tmp_path / "home"}[place] / ".claude"
        folder.mkdir(parents=True)
        (folder / "settings.json").write_text(json.dumps(BYPASS))
    touches(model, outside / "made")
    with anyio.fail_after(60):
        async with runtime(**IN_A_CONTAINER) as rt:
            assert (await delegate(rt, Task(agent="worker", prompt="go"))).ok
    assert len(model.journal) == 2
    assert not (outside / "made").exists()


async def test_the_layer_takes_the_mode_away_even_from_a_cli_that_was_given_it(
    runtime: Open, model: ModelServer, outside: Path
) -> None:
    """A second lock: it holds where something else than our own argument chooses the mode."""
    made = []
    with anyio.fail_after(90):
        async with runtime(**IN_A_CONTAINER, claude__allow_bypass_permissions=True) as rt:
            for allowed in (True, False):
                touches(model, outside / "made")
                layer = run_settings(None, sandboxed=False, allow_bypass=allowed)
                task = Task(agent="worker", prompt="go", permission_mode="bypassPermissions", settings=layer)
                assert (await delegate(rt, task)).ok
                made.append((outside / "made").exists())
                (outside / "made").unlink(missing_ok=True)
    assert made == [True, False]
