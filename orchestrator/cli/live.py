"""Ways to show a running plan: a live table, plain lines, JSON lines, nothing. Each yields what takes an event."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

import click
from rich.live import Live

from orchestrator.cli.views import LiveView, console
from orchestrator.events import Event

Show = Callable[[Event], None]
REFRESH_PER_SECOND = 8


@contextmanager
def live_table(title: str, run_id: str) -> Iterator[Show]:
    """A table that is redrawn in place: for terminals."""
    view = LiveView(title, run_id)
    out = console()
    out.print(f"run {run_id}", style="dim")
    with Live(get_renderable=view.render, console=out, refresh_per_second=REFRESH_PER_SECOND, transient=True):
        yield lambda event: _feed(view, event)


def _feed(view: LiveView, event: Event) -> None:
    if event.run_id is not None:
        view.feed(event.type, event.run_id, event.data)


@contextmanager
def plain_lines(title: str, run_id: str) -> Iterator[Show]:
    """One line on stderr for each run that starts or ends: for pipes and logs."""
    view = LiveView(title, run_id)
    click.echo(f"run {run_id}: {title}", err=True)

    def show(event: Event) -> None:
        line = view.feed(event.type, event.run_id, event.data) if event.run_id else None
        if line:
            click.echo(f"{datetime.now().astimezone():%H:%M:%S} {line}", err=True)

    yield show


@contextmanager
def json_lines() -> Iterator[Show]:
    """One JSON object on stdout for each event: for programs."""

    def show(event: Event) -> None:
        line = {"event": event.type, "run_id": event.run_id, **event.data}
        sys.stdout.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        sys.stdout.flush()

    yield show


@contextmanager
def nothing() -> Iterator[Show]:
    yield lambda _event: None
