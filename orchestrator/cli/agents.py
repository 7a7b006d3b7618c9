"""``orchestrator agents``: the agent files."""

import sys
from pathlib import Path

import click
from rich.table import Table

from orchestrator.agents import Catalog, FileReport, resolve_model, validate_tree
from orchestrator.cli.common import as_json, config_of, one_line, print_json, run_async
from orchestrator.cli.views import console
from orchestrator.config import Config
from orchestrator.runtime import agent_roots
from orchestrator.store import open_store


@click.group("agents")
def agents_command() -> None:
    """List, show and validate agent files; prefer a model for one."""


def _catalog(config: Config) -> Catalog:
    catalog = Catalog(agent_roots(config))
    catalog.load()
    return catalog


async def _preferences(config: Config) -> dict[str, str]:
    async with open_store(config.store_path) as store:
        return await store.preferences()


@agents_command.command("list")
@as_json
@click.pass_context
def list_command(ctx: click.Context, as_json: bool) -> None:
    """The agents that can be delegated to, with the model each would run on."""
    config = config_of(ctx)
    catalog = _catalog(config)
    preferences = run_async(_preferences, config)
    rows = []
    for agent in catalog.agents():
        model, origin = resolve_model(None, preferences.get(agent.id), agent, config.agents.default_model)
        rows.append((agent, model, origin))
    if as_json:
        print_json(
            [
                {
                    "id": agent.id,
                    "description": agent.description,
                    "model": model,
                    "model_origin": origin,
                    "tools": agent.tools,
                    "source": agent.source,
                    "path": str(agent.path),
                    "warnings": agent.warnings,
                }
                for agent, model, origin in rows
            ]
        )
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("agent", "model", "tools", "source", "description"):
        table.add_column(name, no_wrap=name != "description", overflow="ellipsis")
    for agent, model, origin in rows:
        offered = "all" if agent.tools is None else ", ".join(agent.tools) or "none"
        chosen = f"{model or 'CLI default'} ({origin})"
        table.add_row(agent.id, chosen, one_line(offered, 40), agent.source, one_line(agent.description, 80))
    console().print(table)
    if not rows:
        folders = ", ".join(str(root.path) for root in agent_roots(config))
        click.echo(f"no agents: put a markdown file with frontmatter into one of {folders}", err=True)
    for problem in catalog.problems():
        click.echo(f"{problem.path}:{problem.line or 1}: {problem.reason}", err=True)


@agents_command.command("show")
@click.argument("name")
@as_json
@click.pass_context
def show_command(ctx: click.Context, name: str, as_json: bool) -> None:
    """Everything known of one agent."""
    config = config_of(ctx)
    agent = _catalog(config).get(name)
    if as_json:
        print_json(agent.model_dump(mode="json"))
        return
    model, origin = resolve_model(
        None, run_async(_preferences, config).get(agent.id), agent, config.agents.default_model
    )
    facts = {
        "file": agent.path,
        "model": f"{model or 'CLI default'} ({origin})",
        "tools": "all" if agent.tools is None else ", ".join(agent.tools) or "none",
        "not": ", ".join(agent.disallowed_tools),
        "permissions": agent.permission_mode,
        "effort": agent.effort,
        "may delegate": "yes" if agent.may_delegate() else "no",
    }
    click.echo(f"{agent.id}: {agent.description}")
    for fact, value in facts.items():
        if value:
            click.echo(f"  {fact + ':':14}{value}")
    for warning in agent.warnings:
        click.echo(f"  warning: {warning}", err=True)
    click.echo(f"\n{agent.system_prompt}")


@agents_command.command("validate")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@as_json
@click.pass_context
def validate_command(ctx: click.Context, path: Path | None, as_json: bool) -> None:
    """Read every agent file under PATH (default: the configured folders) and say how it was read.

    Exits with 1 if a file was refused.
    """
    config = config_of(ctx)
    roots = [path] if path is not None else [root.path for root in agent_roots(config) if root.path.exists()]
    reports = [report for root in roots for report in validate_tree(root)]
    if as_json:
        print_json([report.model_dump(mode="json") for report in reports])
    else:
        _print_reports(reports)
    sys.exit(1 if any(report.status == "refused" for report in reports) else 0)


def _print_reports(reports: list[FileReport]) -> None:
    marks = {"loaded": "ok      ", "warnings": "warnings", "refused": "refused "}
    for report in reports:
        click.echo(f"{marks[report.status]}  {report.path}  {report.name or ''}".rstrip())
        for line in [report.reason] if report.reason else report.warnings:
            click.echo(f"            {line}")
    count = {status: sum(report.status == status for report in reports) for status in marks}
    click.echo(f"{count['loaded']} loaded, {count['warnings']} loaded with warnings, {count['refused']} refused")


@agents_command.command("prefer")
@click.argument("name")
@click.argument("model", required=False)
@click.option("--clear", is_flag=True, help="Forget the preference.")
@click.pass_context
def prefer_command(ctx: click.Context, name: str, model: str | None, clear: bool) -> None:
    """Run NAME on MODEL from now on, whatever its file says."""
    if (model is None) != clear:
        raise click.UsageError("give a MODEL, or --clear")
    config = config_of(ctx)
    agent = _catalog(config).get(name)

    async def store_it() -> None:
        async with open_store(config.store_path) as store:
            await store.prefer(agent.id, model)

    run_async(store_it)
    click.echo(f"{agent.id} runs on {model}" if model else f"{agent.id}: preference forgotten")
