"""Every decision of the process pool, in one synchronous function over a state that can be printed.

``PoolState.decide`` never waits and is told the time: who gets which process, what is started, what is ended.
The pool around it (``orchestrator.pool``) only carries out what is decided and reports what happened. Deciding
without awaiting is what keeps two borrowers from being given one process.

The rules: a process is handed out once, to a run that needs exactly what was fixed when it started, or again to
the next turn of the session it holds; nothing unrelated ever shares one. A run whose children work lends them its
place, so delegation cannot block itself. What is kept warm follows recent demand, never more than asked for.
"""

import itertools
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["idle", "busy", "held", "ending"]
Reason = Literal[
    "expired",  # unused for too long
    "room",  # more sessions are held than may be
    "memory",  # the memory is needed for a run
    "stale",  # a file that was read when it started has changed
    "superseded",  # its session goes on with other settings, or went on elsewhere
    "failed",  # its turn did not end well
    "not_kept",  # the settings keep none
    "died",  # it ended by itself
    "shutdown",
]

#: Seconds of history that demand is judged by, the seconds within which runs count as simultaneous, and how many
#: kinds of process are remembered.
DEMAND_WINDOW_S = 600.0
BURST_S = 1.0
MAX_KINDS = 64
#: How long a process that does not answer counts as one that is starting.
MAX_START_S = 10.0
#: How long after a hand-out the next process is started to be kept warm.
REFILL_DELAY_S = 0.3
#: For how long no process is kept warm after one of its kind died while it started.
FAILED_S = 60.0
#: How far into one parent's line is looked for a run that can start although the one before it cannot.
LOOK_AHEAD = 16


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """What the pool may use. Memory is in MB, times are in seconds.

    ``max_processes`` counts runs at work, ``max_idle`` warm processes, ``max_sessions`` processes that hold a
    session for its next turn, ``max_starts`` processes that start at the same time. ``memory_mb`` None is no
    bound. The estimates of a process's memory count until it has been measured. ``transcripts`` is False where
    sessions are kept in no files (fakes).
    """

    max_processes: int = 8
    max_idle: int = 4
    max_sessions: int = 4
    max_starts: int = 2
    memory_mb: float | None = None
    idle_mb: float = 90.0
    active_mb: float = 110.0
    idle_s: float = 300.0
    session_idle_s: float = 300.0
    transcripts: bool = True


@dataclass(frozen=True, slots=True)
class Request:
    """A run that wants a process. ``key`` stands for everything that is fixed when a process starts.

    ``session_id`` is the session to go on with, None for a new one; ``transcript`` is the state of the session's
    file: if it is not what its process left, somebody else has gone on with it. ``fresh`` is False for a fork,
    which needs a process of its own. Higher ``priority`` goes first; among equals, the parent with the fewest runs
    at work.
    """

    run_id: str
    key: str
    agent: str
    model: str | None = None
    session_id: str | None = None
    transcript: str = ""
    fresh: bool = True
    parent_id: str | None = None
    priority: int = 0
    since: float = 0.0

    @property
    def group(self) -> "Group":
        return self.priority, self.parent_id or ""


@dataclass(slots=True, eq=False)
class Worker:
    """One CLI process. ``starting`` until it has answered for the first time; ``since`` is when its phase began.

    ``session_id`` is the session it holds for the next turn. ``memory_mb`` is None until it has been measured.
    """

    id: int
    key: str
    agent: str
    phase: Phase
    since: float
    model: str | None = None
    session_id: str | None = None
    transcript: str = ""
    run_id: str | None = None
    parent_id: str | None = None
    starting: bool = True
    refill: bool = False
    born: float = 0.0
    turns: int = 0
    memory_mb: float | None = None

    def __repr__(self) -> str:
        start = ", starting" if self.starting else ""
        for_whom = f", run {self.run_id}" if self.run_id else ""
        session = f", session {self.session_id[:8]}" if self.session_id else ""
        return f"<#{self.id} {self.agent} {self.key[:6]} {self.phase}{start}{session}{for_whom}>"


@dataclass(frozen=True, slots=True)
class Assign:
    """Give the worker to the run."""

    request: Request
    worker: Worker


@dataclass(frozen=True, slots=True)
class Start:
    """Start a process: for the run, or (None) to be kept warm."""

    request: Request | None
    worker: Worker


@dataclass(frozen=True, slots=True)
class End:
    """End the process."""

    worker: Worker
    reason: Reason


Action = Assign | Start | End
Group = tuple[int, str]


@dataclass(slots=True)
class PoolCounters:
    """What happened since the pool was opened.

    ``hits`` and ``session_hits`` are runs that were given a warm process and their session's own, ``waits`` those
    that could not begin at once, ``refused`` those that met a full queue. ``retired`` counts by reason.
    """

    hits: int = 0
    session_hits: int = 0
    cold_starts: int = 0
    refills: int = 0
    waits: int = 0
    refused: int = 0
    retired: Counter[str] = field(default_factory=Counter)


class PoolState:
    """Processes, runs that wait for one, and demand. Nothing in it waits; not safe for threads."""

    def __init__(self, limits: PoolLimits) -> None:
        self.limits = limits
        self.counters = PoolCounters()
        self.workers: dict[int, Worker] = {}
        self.closing = False
        self._minimum: dict[str, int] = {}
        self._waiting: dict[Group, deque[Request]] = {}
        self._demand: OrderedDict[str, deque[float]] = OrderedDict()
        self._kinds: dict[str, tuple[str, str | None]] = {}
        self._failed: dict[str, float] = {}
        self._handed_out_at = -math.inf
        self._ids = itertools.count(1)

    def __repr__(self) -> str:
        phases = Counter(worker.phase for worker in self.workers.values())
        counts = ", ".join(f"{count} {phase}" for phase, count in sorted(phases.items()))
        workers = "".join(f"\n  {worker!r}" for worker in self.workers.values())
        return f"<PoolState {counts or 'empty'}, {self.waiting} waiting{workers}>"

    @property
    def refill_at(self) -> float:
        """Not before this is a process started to be kept warm: that would slow the run that just began."""
        return self._handed_out_at + REFILL_DELAY_S

    # -- what is there ------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Runs that wait for a process."""
        return sum(map(len, self._waiting.values()))

    @property
    def working(self) -> int:
        """Runs that have a process and do not merely wait for runs they delegated: those lend their place."""
        busy = self._in_phase("busy")
        parents = {group[1] for group in self._waiting} | {worker.parent_id for worker in busy}
        return sum(worker.run_id not in parents for worker in busy)

    def starting(self, now: float) -> int:
        """Processes that are starting; one that has not answered for long holds nobody else up."""
        recent = (w for w in self.workers.values() if w.starting and w.phase != "ending")
        return sum(now - worker.born <= MAX_START_S for worker in recent)

    @property
    def spare(self) -> list[Worker]:
        """Processes that wait for a run, those unused for longest first."""
        return sorted((w for w in self.workers.values() if w.phase in ("idle", "held")), key=lambda w: w.since)

    @property
    def memory_mb(self) -> float:
        """What all processes use, measured where that is known."""
        return sum(map(self._memory_of, self.workers.values()))

    @property
    def keys(self) -> set[str]:
        """Keys that are in use, waited for, wanted or remembered."""
        waiting = (request.key for line in self._waiting.values() for request in line)
        return {*self._demand, *self._minimum, *(w.key for w in self.workers.values()), *waiting}

    def wanted(self, key: str, now: float) -> int:
        """How many processes of the key ought to be warm: the configured minimum, or what demand of late says.

        Demand is the largest number of runs that began within BURST_S of each other. One run alone says nothing:
        many kinds of run happen once.
        """
        recent = [at for at in self._demand.get(key, ()) if now - at <= DEMAND_WINDOW_S]
        burst = max((sum(0 <= at - first <= BURST_S for at in recent) for first in recent), default=0)
        return max(self._minimum.get(key, 0), burst if len(recent) > 1 else 0)

    def _in_phase(self, *phases: Phase) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.phase in phases]

    def _memory_of(self, worker: Worker) -> float:
        if worker.phase == "ending":
            return 0.0
        return worker.memory_mb or (self.limits.active_mb if worker.phase == "busy" else self.limits.idle_mb)

    # -- what happened ------------------------------------------------------------------------------------

    def ask(self, request: Request) -> None:
        """A run wants a process."""
        self._waiting.setdefault(request.group, deque()).append(request)

    def drop(self, run_id: str) -> None:
        """The run does not want one any more; nothing happens if it does not wait."""
        for line in list(self._waiting.values()):
            for request in [request for request in line if request.run_id == run_id]:
                self._take_out(request)

    def _take_out(self, request: Request) -> None:
        line = self._waiting[request.group]
        line.remove(request)
        if not line:
            del self._waiting[request.group]

    def started(self, worker: Worker) -> None:
        """The process has answered: another may start now."""
        worker.starting = False

    def release(
        self, worker: Worker, now: float, *, session_id: str | None, transcript: str = "", keep: bool
    ) -> list[End]:
        """The run is done with its process, which is kept for the session's next turn, or ended.

        ``session_id`` None says that it was not used: it is what it was before.
        """
        worker.run_id = worker.parent_id = None
        worker.turns += session_id is not None
        worker.since = now
        if worker.phase == "ending":
            return []
        if session_id is not None:
            worker.session_id, worker.transcript = session_id, transcript
        worker.phase = "held" if worker.session_id else "idle"
        if not keep:
            return self.end(worker, "failed")
        holds = self.limits.max_sessions and self.limits.session_idle_s
        if self.closing or (worker.phase == "held" and not holds):
            return self.end(worker, "not_kept")
        # A CLI goes on tidying up for a fifth of a start after its turn; the others have done so. While runs wait,
        # the one that has just ended its turn makes way, although it is the youngest.
        if self._waiting and len(self._in_phase("held")) > self.limits.max_sessions:
            return self.end(worker, "room")
        return []

    def end(self, worker: Worker, reason: Reason) -> list[End]:
        """The process has to end. Nothing if it is ending already."""
        if worker.phase == "ending":
            return []
        worker.phase = "ending"
        self.counters.retired[reason] += 1
        return [End(worker, reason)]

    def gone(self, worker: Worker, now: float) -> None:
        """The process has ended. One that died before its first turn is not replaced soon: the next may die too."""
        if self.workers.pop(worker.id, None) is None or worker.phase == "ending":
            return
        self.counters.retired["died"] += 1
        if worker.starting or not worker.turns:
            self._failed[worker.key] = now

    def want(self, key: str, agent: str, model: str | None, minimum: int) -> None:
        """Keep at least so many warm processes of the key."""
        self._minimum[key] = minimum
        self._kinds[key] = (agent, model)

    def forget(self, key: str) -> list[End]:
        """The key means nothing any more, what it stands for has changed: end its spare processes."""
        for memory in (self._minimum, self._demand, self._kinds, self._failed):
            memory.pop(key, None)
        stale = [worker for worker in self.spare if worker.key == key]
        return [end for worker in stale for end in self.end(worker, "stale")]

    # -- the decision -------------------------------------------------------------------------------------

    def decide(self, now: float) -> list[Action]:
        """Everything that can be done now, in order; the state is as if it were done already."""
        actions: list[Action] = [*self._expire(now), *self._trim_sessions(now)]
        while (done := self._serve_next(now)) is not None:
            actions += done
        if not self.closing:
            actions += self._refill(now)
        return actions

    def _ttl(self, worker: Worker) -> float:
        return self.limits.idle_s if worker.phase == "idle" else self.limits.session_idle_s

    def _expire(self, now: float) -> Iterator[End]:
        for worker in self.spare:
            if now - worker.since >= self._ttl(worker):
                yield from self.end(worker, "expired")

    def _trim_sessions(self, now: float) -> Iterator[End]:
        """End what holds sessions beyond those that are kept, those unused for longest first.

        To end takes a process as long as a turn takes it, and nobody waits for it: while runs begin one after the
        other they may stay where warm processes were, afterwards as few end at once as start at once.
        """
        held = sorted(self._in_phase("held"), key=lambda worker: worker.since)
        many = len(held) - self.limits.max_sessions
        too_many = many - max(0, self.limits.max_idle - len(self._in_phase("idle")))
        quiet = now - self._handed_out_at >= BURST_S
        at_once = self.limits.max_starts - len(self._in_phase("ending")) if quiet else 0
        for worker in held[: max(0, too_many, min(many, at_once))]:
            yield from self.end(worker, "room")

    def _serve_next(self, now: float) -> list[Action] | None:
        """What serves the next run that can be served; None if none can."""
        if not self._waiting or self.working >= self.limits.max_processes:
            return None
        for group in self._groups():
            for request in itertools.islice(self._waiting[group], LOOK_AHEAD):
                if actions := self._serve(request, now):
                    if isinstance(actions[-1], Assign | Start):
                        self._take_out(request)
                    return actions
        return None

    def _groups(self) -> list[Group]:
        """Who is next: the higher priority, then the parent with the fewest runs at work, then the oldest."""
        if len(self._waiting) == 1:
            return list(self._waiting)
        at_work = Counter(worker.parent_id or "" for worker in self._in_phase("busy"))
        return sorted(
            self._waiting, key=lambda group: (-group[0], at_work[group[1]], self._waiting[group][0].since)
        )

    def _serve(self, request: Request, now: float) -> list[Action]:
        """What serves the run; what makes way for it (it goes on waiting then); or nothing."""
        if request.session_id is not None:
            holder = self._holder_of(request.session_id)
            if holder is None:
                return self._start(request, now)
            if holder.phase != "held":
                return []  # it is on its way out: two processes on one session would part its history unseen
            if not self._goes_on(holder, request):
                return [*self.end(holder, "superseded")]
            self.counters.session_hits += 1
            return [self._assign(request, holder, now)]
        if request.fresh and (warm := self._warmest(request.key)) is not None:
            self._note_demand(request, now)
            self.counters.hits += 1
            return [self._assign(request, warm, now)]
        return self._start(request, now)

    def _goes_on(self, holder: Worker, request: Request) -> bool:
        # A change of model in mid-session would be told to the model within the prompt; a resume is silent.
        same = (holder.key, holder.model) == (request.key, request.model)
        # Where the file is not found nobody can tell who has gone on with the session.
        known = bool(request.transcript) or not self.limits.transcripts
        return same and known and holder.transcript == request.transcript

    def _holder_of(self, session_id: str) -> Worker | None:
        return next((worker for worker in self.workers.values() if worker.session_id == session_id), None)

    def _warmest(self, key: str) -> Worker | None:
        """A warm process of the key: one that is ready, else one that is starting already."""
        warm = [worker for worker in self._in_phase("idle") if worker.key == key]
        return min(warm, key=lambda worker: (worker.starting, worker.since), default=None)

    def _assign(self, request: Request, worker: Worker, now: float) -> Assign:
        worker.phase, worker.since = "busy", now
        self._handed_out_at = now
        worker.run_id, worker.parent_id, worker.model = request.run_id, request.parent_id, request.model
        return Assign(request, worker)

    def _start(self, request: Request, now: float) -> list[Action]:
        if self.starting(now) >= self.limits.max_starts:
            return []
        ends = list(self._make_room(self.limits.active_mb))
        if not self._fits(self.limits.active_mb) and not self._may_exceed_memory(request):
            return [*ends]
        if request.fresh and request.session_id is None:
            self._note_demand(request, now)
        self.counters.cold_starts += 1
        worker = self._new_worker(request.key, request.agent, request.model, now)
        self._assign(request, worker, now)
        # Known from the start: a second run on the session has to wait for this process even before it has begun.
        worker.session_id = request.session_id
        return [*ends, Start(request, worker)]

    def _may_exceed_memory(self, request: Request) -> bool:
        """A run whose parent waits for it, and the only run there is, go on: nothing else could free memory."""
        busy = self._in_phase("busy")
        return not busy or any(worker.run_id == request.parent_id for worker in busy)

    def _make_room(self, memory_mb: float) -> Iterator[End]:
        """End spare processes, those unused for longest first, until there is room or none is left."""
        for worker in self.spare:
            if self._fits(memory_mb):
                return
            yield from self.end(worker, "memory")

    def _fits(self, memory_mb: float) -> bool:
        return self.limits.memory_mb is None or self.memory_mb + memory_mb <= self.limits.memory_mb

    def _new_worker(self, key: str, agent: str, model: str | None, now: float) -> Worker:
        worker = Worker(next(self._ids), key, agent, "idle", now, model=model, born=now)
        self.workers[worker.id] = worker
        return worker

    def _note_demand(self, request: Request, now: float) -> None:
        self._kinds[request.key] = (request.agent, request.model)
        self._demand.setdefault(request.key, deque(maxlen=LOOK_AHEAD)).append(now)
        self._demand.move_to_end(request.key)
        while len(self._demand) > MAX_KINDS:
            key, _ = self._demand.popitem(last=False)
            if key not in self._minimum:
                self._kinds.pop(key, None)

    def _refill(self, now: float) -> Iterator[Start]:
        """One process to be kept warm, if it is wanted, nothing else starts, nobody waits and there is room."""
        idle = self._in_phase("idle")
        if self._waiting or self.starting(now) or len(idle) >= self.limits.max_idle:
            return
        if len(self._in_phase("held")) > self.limits.max_sessions:
            return  # these end first
        if now < self.refill_at:
            return
        if not self._fits(self.limits.idle_mb):
            return
        for key in [*reversed(self._demand), *self._minimum]:
            if now - self._failed.get(key, -FAILED_S) < FAILED_S:
                continue
            if sum(worker.key == key for worker in idle) < self.wanted(key, now):
                self.counters.refills += 1
                worker = self._new_worker(key, *self._kinds[key], now)
                worker.refill = True
                yield Start(None, worker)
                return
