"""Logs: on stderr alone, never a key in them, and one JSON object a line where that is asked for."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.logs import ConsoleFormatter, JsonFormatter

ROOT = Path(__file__).parent.parent
KEY = "sk-ant-api03-AbCdEfGh_123-xyz"
TOKEN = "Bearer abc.DEF-ghi_123~+/=="


@pytest.fixture
def logger() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """A logger of its own with a place to write to."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    logger = logging.getLogger("tests.logs")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield logger, out
    logger.removeHandler(handler)


def use(logger: logging.Logger, formatter: logging.Formatter) -> None:
    logger.handlers[0].setFormatter(formatter)


# -- secrets (what is one: tests/test_redaction.py) ---------------------------------------------------------


@given(
    before=st.text(max_size=20),
    secret=st.from_regex(r"[A-Za-z0-9_-]{8,40}", fullmatch=True),
    after=st.sampled_from(["", " ", "\n", '"', "'", ",", ")", "}"]),
)
@pytest.mark.parametrize("formatter", [ConsoleFormatter(), JsonFormatter()])
def test_no_key_survives(formatter: logging.Formatter, before: str, secret: str, after: str) -> None:
    for text in (f"sk-ant-abcd{secret}{after}", f"Authorization: Bearer {secret}{after}"):
        record = logging.LogRecord("n", logging.INFO, "", 0, "%s %s", (before, text), None)
        line = formatter.format(record)
        assert line.count("[redacted]") >= 1
        assert secret not in line.rpartition("[redacted]")[2]


@pytest.mark.parametrize("formatter", [ConsoleFormatter(), JsonFormatter()])
def test_keys_are_redacted_wherever_they_come_from(
    logger: tuple[logging.Logger, io.StringIO], formatter: logging.Formatter
) -> None:
    log, out = logger
    use(log, formatter)
    log.warning("plain %s", KEY)
    log.warning("%s and %r", {"authorization": TOKEN}, [KEY])
    try:
        raise RuntimeError(f"refused: {KEY}")
    except RuntimeError:
        log.exception("failed")
    assert "AbCdEfGh" not in out.getvalue()
    assert "DEF-ghi" not in out.getvalue()
    assert "RuntimeError: refused: [redacted]" in out.getvalue()


# -- form ---------------------------------------------------------------------------------------------------


def test_json_is_one_object_a_line(logger: tuple[logging.Logger, io.StringIO]) -> None:
    log, out = logger
    use(log, JsonFormatter())
    log.info('two\nlines "and" ünïcode \u2028', extra={"run_id": "a" * 16})
    try:
        raise ValueError("inner\nerror")
    except ValueError:
        log.exception("failed")
    first, second = (json.loads(line) for line in out.getvalue().split("\n")[:-1])
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "INFO",
        "logger": "tests.logs",
        "message": 'two\nlines "and" ünïcode \u2028',
        "run_id": "a" * 16,
    }
    assert "ValueError: inner\nerror" in second["exception"]
    assert "run_id" not in second


def test_a_redacted_line_is_still_json(logger: tuple[logging.Logger, io.StringIO]) -> None:
    log, out = logger
    use(log, JsonFormatter())
    for text in (KEY, f'"{KEY}"', f"{TOKEN}\\", f"{TOKEN}\\n", f"Bearer {KEY}", f"\\{KEY}\\"):
        log.info(text)
    lines = out.getvalue().splitlines()
    assert len(lines) == 6
    assert all("[redacted]" in json.loads(line)["message"] for line in lines)


def test_console_lines_say_when_how_grave_and_where(logger: tuple[logging.Logger, io.StringIO]) -> None:
    log, out = logger
    use(log, ConsoleFormatter())
    log.warning("said %d", 3)
    clock, rest = out.getvalue().split(" ", 1)
    assert clock.count(":") == 2
    assert rest == "WARNING tests.logs: said 3\n"


# -- where they go ------------------------------------------------------------------------------------------

PROGRAM = """
import logging, sys
from orchestrator.config import LogConfig
from orchestrator.logs import configure_logging
for config in sys.argv[1:]:
    level, format = config.split("/")
    configure_logging(LogConfig(level=level, format=format))
    for name in ("orchestrator.store", "mcp_tools.tools"):
        logging.getLogger(name).debug("fine of %s", name)
        logging.getLogger(name).info("news of %s \\ud800", name)
        logging.getLogger(name).error("trouble of %s", name)
    logging.getLogger("somebody.else").info("not ours")
"""


def logged(*configs: str, code: str = PROGRAM) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *configs],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT), "HOME": "/", "LANG": "C.UTF-8"},
    )
    assert done.stdout == "", "stdout belongs to MCP and to scripts"
    return done.stderr.splitlines()


def test_logs_go_to_stderr_alone_from_the_level_on() -> None:
    assert [line.split(" ", 1)[1] for line in logged("warning/console")] == [
        "ERROR orchestrator.store: trouble of orchestrator.store",
        "ERROR mcp_tools.tools: trouble of mcp_tools.tools",
    ]


def test_configuring_twice_logs_once_and_in_the_last_form() -> None:
    lines = [json.loads(line) for line in logged("ERROR/console", "INFO/json")[2:]]
    assert [(line["level"], line["logger"]) for line in lines] == [
        ("INFO", "orchestrator.store"),
        ("ERROR", "orchestrator.store"),
        ("INFO", "mcp_tools.tools"),
        ("ERROR", "mcp_tools.tools"),
    ]


def test_what_opentelemetry_says_has_our_form() -> None:
    lines = [json.loads(line) for line in logged("WARNING/json", code=OPENTELEMETRY)[2:]]
    assert [line["message"] for line in lines] == ["Failed to export to http://collector, [redacted]"]


OPENTELEMETRY = (
    PROGRAM
    + """
logging.getLogger("opentelemetry.exporter").info("retrying")
logging.getLogger("opentelemetry.exporter").error("Failed to export to http://collector, sk-ant-api03-AbCdEfGh")
"""
)


@pytest.mark.parametrize("level", ["debug", "INFO", "Warning", "ERROR", "critical"])
def test_every_level_that_can_be_configured_can_be_set(level: str) -> None:
    code = PROGRAM + 'print(logging.getLogger("orchestrator").level, file=sys.stderr)'
    assert logged(f"{level}/console", code=code)[-1] == str(getattr(logging, level.upper()))
