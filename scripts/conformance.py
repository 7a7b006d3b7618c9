"""Runs the conformance suite of the Model Context Protocol against our server: ``make conformance``.

The suite and the Node it needs are installed into ``.venv/conformance``. Nothing is expected to fail: there is no
baseline, every check of every scenario counts, those of optional extensions included.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import click

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / ".venv" / "conformance"
SUITE = HERE / "node_modules" / "@modelcontextprotocol" / "conformance"
VERSION = "0.2.0-alpha.12"
REVISION = "2026-07-28"
NODE_MAJOR = 22

#: Scenarios that need none of the suite's fixtures: the server as it is must pass them too.
PLAIN = frozenset(
    {
        "caching",
        "dns-rebinding-protection",
        "http-header-validation",
        "input-required-result-unsupported-methods",
        "prompts-list",
        "resources-list",
        "sep-2164-resource-not-found",
        "server-sse-multiple-streams",
        "tools-list",
    }
)
#: The suite itself skips it until it can listen for what it is about.
SKIPPED = frozenset({"tasks-status-notifications"})

_FOLDER = re.compile(r"server-(?P<scenario>.+?)-\d{4}-\d\d-\d\dT[\d-]+Z")


@dataclass(frozen=True, slots=True)
class Check:
    """One check of a scenario. ``status`` is the suite's: SUCCESS, INFO, WARNING, FAILURE or SKIPPED."""

    scenario: str
    name: str
    status: str
    error: str

    @property
    def good(self) -> bool:
        return self.status in ("SUCCESS", "INFO") or (self.status == "SKIPPED" and self.scenario in SKIPPED)

    def __str__(self) -> str:
        return f"{self.status} {self.scenario}: {self.name}: {self.error}"


def find_node() -> Path | None:
    """A Node that is new enough: the one installed here, or the machine's."""
    candidates = [str(HERE / "node_modules" / "node" / "bin" / "node"), shutil.which("node")]
    return next((Path(path) for path in candidates if path and _major(path) >= NODE_MAJOR), None)


def _major(node: str) -> int:
    try:
        told = subprocess.run([node, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    match = re.fullmatch(r"v(\d+)\..*", told.strip())
    return int(match[1]) if match else 0


def missing() -> str | None:
    """Why the suite cannot run on this machine yet; None if it can."""
    try:
        version = json.loads((SUITE / "package.json").read_text())["version"]
    except OSError:
        return "the MCP conformance suite is not installed; `make conformance` installs it"
    if version != VERSION:
        return f"the MCP conformance suite is {version}, not {VERSION}; `make conformance` installs it"
    return None if find_node() else f"there is no Node {NODE_MAJOR} or newer; `make conformance` installs it"


def install() -> None:
    """Install what is missing. Raises ClickException."""
    npm = shutil.which("npm")
    if npm is None:
        raise click.ClickException("npm is needed to install the conformance suite; it comes with Node.")
    HERE.mkdir(parents=True, exist_ok=True)
    packages = [f"@modelcontextprotocol/conformance@{VERSION}"]
    if find_node() is None:
        packages.append(f"node@{NODE_MAJOR}")
    command = [npm, "install", "--no-audit", "--no-fund", "--save-exact", "--prefix", str(HERE), *packages]
    if subprocess.run(command, check=False).returncode != 0:
        raise click.ClickException("npm could not install the conformance suite; its words are above.")
    if (problem := missing()) is not None:
        raise click.ClickException(f"npm has installed the conformance suite, but {problem}.")


async def run(url: str, folder: Path, environ: Mapping[str, str]) -> list[Check]:
    """Every check the suite has for a server of REVISION. ``folder`` is where it leaves its results."""
    node = find_node()
    assert node is not None
    command = [str(node), str(SUITE / "dist" / "index.js"), "server", "--url", url, "--requirements", REVISION]
    await anyio.run_process([*command, "-o", str(folder)], check=False, env=dict(environ), cwd=folder.parent)
    return [check for path in sorted(folder.glob("*/checks.json")) for check in _checks(path)]


def _checks(path: Path) -> list[Check]:
    match = _FOLDER.fullmatch(path.parent.name)
    scenario = match["scenario"] if match else path.parent.name
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return [Check(scenario, row["id"], row["status"], row.get("errorMessage") or "") for row in rows]


async def run_both(folder: Path) -> tuple[list[Check], list[Check]]:
    """The checks of the server as it is that need no fixtures, and all checks of the server with fixtures."""
    from tests.conformance_server import serving  # noqa: PLC0415  # half a second, and not to install

    environ = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder)}
    async with serving(folder / "project") as (plain, full):
        alone = await run(plain, folder / "plain", environ)
        return [check for check in alone if check.scenario in PLAIN], await run(full, folder / "full", environ)


def main() -> int:
    if missing():
        install()
    with tempfile.TemporaryDirectory() as folder:
        results = anyio.run(run_both, Path(folder))
    for name, checks in zip(("the server as it is", "with the suite's fixtures"), results, strict=True):
        scenarios = {check.scenario for check in checks}
        bad = [check for check in checks if not check.good]
        click.echo(f"{name}: {len(checks)} checks of {len(scenarios)} scenarios, {len(bad)} not good")
        for check in bad:
            click.echo(f"  {check}")
    return 0 if all(checks and all(check.good for check in checks) for checks in results) else 1


if __name__ == "__main__":
    sys.exit(main())
