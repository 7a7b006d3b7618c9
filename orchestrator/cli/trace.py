"""``orchestrator trace``: the tree of runs, for people and for Jaeger."""

import json
from dataclasses import replace
from pathlib import Path

import click

from orchestrator.cli.common import as_json, config_of, duration, print_json, run_async
from orchestrator.cli.views import console, runs_tree
from orchestrator.config import Config
from orchestrator.progress import describe_tool
from orchestrator.store import Run, StoredMessage, open_store
from orchestrator.telemetry import names
from orchestrator.telemetry.jaeger import jaeger_json
from orchestrator.telemetry.spans import MAX_VALUE_CHARS, SpanData, run_span, tool_spans


@click.group("trace")
def trace_command() -> None:
    """Show the tree of runs below one, or export it."""


@trace_command.command("show")
@click.argument("run_id")
@click.option("--tools", is_flag=True, help="Also the tools each run used.")
@as_json
@click.pass_context
def show_command(ctx: click.Context, run_id: str, tools: bool, as_json: bool) -> None:
    """Draw the run and everything below it: status, agent, model, tokens, cost, time."""
    runs, messages = run_async(_load, config_of(ctx), run_id)
    if as_json:
        print_json([run.model_dump(mode="json", exclude={"agent", "source"}) for run in runs])
        return
    out = console()
    out.print(f"trace {runs[0].trace_id}", style="dim")
    lines = {run.id: _tool_lines(tool_spans(run, messages[run.id])) for run in runs} if tools else None
    out.print(runs_tree(runs, runs[0].id, lines))


def _tool_lines(spans: list[SpanData]) -> list[str]:
    return [_tool_line(span) for span in spans]


def _tool_line(span: SpanData) -> str:
    arguments = json.loads(str(span.attributes[names.TOOL_ARGUMENTS])) if not _is_cut(span) else {}
    said = describe_tool(str(span.attributes[names.TOOL_NAME]), arguments if isinstance(arguments, dict) else {})
    return f"{said}  {duration((span.end_us - span.start_us) // 1000)}{'  failed' if span.error else ''}"


def _is_cut(span: SpanData) -> bool:
    return len(str(span.attributes[names.TOOL_ARGUMENTS])) >= MAX_VALUE_CHARS


@trace_command.command("export")
@click.argument("run_id")
@click.option("--jaeger", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Jaeger JSON file.")
@click.option("--content/--no-content", default=True, show_default=True, help="Put prompts, answers, tool data in.")
@click.pass_context
def export_command(ctx: click.Context, run_id: str, jaeger: Path, content: bool) -> None:
    """Write the trace to a file. Jaeger's user interface opens it under Search, Upload."""
    runs, messages = run_async(_load, config_of(ctx), run_id)
    spans = [run_span(run, content=content) for run in runs]
    for run in runs:
        spans += tool_spans(run, messages[run.id], content=content)
    document = jaeger_json(_attached(spans, runs))
    jaeger.write_text(json.dumps(document, ensure_ascii=False), "utf-8")
    click.echo(f"{jaeger}: {len(spans)} spans")


def _attached(spans: list[SpanData], runs: list[Run]) -> list[SpanData]:
    """Hang a run whose exact caller is not in the file under the run that delegated it."""
    ids = {span.span_id for span in spans}
    parents = {run.id: run.parent_id for run in runs}
    return [
        span if span.parent_id in ids else replace(span, parent_id=parents.get(span.span_id))
        for span in spans
    ]  # fmt: skip


async def _load(config: Config, run_id: str) -> tuple[list[Run], dict[str, list[StoredMessage]]]:
    async with open_store(config.store_path) as store:
        run = await store.run(run_id)
        runs = await store.tree(run.id)
        return runs, {each.id: await store.messages(each.id) for each in runs}
