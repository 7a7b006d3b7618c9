"""``orchestrator serve`` and ``orchestrator mcp``: the one command module that may load MCP."""

import gc
import sys
from typing import Any

import click

from orchestrator.cli.common import config_of, run_async
from orchestrator.config import Config
from orchestrator.runtime import open_runtime
from orchestrator.server import ServerState, serve


@click.command("serve")
@click.option("--port", type=click.IntRange(0, 65535), help="Port of the HTTP door (default: server.port).")
@click.pass_context
def serve_command(ctx: click.Context, port: int | None) -> None:
    """Serve MCP over streamable HTTP on loopback, and to `orchestrator mcp`, until SIGTERM or Ctrl-C.

    One server per data directory. The bearer token is in server.token there.
    """
    config = config_of(ctx, **({} if port is None else {"server__port": port}))
    gc.disable()  # what MCP loads stays: to look through it again and again is a sixth of the start
    run_async(_serve, config)


async def _serve(config: Config) -> None:
    import anyio  # noqa: PLC0415

    from mcp_tools import open_door, open_doors  # noqa: PLC0415  # the one layer above us that commands may open

    async with open_runtime(config, kind="serve", open_door=open_door) as rt, anyio.create_task_group() as tg:
        state: ServerState = await tg.start(serve, rt, open_doors)
        gc.freeze()
        gc.enable()
        click.echo(f"serving {state.url}\ntoken in {config.data_path / 'server.token'}", err=True)


@click.command("mcp", context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def mcp_command(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """MCP over stdio: register with `claude mcp add orchestrator -- orchestrator mcp`.

    Finds the server of the data directory, or starts it. Ends with its input; runs go on. --config and
    --data-dir are taken before and after the command.
    """
    from orchestrator import shim  # noqa: PLC0415

    root: dict[str, Any] = ctx.find_root().obj or {}
    if root.get("sets"):
        raise click.UsageError(
            "--set cannot reach the server behind `orchestrator mcp`, which may be running already;"
            " put the setting into orchestrator.yaml, or name another file with --config"
        )
    given = {"--config": root.get("config_file"), "--data-dir": root.get("data_dir")}
    words = [word for name, path in given.items() if path is not None for word in (name, str(path))]
    sys.exit(shim.main([*words, *arguments]))
