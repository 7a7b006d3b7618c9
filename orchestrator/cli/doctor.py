"""``orchestrator doctor``: is everything in place, and what to do if not. Spends nothing, sends no prompt."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import click

from orchestrator import __version__
from orchestrator.agents import Catalog
from orchestrator.backends.claude import environment
from orchestrator.backends.claude_binary import candidates, find_binary, version_of
from orchestrator.cli.common import as_json, config_of, print_json, run_async
from orchestrator.config import Config
from orchestrator.errors import OrchestratorError
from orchestrator.killing import death_signal_prefix
from orchestrator.runtime import agent_roots
from orchestrator.store import open_store
from orchestrator.telemetry import endpoint_of

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at; ``advice`` says what to do about it."""

    name: str
    level: Level
    found: str
    advice: str = ""


@click.command("doctor")
@as_json
@click.pass_context
def doctor_command(ctx: click.Context, as_json: bool) -> None:
    """Check the installation: CLI, login, store, agents, server, telemetry. Exits with 1 on a problem."""
    import os  # noqa: PLC0415  # the environment is read here and nowhere else in this module

    config = config_of(ctx)
    checks = list(examine(config, dict(os.environ)))
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        for check in checks:
            mark = {"ok": "✓", "warning": "!", "problem": "✗"}[check.level]
            click.echo(f"{mark} {check.name}: {check.found}")
            if check.advice:
                click.echo(f"    {check.advice}")
    sys.exit(1 if any(check.level == "problem" for check in checks) else 0)


def examine(config: Config, environ: dict[str, str]) -> Iterator[Check]:
    """Every check, in the order a person would go about it."""
    yield Check("orchestrator", "ok", f"{__version__}, Python {sys.version.split()[0]}")
    yield from _cli(config, environ)
    yield _store(config)
    yield from _agents(config)
    yield _server(config)
    endpoint = endpoint_of(environ)
    yield Check(
        "telemetry", "ok", f"spans go to {endpoint}" if endpoint else "no OTLP endpoint set: traces stay here"
    )
    if sys.platform == "linux" and not death_signal_prefix():
        yield Check(
            "setpriv", "warning", "not found", "Install util-linux, so that a killed orchestrator leaves no agent."
        )


def _cli(config: Config, environ: dict[str, str]) -> Iterator[Check]:
    home = config.resolve(config.claude.home) if config.claude.home else Path(environ.get("HOME", "/"))
    try:
        found = find_binary(config.claude_path, environ, home)
        assert found.path is not None
        version = version_of(found.path)
    except OrchestratorError as error:
        yield Check("Claude Code CLI", "problem", error.message, error.advice)
        return
    yield Check("Claude Code CLI", "ok", f"{version} at {found.path} (found by {found.origin})")
    for other in candidates(config.claude_path, environ, home):
        if other.usable and other.path != found.path:
            yield Check("another CLI", "ok", f"{other.path} ({other.origin}), not used")
    yield _login(config, environ, home, found.path)


def _login(config: Config, environ: dict[str, str], home: Path, binary: Path) -> Check:
    """Ask the CLI itself; we never look at credentials."""
    extra = {
        **({"ANTHROPIC_BASE_URL": config.claude.base_url} if config.claude.base_url else {}),
        **config.claude.env,
    }
    env = environment(environ, home=home, pass_env=config.claude.pass_env, extra=extra)
    try:
        done = subprocess.run(
            [str(binary), "auth", "status"],
            env=env, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        status: dict[str, Any] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return Check("login", "warning", f"`claude auth status` did not answer: {error}")
    if status.get("loggedIn"):
        return Check("login", "ok", f"{status.get('authMethod')} under {home}")
    return Check(
        "login",
        "problem",
        f"the CLI has no login under {home}",
        f"Run `{binary} auth login`, or let it see a key (claude.pass_env: [ANTHROPIC_API_KEY]). "
        "Plans with a scenario run without: `orchestrator run PLAN --offline`.",
    )


def _store(config: Config) -> Check:
    async def count() -> int:
        async with open_store(config.store_path) as store:
            return len(await store.runs(limit=1000))

    try:
        runs = run_async(count)
    except OrchestratorError as error:
        return Check("store", "problem", error.message, error.advice)
    return Check("store", "ok", f"{config.store_path}, {'1000 runs or more' if runs == 1000 else f'{runs} runs'}")


def _agents(config: Config) -> Iterator[Check]:
    catalog = Catalog(agent_roots(config))
    catalog.load()
    names = [agent.id for agent in catalog.agents()]
    if names:
        yield Check("agents", "ok", f"{len(names)}: {', '.join(names)}")
    else:
        folders = ", ".join(str(root.path) for root in agent_roots(config))
        yield Check(
            "agents", "warning", f"none in {folders}", "Put a markdown file with frontmatter into one of them."
        )
    for problem in catalog.problems():
        yield Check("agent file", "warning", f"{problem.path}:{problem.line}: {problem.reason}")


def _server(config: Config) -> Check:
    from orchestrator.server import read_state  # noqa: PLC0415  # only this check needs it

    state = read_state(config.data_path)
    if state is None:
        return Check("server", "ok", "not running; `orchestrator mcp` starts it when needed")
    return Check("server", "ok", f"pid {state.pid} at {state.url}")
