"""``orchestrator delegate``: one task for one agent."""

import json
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.common import (
    as_json,
    config_of,
    duration,
    exit_code,
    is_terminal,
    money,
    print_json,
    run_async,
)
from orchestrator.cli.run import enclosing_run, shown, watch_to_end
from orchestrator.delegation import submit
from orchestrator.errors import ConfigError
from orchestrator.offline import offline_model, offline_settings
from orchestrator.outcome import Outcome
from orchestrator.runtime import open_runtime
from orchestrator.task import Task
from orchestrator.tracing import SpanContext


@click.command("delegate")
@click.argument("agent")
@click.argument("prompt", required=False)
@click.option("--session", help="Go on with this session.")
@click.option("--fork", is_flag=True, help="Go on with a copy of --session; the session stays as it is.")
@click.option("--model", help="Model for this run.")
@click.option("--cwd", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Working directory.")
@click.option("--budget-usd", type=click.FloatRange(0, 1e6), help="Most this run may spend.")
@click.option("--timeout-s", type=click.FloatRange(0, 1e7, min_open=True), help="Most time this run may take.")
@click.option(
    "--schema", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="JSON Schema file of the answer."
)
@click.option("--scenario", type=click.Path(path_type=Path), help="Answer from this scenario; no model, no login.")
@as_json
@click.pass_context
def delegate_command(ctx: click.Context, /, agent: str, prompt: str | None, **options: Any) -> None:
    """Hand PROMPT to AGENT and print its answer. Without PROMPT, it is read from standard input."""
    if prompt is None:
        if sys.stdin.isatty():
            raise click.UsageError("give a PROMPT, or pipe one in")
        prompt = sys.stdin.read()
    outcome = run_async(_run, ctx, agent, prompt, **options)
    sys.exit(exit_code(outcome.status, outcome.error))


async def _run(
    ctx: click.Context,
    agent: str,
    prompt: str,
    *,
    schema: Path | None,
    scenario: Path | None,
    as_json: bool,
    **task: Any,
) -> Outcome:
    from mcp_tools import open_door  # noqa: PLC0415  # the one layer above us that commands may open

    async with AsyncExitStack() as stack:
        config = config_of(ctx)
        if scenario is not None:
            model = await stack.enter_async_context(offline_model(scenario))
            config = config_of(ctx, **offline_settings(config, model.base_url))
        rt = await stack.enter_async_context(
            open_runtime(config, kind="run", open_door=open_door, watch_agents=False)
        )
        request = Task(
            agent=agent,
            prompt=prompt,
            output_schema=_schema(schema),
            parent_id=await enclosing_run(rt),
            parent_span=SpanContext.parse(rt.environ.get("TRACEPARENT")),
            **task,
        )
        with rt.events.watch() as watcher:
            run_id = await submit(rt, request)
            live = rt.live[run_id]
            with shown(agent, run_id, quiet=as_json or not is_terminal(), as_json=False) as show:
                await watch_to_end(rt, run_id, watcher, show)
    # Leaving the runtime has ended what a second signal left running.
    assert live.outcome is not None
    outcome = live.outcome
    _print(outcome, as_json=as_json)
    return outcome


def _schema(file: Path | None) -> dict[str, Any] | None:
    if file is None:
        return None
    try:
        schema = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}", advice="Correct the schema file.") from None
    if not isinstance(schema, dict):
        raise ConfigError(f"{file} must be a JSON object", advice="Correct the schema file.")
    return schema


def _print(outcome: Outcome, *, as_json: bool) -> None:
    if as_json:
        print_json(outcome.model_dump(mode="json"))
        return
    click.echo(
        json.dumps(outcome.structured, indent=2, ensure_ascii=False) if outcome.has_structured else outcome.text
    )
    facts = (
        f"run {outcome.run_id} {outcome.status} · session {outcome.session_id} · {money(outcome.cost_usd)}"
        f" · {duration(outcome.duration_ms)}"
    )
    click.echo(facts, err=True)
    if outcome.error:
        click.echo(f"error: {outcome.error['message']}\n  {outcome.error['advice']}", err=True)
