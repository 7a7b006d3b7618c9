"""Runs parked at a usage limit of the account, with the real CLI: what they keep and cost, and do only once."""

import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
from mcp import Client
from mcp_types import TextContent

from mcp_tools import build_server, open_door
from orchestrator.cli.views import LiveView
from orchestrator.delegation import cancel, delegate, submit, wait
from orchestrator.errors import SessionBusyError
from orchestrator.events import Event, Watcher
from orchestrator.killing import INSTANCE_ID_ENV
from orchestrator.outcome import Outcome
from orchestrator.parking import CONTINUE_PROMPT
from orchestrator.plan_runs import run_plan
from orchestrator.plans import parse_plan
from orchestrator.runtime import Runtime
from orchestrator.store import Run, open_store
from orchestrator.task import Task
from orchestrator.testing import Fault, ModelServer, Reply, Request, Rule, ToolUse
from orchestrator.watching import watch_run
from tests.conftest import bundled_cli, settings, write_agent

Open = Callable[..., AbstractAsyncContextManager[Runtime]]

#: A subscription: only its login is told when a window ends. It could be looked up elsewhere: there is no way out.
SUBSCRIPTION = {
    "claude.env.CLAUDE_CODE_OAUTH_TOKEN": "dummy-not-a-token",
    "claude.env.ANTHROPIC_API_KEY": "",
    "claude.env.HTTPS_PROXY": "http://127.0.0.1:9",
    "claude.env.NO_PROXY": "127.0.0.1",
    "limits.park_stagger_s": 0,
}
HOUR = 3600


class UsedUp:
    """A model that refuses: the window of the account ends so many seconds after its first refusal."""

    def __init__(self, seconds: float, at: float | None = None) -> None:
        self.resets_at = at
        self._seconds = seconds

    def __call__(self, request: Request) -> Reply:
        self.resets_at = self.resets_at or int(time.time() + self._seconds)
        window = {
            "status": "rejected",
            "reset": self.resets_at,
            "representative-claim": "five_hour",
            "5h-status": "rejected",
            "5h-utilization": "1.0",
            "5h-reset": self.resets_at,
        }
        headers = {f"anthropic-ratelimit-unified-{name}": value for name, value in window.items()}
        return Reply(fault=Fault(status=429, headers=headers))


@pytest.fixture
def subscribed(runtime: Open) -> Open:
    """Opens runtimes whose CLIs log in with a subscription."""

    @asynccontextmanager
    async def open_one(**more: Any) -> AsyncIterator[Runtime]:
        named = {name.replace(".", "__"): value for name, value in SUBSCRIPTION.items()}
        with anyio.fail_after(120):
            async with runtime(**named, **more) as rt:
                yield rt

    return open_one


async def heard(watcher: Watcher, kind: str, run_id: str | None = None) -> Event:
    """The next event of that kind, of that run."""
    async for event in watcher:
        if event.type == kind and run_id in (None, event.run_id):
            return event
    raise AssertionError


async def parked_run(rt: Runtime, task: Task) -> Run:
    """The task's run, once it is parked."""
    with rt.events.watch() as watcher:
        run_id = await submit(rt, task)
        await heard(watcher, "run.parked", run_id)
    return await rt.store.run(run_id)


def life(events: Iterator[Event], run_id: str) -> list[str]:
    """What became of a run, in order."""
    told = [event.type for event in events if event.run_id == run_id and event.type.startswith("run.")]
    return [kind for kind in told if kind != "run.activity"]


def processes_of(rt: Runtime) -> list[psutil.Process]:
    """The processes that belong to a runtime."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(INSTANCE_ID_ENV) == rt.store.instance_id:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def said(request: Request) -> list[str]:
    """What was said in the whole conversation, without the CLI's reminders."""
    return [text.strip() for text in request.texts if not text.lstrip().startswith("<system-reminder>")]


def error_of(outcome: Outcome) -> dict[str, Any]:
    assert outcome.error is not None, outcome
    return outcome.error


# -- waiting, and going on ------------------------------------------------------------------------------------


async def test_a_refused_run_waits_without_a_process_and_goes_on_in_its_session(
    subscribed: Open, model: ModelServer
) -> None:
    used_up = UsedUp(8)
    model.rules = [Rule(used_up, times=1), Rule("Done.")]
    async with subscribed() as rt:
        with rt.events.watch() as watcher:
            run_id = await submit(rt, Task(agent="helper", prompt="Work."))
            event = await heard(watcher, "run.parked")
            waiting = await rt.store.run(run_id)
            assert waiting.status == "waiting"
            assert used_up.resets_at is not None
            assert waiting.resume_at_us == event.data["until"] * 1_000_000 == used_up.resets_at * 1_000_000
            assert event.data["reason"] == "five_hour"
            assert processes_of(rt) == []
            with pytest.raises(SessionBusyError):
                await submit(rt, Task(agent="helper", prompt="Me too.", session=waiting.session_id))
            assert len(model.journal) == 1
            outcome = await wait(rt, run_id)
            assert life(watcher.rest(), run_id) == ["run.resumed", "run.ended"]
        row = await rt.store.run(run_id)
        messages = await rt.store.messages(run_id)
        session = await rt.store.session(row.session_id or "")

    assert (outcome.status, outcome.text) == ("succeeded", "Done.")
    assert len(model.journal) == 2, "one turn after the refusal"
    assert said(model.journal[1]) == ["Work.", CONTINUE_PROMPT], "the prompt is there once"
    assert (row.session_id, row.resume_at_us) == (waiting.session_id, None)
    assert row.started_us == waiting.started_us
    assert (row.ended_us or 0) / 1e6 >= used_up.resets_at, "it did not go on before"
    assert (session.locked_by, session.turns) == (None, 1)
    audit = [(m.subtype, m.body["attempt"]) for m in messages if m.type == "orchestrator"]
    assert audit == [("run.parked", 1), ("run.resumed", 1)]


async def test_what_was_done_before_is_not_done_twice_and_counts(
    subscribed: Open, model: ModelServer, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    work = ToolUse("Bash", {"command": f"echo done >> {log}"})
    model.rules = [Rule(Reply(["On it.", work]), times=1), Rule(UsedUp(2), times=1), Rule("Done.")]
    async with subscribed() as rt:
        with rt.events.watch() as watcher:
            outcome = await delegate(rt, Task(agent="worker", prompt="Work.", allowed_tools=("Bash",)))
            told = life(watcher.rest(), outcome.run_id)
        row = await rt.store.run(outcome.run_id)
    assert (outcome.status, row.text) == ("succeeded", "Done.")
    assert log.read_text() == "done\n"
    assert told == ["run.created", "run.started", "run.parked", "run.resumed", "run.ended"]
    assert len(model.journal) == 3
    assert [text for text in said(model.journal[2]) if text in ("Work.", CONTINUE_PROMPT)] == [
        "Work.",
        CONTINUE_PROMPT,
    ]
    assert (outcome.usage.input_tokens, outcome.usage.output_tokens) == (200, 10), "of both attempts"
    assert outcome.cost_usd == pytest.approx(2 * (100 * 4 + 5 * 20) / 1e6)
    assert row.cost_basis == "cli"


@pytest.mark.parametrize("fork", [False, True], ids=["continue", "fork"])
async def test_a_run_that_goes_on_with_a_session_keeps_to_it(
    subscribed: Open, model: ModelServer, fork: bool
) -> None:
    model.rules = [Rule("Ready.", times=1), Rule(UsedUp(1), times=1), Rule("Done.")]
    async with subscribed() as rt:
        first = await delegate(rt, Task(agent="helper", prompt="Begin."))
        waiting = await parked_run(rt, Task(agent="helper", prompt="Work.", session=first.session_id, fork=fork))
        outcome = await wait(rt, waiting.id)
        sessions = {session.id: session.turns for session in await rt.store.sessions()}
    assert (outcome.status, outcome.text) == ("succeeded", "Done.")
    assert said(model.journal[-1]) == ["Begin.", "Ready.", "Work.", CONTINUE_PROMPT]
    assert outcome.session_id == waiting.session_id
    assert sessions == ({first.session_id: 1, outcome.session_id: 1} if fork else {first.session_id: 2})


async def test_a_run_that_begins_meanwhile_waits_before_it_has_a_process(
    subscribed: Open, model: ModelServer
) -> None:
    model.rules = [Rule(UsedUp(6), times=1), Rule("Done.")]
    async with subscribed() as rt:
        first = await parked_run(rt, Task(agent="helper", prompt="First."))
        with rt.events.watch() as watcher:
            second = await submit(rt, Task(agent="helper", prompt="Second."))
            await heard(watcher, "run.parked", second)
            row = await rt.store.run(second)
            assert (row.status, row.session_id, row.resume_at_us) == ("waiting", None, first.resume_at_us)
            assert (processes_of(rt), len(model.journal)) == ([], 1)
            outcomes = [await wait(rt, run_id) for run_id in (first.id, second)]
            told = life(watcher.rest(), second)
    assert [(outcome.status, outcome.text) for outcome in outcomes] == [("succeeded", "Done.")] * 2
    assert told == ["run.resumed", "run.started", "run.ended"]
    [request] = [request for request in model.journal if "Second." in said(request)]
    assert said(request) == ["Second."], "it was never refused: nothing is to be continued"


async def test_the_budget_is_one_for_all_attempts(subscribed: Open, model: ModelServer) -> None:
    work = ToolUse("Bash", {"command": "true"})
    model.rules = [Rule(work, times=1), Rule(UsedUp(1), times=1), Rule(work)]
    async with subscribed() as rt:
        task = Task(agent="worker", prompt="Work.", allowed_tools=("Bash",), budget_tokens=200)
        outcome = await delegate(rt, task)
        messages = await rt.store.messages(outcome.run_id)
    assert [m.subtype for m in messages if m.type == "orchestrator"] == ["run.parked", "run.resumed"]
    error = error_of(outcome)
    assert (error["code"], error["details"]["dimension"]) == ("budget_exceeded", "tokens")
    assert error["details"]["spent"] > 200, "105 before the wait, and as much after it"
    assert len(model.journal) == 3


async def test_a_process_that_dies_at_once_after_the_wait_is_replaced(
    subscribed: Open, model: ModelServer, tmp_path: Path
) -> None:
    script = tmp_path / "second-start-fails"
    script.write_text(
        f'#!/bin/sh\nmkdir {tmp_path}/start-1 2>/dev/null && exec {bundled_cli()} "$@"\n'
        f'mkdir {tmp_path}/start-2 2>/dev/null && kill -9 $$\nexec {bundled_cli()} "$@"\n'
    )
    script.chmod(0o755)
    model.rules = [Rule(UsedUp(1), times=1), Rule("Done.")]
    async with subscribed(claude__path=str(script), retry__max_retries=1, retry__base_delay_s=0) as rt:
        outcome = await delegate(rt, Task(agent="helper", prompt="Work."))
        assert (outcome.status, outcome.text) == ("succeeded", "Done."), outcome.error
        assert (await rt.store.session(outcome.session_id or "")).turns == 1
    assert said(model.journal[1]) == ["Work.", CONTINUE_PROMPT]


async def test_who_watches_a_run_sees_it_wait_and_go_on(subscribed: Open, model: ModelServer) -> None:
    model.rules = [Rule(UsedUp(2), times=1), Rule("Done.")]
    seen: list[Any] = []
    async with subscribed() as rt:
        run_id = await submit(rt, Task(agent="helper", prompt="Work."))
        async for message in watch_run(rt, run_id):
            raw = message.raw()
            if raw["type"] == "orchestrator":
                status = (await rt.store.run(run_id)).status
                seen.append((raw["subtype"], raw["attempt"], status if not seen else ""))
    assert seen == [("run.parked", 1, "waiting"), ("run.resumed", 1, "")]


# -- not waiting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "why"), [({"limits__park": False}, "off"), ({"limits__max_park_s": 60}, "too_long")]
)
async def test_a_run_that_may_not_wait_fails_and_says_when(
    subscribed: Open, model: ModelServer, limits: dict[str, Any], why: str
) -> None:
    model.rules = [Rule(UsedUp(HOUR))]
    async with subscribed(**limits) as rt:
        with rt.events.watch() as watcher:
            outcomes = [await delegate(rt, Task(agent="helper", prompt="Work.")) for _ in range(2)]
            told = [event.type for event in watcher.rest()]
    for outcome in outcomes:
        error = error_of(outcome)
        assert (outcome.status, error["code"], error["details"]["not_parked"]) == ("failed", "rate_limit", why)
        assert HOUR - 60 < error["retry_after"] <= HOUR
    assert len(model.journal) == 1, "no request is spent on learning it again"
    assert "run.parked" not in told


async def test_without_a_known_end_no_run_waits(runtime: Open, model: ModelServer) -> None:
    """With a key the CLI keeps the windows to itself."""
    model.rules = [Rule(UsedUp(HOUR), times=1), Rule("Fine again.")]
    with anyio.fail_after(60):
        async with runtime(claude__max_retries=0) as rt:
            error = error_of(await delegate(rt, Task(agent="helper", prompt="Work.")))
            assert (error["code"], error["details"]["not_parked"]) == ("rate_limit", "unknown_end")
            after = await delegate(rt, Task(agent="helper", prompt="Work."))
    assert after.text == "Fine again.", "and it bars nobody"


async def test_a_provider_that_refuses_again_is_asked_less_often_up_to_the_cap(
    subscribed: Open, model: ModelServer
) -> None:
    model.rules = [Rule(lambda request: UsedUp(1)(request))]
    async with subscribed(limits__max_park_s=20) as rt:
        outcome = await delegate(rt, Task(agent="helper", prompt="Work."))
        messages = await rt.store.messages(outcome.run_id)
    error = error_of(outcome)
    assert (error["code"], error["details"]["not_parked"]) == ("rate_limit", "too_long")
    assert "already waited" in error["advice"]
    assert [m.subtype for m in messages if m.type == "orchestrator"] == ["run.parked", "run.resumed"]
    assert len(model.journal) == 2


async def test_over_the_api_no_run_waits(runtime: Open, model: ModelServer, project: Path, tmp_path: Path) -> None:
    """It has another account than the CLI, and no session to go on with."""
    write_agent(project, "talker", tools="[]", body="You talk.")
    model.rules = [Rule(Reply(fault=Fault(status=429, headers={"retry-after": 30})))]
    with anyio.fail_after(60):
        async with runtime(claude__path=str(tmp_path / "missing"), fallback__enabled=True) as rt:
            outcome = await delegate(rt, Task(agent="talker", prompt="Talk."))
            row = await rt.store.run(outcome.run_id)
            assert (error_of(outcome)["code"], row.resume_at_us) == ("rate_limit", None)
            assert row.fallback is not None
            assert rt.reached.of(rt.account, time.time()) is None


# -- stopped while it waits -----------------------------------------------------------------------------------


async def test_a_run_cancelled_while_it_waits_ends_at_once_and_keeps_its_session(
    subscribed: Open, model: ModelServer
) -> None:
    model.rules = [Rule(UsedUp(HOUR), times=1), Rule("Later.")]
    async with subscribed() as rt:
        run = await parked_run(rt, Task(agent="helper", prompt="Work."))
        await cancel(rt, run.id)
        with anyio.fail_after(5):
            outcome = await wait(rt, run.id)
        assert (outcome.status, error_of(outcome)["code"]) == ("cancelled", "cancelled")
        row = await rt.store.run(run.id)
        assert (row.resume_at_us, row.started_us, row.ended_us is not None) == (None, run.started_us, True)
        assert (await rt.store.session(run.session_id or "")).locked_by is None
    async with subscribed() as rt:
        after = await delegate(rt, Task(agent="helper", prompt="And now?", session=run.session_id))
    assert after.text == "Later."
    assert said(model.journal[-1]) == ["Work.", "And now?"]
    assert len(model.journal) == 2


async def test_a_runtime_that_closes_does_not_wait_for_runs_that_wait(subscribed: Open, model: ModelServer) -> None:
    model.rules = [Rule(UsedUp(HOUR))]
    async with subscribed() as rt:
        run = await parked_run(rt, Task(agent="helper", prompt="Work."))
        unstarted = await parked_run(rt, Task(agent="helper", prompt="Work."))
    async with open_store(rt.config.store_path) as store:
        for run_id in (run.id, unstarted.id):
            outcome = (await store.run(run_id)).outcome()
            assert outcome.status == "cancelled"
            assert error_of(outcome)["message"] == "the orchestrator is shutting down"
            assert error_of(outcome)["retryable"] is True
        assert (await store.session(run.session_id or "")).locked_by is None
    assert len(model.journal) == 1


ORCHESTRATOR = """\
import json, sys, anyio
from pathlib import Path
from orchestrator.config import load_config
from orchestrator.delegation import delegate
from orchestrator.runtime import open_runtime
from orchestrator.task import Task

async def main(project, overrides, environ):
    config = load_config(project_dir=Path(project), environ={}, overrides=overrides)
    async with open_runtime(config, environ=environ) as rt:
        await delegate(rt, Task(agent="helper", prompt="Work."))

anyio.run(main, *json.loads(sys.argv[1]))
"""


async def test_nothing_resumes_the_run_of_an_orchestrator_that_was_killed(
    subscribed: Open, model: ModelServer, project: Path, tmp_path: Path, environ: dict[str, str]
) -> None:
    used_up = UsedUp(12)
    model.rules = [Rule(used_up, times=1), Rule("Later.")]
    arguments = json.dumps([str(project), settings(tmp_path, model.base_url) | SUBSCRIPTION, environ])
    async with await anyio.open_process(
        [sys.executable, "-c", ORCHESTRATOR, arguments],
        cwd=Path(__file__).parent.parent,
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=None,
    ) as orchestrator:
        await model.wait_for("Work.", timeout=60)
        run = await waiting_run(tmp_path / "data" / "runs.db")
        orchestrator.kill()
        await orchestrator.wait()

    async with subscribed() as rt:
        outcome = await wait(rt, run.id)
        error = error_of(outcome)
        assert (outcome.status, error["code"]) == ("interrupted", "interrupted")
        assert "waiting for the end of a usage limit" in error["message"]
        assert "Continue its session" in error["advice"]
        assert used_up.resets_at is not None
        await anyio.sleep(max(0, used_up.resets_at + 1 - time.time()))  # the moment it would have gone on
        assert (len(model.journal), rt.live) == (1, {})
        after = await delegate(rt, Task(agent="helper", prompt="Go on.", session=outcome.session_id))
    assert after.text == "Later.", "whoever wants to goes on by hand"
    assert said(model.journal[-1]) == ["Work.", "Go on."]


async def waiting_run(path: Path) -> Run:
    """The run of another process, once it waits: nobody tells us."""
    async with open_store(path) as store:
        for _ in range(200):
            for run in await store.runs(status="waiting"):
                return run
            await anyio.sleep(0.05)
    raise AssertionError("no run waited in ten seconds")


# -- runs above, plans, time ----------------------------------------------------------------------------------


async def test_an_agent_gets_the_answer_of_a_child_that_had_to_wait(
    subscribed: Open, model: ModelServer, project: Path
) -> None:
    write_agent(project, "boss", tools="mcp__orchestrator", body="You are the boss.")
    call = ToolUse("mcp__orchestrator__delegate", {"agent": "helper", "prompt": "Work."})
    model.rules = [
        Rule(call, when={"system": "the boss", "tool_result": False}),
        Rule(lambda request: f"It says: {request.tool_results[0].text}", when={"system": "the boss"}),
        Rule(UsedUp(3), times=1),
        Rule("Helped."),
    ]
    async with subscribed(open_door=open_door) as rt:
        outcome = await delegate(rt, Task(agent="boss", prompt="Go."))
        boss, helper = await rt.store.tree(outcome.run_id)
        audit = {run.id: [m.subtype for m in await rt.store.messages(run.id)] for run in (boss, helper)}
    assert (boss.status, helper.status) == ("succeeded", "succeeded")
    assert "It says: Helped." in outcome.text
    assert "run.resumed" in audit[helper.id]
    assert "run.parked" not in audit[boss.id], "its own turn was never refused"


async def test_a_step_of_a_plan_that_has_to_wait(subscribed: Open, model: ModelServer) -> None:
    model.rules = [Rule(UsedUp(2), times=1), Rule("Done.")]
    plan = parse_plan(
        "version: 1\nname: p\nsteps:\n"
        "  - {id: a, agent: helper, prompt: Work.}\n"
        '  - {id: b, agent: helper, prompt: "After {{ steps.a.text }}", depends_on: a}\n',
        Path("p.yaml"),
    )
    async with subscribed() as rt:
        with rt.events.watch() as watcher:
            outcome = await run_plan(rt, plan, {})
            view = LiveView("p", outcome.run_id)
            lines = [view.feed(event.type, event.run_id or "", event.data) for event in watcher.rest()]
        top, *steps = await rt.store.tree(outcome.run_id)
    assert (top.status, [step.status for step in steps]) == ("succeeded", ["succeeded"] * 2)
    assert said(model.journal[-1]) == ["After Done."]
    assert len(model.journal) == 3
    told = [line.split(" until")[0].split(":")[0].split(" in ")[0] for line in lines if line]
    assert told == ["a started", "a waiting", "a goes on", "a succeeded", "b started", "b succeeded"]
    assert top.cost_usd == pytest.approx(sum(step.cost_usd or 0 for step in steps))


# A CLI of our own that is quick to start, for tests of time. What it does is its prompt.
QUICK_CLI = f"""\
#!{sys.executable} -IS
import json, os, sys, time

def say(**message):
    print(json.dumps(message), flush=True)

def answer(text, **more):
    say(type="result", subtype="success", result=text, **{{"is_error": False, **more}})

def used_up(name, seconds):
    try:
        os.mkdir(name)
    except FileExistsError:
        return False
    info = {{"status": "rejected", "resetsAt": time.time() + seconds, "rateLimitType": "five_hour"}}
    say(type="rate_limit_event", rate_limit_info=info)
    answer("limit reached", is_error=True, api_error_status=429)
    return True

say(type="system", subtype="init")
while (line := json.loads(sys.stdin.readline()))["type"] != "user":
    pass
exec(line["message"]["content"])
"""


@pytest.fixture
def quick(runtime: Open, tmp_path: Path) -> Open:
    """Opens runtimes with a CLI that is quick to start."""
    script = tmp_path / "claude"
    script.write_text(QUICK_CLI)
    script.chmod(0o755)

    @asynccontextmanager
    async def open_one(**more: Any) -> AsyncIterator[Runtime]:
        with anyio.fail_after(60):
            async with runtime(claude__path=str(script), limits__park_stagger_s=0, **more) as rt:
                yield rt

    return open_one


async def test_the_time_of_runs_above_stands_still_while_one_waits(quick: Open) -> None:
    async with quick() as rt:
        top = await submit(rt, Task(agent="helper", prompt="time.sleep(300)", timeout_s=5, idle_timeout_s=4))
        middle = await submit(
            rt, Task(agent="helper", prompt="time.sleep(301)", timeout_s=5, idle_timeout_s=4, parent_id=top)
        )
        work = "used_up('once', 7) or answer('done')"
        child = await delegate(rt, Task(agent="helper", prompt=work, timeout_s=4, parent_id=middle))
        assert (child.text, (child.duration_ms or 0) >= 7000) == ("done", True)
        assert [(await rt.store.run(each)).status for each in (top, middle)] == ["running", "running"]
        with anyio.fail_after(20):
            assert (await wait(rt, top)).status == "timed_out", "it goes on afterwards"


async def test_waiting_for_a_place_after_the_wait_is_no_time_of_the_run(quick: Open) -> None:
    async with quick(limits__max_processes=1) as rt:
        with rt.events.watch() as watcher:
            work = "time.sleep(0.5); used_up('once', 1) or answer('done')"
            run_id = await submit(rt, Task(agent="helper", prompt=work, timeout_s=4, idle_timeout_s=3))
            await heard(watcher, "run.started", run_id)
            other = await submit(rt, Task(agent="helper", prompt="time.sleep(7); answer('other')"))
            await heard(watcher, "run.parked", run_id)  # which leaves its place to the other one
            await heard(watcher, "run.resumed", run_id)
            await heard(watcher, "run.ended", other)
        outcome = await wait(rt, run_id)
    assert (outcome.status, outcome.text) == ("succeeded", "done"), outcome.error


async def test_a_plan_s_time_stands_still_while_a_step_waits(quick: Open) -> None:
    prompt = "used_up('once', 6) or answer('done')"
    plan = parse_plan(
        f'version: 1\nname: p\nlimits: {{timeout: 4}}\nsteps: [{{id: a, agent: helper, prompt: "{prompt}"}}]\n',
        Path("p.yaml"),
    )
    async with quick() as rt:
        outcome = await run_plan(rt, plan, {})
    assert outcome.status == "succeeded", outcome.error


# -- what people and agents see of it -------------------------------------------------------------------------


async def test_a_waiting_run_is_shown_with_the_time_it_goes_on(
    subscribed: Open, model: ModelServer, project: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    used_up = UsedUp(HOUR)
    model.rules = [Rule(used_up)]
    async with subscribed() as rt:
        run = await parked_run(rt, Task(agent="helper", prompt="Work."))
        assert used_up.resets_at is not None
        local = time.strftime("%m-%d %H:%M:%S", time.localtime(used_up.resets_at))
        at = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(used_up.resets_at))

        async def orchestrator(*args: str) -> str:
            (project / "orchestrator.yaml").write_text(f"data_dir: {tmp_path / 'data'}\n")
            env = environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
            command = [sys.executable, "-m", "orchestrator", *args]
            done = await anyio.run_process(command, cwd=project, env=env, check=False)
            return done.stdout.decode()

        assert f"waiting until {local}" in await orchestrator("runs", "list")
        shown = await orchestrator("runs", "show", run.id)
        assert f"waiting until {local}" in shown
        assert "usage limit" in shown
        assert json.loads(await orchestrator("runs", "show", run.id, "--json"))["resume_at_us"]

        async with Client(build_server(rt)) as client:
            found = (await client.call_tool("query_traces", {"status": "waiting"})).structured_content
            assert found is not None
            [row] = found["runs"]
            assert (row["run_id"], row["resumes"]) == (run.id, at)
            [told] = (await client.call_tool("run_wait", {"run_ids": [run.id], "timeout_s": 0})).content
            assert isinstance(told, TextContent)
            assert f"waiting until {at} for the end of a usage limit" in told.text

        assert "cancelled" in await orchestrator("runs", "cancel", run.id)
        assert (await wait(rt, run.id)).status == "cancelled"
