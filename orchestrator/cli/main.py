"""The ``orchestrator`` command: global options, and commands that are imported only when they are used.

``orchestrator --help`` imports nothing but click: what a command needs is loaded when it runs.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from orchestrator import __version__

# name: (module, what --help says). The functions are named like the commands.
COMMANDS = {
    "init": ("orchestrator.cli.init", "Set up a project: settings, example agents, .mcp.json."),
    "run": ("orchestrator.cli.run", "Run a plan to its end."),
    "delegate": ("orchestrator.cli.delegating", "Hand one task to one agent."),
    "agents": ("orchestrator.cli.agents", "List, show and validate agent files; prefer a model for one."),
    "runs": ("orchestrator.cli.runs", "List, show, cancel and wait for runs."),
    "pool": ("orchestrator.cli.pool", "Show the CLI processes of the running server, and how often they helped."),
    "trace": ("orchestrator.cli.trace", "Show the tree of runs below one, or export it."),
    "serve": ("orchestrator.cli.serving", "Serve MCP over HTTP and to the stdio shim."),
    "mcp": ("orchestrator.cli.serving", "MCP over stdio, for `claude mcp add` (finds or starts the server)."),
    "register": ("orchestrator.cli.register", "Register with Claude Code, or print what another client needs."),
    "doctor": ("orchestrator.cli.doctor", "Check that everything is in place, and say what to do if not."),
    "config": ("orchestrator.cli.config", "Show the settings in force and where each comes from."),
}


class LazyGroup(click.Group):
    """Knows its commands' names and help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command = getattr(import_module(COMMANDS[cmd_name][0]), f"{cmd_name}_command")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib  # noqa: PLC0415  # only a mistyped command pays for it

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if not near:
                raise
            raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from None


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", message="orchestrator %(version)s")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="A configuration file.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where state is kept.")
@click.option("--set", "sets", multiple=True, metavar="SETTING=VALUE", help="Any setting, e.g. limits.max_depth=2.")
@click.option("-v", "--verbose", count=True, help="More log lines on stderr (-vv: all).")
@click.pass_context
def cli(
    ctx: click.Context, config_file: Path | None, data_dir: Path | None, sets: tuple[str, ...], verbose: int
) -> None:
    """Hand work to agents: durable, budgeted, traced.

    Exit codes: 0 ok · 1 failed · 2 wrong use · 3 cancelled or interrupted · 4 out of budget.
    """
    ctx.obj = {"config_file": config_file, "data_dir": data_dir, "sets": sets, "verbose": verbose}


def main(argv: list[str] | None = None) -> Any:
    """Run the command line. Errors of ours end in one sentence and what to do, not in a traceback."""
    from orchestrator.errors import OrchestratorError  # noqa: PLC0415  # keeps --help at click's own cost

    try:
        return cli.main(args=argv, prog_name="orchestrator", standalone_mode=True)
    except OrchestratorError as error:
        click.echo(f"error: {error.message}", err=True)
        for problem in error.details.get("problems", []):
            click.echo(f"  {problem}", err=True)
        click.echo(f"  {error.advice}", err=True)
        sys.exit(error.exit_code)
