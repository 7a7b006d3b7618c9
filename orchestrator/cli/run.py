"""``orchestrator run``: a plan from its file to its outcome, watched live."""

import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import click
import yaml

from orchestrator.cli.common import as_json, config_of, exit_code, is_terminal, money, run_async
from orchestrator.config import Config
from orchestrator.delegation import cancel
from orchestrator.errors import PlanError, RunNotFoundError
from orchestrator.events import Event, Watcher
from orchestrator.killing import RUN_ID_ENV
from orchestrator.offline import offline_model, offline_settings, scenario_beside
from orchestrator.outcome import Outcome
from orchestrator.plan_runs import submit_plan
from orchestrator.plans import load_plan
from orchestrator.runtime import Runtime, open_runtime
from orchestrator.tracing import SpanContext


@click.command("run")
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--input", "-i", "inputs", multiple=True, metavar="KEY=VALUE", help="An input of the plan.")
@click.option(
    "--input-file", type=click.Path(path_type=Path, exists=True), help="Inputs as a YAML or JSON mapping."
)
@click.option("--offline", is_flag=True, help="Answer from the scenario file beside the plan; no model, no login.")
@click.option("--scenario", type=click.Path(path_type=Path), help="The scenario for --offline.")
@click.option("--quiet", "-q", is_flag=True, help="No progress; only the outcome.")
@as_json
@click.pass_context
def run_command(ctx: click.Context, /, plan_file: Path, **options: Any) -> None:
    """Run PLAN to its end.

    Progress goes to stderr when stdout is not a terminal. With --json, stdout has one event per line and the
    outcome last. The first Ctrl-C cancels the plan and waits for its end; the second leaves at once.
    """
    outcome = run_async(run_file, ctx, plan_file, **options)
    sys.exit(exit_code(outcome.status, outcome.error))


async def run_file(
    ctx: click.Context,
    plan_file: Path,
    *,
    inputs: tuple[str, ...],
    input_file: Path | None,
    offline: bool,
    scenario: Path | None,
    quiet: bool,
    as_json: bool,
) -> Outcome:
    """Load, open, run, print. Raises PlanError, ScenarioError, ConfigError."""
    values = {**_inputs_of(input_file), **dict(_pair(text) for text in inputs)}
    async with AsyncExitStack() as stack:
        config = config_of(ctx)
        if offline or scenario:
            model = await stack.enter_async_context(offline_model(scenario or scenario_beside(plan_file)))
            config = config_of(ctx, **offline_settings(config, model.base_url))
        rt = await stack.enter_async_context(_runtime(config))
        plan = load_plan(plan_file, known_agents=[agent.id for agent in rt.catalog.agents()])
        parent = SpanContext.parse(rt.environ.get("TRACEPARENT"))
        with rt.events.watch(size=10_000) as watcher:
            run_id = await submit_plan(
                rt, plan, values, base=config.project_dir, parent_id=await enclosing_run(rt), parent_span=parent
            )
            live = rt.live[run_id]
            with shown(plan.name, run_id, quiet=quiet, as_json=as_json) as show:
                await watch_to_end(rt, run_id, watcher, show)
        if live.ended.is_set():
            await _report(rt, run_id, as_json=as_json)
    # Leaving the runtime has ended what a second signal left running.
    assert live.outcome is not None
    return live.outcome


@asynccontextmanager
async def _runtime(config: Config) -> AsyncIterator[Runtime]:
    """A runtime of our own, with a door so that this plan's agents can delegate."""
    from mcp_tools import open_door  # noqa: PLC0415  # the one layer above us that commands may open

    async with open_runtime(config, kind="run", open_door=open_door, watch_agents=False) as rt:
        yield rt


def _inputs_of(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        values = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"{file} is not valid YAML: {error}", advice="Correct the input file.") from None
    if not isinstance(values, dict):
        raise PlanError(f"{file} must be a mapping of inputs", advice="Correct the input file.")
    return values


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise PlanError(f"--input needs KEY=VALUE, got {text!r}", advice="Write --input key=value.")
    return name.strip(), value


async def enclosing_run(rt: Runtime) -> str | None:
    """The run of this record below which we were started, if an agent started us from its shell.

    What it starts is its own: below it in the trace, as deep as what it delegates, within what it has left.
    """
    run_id = rt.environ.get(RUN_ID_ENV)
    if run_id is None:
        return None
    try:
        run = await rt.store.run(run_id)
    except RunNotFoundError:
        return None  # a run of another record: nothing here can bound it
    return None if run.ended else run.id


async def watch_to_end(rt: Runtime, run_id: str, watcher: Watcher, show: Callable[[Event], None]) -> None:
    """Feed events to ``show`` until the run has ended. SIGINT and SIGTERM cancel it; a second leaves at once."""
    live = rt.live.get(run_id)

    async def stop_on_signal() -> None:
        # SIGHUP too: a closed terminal must not leave a plan without an end.
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            asked = False
            async for _ in signals:
                if asked:
                    tg.cancel_scope.cancel()  # the runtime still ends the runs, without waiting for the plan's turn
                asked = True
                click.echo("\ncancelling; once more to leave at once", err=True)
                await cancel(rt, run_id)

    async def feed() -> None:
        async for event in watcher:
            show(event)

    async with anyio.create_task_group() as tg:
        tg.start_soon(stop_on_signal)
        tg.start_soon(feed)
        if live is not None:
            await live.ended.wait()
        await anyio.lowlevel.checkpoint()
        tg.cancel_scope.cancel()
    for event in watcher.rest():
        show(event)


def shown(title: str, run_id: str, *, quiet: bool, as_json: bool) -> Any:
    """A context that yields what to do with each event."""
    from orchestrator.cli.live import json_lines, live_table, nothing, plain_lines  # noqa: PLC0415  # rich is slow

    if as_json:
        return json_lines()
    if quiet:
        return nothing()
    return live_table(title, run_id) if is_terminal() else plain_lines(title, run_id)


async def _report(rt: Runtime, run_id: str, *, as_json: bool) -> None:
    run = await rt.store.run(run_id)
    if as_json:
        click.echo(json.dumps({"event": "outcome", **run.outcome().model_dump(mode="json")}, ensure_ascii=False))
        return
    from orchestrator.cli.views import console, runs_tree, steps_table  # noqa: PLC0415  # rich is slow

    tree = await rt.store.tree(run_id)
    out = console()
    out.print()
    out.print(steps_table(tree, run.options.get("steps", {})))
    out.print()
    out.print(runs_tree(tree, run_id))
    out.print(f"\nplan {run.name}: {run.status}, {money(run.cost_usd, run.cost_basis)}, in {run.cwd}")
    for name, value in (run.structured or {}).items():
        out.print(f"{name}: {value}")
    if run.error:
        out.print(f"error: {run.error['message']}\n  {run.error['advice']}")
    out.print(f"next: orchestrator trace show {run_id}")
