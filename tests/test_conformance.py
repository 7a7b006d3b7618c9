"""The public conformance suite of MCP against our server. It needs Node: `make conformance` installs it."""

from pathlib import Path

import anyio
import pytest

from scripts import conformance

TASKS = {
    "tasks-lifecycle",
    "tasks-capability-negotiation",
    "tasks-wire-fields",
    "tasks-request-state-removal",
    "tasks-mrtr-input",
    "tasks-request-headers",
    "tasks-dispatch-and-envelope",
    "tasks-required-task-error",
    "tasks-mrtr-composition",
}


async def test_the_server_conforms_to_the_protocol(tmp_path: Path) -> None:
    if (reason := conformance.missing()) is not None:
        pytest.skip(reason)

    with anyio.fail_after(110):
        plain, full = await conformance.run_both(tmp_path)

    assert [str(check) for check in (*plain, *full) if not check.good] == []
    assert {check.scenario for check in plain} == conformance.PLAIN
    scenarios = {check.scenario for check in full if check.status == "SUCCESS"}
    assert scenarios >= TASKS | conformance.PLAIN
    assert len(scenarios) >= 46


@pytest.mark.parametrize(
    ("scenario", "status", "good"),
    [
        ("tools-list", "SUCCESS", True),
        ("tools-list", "INFO", True),
        ("tools-list", "WARNING", False),
        ("tools-list", "FAILURE", False),
        ("tools-list", "SKIPPED", False),
        ("tasks-status-notifications", "SKIPPED", True),
    ],
)
def test_only_what_the_suite_itself_skips_may_be_skipped(scenario: str, status: str, good: bool) -> None:
    assert conformance.Check(scenario, "a check", status, "").good is good
