"""Offline runs: the scripted model server in place of the provider, and a HOME of its own for the CLI."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config import Config
from orchestrator.errors import ScenarioError

if TYPE_CHECKING:
    from orchestrator.testing import ModelServer

# Not a credential: the CLI wants some key before it talks to any server.
OFFLINE_KEY = "sk-ant-offline-no-credential"


def scenario_beside(plan: Path) -> Path:
    """``review.yaml`` → ``review.scenario.yaml``."""
    return plan.with_suffix(f".scenario{plan.suffix or '.yaml'}")


@asynccontextmanager
async def offline_model(scenario: Path) -> AsyncIterator["ModelServer"]:
    """Serve the scenario file on loopback. Raises ScenarioError."""
    # A tenth of a second that runs with a real model need not pay.
    from orchestrator.testing import load_scenario, running_model_server  # noqa: PLC0415

    if not scenario.is_file():
        raise ScenarioError(
            f"no scenario at {scenario}",
            advice="Put one beside the plan, or name it with --scenario; docs/testing.md shows the format.",
        )
    async with running_model_server(load_scenario(scenario)) as server:
        yield server


def offline_settings(config: Config, base_url: str) -> dict[str, Any]:
    """What must be set so that no CLI reaches a provider or a login: dotted settings."""
    home = config.data_path / "offline-home"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    return {
        "claude.base_url": base_url,
        "claude.home": str(home),
        "claude.pass_env": (),
        "claude.env": {"ANTHROPIC_API_KEY": OFFLINE_KEY},
        "claude.max_retries": 1,
        # Settings of the directory could name another server.
        "claude.setting_sources": (),
    }
