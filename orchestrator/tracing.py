"""W3C trace context and the ids of runs. Pure; no OpenTelemetry import, because every command needs this.

A run's id is its span id: 16 hex digits, random, so that the journal, the trace and what a person types agree.
"""

import re
import secrets
from dataclasses import dataclass
from typing import Self

# W3C Trace Context: version 00 has exactly four fields, later versions may have more, ff is no version.
_TRACEPARENT = re.compile(r"(?!ff|00.{53}-)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?")


@dataclass(frozen=True, slots=True)
class SpanContext:
    """Where a span hangs: its trace (32 hex digits) and its own id (16)."""

    trace_id: str
    span_id: str

    @property
    def traceparent(self) -> str:
        # Flags 01: the CLI and the SDKs record nothing at all below a parent that was not sampled.
        return f"00-{self.trace_id}-{self.span_id}-01"

    @classmethod
    def parse(cls, traceparent: str | None) -> Self | None:
        """The context in a ``traceparent`` header, or None if there is none or it is not valid."""
        match = _TRACEPARENT.fullmatch((traceparent or "").strip().lower())
        if match is None or not int(match[1], 16) or not int(match[2], 16):
            return None
        return cls(match[1], match[2])


def new_run_id() -> str:
    """A fresh run id. 64 random bits: nobody guesses another's run."""
    return secrets.token_hex(8)


def new_trace_id() -> str:
    return secrets.token_hex(16)
