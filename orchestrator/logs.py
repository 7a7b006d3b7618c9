"""Logs: on stderr only, because stdout belongs to MCP and to scripts; with the run's id; never a secret.

Prompts and answers are not logged above DEBUG level. What looks like a key is masked wherever it comes from.
"""

import json
import logging
import re
import sys
from datetime import UTC, datetime

from orchestrator.config import LogConfig

_SECRET = re.compile(r"(sk-ant-[\w-]{4})[\w-]+|(Bearer\s+)[\w.~+/-]+=*", re.IGNORECASE)


def configure_logging(config: LogConfig) -> None:
    """Send the package's logs, and what OpenTelemetry says of its collector, to stderr in the configured form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if config.format == "json" else ConsoleFormatter())
    for name in ("orchestrator", "mcp_tools", "opentelemetry"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(config.level.upper())
        logger.propagate = False


def mask(text: str) -> str:
    """Replace what looks like a key or a bearer token."""
    return _SECRET.sub(lambda match: f"{match[1] or match[2]}***", text)


class ConsoleFormatter(logging.Formatter):
    """``12:00:01 WARNING orchestrator.store: …``"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return mask(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and the run's id where there is one."""

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
        return mask(json.dumps(line, ensure_ascii=False))
