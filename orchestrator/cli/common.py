"""What the commands share: settings, logging, an event loop, output for people and for programs."""

import json
import logging
import sys
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any, ParamSpec, TypeVar

import anyio
import click

from orchestrator.config import Config, load_config, parse_value, settings
from orchestrator.errors import ConfigError
from orchestrator.logs import configure_logging

P = ParamSpec("P")
T = TypeVar("T")

as_json = click.option("--json", "as_json", is_flag=True, help="JSON on stdout, for programs.")


def config_of(ctx: click.Context, **overrides: Any) -> Config:
    """The settings of this command line; ``overrides`` (dots as ``__``) are what the command itself decides."""
    root = ctx.find_root().obj or {}
    values: dict[str, Any] = {}
    known = settings()
    if root.get("data_dir") is not None:
        values["data_dir"] = root["data_dir"].expanduser().absolute()
    if root.get("verbose"):
        values["log.level"] = "INFO" if root["verbose"] == 1 else "DEBUG"
    for pair in root.get("sets", ()):
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set needs SETTING=VALUE, got {pair!r}")
        values[name.strip()] = parse_value(name.strip(), value, known)
    values.update({name.replace("__", "."): value for name, value in overrides.items()})
    config = load_config(root.get("config_file"), overrides=values)
    configure_logging(config.log)
    return config


def run_async(function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run an async function to its end."""

    async def call() -> T:
        return await function(*args, **kwargs)

    return anyio.run(call)


def exit_code(status: str, error: Mapping[str, Any] | None) -> int:
    """0 ok · 1 failed · 3 cancelled or interrupted · 4 out of budget. (2, wrong use, is never a run.)"""
    if status == "succeeded":
        return 0
    if status in ("cancelled", "interrupted"):
        return 3
    return 4 if (error or {}).get("code") == "budget_exceeded" else 1


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def is_terminal() -> bool:
    return sys.stdout.isatty()


def money(usd: float | None, basis: str | None = None) -> str:
    """Dollars for people; ``?`` for unknown, ``~`` before an estimate."""
    if usd is None:
        return "?"
    return f"{'~' if basis == 'estimate' else ''}${usd:.4f}"


def tokens(count: int) -> str:
    """1234 → 1.2k."""
    if count < 1000:
        return str(count)
    return f"{count / 1000:.1f}k" if count < 1_000_000 else f"{count / 1_000_000:.1f}M"


def duration(ms: int | None) -> str:
    if ms is None:
        return ""
    seconds = ms / 1000
    if seconds < 60:
        return f"{seconds:.1f}s"
    return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"


def when(us: int | None) -> str:
    """Local time for people."""
    if us is None:
        return ""
    return datetime.fromtimestamp(us / 1e6, UTC).astimezone().strftime("%m-%d %H:%M:%S")


def one_line(text: str | None, width: int) -> str:
    line = " ".join((text or "").split())
    return line if len(line) <= width else line[: width - 1] + "…"


log = logging.getLogger("orchestrator.cli")
