"""Parking: whose limit it is, whether a run may wait, and until when."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import LimitsConfig
from orchestrator.errors import OverloadedError, RateLimitError
from orchestrator.messages import KeepAlive, RateLimitEvent, parse_message
from orchestrator.outcome import ENDED
from orchestrator.parking import (
    AGAIN_S,
    Park,
    ReachedLimits,
    Redelivery,
    Refuse,
    UsageLimit,
    Waits,
    account_of,
    continue_uuid,
    park,
    parked,
    prompt_uuid,
    refused,
    resumed,
    stagger,
    usage_limit,
)
from orchestrator.store import open_store

ROOT = Path(__file__).parent.parent
NOW = 1_800_000_000.0
HOME = Path("/home/ada")
RUN = "0123456789abcdef"
KEY = {"ANTHROPIC_API_KEY": "sk-ant-test-loopback"}
PLAIN = LimitsConfig(park_stagger_s=0)


def limit(resets_at: float | None = NOW + 60) -> UsageLimit:
    return UsageLimit("a", resets_at, "five_hour", "rate_limit_event")


def event(**info: Any) -> RateLimitEvent:
    message = parse_message(_json({"type": "rate_limit_event", "rate_limit_info": info}))
    assert isinstance(message, RateLimitEvent)
    return message


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


# -- the account --------------------------------------------------------------------------------------------


def test_an_account_is_known_by_its_credential_or_its_login() -> None:
    same = account_of(KEY | {"PATH": "/bin"}, Path("/home/bob"))
    assert account_of(KEY, HOME) == same
    others = [
        account_of({"ANTHROPIC_API_KEY": "another"}, HOME),
        account_of({"CLAUDE_CODE_OAUTH_TOKEN": KEY["ANTHROPIC_API_KEY"]}, HOME),
        account_of(KEY, HOME, "https://gateway.example"),
        account_of({}, HOME),
        account_of({}, Path("/home/bob")),
        account_of({"CLAUDE_CONFIG_DIR": "/srv/claude"}, HOME),
        account_of({"CLAUDE_CODE_USE_BEDROCK": "1", "AWS_PROFILE": "work"}, HOME),
    ]
    assert len({same, *others}) == len(others) + 1


def test_an_empty_credential_is_none_and_the_address_has_one_form() -> None:
    assert account_of({"ANTHROPIC_API_KEY": ""}, HOME) == account_of({}, HOME)
    by_env = account_of({"ANTHROPIC_BASE_URL": "https://gateway.example/"}, HOME)
    assert by_env == account_of({}, HOME, "https://gateway.example")


def test_an_account_tells_nothing_of_its_key() -> None:
    account = account_of(KEY, HOME)
    assert len(account) == 16
    assert int(account, 16) >= 0
    assert not any(part in account for part in KEY["ANTHROPIC_API_KEY"].split("-"))


# -- the limit ----------------------------------------------------------------------------------------------


def test_the_window_that_is_used_up() -> None:
    told = event(status="rejected", resetsAt=int(NOW) + 60, rateLimitType="seven_day")
    found = usage_limit(RateLimitError("no"), told, account="a", now=NOW)
    assert found == UsageLimit("a", NOW + 60, "seven_day", "rate_limit_event")


def test_seconds_of_the_error_where_no_window_is_told() -> None:
    warning = event(status="allowed_warning", resetsAt=int(NOW) + 9999, rateLimitType="five_hour")
    error = RateLimitError("no", retry_after=90)
    assert usage_limit(error, warning, account="a", now=NOW) == UsageLimit(
        "a", NOW + 90, "request_rate", "retry_after"
    )


@pytest.mark.parametrize("resets_at", [None, "soon", True, -1, (NOW + 60) * 1000])
def test_a_time_that_is_none_is_unknown(resets_at: Any) -> None:
    told = event(status="rejected", resetsAt=resets_at)
    found = usage_limit(RateLimitError("no"), told, account="a", now=NOW)
    assert found == UsageLimit("a", None, "request_rate", "status")


def test_only_the_error_makes_a_limit() -> None:
    told = event(status="rejected", resetsAt=int(NOW) + 60, rateLimitType="five_hour")
    assert usage_limit(None, told, account="a", now=NOW) is None
    assert usage_limit(OverloadedError("busy", retry_after=9), told, account="a", now=NOW) is None


def test_a_limit_holds_for_its_account_until_the_reset() -> None:
    reached = ReachedLimits()
    reached.reach(limit())
    assert reached.of("a", NOW) == limit()
    assert reached.of("b", NOW) is None
    assert reached.of("a", NOW + 60) is None
    assert reached.of("a", NOW) is None, "over is over"


def test_the_latest_word_on_a_limit_counts() -> None:
    reached = ReachedLimits()
    reached.reach(limit(NOW + 60))
    reached.reach(limit(None))
    assert reached.of("a", NOW) == limit(NOW + 60)
    reached.reach(limit(NOW + 20))
    assert reached.of("a", NOW + 30) is None


# -- to wait or not -----------------------------------------------------------------------------------------


def test_a_run_waits_until_the_reset() -> None:
    assert park(limit(), NOW, PLAIN, Waits(), RUN) == Park(NOW + 60)


@pytest.mark.parametrize(
    ("reached", "config", "waits", "reason"),
    [
        (limit(), LimitsConfig(park=False), Waits(), "off"),
        (limit(None), PLAIN, Waits(), "unknown_end"),
        (limit(NOW + 6 * 3600 + 1), PLAIN, Waits(), "too_long"),
        (limit(NOW + 60), PLAIN, Waits(1, 6 * 3600 - 59), "too_long"),
        (limit(NOW + 60), LimitsConfig(max_park_s=0), Waits(), "too_long"),
    ],
)
def test_a_run_does_not_wait(reached: UsageLimit, config: LimitsConfig, waits: Waits, reason: str) -> None:
    answer = park(reached, NOW, config, waits, RUN)
    assert isinstance(answer, Refuse)
    assert answer.reason == reason
    error = refused(RateLimitError("no", details={"status": 429}), answer)
    assert error.details == {"status": 429, "not_parked": reason}
    assert ("limits.max_park_s" in error.advice) == (reason == "too_long")


def test_a_reset_time_that_proves_wrong_costs_few_requests() -> None:
    waits, now, attempts = Waits(), NOW, 0
    while isinstance(answer := park(limit(NOW - 60), now, PLAIN, waits, RUN), Park):
        waits.add(answer.until - now)
        now, attempts = max(now, answer.until), attempts + 1
    assert answer.reason == "too_long"
    # The first wait is none at all, then they double: their sum stays within the cap.
    assert waits.waited_s == AGAIN_S * (2 ** (attempts - 1) - 1) <= PLAIN.max_park_s
    assert attempts == 1 + int(math.log2(PLAIN.max_park_s / AGAIN_S + 1))


@given(
    resets_in=st.floats(-1e6, 1e6),
    waited=st.floats(0, 30_000),
    parks=st.integers(0, 10_000),
    cap=st.floats(0, 30_000),
    span=st.floats(0, 600),
    run_id=st.text("0123456789abcdef", min_size=16, max_size=16),
)
def test_no_run_waits_longer_than_allowed_nor_comes_back_early(
    resets_in: float, waited: float, parks: int, cap: float, span: float, run_id: str
) -> None:
    config = LimitsConfig(max_park_s=cap, park_stagger_s=span)
    answer = park(limit(NOW + resets_in), NOW, config, Waits(parks, waited), run_id)
    if isinstance(answer, Park):
        assert answer.until >= max(NOW, NOW + resets_in)
        assert waited + (answer.until - NOW) <= cap
        assert not parks or answer.until - NOW >= AGAIN_S
    else:
        assert answer.reason == "too_long"


def test_runs_come_back_one_by_one_each_always_at_its_own_moment() -> None:
    moments = [stagger(f"{n:016x}", 30) for n in range(400)]
    assert moments == [stagger(f"{n:016x}", 30) for n in range(400)]
    assert all(0 <= moment < 30 for moment in moments)
    per_second = [sum(int(moment) == second for moment in moments) for second in range(30)]
    assert min(per_second) > 0
    assert max(per_second) < 40, "13 on average"


def test_a_wait_that_was_broken_off_counts_and_never_backwards() -> None:
    waits = Waits()
    waits.add(12.5)
    waits.add(-3)
    assert waits == Waits(2, 12.5)


# -- going on -----------------------------------------------------------------------------------------------


def test_uuids_belong_to_a_run_and_an_attempt() -> None:
    all_of_them = [prompt_uuid(RUN), prompt_uuid("f" * 16), *(continue_uuid(RUN, n) for n in (1, 2))]
    assert len(set(all_of_them)) == 4
    assert prompt_uuid(RUN) == all_of_them[0]


def lifecycle(prompt: str, state: str) -> Any:
    return parse_message(_json({"type": "command_lifecycle", "command_uuid": prompt, "state": state}))


@pytest.mark.parametrize(
    ("states", "swallowed"),
    [
        (["completed"], [True]),
        (["queued", "started", "completed"], [False, False, False]),
        (["started", "completed"], [False, False]),
        (["cancelled"], [False]),
    ],
)
def test_a_prompt_is_swallowed_if_it_completes_without_a_start(states: list[str], swallowed: list[bool]) -> None:
    redelivery = Redelivery("u")
    assert not redelivery.swallowed(lifecycle("another", "completed"))
    assert not redelivery.swallowed(KeepAlive(type="keep_alive"))
    assert [redelivery.swallowed(lifecycle("u", state)) for state in states] == swallowed


# -- what is told and kept ----------------------------------------------------------------------------------


def test_events_say_why_until_when_and_how_often() -> None:
    told = parked(limit(), Park(NOW + 70), 1)
    assert told == {
        "reason": "five_hour",
        "source": "rate_limit_event",
        "account": "a",
        "resets_at": NOW + 60,
        "until": NOW + 70,
        "attempt": 1,
    }
    assert resumed(limit(), Park(NOW + 70), 1, Waits(1, 70.0)) == told | {"waited_s": 70.0}


OWNER = """
import sys, anyio, pathlib
from orchestrator.store import Run, open_store

async def main():
    async with open_store(pathlib.Path(sys.argv[1])) as store:
        for run_id, status, resume_at_us in (("a" * 16, "waiting", 5), ("b" * 16, "running", None)):
            await store.create_run(Run(
                id=run_id, trace_id="0" * 32, root_id=run_id, depth=1, kind="agent", name="helper", project="/",
                cwd="/", created_us=1, instance_id=store.instance_id, status=status, resume_at_us=resume_at_us))
        print("ready", flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


def own_and_die(path: Path) -> None:
    """A process that owns a waiting and a running run, and is killed."""
    with subprocess.Popen([sys.executable, "-c", OWNER, path], cwd=ROOT, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        try:
            assert owner.stdout.readline() == b"ready\n"
        finally:
            owner.kill()


async def test_a_waiting_run_whose_process_died_is_interrupted_and_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    own_and_die(path)
    async with open_store(path) as store:
        assert len(await store.interrupt_abandoned()) == 2
        waiting, running = await store.run("a" * 16), await store.run("b" * 16)
    assert waiting.status == running.status == "interrupted"
    assert waiting.error is not None
    assert running.error is not None
    assert waiting.error["code"] == running.error["code"] == "interrupted"
    assert "was not resumed" in waiting.error["message"]
    assert "resumed" not in running.error["message"]
    assert (waiting.resume_at_us, running.resume_at_us) == (5, None)


def test_a_waiting_run_has_not_ended() -> None:
    assert "waiting" not in ENDED
