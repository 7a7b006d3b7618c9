"""What goes wrong behind the CLI and in it: the right error, in bounded time, and nothing left behind."""

import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.delegation import delegate
from orchestrator.runtime import Runtime
from orchestrator.task import Task
from orchestrator.testing import Fault, ModelServer, Reply, Rule
from tests.failures import (
    OpenRuntime,
    acting,
    all_at_once,
    error_of,
    faulty,
    nothing_is_left_of,
    runs_well,
    says,
    verdict,
)

# --- The provider


# Fault → status, error code, whether trying again can help, how far the trouble reaches.
HTTP_FAULTS: Mapping[str, tuple[Reply, tuple[Any, ...]]] = {
    "a refused key": (faulty(status=401), ("failed", "authentication", False, "account")),
    "a refused account": (faulty(status=403), ("failed", "permission", False, "account")),
    "no credit": (
        faulty(status=400, message="Your credit balance is too low to access the Anthropic API."),
        ("failed", "billing", False, "account"),
    ),
    "an unknown model": (faulty(status=404), ("failed", "model_not_found", False, "agent")),
    "a rate limit": (faulty(status=429), ("failed", "rate_limit", True, "account")),
    "a short rate limit": (
        faulty(status=429, headers={"retry-after": 2}),
        ("failed", "rate_limit", True, "account"),
    ),
    "a long rate limit": (
        faulty(status=429, headers={"retry-after": 7200}),
        ("failed", "rate_limit", True, "account"),
    ),
    "a server error": (faulty(status=500), ("failed", "server_error", True, "provider")),
    "overload": (faulty(status=529), ("failed", "overloaded", True, "provider")),
}

BROKEN_ANSWERS: Mapping[str, tuple[Reply, tuple[Any, ...]]] = {
    "cut short": (faulty(truncate_at=4), ("failed", "connection", True, "provider")),
    "reset": (faulty(reset_at=0), ("failed", "connection", True, "provider")),
    "an error event": (faulty(error_at=4), ("failed", "server_error", True, "provider")),
    "a web page": (faulty(body="<html>Sign in</html>"), ("failed", "connection", True, "provider")),
    "a refusal": (Reply("No.", stop_reason="refusal"), ("failed", "refusal", False, "request")),
    "no end": (Reply("On and", stop_reason="max_tokens"), ("failed", "invalid_request", False, "request")),
}


@pytest.mark.parametrize("faults", [HTTP_FAULTS, BROKEN_ANSWERS], ids=["http", "answer"])
async def test_faults_that_stay(
    runtime: OpenRuntime, model: ModelServer, faults: Mapping[str, tuple[Reply, tuple[Any, ...]]]
) -> None:
    model.rules = [says(name, reply) for name, (reply, _) in faults.items()]
    async with runtime(claude__max_retries=0) as rt:
        with anyio.fail_after(60):  # a long retry-after is not slept, neither by the CLI nor by us
            outcomes = await all_at_once(rt, faults)
        assert {name: verdict(outcome) for name, outcome in outcomes.items()} == {
            name: expected for name, (_, expected) in faults.items()
        }
        assert not model.unmatched
        await runs_well(rt, model)
    for outcome in outcomes.values():
        await nothing_is_left_of(outcome)


async def test_faults_that_pass(rt: Runtime, model: ModelServer) -> None:
    """Slow, because the CLI notices a stall after ten seconds at the earliest."""
    faults = {
        "stalled": faulty(stall_at=4),
        "silent from the start": faulty(stall_at=0),
        "reset": faulty(reset_at=4),
        "reset before the head": faulty(reset_at=0),
        "nothing but the head": faulty(truncate_at=0),
        "malformed": faulty(malformed_at=4),
        "busy": faulty(status=529),
        "wait two seconds": faulty(status=429, headers={"retry-after": 2}),
        "cut short": faulty(truncate_at=4),
        "an error event": faulty(error_at=4),
    }
    model.rules = [says(name, reply, "Whole.") for name, reply in faults.items()]
    with anyio.fail_after(60):
        outcomes = await all_at_once(rt, faults)
    assert {name: outcome.text for name, outcome in outcomes.items()} == dict.fromkeys(faults, "Whole.")
    assert not model.unmatched


async def test_data_that_stays_malformed(rt: Runtime, model: ModelServer) -> None:
    model.rules = [Rule(faulty(malformed_at=4))]
    outcome = await delegate(rt, Task(agent="helper", prompt="x"))
    assert outcome.status == "failed"
    assert error_of(outcome)["code"] in ("backend", "connection")
    assert "JSON Parse error" in error_of(outcome)["message"]
    assert outcome.text == "Half an"


async def test_a_silence_that_stays(rt: Runtime, model: ModelServer) -> None:
    """The CLI would ask once more, without streaming; the run's own idle time-out may end it before."""
    model.rules = [Rule(faulty(stall_at=4))]
    with anyio.fail_after(60):
        outcome = await delegate(rt, Task(agent="helper", prompt="x", idle_timeout_s=5))
    assert verdict(outcome)[:3] == ("timed_out", "timeout", True)
    assert error_of(outcome)["details"] == {"kind": "idle"}
    assert outcome.text == "Half an"
    await nothing_is_left_of(outcome)


async def test_a_stall_that_stays_is_a_stall(runtime: OpenRuntime, model: ModelServer) -> None:
    """The pause a stream is allowed, then the time of the one request the CLI makes instead."""
    model.rules = [Rule(faulty(stall_at=4))]
    async with runtime(claude__request_timeout_s=2) as rt:
        with anyio.fail_after(60):
            outcome = await delegate(rt, Task(agent="helper", prompt="x"))
    assert verdict(outcome) == ("failed", "stalled", True, "provider")
    assert outcome.text == "Half an"
    assert [request.stream for request in model.journal] == [True, False]
    await nothing_is_left_of(outcome)


async def test_a_refused_key_ends_the_run_at_once(runtime: OpenRuntime, model: ModelServer) -> None:
    """The CLI by itself would try for three minutes; the second refusal is enough for us."""
    model.rules = [Rule(Reply(fault=Fault(status=401)))]
    async with runtime(claude__max_retries=10) as rt:
        with anyio.fail_after(60):
            outcome = await delegate(rt, Task(agent="helper", prompt="x"))
    assert verdict(outcome) == ("failed", "authentication", False, "account")
    assert len(model.journal) in (2, 3)  # the third may be on its way already


async def test_nobody_listens(runtime: OpenRuntime) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        async with runtime(claude__base_url=f"http://127.0.0.1:{port}") as rt:
            with anyio.fail_after(60):
                outcome = await delegate(rt, Task(agent="helper", prompt="x"))
    assert verdict(outcome) == ("failed", "connection", True, "provider")
    assert outcome.cost_usd == 0


# --- A CLI that misbehaves: real processes, of our own making


@pytest.fixture
def act(runtime: OpenRuntime, tmp_path: Path) -> Callable[..., Any]:
    return acting(runtime, tmp_path)


async def test_rubbish_before_the_result(act: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    outcome = await act(
        "print('Warning: something'); print('{\"broken'); print('[1, 2]'); print(); print('null')\n"
        "sys.stdout.flush(); sys.stdout.buffer.write(b'\\xff\\xfe\\n'); sys.stdout.flush()\n"
        "begin(); answer('hi'); say(type='news', of='tomorrow'); result('hi')"
    )
    assert (outcome.status, outcome.text, outcome.cost_usd) == ("succeeded", "hi", 0.5)
    assert "printed 5 lines that are not messages" in caplog.text


async def test_it_refuses_to_start(act: Callable[..., Any]) -> None:
    outcome = await act("sys.exit('error: unknown option --frobnicate')")
    assert verdict(outcome) == ("failed", "cli_start", False, "host")
    assert "unknown option --frobnicate" in error_of(outcome)["message"]
    assert error_of(outcome)["details"]["exit_code"] == 1
    assert outcome.cost_usd == 0


async def test_it_exits_without_a_word(act: Callable[..., Any]) -> None:
    outcome = await act("os._exit(3)")
    assert verdict(outcome) == ("failed", "cli_start", False, "host")
    assert error_of(outcome)["details"]["exit_code"] == 3


async def test_it_dies_in_the_middle(act: Callable[..., Any]) -> None:
    outcome = await act(
        "begin(); answer('so far'); print('out of memory', file=sys.stderr, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert verdict(outcome) == ("failed", "cli_exit", True, "host")
    assert error_of(outcome)["details"] == {"exit_code": -9, "stderr": "out of memory", "skipped_lines": 0}
    assert outcome.text == "so far"
    assert outcome.cost_usd is None


async def test_a_request_that_was_open_when_it_died_has_a_price(act: Callable[..., Any]) -> None:
    outcome = await act(
        "begin()\nusage = {'input_tokens': 1000, 'output_tokens': 1}\n"
        "message = {'model': 'claude-opus-5-5', 'usage': usage}\n"
        "say(type='stream_event', event={'type': 'message_start', 'message': message}); os._exit(1)"
    )
    assert verdict(outcome) == ("failed", "cli_exit", True, "host")
    assert outcome.cost_usd == pytest.approx((1000 * 4 + 20) / 1e6)
    assert outcome.usage.input_tokens == 1000


async def test_last_words_after_many(act: Callable[..., Any]) -> None:
    outcome = await act("begin(); sys.stderr.write('noise\\n' * 1_000_000 + 'disk full'); sys.exit(2)")
    assert error_of(outcome)["message"].endswith("disk full")


async def test_half_a_line_and_the_end(act: Callable[..., Any]) -> None:
    outcome = await act('begin(); sys.stdout.write(\'{"type": "result", "subtype": "succ\'); sys.stdout.flush()')
    assert verdict(outcome) == ("failed", "cli_exit", True, "host")
    assert error_of(outcome)["details"] == {"exit_code": 0, "stderr": "", "skipped_lines": 1}


async def test_a_last_line_without_its_end(act: Callable[..., Any]) -> None:
    last = '{"type": "result", "subtype": "success", "is_error": false, "result": "just so"}'
    outcome = await act(f"begin(); sys.stdout.write({last!r}); sys.stdout.flush()")
    assert (outcome.status, outcome.text) == ("succeeded", "just so")


async def test_a_flood_on_stderr(act: Callable[..., Any]) -> None:
    outcome = await act(
        "begin()\nfor _ in range(50): sys.stderr.write('x' * 1_000_000 + '\\n')\nsys.stderr.flush(); result('dry')"
    )
    assert (outcome.status, outcome.text) == ("succeeded", "dry")


async def test_a_long_line(act: Callable[..., Any]) -> None:
    outcome = await act("begin(); answer('x' * 10_000_000); result('y' * 10_000_000)")
    assert outcome.status == "succeeded"
    assert outcome.text == "y" * 10_000_000


async def test_a_line_above_the_limit(act: Callable[..., Any]) -> None:
    outcome = await act(
        "begin(); answer('short'); answer('x' * 70_000); time.sleep(300)", claude__max_line_bytes=65_536
    )
    assert verdict(outcome) == ("failed", "message_too_large", False, "request")
    assert "claude.max_line_bytes allows 65536" in error_of(outcome)["message"]
    assert outcome.text == "short"


async def test_a_result_alone(act: Callable[..., Any]) -> None:
    outcome = await act("result('from nowhere')")
    assert (outcome.status, outcome.text, outcome.cost_usd) == ("succeeded", "from nowhere", 0.5)


async def test_a_result_nobody_can_read(act: Callable[..., Any]) -> None:
    outcome = await act("begin(); answer('so far'); say(type='result', subtype=7); time.sleep(300)")
    assert verdict(outcome)[:2] == ("failed", "backend")
    assert "result could not be read" in error_of(outcome)["message"]
    assert outcome.text == "so far"


async def test_it_will_not_end(act: Callable[..., Any]) -> None:
    outcome = await act(
        "for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)\n"
        "begin(); answer('so far')\nwhile True: time.sleep(300)",
        idle_timeout_s=0.5,
    )
    assert (outcome.status, outcome.text) == ("timed_out", "so far")


async def test_it_will_not_end_after_its_result(act: Callable[..., Any]) -> None:
    outcome = await act("begin(); result('done')\nwhile True: time.sleep(300)")
    assert (outcome.status, outcome.text) == ("succeeded", "done")


async def test_it_closes_its_input_early(act: Callable[..., Any]) -> None:
    outcome = await act("os.close(0); begin(); result('unasked')", prompt="word " * 200_000)
    assert (outcome.status, outcome.text) == ("succeeded", "unasked")


async def test_it_never_reads_its_input(act: Callable[..., Any]) -> None:
    outcome = await act("begin(); time.sleep(300)", prompt="word " * 1_000_000, idle_timeout_s=0.5)
    assert outcome.status == "timed_out"
    assert error_of(outcome)["details"] == {"kind": "idle"}


async def test_it_asks_for_what_nobody_knows(act: Callable[..., Any]) -> None:
    """Every request is answered, or the CLI would wait for ever."""
    outcome = await act(
        "hear('user'); begin()\n"
        "say(type='control_request', request_id='r1', request={'subtype': 'lend_me_your_ears'})\n"
        "result(hear('control_response')['response']['error'])"
    )
    assert outcome.text == "the orchestrator does not handle lend_me_your_ears"


GRANDCHILD = "subprocess.Popen(['setsid', 'sleep', '300'], stdin=subprocess.DEVNULL)\n"


async def test_what_outlives_it_holds_its_output(act: Callable[..., Any]) -> None:
    outcome = await act("begin(); " + GRANDCHILD + "result('done')")
    assert (outcome.status, outcome.text) == ("succeeded", "done")


async def test_what_outlives_it_holds_its_output_and_there_is_no_result(act: Callable[..., Any]) -> None:
    outcome = await act("begin(); answer('so far'); " + GRANDCHILD)
    assert verdict(outcome) == ("failed", "cli_exit", True, "host")
    assert outcome.text == "so far"
