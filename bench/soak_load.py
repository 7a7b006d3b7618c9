"""What the soak does to each run, drawn from its seed beforehand, and what the model says to it. No I/O.

A run is known everywhere by a marker in its prompt.
"""

import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from orchestrator.testing import Fault, Reply, Request, ToolUse

Mode = Literal["fresh", "continue", "fork"]
#: ``caller``: whoever waits is cancelled; ``verb``: somebody asks for the run to be cancelled.
Cancel = Literal["caller", "verb"]
#: A CLI is killed when it has started, before it is given the prompt, or while it works on it.
Kill = Literal["start", "before", "during"]

MODES: tuple[Mode, ...] = ("fresh", "continue", "fork")
MARKER = re.compile(r"soak-\d{6}")
AGENTS = {
    "reader": "---\nname: reader\ndescription: reads\ntools: Read\n---\nYou read.\n",
    "sheller": "---\nname: sheller\ndescription: runs commands\ntools: Bash(*)\n---\nYou run commands.\n",
}
#: One shell command that ends, one that stays in the background, one that leaves its session.
COMMANDS = ("sleep 0.1; echo done", "(sleep 600 >/dev/null 2>&1 &); echo started", "setsid sleep 600 & sleep 0.2")

FAULTS = (
    Fault(status=429),
    Fault(status=500),
    Fault(status=529),
    Fault(reset_at=0),
    Fault(reset_at=4),
    Fault(truncate_at=4),
    Fault(malformed_at=3),
    Fault(error_at=3, error_type="overloaded_error"),
)
STALL = Fault(stall_at=3)


@dataclass(frozen=True)
class Fate:
    """What becomes of one run: who works on it, what goes wrong, after how many seconds.

    After ``pause_s`` its client asks for the next one; meanwhile processes are idle and are got ready.
    """

    marker: str
    agent: str
    mode: Mode
    delay_s: float
    command: str | None = None
    fault: Fault | None = None
    fault_times: int = 0
    cancel: Cancel | None = None
    kill: Kill | None = None
    after_s: float = 0.0
    timeout_s: float | None = None
    idle_timeout_s: float | None = None
    pause_s: float = 0.0


def fates(seed: int, count: int) -> list[Fate]:
    """The fates of so many runs; always the same for a seed."""
    chance = random.Random(seed)
    return [_fate(chance, f"soak-{n:06}") for n in range(count)]


def _fate(chance: random.Random, marker: str) -> Fate:
    mode = chance.choices(MODES, (5, 3, 2))[0]
    agent = chance.choices(("reader", "sheller"), (2, 1))[0]
    delay = chance.choice((0.0, 0.0, 0.1, 0.5, 1.0))
    command = chance.choice(COMMANDS) if agent == "sheller" else None
    after = chance.uniform(0.0, 2.0)
    base = Fate(marker, agent, mode, delay, command, after_s=after, pause_s=chance.choice((0.0, 0.0, 1.5)))
    return _with_trouble(chance, base)


def _with_trouble(chance: random.Random, base: Fate) -> Fate:
    more: dict[str, Any] = {}
    kind = chance.choices(
        ("none", "fault once", "fault always", "cancel", "kill", "timeout", "stall"), (40, 16, 8, 14, 12, 7, 3)
    )[0]
    if kind.startswith("fault"):
        more = {"fault": chance.choice(FAULTS), "fault_times": 1 if kind == "fault once" else 1000}
    elif kind == "cancel":
        more = {"cancel": chance.choice(("caller", "verb"))}
    elif kind == "kill":
        more = {"kill": chance.choice(("start", "before", "during", "during"))}
    elif kind == "timeout":
        more = {"timeout_s": chance.uniform(0.2, 1.5), "delay_s": 2.0}
    elif kind == "stall":
        # Twice: the CLI itself gives up after ten seconds, or we do, before that.
        more = {"fault": STALL, "fault_times": 1, "idle_timeout_s": chance.choice((None, 2.0))}
    return replace(base, **more)


@dataclass
class Seen:
    """What the model saw of one marker's own turn; what follows a tool's result is not counted."""

    requests: int = 0
    good_answers: int = 0
    sessions: set[str] = field(default_factory=set)
    run_ids: set[str] = field(default_factory=set)


class ScriptedModel:
    """Answers each request as the fate of its run wants it, and counts.

    A first-turn request is one whose last user text has the marker. The CLI sends it again after a fault, which is
    still the same turn; after an answer without a fault it has no reason to. So more than one such answer, or more
    than one session that asks, means that a run was carried out twice.
    """

    def __init__(self, all_fates: list[Fate]) -> None:
        self.seen: dict[str, Seen] = defaultdict(Seen)
        self.strangers: list[str] = []
        self._fates = {fate.marker: fate for fate in all_fates}

    def answer(self, request: Request) -> Reply:
        found = MARKER.findall(request.last_user_text)
        if not found:
            return self._follow_up(request)
        marker = found[-1]
        fate, seen = self._fates[marker], self.seen[marker]
        seen.requests += 1
        seen.sessions.add(request.headers.get("x-claude-code-session-id", "?"))
        seen.run_ids.add(request.headers.get("x-orchestrator-run-id", "?"))
        if fate.fault is not None and seen.requests <= fate.fault_times:
            return Reply("Half and half.", fault=fate.fault, delay_s=fate.delay_s)
        seen.good_answers += 1
        if fate.command is not None:
            use = ToolUse("Bash", {"command": fate.command, "description": "a command"})
            return Reply(["Now.", use], delay_s=fate.delay_s)
        return Reply(f"answer to {marker}", delay_s=fate.delay_s, event_delay_s=fate.delay_s / 10)

    def _follow_up(self, request: Request) -> Reply:
        markers = MARKER.findall("\n".join(request.texts))
        if not request.tool_results or not markers:
            self.strangers.append(request.describe())
            return Reply("?")
        return Reply(f"answer to {markers[-1]}")

    def twice(self) -> list[str]:
        """Runs that were carried out more than once, in words."""
        return [
            f"{marker}: {seen.good_answers} good answers, sessions {seen.sessions}, runs {seen.run_ids}"
            for marker, seen in sorted(self.seen.items())
            if seen.good_answers > 1 or len(seen.sessions) > 1 or len(seen.run_ids) > 1
        ]


def kinds(all_fates: list[Fate]) -> dict[str, int]:
    """How many runs there are of each kind, for the report."""
    counts: Counter[str] = Counter()
    for fate in all_fates:
        counts[fate.mode] += 1
        counts[fate.agent] += 1
        counts["faults"] += fate.fault is not None
        counts["cancels"] += fate.cancel is not None
        counts["kills"] += fate.kill is not None
        counts["time-outs"] += fate.timeout_s is not None or fate.idle_timeout_s is not None
    return dict(counts)
