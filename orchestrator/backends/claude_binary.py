"""Where the Claude Code binary is: configuration, PATH, the usual places, the copy inside claude_agent_sdk."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import CLINotFoundError


@dataclass(frozen=True, slots=True)
class Candidate:
    """A place that was looked at. ``origin`` says why; ``usable`` is whether a program is there."""

    origin: str
    path: Path | None

    @property
    def usable(self) -> bool:
        # Asked in this order, a place we may not even look into is just not usable.
        return self.path is not None and os.access(self.path, os.X_OK) and self.path.is_file()

    def __str__(self) -> str:
        if self.path is None:
            return f"{self.origin}: nothing"
        return (
            f"{self.origin}: {self.path} {'is not a program' if os.access(self.path, os.F_OK) else 'is not there'}"
        )


def candidates(configured: Path | None, environ: Mapping[str, str], home: Path) -> list[Candidate]:
    """Every place in order of preference. A configured path is the only one: it was asked for by name."""
    if configured is not None:
        return [Candidate("claude.path", configured)]
    on_path = shutil.which("claude", path=environ.get("PATH", ""))
    usual = (home / ".local/bin/claude", home / ".claude/local/claude", Path("/usr/local/bin/claude"))
    return [
        # Absolute: agents run in other directories, and PATH may have relative entries.
        Candidate("PATH", Path(on_path).absolute() if on_path else None),
        *(Candidate("usual place", path) for path in usual),
        Candidate("claude_agent_sdk", _bundled()),
    ]


def find_binary(configured: Path | None, environ: Mapping[str, str], home: Path) -> Candidate:
    """The first usable candidate. Raises CLINotFoundError naming every place that was looked at."""
    looked = candidates(configured, environ, home)
    for candidate in looked:
        if candidate.usable:
            return candidate
    raise CLINotFoundError(f"no Claude Code CLI found ({'; '.join(map(str, looked))})")


def version_of(binary: Path, timeout: float = 10) -> str:
    """The first line of ``claude --version``; costs 12 ms and touches nothing. Raises CLINotFoundError."""
    try:
        done = subprocess.run(
            [str(binary), "--version"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            check=True,
            stdin=subprocess.DEVNULL,
            env={"PATH": os.defpath, "HOME": "/nonexistent"},
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise CLINotFoundError(f"{binary} does not answer --version: {error}") from error
    return done.stdout.strip().partition("\n")[0]


def _bundled() -> Path | None:
    # find_spec does not run the package: importing it would cost 0.6 s.
    spec = importlib.util.find_spec("claude_agent_sdk")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "_bundled" / "claude"
