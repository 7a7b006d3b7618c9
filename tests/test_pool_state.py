"""The pool's decisions: whoever gets a process gets the right one, bounds hold, and nobody waits for ever."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from orchestrator.pool_state import (
    DEMAND_WINDOW_S,
    Action,
    Assign,
    End,
    PoolLimits,
    PoolState,
    Request,
    Start,
    Worker,
)

KEY = "k" * 8


def state(**limits: Any) -> PoolState:
    return PoolState(PoolLimits(**{"max_starts": 8, **limits}))


def run(name: str, key: str = KEY, **more: Any) -> Request:
    return Request(run_id=name, key=key, agent="helper", **more)


def given(pool: PoolState, request: Request, now: float = 0.0) -> Worker | None:
    """The process the run is given at once, if it is."""
    pool.ask(request)
    for action in pool.decide(now):
        if isinstance(action, Assign | Start) and action.request is request:
            return action.worker
    return None


def kinds(actions: list[Action]) -> list[str]:
    return [f"{type(action).__name__}:{getattr(action, 'reason', '')}".rstrip(":") for action in actions]


def served(pool: PoolState, worker: Worker, now: float, *, session: str = "s1", **more: Any) -> list[End]:
    pool.started(worker)
    return pool.release(worker, now, session_id=session, keep=True, **more)


# -- who gets which process ---------------------------------------------------------------------------------


def test_the_first_run_of_its_kind_starts_a_process() -> None:
    pool = state()
    worker = given(pool, run("r1"))
    assert worker is not None
    assert (worker.phase, worker.run_id, worker.starting) == ("busy", "r1", True)
    assert pool.counters.cold_starts == 1


def test_a_session_goes_on_in_the_process_that_holds_it() -> None:
    pool = state()
    first = given(pool, run("r1"))
    assert first is not None
    served(pool, first, 1, transcript="t1")
    assert given(pool, run("r2", session_id="s1", transcript="t1"), 2) is first
    assert pool.counters.session_hits == 1


@pytest.mark.parametrize(
    "change",
    [{"key": "other"}, {"model": "sonnet"}, {"transcript": "somebody else has gone on with it"}],
    ids=["settings", "model", "transcript"],
)
def test_a_session_that_goes_on_otherwise_waits_until_its_process_is_gone(change: dict[str, Any]) -> None:
    """Two processes on one session would part its history without a word."""
    pool = state()
    first = given(pool, run("r1"))
    assert first is not None
    served(pool, first, 1, transcript="t1")
    again = run("r2", **{"session_id": "s1", "transcript": "t1", **change})
    pool.ask(again)
    assert kinds(pool.decide(2)) == ["End:superseded"]
    assert pool.decide(3) == []
    pool.gone(first, 4)
    [start] = pool.decide(4)
    assert isinstance(start, Start)
    assert start.worker is not first


@pytest.mark.parametrize("kept", [True, False], ids=["in files", "in memory alone"])
def test_a_session_whose_file_is_not_found_goes_on_only_where_there_are_no_files(kept: bool) -> None:
    """That it was not found before either does not say that nobody has gone on with it."""
    pool = state(transcripts=kept)
    first = given(pool, run("r1"))
    assert first is not None
    served(pool, first, 1, transcript="")
    assert given(pool, run("r2", session_id="s1", transcript=""), 2) is (None if kept else first)
    assert pool.counters.session_hits == (0 if kept else 1)


def test_a_fresh_run_never_gets_a_process_that_holds_a_session() -> None:
    pool = state()
    first = given(pool, run("r1"))
    assert first is not None
    served(pool, first, 1)
    second = given(pool, run("r2"), 2)
    assert second is not None
    assert second is not first


def test_a_fork_gets_a_process_of_its_own() -> None:
    pool = state()
    pool.want(KEY, "helper", None, 1)
    [refill] = pool.decide(0)
    pool.started(refill.worker)
    fork = given(pool, run("r1", fresh=False), 1)
    assert fork is not None
    assert fork is not refill.worker


def test_a_process_that_is_still_starting_is_taken_before_another_is_started() -> None:
    pool = state()
    pool.want(KEY, "helper", None, 1)
    [refill] = pool.decide(0)
    assert isinstance(refill, Start)
    assert refill.request is None
    assert given(pool, run("r1")) is refill.worker


def test_a_process_that_was_not_used_is_what_it_was_before() -> None:
    pool = state()
    first = given(pool, run("r1"))
    assert first is not None
    served(pool, first, 1, transcript="t1")
    assert given(pool, run("r2", session_id="s1", transcript="t1"), 2) is first
    pool.release(first, 3, session_id=None, keep=True)
    assert (first.phase, first.session_id) == ("held", "s1")
    assert given(pool, run("r3"), 4) is not first


# -- bounds -------------------------------------------------------------------------------------------------


def test_runs_at_work_are_bounded_and_the_rest_wait_in_order() -> None:
    pool = state(max_processes=2)
    workers = [given(pool, run(f"r{n}")) for n in range(4)]
    assert [worker is not None for worker in workers] == [True, True, False, False]
    assert workers[0] is not None
    served(pool, workers[0], 1)
    [start] = [action for action in pool.decide(2) if isinstance(action, Start)]
    assert start.request is not None
    assert start.request.run_id == "r2"


def test_starts_are_bounded_and_a_session_that_is_held_need_not_wait_for_them() -> None:
    pool = state(max_starts=1)
    first = given(pool, run("r0"))
    assert first is not None
    served(pool, first, 1, transcript="t1")
    assert given(pool, run("r1", key="b"), 2) is not None
    assert given(pool, run("r2", key="c"), 2) is None
    assert given(pool, run("r3", session_id="s1", transcript="t1"), 2) is first


def test_a_process_that_never_answers_holds_up_starts_only_for_a_while() -> None:
    pool = state(max_starts=1)
    assert given(pool, run("r1")) is not None
    assert given(pool, run("r2"), 5) is None
    assert [type(action) for action in pool.decide(11)] == [Start]


def test_a_run_lends_its_place_to_those_it_waits_for() -> None:
    """With a bound of one, delegation three levels deep would otherwise wait for itself."""
    pool = state(max_processes=1)
    assert given(pool, run("a")) is not None
    assert given(pool, run("stranger")) is None
    child = given(pool, run("b", parent_id="a"))
    assert child is not None
    assert given(pool, run("c", parent_id="b")) is not None
    assert pool.working == 1


def test_memory_is_made_room_for_by_those_unused_for_longest() -> None:
    pool = state(memory_mb=320, idle_mb=90, active_mb=110)
    older, newer = given(pool, run("r1", key="a")), given(pool, run("r2", key="b"))
    assert older is not None
    assert newer is not None
    served(pool, older, 1, session="s1")
    served(pool, newer, 2, session="s2")
    pool.ask(run("r3", key="c"))
    assert kinds(pool.decide(3)) == ["Start"], "90, 90 and 110 fit"
    pool.ask(run("r4", key="d"))
    end, start = pool.decide(4)
    assert (kinds([end, start]), end.worker) == (["End:memory", "Start"], older)


def test_a_run_that_does_not_fit_into_memory_waits_unless_nothing_else_could_free_any() -> None:
    pool = state(memory_mb=150)
    first = given(pool, run("r1"))
    assert first is not None, "the only run there is goes on whatever it takes"
    assert given(pool, run("r2")) is None
    assert given(pool, run("child", parent_id="r1")) is not None, "its parent waits for it"


def test_sessions_are_held_up_to_the_bound() -> None:
    pool = state(max_sessions=1)
    first, second = given(pool, run("r1", key="a")), given(pool, run("r2", key="b"))
    assert first is not None
    assert second is not None
    served(pool, first, 1, session="s1")
    served(pool, second, 2, session="s2")
    [end] = pool.decide(3)
    assert isinstance(end, End)
    assert (end.worker, end.reason) == (first, "room")


def test_while_runs_wait_the_session_that_was_used_last_makes_way() -> None:
    pool = state(max_sessions=1, max_processes=2)
    first, second = given(pool, run("r1")), given(pool, run("r2"))
    assert first is not None
    assert second is not None
    assert given(pool, run("waits")) is None
    assert served(pool, first, 1, session="s1") == []
    [end] = served(pool, second, 2, session="s2")
    assert (end.worker, end.reason) == (second, "room")
    assert first.phase == "held"


def test_sessions_end_after_the_runs_that_begin_one_after_the_other() -> None:
    """They stay where the warm processes were that those runs were given, and then go a few at a time."""
    pool = state(max_sessions=1, max_idle=2, max_starts=1, max_processes=9)
    for n in range(4):
        worker = given(pool, run(f"r{n}"), 10)
        assert worker is not None
        served(pool, worker, 10, session=f"s{n}")
    assert given(pool, run("another", key="b"), 10) is not None
    held = [worker.session_id for worker in pool.workers.values() if worker.phase == "held"]
    assert held == ["s1", "s2", "s3"], "one that is kept, and no more than two in the places of others"
    for session in ("s1", "s2"):
        [ended] = [worker for worker in pool.workers.values() if worker.phase == "ending"]
        assert pool.decide(11) == [], "one at a time"
        pool.gone(ended, 11)
        [end] = pool.decide(11)
        assert isinstance(end, End)
        assert (end.worker.session_id, end.reason) == (session, "room")


@pytest.mark.parametrize("none", [{"max_sessions": 0}, {"session_idle_s": 0}])
def test_sessions_need_not_be_held_at_all(none: dict[str, Any]) -> None:
    pool = state(**none)
    first = given(pool, run("r1"))
    assert first is not None
    assert [end.reason for end in served(pool, first, 1)] == ["not_kept"]


def test_a_turn_that_did_not_end_well_ends_its_process() -> None:
    pool = state()
    first = given(pool, run("r1"))
    assert first is not None
    [end] = pool.release(first, 1, session_id="s1", keep=False)
    assert (end.worker, end.reason) == (first, "failed")
    assert given(pool, run("r2", session_id="s1"), 2) is None, "not before the old process is gone"


def test_spare_processes_expire() -> None:
    pool = state(session_idle_s=10)
    first = given(pool, run("r1"))
    assert first is not None
    served(pool, first, 1)
    assert pool.decide(10.9) == []
    assert kinds(pool.decide(11)) == ["End:expired"]


# -- what is kept warm --------------------------------------------------------------------------------------


def test_one_run_alone_is_no_demand() -> None:
    pool = state()
    first = given(pool, run("r1"))
    assert first is not None
    served(pool, first, 1)
    assert pool.wanted(KEY, 1) == 0
    assert pool.decide(1) == []


def test_runs_that_came_together_are_expected_together_again_for_a_while() -> None:
    pool = state(max_idle=8)
    for n in range(3):
        worker = given(pool, run(f"r{n}"), 0.1 * n)
        assert worker is not None
        pool.started(worker)
    assert pool.wanted(KEY, 1) == 3
    assert pool.wanted(KEY, DEMAND_WINDOW_S + 1) == 0
    [refill] = pool.decide(1)
    assert pool.decide(1) == [], "one at a time"
    pool.started(refill.worker)
    assert kinds(pool.decide(2)) == ["Start"]


def test_nothing_is_kept_warm_while_runs_wait_or_start() -> None:
    pool = state(max_processes=1)
    pool.want("warm", "helper", None, 2)
    first = given(pool, run("r1"))
    assert first is not None
    assert pool.decide(0) == [], "the run's own process starts"
    pool.started(first)
    pool.ask(run("r2"))
    assert pool.decide(1) == [], "a run waits"
    pool.drop("r2")
    assert kinds(pool.decide(2)) == ["Start"]


def test_warm_processes_are_bounded_in_number_and_memory() -> None:
    pool = state(max_idle=2, memory_mb=200, idle_mb=90)
    pool.want("warm", "helper", None, 9)
    for now in range(5):
        for action in pool.decide(now):
            pool.started(action.worker)
    assert len(pool.workers) == 2


def test_a_key_that_means_nothing_any_more_ends_its_processes() -> None:
    pool = state()
    pool.want("old", "helper", None, 1)
    [refill] = pool.decide(0)
    assert [end.reason for end in pool.forget("old")] == ["stale"]
    pool.gone(refill.worker, 4)
    assert pool.decide(1) == []


def test_a_process_that_dies_while_it_starts_is_not_started_again_and_again() -> None:
    pool = state()
    pool.want(KEY, "helper", None, 1)
    [refill] = pool.decide(0)
    pool.gone(refill.worker, 1)
    assert pool.decide(2) == []
    assert kinds(pool.decide(62)) == ["Start"]


# -- who is next --------------------------------------------------------------------------------------------


def test_priority_comes_first_and_parents_take_turns() -> None:
    pool = state(max_processes=2)
    busy = [given(pool, run("x1", parent_id="a")), given(pool, run("x2", parent_id="a"))]
    pool.ask(run("a1", parent_id="a", since=1))
    pool.ask(run("a2", parent_id="a", since=2))
    pool.ask(run("b1", parent_id="b", since=3))
    pool.ask(run("urgent", parent_id="a", priority=1, since=4))
    order: list[str] = []
    while pool.waiting:
        worker = busy.pop(0)
        assert worker is not None
        pool.release(worker, 5, session_id=None, keep=False)
        pool.gone(worker, 4)
        for action in pool.decide(5):
            assert isinstance(action, Start)
            assert action.request is not None
            order.append(action.request.run_id)
            pool.started(action.worker)
            busy.append(action.worker)
    assert order == ["urgent", "b1", "a1", "a2"]


# -- whatever happens ---------------------------------------------------------------------------------------


class AnyPool(RuleBasedStateMachine):
    """Runs come and go in any order; what the pool promises holds after every step."""

    asked = Bundle("asked")
    lent = Bundle("lent")
    ending = Bundle("ending")

    def __init__(self) -> None:
        super().__init__()
        self.limits = PoolLimits(
            max_processes=3, max_idle=2, max_sessions=2, max_starts=2, memory_mb=600, idle_s=50, session_idle_s=50
        )
        self.pool = PoolState(self.limits)
        self.now = 0.0
        self.runs = 0
        self.busy: dict[int, Request] = {}
        self.ends: list[Worker] = []

    def act(self) -> None:
        actions = self.pool.decide(self.now)
        if any(isinstance(action, Assign | Start) and action.request for action in actions):
            assert self.pool.working <= self.limits.max_processes
        for action in actions:
            match action:
                case Assign(request, worker) | Start(request, worker) if request is not None:
                    assert worker.id not in self.busy, "a process was handed out twice"
                    if isinstance(action, Assign):
                        assert worker.key == request.key
                        assert worker.session_id == request.session_id
                        assert request.fresh or request.session_id
                    self.busy[worker.id] = request
                case End(worker, _):
                    assert worker.id not in self.busy, "a process was ended under its run"
                    self.ends.append(worker)

    @rule(
        key=st.sampled_from("ab"),
        session=st.sampled_from([None, None, "s1", "s2"]),
        fork=st.booleans(),
        parent=st.sampled_from([None, None, "newest"]),
        priority=st.integers(0, 1),
    )
    def ask(self, key: str, session: str | None, fork: bool, parent: str | None, priority: int) -> None:
        in_use = {r.session_id for r in self.busy.values()} | {
            r.session_id for line in self.pool._waiting.values() for r in line
        }
        if session in in_use:
            session = None  # the store lets one run at a time have a session
        newest = next(reversed(self.busy.values()), None)
        self.runs += 1
        self.pool.ask(
            Request(
                f"r{self.runs}",
                key,
                "helper",
                session_id=session,
                fresh=not fork or session is not None,
                parent_id=newest.run_id if parent and newest else None,
                priority=priority,
                since=self.now,
            )
        )
        self.act()

    @precondition(lambda self: self.busy)
    @rule(well=st.booleans(), data=st.data())
    def end_a_run(self, well: bool, data: st.DataObject) -> None:
        worker_id = data.draw(st.sampled_from(sorted(self.busy)))
        request = self.busy.pop(worker_id)
        worker = self.pool.workers[worker_id]
        session = request.session_id or f"new-{request.run_id}"
        self.ends += [end.worker for end in self.pool.release(worker, self.now, session_id=session, keep=well)]
        self.act()

    @rule(data=st.data())
    def a_process_answers(self, data: st.DataObject) -> None:
        if starting := [w for w in self.pool.workers.values() if w.starting]:
            self.pool.started(data.draw(st.sampled_from(starting)))
            self.act()

    @rule(data=st.data())
    def a_spare_process_dies(self, data: st.DataObject) -> None:
        if spare := self.pool.spare:
            self.pool.gone(data.draw(st.sampled_from(spare)), self.now)
            self.act()

    @precondition(lambda self: self.ends)
    @rule()
    def an_ending_process_is_gone(self) -> None:
        self.pool.gone(self.ends.pop(0), self.now)
        self.act()

    @rule(seconds=st.sampled_from([0.1, 5, 60]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.act()

    @invariant()
    def bounds_hold(self) -> None:
        workers = self.pool.workers.values()
        phases = Counter(worker.phase for worker in workers)
        assert phases["idle"] <= self.limits.max_idle
        assert phases["held"] <= self.limits.max_sessions + self.limits.max_idle - phases["idle"]
        assert phases["busy"] == len(self.busy)
        sessions = Counter(w.session_id for w in workers if w.session_id)
        assert all(count == 1 for count in sessions.values()), "two processes on one session"

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        """If runs wait, then something is at work, starting or ending whose end will let them go on."""
        if self.pool.waiting:
            assert self.busy or self.ends or self.pool.starting(self.now), repr(self.pool)


TestAnyPool = AnyPool.TestCase
TestAnyPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
