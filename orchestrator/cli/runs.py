"""``orchestrator runs``: the record of runs, and the runs that go on now, whichever process works on them."""

import sys
from typing import Any

import anyio
import click

from orchestrator.cli.common import (
    as_json,
    config_of,
    duration,
    exit_code,
    money,
    one_line,
    print_json,
    run_async,
    when,
)
from orchestrator.cli.views import console, run_status, runs_table
from orchestrator.config import Config
from orchestrator.runtime import clean_up_after_the_dead
from orchestrator.store import Run, Store, open_store

POLL_SECONDS = 0.2
CANCEL_SECONDS = 10


@click.group("runs")
def runs_command() -> None:
    """List, show, cancel and wait for runs."""


@runs_command.command("list")
@click.option("--agent", help="Runs of this agent or plan.")
@click.option("--status", help="Runs in this state: running, succeeded, failed, …")
@click.option("--session", "session_id", help="Runs of this session.")
@click.option("--text", help="Runs whose prompt or answer holds this.")
@click.option("--limit", "-n", default=20, show_default=True)
@as_json
@click.pass_context
def list_command(ctx: click.Context, /, as_json: bool, **filters: Any) -> None:
    """Runs, newest first."""

    async def query(store: Store) -> list[Run]:
        return await store.runs(**filters)

    runs = run_async(_with_store, config_of(ctx), query)
    if as_json:
        print_json([run.model_dump(mode="json", exclude={"agent", "source"}) for run in runs])
    else:
        console().print(runs_table(runs))


@runs_command.command("show")
@click.argument("run_id")
@as_json
@click.pass_context
def show_command(ctx: click.Context, run_id: str, as_json: bool) -> None:
    """One run: what was asked, what came of it, what it cost."""

    async def query(store: Store) -> Run:
        return await store.run(run_id)

    run = run_async(_with_store, config_of(ctx), query)
    if as_json:
        print_json(run.model_dump(mode="json"))
        return
    facts = {
        "run": f"{run.kind} {run.name} {run.id}",
        "status": run_status(run).plain.split(maxsplit=1)[1],
        "waits for": "the end of a usage limit of the provider" if run.status == "waiting" else None,
        "error": f"{run.error['message']} ({run.error['code']})" if run.error else None,
        "what to do": run.error["advice"] if run.error else None,
        "model": run.model_used or run.model_requested,
        "session": f"{run.session_id} ({run.session_mode})" if run.session_id else None,
        "cost": f"{money(run.cost_usd, run.cost_basis)}, {run.usage.total_tokens} tokens, {run.num_turns} turns",
        "time": f"{when(run.started_us or run.created_us)}, {duration(run.duration_ms)}",
        "directory": run.cwd,
        "trace": run.trace_id,
        "prompt": one_line(run.prompt, 400),
    }
    for fact, value in facts.items():
        if value:
            click.echo(f"{fact + ':':12}{value}")
    if run.text:
        click.echo(f"\n{run.text}")


@runs_command.command("cancel")
@click.argument("run_id")
@click.pass_context
def cancel_command(ctx: click.Context, run_id: str) -> None:
    """Cancel a run and everything below it, whichever process works on it."""

    async def ask(store: Store) -> Run:
        # A process that died cannot act on the request: what it left is marked first.
        await clean_up_after_the_dead(store)
        run = await store.run(run_id)
        for each in await store.tree(run.id):
            if not each.ended:
                await store.request_cancel(each.id)
        with anyio.move_on_after(CANCEL_SECONDS):
            return await _ended(store, run.id)
        return await store.run(run.id)

    run = run_async(_with_store, config_of(ctx), ask)
    click.echo(f"run {run.id} {run.status}")
    sys.exit(0 if run.ended else 1)


@runs_command.command("wait")
@click.argument("run_id")
@click.option("--timeout-s", type=float, help="Give up after this many seconds (exit code 1).")
@as_json
@click.pass_context
def wait_command(ctx: click.Context, run_id: str, timeout_s: float | None, as_json: bool) -> None:
    """Wait until a run has ended; exits as the run did."""

    async def wait(store: Store) -> Run:
        run = await store.run(run_id)
        with anyio.move_on_after(timeout_s if timeout_s is not None else float("inf")):
            return await _ended(store, run.id)
        return await store.run(run.id)

    run = run_async(_with_store, config_of(ctx), wait)
    if as_json:
        print_json(run.outcome().model_dump(mode="json"))
    else:
        click.echo(f"run {run.id} {run.status}" + (f": {run.error['message']}" if run.error else ""))
    sys.exit(exit_code(run.status, run.error) if run.ended else 1)


async def _ended(store: Store, run_id: str) -> Run:
    while not (run := await store.run(run_id)).ended:
        await anyio.sleep(POLL_SECONDS)
        await clean_up_after_the_dead(store)
    return run


async def _with_store(config: Config, use: Any) -> Any:
    async with open_store(config.store_path) as store:
        return await use(store)
