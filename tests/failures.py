"""What the tests of failures share: what a caller decides from, and what must not be left behind."""

import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from orchestrator.delegation import delegate
from orchestrator.killing import RUN_ID_ENV
from orchestrator.outcome import Outcome
from orchestrator.runtime import Runtime
from orchestrator.task import Task
from orchestrator.testing import Fault, ModelServer, Reply, Rule

OpenRuntime = Callable[..., AbstractAsyncContextManager[Runtime]]
Verdict = tuple[Any, ...]


def error_of(outcome: Outcome) -> dict[str, Any]:
    assert outcome.error is not None, outcome
    return outcome.error


def verdict(outcome: Outcome) -> Verdict:
    """What a caller decides from. There is always something a person can do."""
    error = error_of(outcome)
    assert error["advice"]
    assert error["message"]
    return (outcome.status, error["code"], error["retryable"], error["scope"])


def carriers(name: str, value: str) -> list[psutil.Process]:
    """Processes with the variable in their environment. A zombie has none."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


async def nothing_is_left(name: str, value: str) -> None:
    """What was killed may take a moment to be gone."""
    for _ in range(60):
        if not carriers(name, value):
            return
        await anyio.sleep(0.05)
    raise AssertionError(f"left over: {carriers(name, value)}")


@pytest.fixture(autouse=True)
async def nothing_outlives_the_test(tmp_path: Path) -> AsyncIterator[None]:
    """For modules that import it. Every CLI of the test, and all it started, has a HOME nobody else has."""
    yield
    await nothing_is_left("HOME", str(tmp_path / "home"))


async def nothing_is_left_of(outcome: Outcome) -> None:
    await nothing_is_left(RUN_ID_ENV, outcome.run_id)


def faulty(**fault: Any) -> Reply:
    """An answer in two halves, and what goes wrong with it."""
    return Reply("Half and half.", fault=Fault(**fault))


def says(name: str, *replies: Any) -> Rule:
    """What the model says, one after the other, in the conversation that began with ``name``."""
    return Rule(list(replies), when=lambda request: request.texts[0].strip() == name)


async def all_at_once(rt: Runtime, names: Iterable[str], **task: Any) -> dict[str, Outcome]:
    """One run for each name, which is its prompt; all at the same time."""
    outcomes: dict[str, Outcome] = {}

    async def one(name: str) -> None:
        outcomes[name] = await delegate(rt, Task(**{"agent": "helper", "prompt": name, **task}))

    async with anyio.create_task_group() as tg:
        for name in names:
            tg.start_soon(one, name)
    return outcomes


async def runs_well(rt: Runtime, model: ModelServer) -> None:
    """The next run does not suffer from what happened before it."""
    model.rules = [Rule("as if nothing had happened")]
    with anyio.fail_after(60):
        healthy = await delegate(rt, Task(agent="helper", prompt="and now?"))
    assert (healthy.status, healthy.text) == ("succeeded", "as if nothing had happened")


# --- A CLI that misbehaves: real processes, of our own making

PRELUDE = f"""\
#!{sys.executable} -IS
import json, os, signal, subprocess, sys, time

def say(**message):
    print(json.dumps(message), flush=True)

def hear(kind):
    for line in sys.stdin:
        message = json.loads(line)
        if message["type"] == kind:
            return message

def begin():
    say(type="system", subtype="init", model="claude-opus-5-5", session_id="s")

def answer(text):
    say(type="assistant", message={{"model": "claude-opus-5-5", "content": [{{"type": "text", "text": text}}]}})

def result(text="done", **more):
    spent = {{"claude-opus-5-5": {{"inputTokens": 1, "outputTokens": 1, "costUSD": 0.5}}}}
    known = dict(subtype="success", is_error=False, result=text, model_usage_since_last_result=spent)
    say(type="result", **known | more)

"""


def write_cli(path: Path, behaviour: str) -> Path:
    """A CLI that behaves as the Python text says. It replaces one that may be running."""
    new = path.with_suffix(".new")
    new.write_text(PRELUDE + behaviour)
    new.chmod(0o755)
    return new.replace(path)


def acting(runtime: OpenRuntime, folder: Path) -> Callable[..., Any]:
    """Runs a task with a CLI that behaves as the Python text says, and looks that nothing is left of it."""

    async def run(
        behaviour: str, *, prompt: str = "x", idle_timeout_s: float | None = None, **more: Any
    ) -> Outcome:
        script = write_cli(folder / "claude", behaviour)
        async with runtime(claude__path=str(script), **more) as rt:
            with anyio.fail_after(60):
                task = Task(agent="helper", prompt=prompt, idle_timeout_s=idle_timeout_s)
                outcome = await delegate(rt, task)
            await nothing_is_left_of(outcome)
            assert not rt.live
        return outcome

    return run
