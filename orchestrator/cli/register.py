"""``orchestrator register``: tell an MCP client of us."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from orchestrator.backends.claude import environment
from orchestrator.backends.claude_binary import find_binary
from orchestrator.cli.common import config_of
from orchestrator.config import Config
from orchestrator.errors import RegistrationError, ServerUnavailableError
from orchestrator.registration import (
    CLIENTS,
    NAME,
    SERVER_NAME,
    TOKEN_VARIABLE,
    add_http,
    add_stdio,
    own_command,
)

#: Registering writes one file; anything longer hangs.
_SECONDS = 60


@click.command("register")
@click.argument("client", metavar="[claude-code]", required=False)
@click.option(
    "--print", "printed", type=click.Choice(list(CLIENTS)), help="Print what goes into this client's file."
)
@click.option(
    "--scope", type=click.Choice(["local", "user", "project"]), default="local", show_default=True,
    help="For you in this project, for you everywhere, or for everyone in this project (.mcp.json).",
)  # fmt: skip
@click.option("--name", default=SERVER_NAME, show_default=True, help="What Claude Code calls the server.")
@click.option("--http", is_flag=True, help="Register the URL of the running server instead of the stdio command.")
@click.option("--dry-run", is_flag=True, help="Show the command and do not run it.")
@click.pass_context
def register_command(
    ctx: click.Context, client: str | None, printed: str | None, scope: str, name: str, http: bool, dry_run: bool
) -> None:
    """Register with Claude Code, or print what another client needs.

    \b
    orchestrator register claude-code             runs `claude mcp add`
    orchestrator register --print cursor          prints what goes into Cursor's file
    """
    _check(ctx, client, printed, name)
    config = config_of(ctx)
    if printed:
        _print_snippet(ctx, config, printed)
        return
    if http:
        url = _url(config)
        arguments = add_http(name, scope, url)
    else:
        arguments = add_stdio(name, scope, _command(ctx, scope))
    binary = find_binary(config.claude_path, os.environ, Path.home()).path
    command = [str(binary), *arguments]
    click.echo(f"$ {shlex.join(command)}")
    if dry_run:
        click.echo("not run")
        return
    click.echo(_run(command, name, scope))
    _tell_next(config, scope, http)


def _check(ctx: click.Context, client: str | None, printed: str | None, name: str) -> None:
    """Raises UsageError for what does not go together."""
    root: dict[str, Any] = ctx.find_root().obj or {}
    if client in CLIENTS:
        raise click.UsageError(
            f"{client} has no command to register with; try: orchestrator register --print {client}"
        )
    if client not in (None, "claude-code"):
        raise click.UsageError(f"unknown client {client!r}; there are: claude-code, {', '.join(CLIENTS)}")
    if (client is None) == (printed is None):
        raise click.UsageError("say either claude-code or --print CLIENT")
    if printed and any(_given(ctx, option) for option in ("scope", "name", "http", "dry_run")):
        raise click.UsageError("--print goes with none of --scope, --name, --http, --dry-run")
    if not NAME.fullmatch(name):
        raise click.UsageError(f"the name {name!r} may only have letters, digits, _ and, inside, -")
    if root.get("sets"):
        raise click.UsageError("--set does not reach a registered server: put the setting into orchestrator.yaml")


def _given(ctx: click.Context, option: str) -> bool:
    return ctx.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE


def _command(ctx: click.Context, scope: str) -> list[str]:
    """What starts the stdio shim. Others of a project have our script elsewhere: theirs is looked for on PATH."""
    root: dict[str, Any] = ctx.find_root().obj or {}
    given = {"--config": root.get("config_file"), "--data-dir": root.get("data_dir")}
    words = [word for option, path in given.items() if path for word in (option, str(path.expanduser().absolute()))]
    start = ["orchestrator"] if scope == "project" else own_command(Path(sys.executable), os.environ)
    return [*start, "mcp", *words]


def _print_snippet(ctx: click.Context, config: Config, name: str) -> None:
    """The snippet alone on stdout, so that it can go into a file; what to do with it on stderr."""
    client = CLIENTS[name]
    click.echo(f"{client.title}: put this into {client.where}", err=True)
    if name == "claude-desktop":
        click.echo(f"  It works for {config.project_dir}; run this in another project for that one.", err=True)
    click.echo(client.render(_command(ctx, "user"), config.project_dir), nl=False)


def _url(config: Config) -> str:
    from orchestrator.server import read_state  # noqa: PLC0415  # only --http needs it

    state = read_state(config.data_path)
    if state is None:
        raise ServerUnavailableError(
            f"no server is running for {config.data_path}",
            advice="Start it with `orchestrator serve` in another terminal, or register without --http.",
        )
    return state.url


def _run(command: list[str], name: str, scope: str) -> str:
    """Run ``claude mcp add`` and return what it said. Raises RegistrationError."""
    env = environment(os.environ, home=None, pass_env=(), extra={})
    try:
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace",
            timeout=_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RegistrationError(f"{command[0]} did not register us: {error}") from None
    said = (done.stderr or done.stdout).strip()
    if done.returncode == 0:
        return done.stdout.strip()
    if "already exists" in said:
        remove = shlex.join([command[0], "mcp", "remove", "--scope", scope, name])
        raise RegistrationError(
            f"{name} is registered already, and was left as it is ({said})",
            advice=f"To register it anew, first: {remove}; or choose another --name.",
        )
    raise RegistrationError(f"`claude mcp add` ended with {done.returncode}: {said}")


def _tell_next(config: Config, scope: str, http: bool) -> None:
    click.echo("\nnext:")
    if http:
        token = shlex.quote(str(config.data_path / "server.token"))
        click.echo(f'  export {TOKEN_VARIABLE}="$(cat {token})"    in the terminal where you start claude')
    approve = "approve the server, then " if scope == "project" else ""
    click.echo(f"  claude      {approve}type /mcp: it should say connected")
    if http and config.server.port == 0:
        click.echo(
            "note: the server takes another port whenever it starts. Set server.port in orchestrator.yaml,"
            " restart it and register again.",
            err=True,
        )
