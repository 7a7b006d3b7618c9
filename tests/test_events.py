"""Events: everyone watching gets each of them, and a slow watcher loses some but delays nobody."""

import anyio
import pytest

from orchestrator.events import Event, Events


def numbered(number: int) -> Event:
    return Event("run.activity", f"{number:016x}", {"number": number})


def numbers(events: list[Event]) -> list[int]:
    return [event.data["number"] for event in events]


async def test_every_watcher_gets_every_event_in_order() -> None:
    events = Events()
    seen: dict[str, list[Event]] = {"a": [], "b": []}

    async def watch(name: str, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        with events.watch() as watcher:
            task_status.started()
            async for event in watcher:
                seen[name].append(event)
                if len(seen[name]) == 5:
                    return

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tg:
            for name in seen:
                await tg.start(watch, name)
            for number in range(5):
                events.emit(numbered(number))
    assert {name: numbers(got) for name, got in seen.items()} == {"a": [0, 1, 2, 3, 4], "b": [0, 1, 2, 3, 4]}


async def test_a_watcher_sees_only_what_happens_while_it_watches() -> None:
    events = Events()
    events.emit(numbered(1))
    with events.watch() as watcher:
        events.emit(numbered(2))
        assert numbers(list(watcher.rest())) == [2]
    events.emit(numbered(3))
    assert watcher.lost == 0


async def test_a_slow_watcher_loses_the_newest_and_is_told_how_many() -> None:
    events = Events()
    with events.watch(size=3) as slow, events.watch() as quick:
        for number in range(10):
            events.emit(numbered(number))
        assert numbers(list(slow.rest())) == [0, 1, 2]
        assert slow.lost == 7
        assert numbers(list(quick.rest())) == list(range(10))
        assert quick.lost == 0
        events.emit(numbered(10))
        assert numbers(list(slow.rest())) == [10], "having caught up, it gets what comes next"


async def test_rest_waits_for_nothing() -> None:
    with Events().watch() as watcher:
        assert list(watcher.rest()) == []


async def test_emitting_never_waits() -> None:
    """``emit`` is a plain function: it is called where nothing may be awaited. One may watch and do nothing."""
    events = Events()
    with events.watch(size=0) as watcher:
        events.emit(numbered(1))
        assert watcher.lost == 1


async def test_a_watcher_that_fails_is_forgotten() -> None:
    events = Events()

    def fail() -> None:
        with events.watch():
            raise RuntimeError("the browser went away")

    with pytest.raises(RuntimeError):
        fail()
    events.emit(numbered(1))
    with events.watch() as watcher:
        events.emit(numbered(2))
        assert numbers(list(watcher.rest())) == [2]


async def test_watchers_may_come_and_go_while_events_are_taken_in() -> None:
    events = Events()
    with events.watch() as first:
        events.emit(numbered(1))
        for _ in first.rest():
            with events.watch() as second:
                events.emit(numbered(2))
                assert numbers(list(second.rest())) == [2]
            break
        assert numbers(list(first.rest())) == [2]
