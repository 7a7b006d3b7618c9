"""``orchestrator config``: the settings in force."""

from typing import Any

import click

from orchestrator.cli.common import as_json, config_of, print_json
from orchestrator.config import Config, settings


@click.group("config")
def config_command() -> None:
    """Show the settings in force and where each comes from."""


@config_command.command("show")
@click.option("--origin", is_flag=True, help="Say where each value comes from.")
@as_json
@click.pass_context
def show_command(ctx: click.Context, origin: bool, as_json: bool) -> None:
    """Every setting and its value. Values of claude.env are masked: they may be keys."""
    config = config_of(ctx)
    rows = {name: (_masked(name, value_of(config, name)), _origin(config, name)) for name in settings()}
    if as_json:
        print_json({name: {"value": value, "origin": where} for name, (value, where) in rows.items()})
        return
    width = max(len(name) for name in rows)
    for name, (value, where) in rows.items():
        said = f"  ({where})" if origin else ""
        click.echo(f"{name:{width}}  {'' if value is None else value}{said}")


def value_of(config: Config, name: str) -> Any:
    """The value of a dotted setting."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _origin(config: Config, name: str) -> str:
    given = [where for key, where in config.origin.items() if key == name or key.startswith(f"{name}.")]
    return given[-1] if given else "default"


def _masked(name: str, value: Any) -> Any:
    if name == "claude.env":
        return dict.fromkeys(value, "***") if value else None
    return [str(item) for item in value] if isinstance(value, tuple) else value
