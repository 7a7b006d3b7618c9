"""Fixtures: the scripted model server, a clean environment, and a runtime that uses the real CLI against it.

No test reaches a real model: every CLI gets a HOME of its own, a dummy key and a base URL on loopback.
"""

import importlib.util
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import Config, load_config
from orchestrator.runtime import Runtime, open_runtime
from orchestrator.testing import ModelServer, running_model_server

DUMMY_KEY = "sk-ant-test-loopback"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # aiosqlite, uvicorn and mcp run on it


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project directory with an agents/ folder and two agents."""
    folder = tmp_path / "project"
    (folder / "agents").mkdir(parents=True)
    write_agent(folder, "helper", tools="Read", body="You are the helper.")
    write_agent(
        folder, "worker", tools="Read, Write, Bash", permissionMode="acceptEdits", body="You are the worker."
    )
    return folder


def write_agent(project: Path, name: str, *, body: str = "You help.", **keys: Any) -> Path:
    """Write (or rewrite) an agent file; keys are frontmatter."""
    lines = [f"name: {name}", f"description: The {name} of the tests", *(f"{k}: {v}" for k, v in keys.items())]
    path = project / "agents" / f"{name}.md"
    path.write_text("---\n" + "\n".join(lines) + f"\n---\n{body}\n")
    return path


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """The environment of the test's orchestrator: nothing of the machine's own."""
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(home), "LANG": "C.UTF-8", "TERM": "dumb"}


def settings(tmp_path: Path, base_url: str) -> dict[str, Any]:
    """Settings that keep a test to itself."""
    return {
        "data_dir": str(tmp_path / "data"),
        "agents.user_path": str(tmp_path / "no-user-agents"),
        "agents.default_model": "claude-opus-5-5",
        "claude.path": str(bundled_cli()),
        "claude.home": str(tmp_path / "home"),
        "claude.base_url": base_url,
        "claude.env.ANTHROPIC_API_KEY": DUMMY_KEY,
        "claude.max_retries": 1,
        "claude.stream_idle_timeout_s": 10,
        "limits.timeout_s": 60,
        # Tests of failures make many in a row; those of the breaker lower it.
        "breaker.failure_threshold": 1000,
        "limits.idle_timeout_s": 60,
    }


def bundled_cli() -> Path:
    spec = importlib.util.find_spec("claude_agent_sdk")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "_bundled" / "claude"


@pytest.fixture
async def model() -> AsyncIterator[ModelServer]:
    """The scripted model server, without rules: a test sets ``model.rules``."""
    async with running_model_server([]) as server:
        yield server


@pytest.fixture
def make_config(tmp_path: Path, project: Path, model: ModelServer) -> Callable[..., Config]:
    """Settings of this test; keyword arguments are more of them, with ``__`` for dots."""

    def make(**more: Any) -> Config:
        overrides = {**settings(tmp_path, model.base_url), **{k.replace("__", "."): v for k, v in more.items()}}
        return load_config(project_dir=project, environ={}, overrides=overrides)

    return make


@pytest.fixture
def runtime(
    make_config: Callable[..., Config], environ: dict[str, str]
) -> Callable[..., AbstractAsyncContextManager[Runtime]]:
    """Opens runtimes: ``async with runtime(limits__max_depth=2) as rt``."""

    def open_one(*, open_door: Any = None, env: dict[str, str] | None = None, **more: Any) -> Any:
        return open_runtime(make_config(**more), open_door=open_door, environ={**environ, **(env or {})})

    return open_one


@pytest.fixture
async def rt(runtime: Callable[..., AbstractAsyncContextManager[Runtime]]) -> AsyncIterator[Runtime]:
    """A runtime with the default settings of the tests."""
    async with runtime() as opened:
        yield opened
