"""Files of Claude Code: those that decide what a process is when it starts, and where a session is kept."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from glob import escape
from pathlib import Path

_OF_A_DIRECTORY = ("CLAUDE.md", "CLAUDE.local.md")
_IN_ITS_CLAUDE_FOLDER = (
    "CLAUDE.md",
    "settings.json",
    "settings.local.json",
    "agents",
    "commands",
    "rules",
    "skills",
)
_OF_HOME = (
    "CLAUDE.md",
    "settings.json",
    ".credentials.json",
    "agents",
    "commands",
    "rules",
    "skills",
    "plugins/installed_plugins.json",
)
_OF_THE_MACHINE = (
    "/etc/claude-code/managed-settings.json",
    "/etc/claude-code/CLAUDE.md",
    "/Library/Application Support/ClaudeCode/managed-settings.json",
)


def config_dir(env: Mapping[str, str]) -> Path:
    """Where the CLI keeps its settings and sessions under this environment."""
    return Path(env.get("CLAUDE_CONFIG_DIR") or Path(env["HOME"]) / ".claude")


def files_read(cwd: Path, env: Mapping[str, str]) -> Iterator[str]:
    """Files and folders whose change makes a process that has started another one than a new one would be.

    As texts, and nothing below a folder that is not there: all are looked at for every run.
    """
    yield from _below(config_dir(env), _OF_HOME)
    for folder in (cwd, *cwd.parents):
        yield from _below(folder, _OF_A_DIRECTORY)
        if os.path.isdir(claude := f"{folder}/.claude"):  # noqa: PTH112  # to make a Path takes longer than to look
            yield from _below(claude, _IN_ITS_CLAUDE_FOLDER)
    yield from _OF_THE_MACHINE


def _below(folder: Path | str, names: Iterable[str]) -> list[str]:
    return [f"{folder}/{name}" for name in names]


def fingerprint(binary: Path, cwd: Path, env: Mapping[str, str]) -> str:
    """The state of the CLI itself and of the files it reads when it starts; another text if one has changed."""
    return ";".join([_identity(cwd), *(state_of(path) for path in (str(binary), *files_read(cwd, env)))])


def _identity(folder: Path) -> str:
    """Whether it is the same directory, not what is in it: one made anew under the name is another."""
    try:
        found = os.stat(folder)  # noqa: PTH116
    except OSError:
        return ""
    return f"{found.st_dev},{found.st_ino}"


def state_of(path: Path | str) -> str:
    """Size and time of change of a file, empty if there is none."""
    try:
        found = os.stat(path)  # noqa: PTH116  # a hundred of these for every run: a third of the time of Path.stat
    except OSError:
        return ""
    return f"{found.st_ino},{found.st_size},{found.st_mtime_ns}"


def transcript(session_id: str, cwd: Path, env: Mapping[str, str]) -> Path:
    """The file of a session that was begun in ``cwd``: where it is, or where it is to be expected."""
    projects = config_dir(env) / "projects"
    expected = projects / re.sub(r"[^A-Za-z0-9]", _dashes, str(cwd)) / f"{session_id}.jsonl"
    if os.path.exists(expected):  # noqa: PTH110  # Path.exists raises for a name that is too long
        return expected
    try:
        return _found(projects, session_id)
    except OSError:
        return expected


def _dashes(match: re.Match[str]) -> str:
    return "--" if match[0] > "\uffff" else "-"  # the CLI counts in UTF-16


@lru_cache(maxsize=1000)
def _found(projects: Path, session_id: str) -> Path:
    """The session's file in whatever folder. Raises FileNotFoundError, which is not remembered.

    The CLI shortens the names of long directories in a way of its own, and follows links.
    """
    for path in projects.glob(f"*/{escape(session_id)}.jsonl"):
        return path
    raise FileNotFoundError(session_id)
