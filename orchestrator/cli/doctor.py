"""``orchestrator doctor``: is everything in place, and what to do if not. Spends nothing, sends no prompt."""

import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import click

from orchestrator import __version__
from orchestrator.agents import Catalog
from orchestrator.backends.claude_binary import candidates
from orchestrator.cgroups import cgroup_support
from orchestrator.cli.common import as_json, config_of, print_json, run_async
from orchestrator.config import Config
from orchestrator.errors import OrchestratorError
from orchestrator.health import Check, HealthChecker
from orchestrator.killing import death_signal_prefix
from orchestrator.runtime import agent_roots
from orchestrator.store import open_store
from orchestrator.telemetry import endpoint_of


@click.command("doctor")
@as_json
@click.pass_context
def doctor_command(ctx: click.Context, as_json: bool) -> None:
    """Check the installation: CLI, login, store, runs, agents, server, telemetry. Exits with 1 on a problem."""
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
    yield from _health(config, environ)
    yield from _agents(config, environ)
    yield _server(config)
    yield _telemetry(config, environ)
    if sys.platform == "linux" and not death_signal_prefix():
        yield Check(
            "setpriv", "warning", "not found", "Install util-linux, so that a killed orchestrator leaves no agent."
        )
    if sys.platform == "linux":
        yield _cgroups()


def _telemetry(config: Config, environ: Mapping[str, str]) -> Check:
    wanted = config.telemetry
    endpoints = {
        "spans": endpoint_of(environ) if wanted.enabled else None,
        "metrics": endpoint_of(environ, "METRICS") if wanted.enabled and wanted.metrics else None,
    }
    sent = [f"{what} go to {endpoint}" for what, endpoint in endpoints.items() if endpoint]
    if not wanted.enabled:
        return Check("telemetry", "ok", "off (telemetry.enabled): traces stay here")
    return Check("telemetry", "ok", ", ".join(sent) or "no OTLP endpoint set: traces stay here")


def _cgroups() -> Check:
    made_in = cgroup_support()
    if made_in:
        return Check(
            "control groups", "ok", f"made in {made_in}: nothing that an agent starts outlives its process"
        )
    return Check(
        "control groups", "ok",
        "none may be made here; what agents leave behind is found by its parents and its environment",
    )  # fmt: skip


def _health(config: Config, environ: Mapping[str, str]) -> Iterator[Check]:
    """What every health check looks at, and what only a person would want to know about it."""
    for check in run_async(HealthChecker(config, environ).check).checks:
        if check.name == "store" and check.level == "ok":
            yield replace(check, found=f"{check.found}, {_count(config)}")
        else:
            yield check
        if check.name == "Claude Code CLI" and check.level != "problem":
            yield from _other_clis(config, environ)


def _other_clis(config: Config, environ: Mapping[str, str]) -> Iterator[Check]:
    home = config.resolve(config.claude.home) if config.claude.home else Path(environ.get("HOME", "/"))
    usable = [each for each in candidates(config.claude_path, environ, home) if each.usable]
    for other in usable[1:]:
        if other.path != usable[0].path:
            yield Check("another CLI", "ok", f"{other.path} ({other.origin}), not used")


def _count(config: Config) -> str:
    async def count() -> int:
        async with open_store(config.store_path) as store:
            return len(await store.runs(limit=1000))

    with suppress(OrchestratorError):
        runs = run_async(count)
        return "1000 runs or more" if runs == 1000 else f"{runs} runs"
    return "and could not be read just now"


def _agents(config: Config, environ: Mapping[str, str]) -> Iterator[Check]:
    catalog = Catalog(agent_roots(config))
    catalog.load()
    names = [agent.id for agent in catalog.agents()]
    sandboxed = [agent.id for agent in catalog.agents() if agent.sandbox]
    if names:
        yield Check("agents", "ok", f"{len(names)}: {', '.join(names)}")
    else:
        folders = ", ".join(str(root.path) for root in agent_roots(config))
        yield Check(
            "agents", "warning", f"none in {folders}", "Put a markdown file with frontmatter into one of them."
        )
    if sandboxed:
        yield _sandbox(sandboxed, environ)
    for problem in catalog.problems():
        yield Check("agent file", "warning", f"{problem.path}:{problem.line}: {problem.reason}")


def _sandbox(agents: list[str], environ: Mapping[str, str]) -> Check:
    """Whether the programs are there that the CLI's sandbox is made of; whether they work, only a run can tell."""
    wanted = ("bwrap", "socat") if sys.platform == "linux" else ()
    missing = [name for name in wanted if shutil.which(name, path=environ.get("PATH", "")) is None]
    if not missing:
        return Check("sandbox", "ok", f"required by {', '.join(agents)}")
    return Check(
        "sandbox", "warning", f"{', '.join(missing)} not found: {', '.join(agents)} cannot run",
        "Install bubblewrap and socat.",
    )  # fmt: skip


def _server(config: Config) -> Check:
    from orchestrator.server import read_state  # noqa: PLC0415  # only this check needs it

    state = read_state(config.data_path)
    if state is None:
        return Check("server", "ok", "not running; `orchestrator mcp` starts it when needed")
    return Check("server", "ok", f"pid {state.pid} at {state.url}")
