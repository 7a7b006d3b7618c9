"""Logs: on stderr only, because stdout belongs to MCP and to scripts; with the run's id; never a secret.

Prompts and answers are not logged above DEBUG level. Whole lines are redacted, so that it does not matter whether a
secret came with the message, with one of its arguments or with an exception.
"""

import json
import logging
import sys
from datetime import UTC, datetime

from orchestrator.config import LogConfig
from orchestrator.redaction import Redactor

_LOGGERS = ("orchestrator", "mcp_tools", "opentelemetry")


def configure_logging(config: LogConfig, redact: Redactor | None = None) -> None:
    """Send the package's logs, and what OpenTelemetry says of its collector, to stderr in the configured form.

    ``redact`` takes secrets out of them; by default it knows only the shapes of keys.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter((JsonFormatter if config.format == "json" else ConsoleFormatter)(redact))
    for logger in map(logging.getLogger, _LOGGERS):
        logger.handlers[:] = [handler]
        logger.setLevel(config.level.upper())
        logger.propagate = False


def redact_logs(redact: Redactor) -> None:
    """Have logs that are configured already redacted with ``redact``, which knows more than the shapes of keys."""
    for logger in map(logging.getLogger, _LOGGERS):
        for handler in logger.handlers:
            if isinstance(handler.formatter, ConsoleFormatter | JsonFormatter):
                handler.formatter.redact = redact


class ConsoleFormatter(logging.Formatter):
    """``12:00:01 WARNING orchestrator.store: …``"""

    def __init__(self, redact: Redactor | None = None) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
        self.redact = redact or Redactor()

    def format(self, record: logging.LogRecord) -> str:
        return self.redact.text(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and the run's id where there is one."""

    def __init__(self, redact: Redactor | None = None) -> None:
        super().__init__()
        self.redact = redact or Redactor()

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if run_id := getattr(record, "run_id", None):
            line["run_id"] = run_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return self.redact.json(json.dumps(line, ensure_ascii=False))
