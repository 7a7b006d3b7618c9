"""The soak in small: real CLIs, faults, cancels and kills; and that its checks would see what is wrong."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from bench.soak import Before, Soak, check_nothing_left, problems_of, problems_of_session
from bench.soak_load import Fate, ScriptedModel, fates
from orchestrator.killing import INSTANCE_ID_ENV
from orchestrator.store import Run, SessionRow, StoredMessage
from orchestrator.testing import Request

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(180)
async def test_a_short_soak_finds_nothing(tmp_path: Path) -> None:
    """Its time is bounded by its own limit; it is in a process of its own, so that what is left is its own."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "bench.soak", "--runs", "30", "--limit", "50", "--seed", "11"]
    with anyio.fail_after(150):
        done = await anyio.run_process(command, cwd=ROOT, env=environ, check=False)
    assert done.stdout, done.stderr.decode()
    report = json.loads(done.stdout)
    assert report["defects"] == [], done.stderr.decode()
    assert done.returncode == 0
    assert sum(report["runs"].values()) + len(report["refused"]) == 30
    assert report["runs"]["succeeded"] > 0
    assert report["clis_killed"] > 0


def test_a_seed_draws_the_same_fates_again() -> None:
    assert fates(7, 50) == fates(7, 50)
    assert fates(7, 50) != fates(8, 50)
    assert fates(7, 300)[:50] == fates(7, 50)


# -- the checks see what is wrong ---------------------------------------------------------------------------


def a_run(**more: Any) -> Run:
    fields: dict[str, Any] = {
        "id": "a" * 16,
        "trace_id": "b" * 32,
        "root_id": "a" * 16,
        "depth": 1,
        "kind": "agent",
        "name": "reader",
        "project": "/",
        "cwd": "/",
        "instance_id": "i",
        "status": "succeeded",
        "cost_usd": 0.1,
        "created_us": 1,
        "started_us": 2,
        "ended_us": 3,
    }
    return Run(**(fields | more))


def said(*kinds: str, first: int = 1) -> list[StoredMessage]:
    return [StoredMessage(seq=n, at_us=1, type=kind, subtype=None, body={}) for n, kind in enumerate(kinds, first)]


def test_a_run_in_order_has_no_problems() -> None:
    run = a_run()
    assert problems_of(run, said("system", "result"), run.outcome()) == []


@pytest.mark.parametrize(
    ("run", "messages"),
    [
        (a_run(status="running", ended_us=None), said("result")),
        (a_run(ended_us=1), said("result")),
        (a_run(cost_usd=None), said("result")),
        (a_run(error={"code": "x", "message": "y", "advice": "z"}), said("result")),
        (a_run(status="failed", error={"code": "x"}), said("result")),
        (a_run(status="failed"), said("result")),
        (a_run(), said("system")),
        (a_run(), said("result", "result")),
        (a_run(), said("result", first=2)),
    ],
)
def test_a_run_out_of_order_has_one(run: Run, messages: list[StoredMessage]) -> None:
    assert len(problems_of(run, messages, run.outcome())) == 1


def test_an_outcome_that_is_not_the_record_is_a_problem() -> None:
    assert problems_of(a_run(), said("result"), a_run(cost_usd=0.2).outcome()) != []


def test_a_session_still_held_is_a_problem() -> None:
    row: dict[str, Any] = {"id": "s", "backend": "claude", "agent": "a", "cwd": "/", "home": "/", "turns": 1}
    free = SessionRow(**row, created_us=1, updated_us=1)
    assert problems_of_session(free, {}) == []
    assert problems_of_session(free.model_copy(update={"locked_by": "r"}), {}) == ["is still held by run r"]


def asked(marker: str, session: str) -> Request:
    body = {"model": "m", "messages": [{"role": "user", "content": f"Do {marker}."}]}
    return Request(0, body, {"x-claude-code-session-id": session, "x-orchestrator-run-id": "r"})


def test_a_turn_that_is_asked_again_after_a_fault_is_one_turn() -> None:
    drawn = [Fate("soak-000000", "reader", "fresh", 0.0, fault=fault, fault_times=1) for fault in _first_fault()]
    model = ScriptedModel(drawn)
    for _ in range(2):
        model.answer(asked("soak-000000", "s"))
    assert model.seen["soak-000000"].requests == 2
    assert model.twice() == []


def _first_fault() -> list[Any]:
    return [next(fate.fault for fate in fates(1, 100) if fate.fault is not None)]


@pytest.mark.parametrize("sessions", [("s", "s"), ("s", "t")])
def test_a_turn_that_is_asked_again_after_its_answer_is_a_second_one(sessions: tuple[str, str]) -> None:
    model = ScriptedModel([Fate("soak-000000", "reader", "fresh", 0.0)])
    for session in sessions:
        model.answer(asked("soak-000000", session))
    assert len(model.twice()) == 1


async def test_what_is_left_is_found(tmp_path: Path) -> None:
    soak = Soak(1, [], ScriptedModel([]))
    before = Before.now()
    (tmp_path / "forgotten").write_text("x")
    mark = f"soak-test-{os.getpid()}"
    async with await anyio.open_process(
        ["sleep", "600"], env={INSTANCE_ID_ENV: mark}, stdin=None, stdout=None, stderr=None
    ) as process:
        with (tmp_path / "forgotten").open():
            await check_nothing_left(soak, mark, before, tmp_path)
        process.kill()
    found = " ".join(soak.defects)
    assert "left running" in found
    assert "a child is left" in found
    assert "file descriptors more" in found
    assert "left in TMPDIR: ['forgotten']" in found
