"""Reading the CLI's output: a usual line, a line of 10 MB, and whether the time is linear in the size."""

import json
import time
from pathlib import Path
from typing import Any

from bench.figures import Figure, median
from orchestrator.framing import MessageDecoder
from orchestrator.messages import parse_message
from orchestrator.process import READ_BYTES

COUNT = 20
HUGE_MB = 10
TRANSCRIPTS = Path(__file__).parent.parent / "tests" / "transcripts"


def run(count: int = COUNT) -> dict[str, Any]:
    """Measure ``count`` rounds of each."""
    lines = typical_lines()
    parse_all(lines)  # pydantic builds its validators with the first use
    typical, small, huge = [], [], []
    for _ in range(count):
        typical.append(parse_all(lines) / len(lines))
        small.append(decode(long_line(1_000_000)))
        huge.append(decode(long_line(HUGE_MB * 1_000_000)))
    size = sum(map(len, lines)) / len(lines)
    growth = median(huge) / median(small) / HUGE_MB
    figures = [
        Figure(
            "parsing a typical line",
            1e6 * median(typical),
            "µs",
            15,
            note=f"{len(lines)} lines of {size:.0f} bytes",
        ),
        Figure(
            f"a line of {HUGE_MB} MB", 1e3 * median(huge), "ms", 150, note=f"in pieces of {READ_BYTES // 1024} KB"
        ),
        Figure(f"time per byte at {HUGE_MB} MB, of that at 1 MB", growth, "×", 1.5, note="1 is linear"),
    ]
    return {"figures": [figure.as_dict() for figure in figures]}


def typical_lines() -> list[bytes]:
    """Everything the CLI printed in the recorded scenarios of ordinary work."""
    return [line for path in sorted(TRANSCRIPTS.glob("s*.ndjson")) for line in path.read_bytes().splitlines()]


def parse_all(lines: list[bytes]) -> float:
    began = time.perf_counter()
    for line in lines:
        parse_message(line)
    return time.perf_counter() - began


def long_line(size: int) -> bytes:
    """An answer of one text of that size, as the CLI prints it."""
    content = [{"type": "text", "text": "word " * (size // 5)}]
    return json.dumps({"type": "assistant", "message": {"role": "assistant", "content": content}}).encode() + b"\n"


def decode(line: bytes) -> float:
    """In pieces as they come out of a pipe."""
    decoder = MessageDecoder()
    began = time.perf_counter()
    messages = [m for at in range(0, len(line), READ_BYTES) for m in decoder.feed(line[at : at + READ_BYTES])]
    took = time.perf_counter() - began
    assert len(messages) == 1
    return took
