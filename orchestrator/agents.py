"""The agents there are: found in folders, kept current while files change, looked up by name.

A file that breaks does not take its agent away: the last version that could be read stays in use, and the
trouble is listed until it is mended. A restart in the middle of an edit is the only way to lose one.
"""

import difflib
import logging
import os
import stat
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import anyio
from anyio.abc import TaskStatus
from pydantic import BaseModel, ConfigDict
from watchfiles import awatch

from orchestrator.agent_files import Agent, Source, parse_agent, printable, read_agent
from orchestrator.errors import AgentError, AgentNotFoundError

__all__ = [
    "Agent",
    "AgentProblem",
    "Catalog",
    "CatalogChange",
    "FileReport",
    "Root",
    "Source",
    "parse_agent",
    "read_agent",
    "resolve_model",
    "validate_tree",
]

logger = logging.getLogger(__name__)

ModelOrigin = Literal["argument", "preference", "agent", "config", "cli"]

_PRECEDENCE: tuple[Source, ...] = ("project", "user", "workspace")
_TICK_MS = 200  # watchfiles ends no sooner than its time-out: this is also how long shutdown may wait for it


def resolve_model(
    argument: str | None, preference: str | None, agent: Agent, default: str | None
) -> tuple[str | None, ModelOrigin]:
    """The model to ask for, and who chose it. ``(None, "cli")`` leaves it to the CLI's own default."""
    choices: tuple[tuple[str | None, ModelOrigin], ...] = (
        (argument, "argument"),
        (preference, "preference"),
        (agent.model, "agent"),
        (default, "config"),
    )
    return next(((model, origin) for model, origin in choices if model), (None, "cli"))


class Root(NamedTuple):
    """A folder of agent files. ``workspace`` is the name that qualifies the ids of its agents."""

    path: Path
    source: Source
    workspace: str | None = None


class AgentProblem(BaseModel):
    """A file that is broken, or one whose name another file has taken.

    ``kept``: the agent's last good version is in use. ``agent`` is the id of the agent concerned, if known.
    """

    model_config = ConfigDict(frozen=True)

    kind: Literal["broken", "shadowed"]
    path: Path
    line: int | None = None
    reason: str
    kept: bool = False
    agent: str | None = None


class CatalogChange(BaseModel):
    """What a reload changed: ids of agents, and all problems there are now."""

    model_config = ConfigDict(frozen=True)

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    problems: tuple[AgentProblem, ...]


class FileReport(BaseModel):
    """What became of one file of a folder that was validated."""

    model_config = ConfigDict(frozen=True)

    path: Path
    status: Literal["loaded", "warnings", "refused"]
    name: str | None = None
    warnings: list[str] = []
    reason: str | None = None


def validate_tree(root: Path) -> list[FileReport]:
    """Try every markdown file under ``root``, or the one file that ``root`` is. Never raises for what it finds."""
    if not _is_folder(root):
        return [_report(root)]
    paths, errors = _markdown_files(root)
    unlisted = [
        FileReport(path=_place(error, root), status="refused", reason=f"cannot be listed: {error.strerror}")
        for error in errors
    ]
    return unlisted + [_report(path) for path in paths]


def _report(path: Path) -> FileReport:
    try:
        agent = read_agent(path, source="project")
    except AgentError as error:
        return FileReport(path=_printable(path), status="refused", reason=error.message)
    status: Literal["warnings", "loaded"] = "warnings" if agent.warnings else "loaded"
    return FileReport(path=path, status=status, name=agent.name, warnings=list(agent.warnings))


def _printable(path: Path) -> Path:
    return Path(printable(path))


def _markdown_files(root: Path) -> tuple[list[Path], list[OSError]]:
    """Every ``*.md`` under ``root`` in a stable order, links followed, and the folders that cannot be listed."""
    paths: list[Path] = []
    errors: list[OSError] = []
    seen: set[tuple[int, int] | None] = set()
    for folder, subfolders, files in os.walk(root, onerror=errors.append, followlinks=True):
        subfolders.sort()
        identity = _identity(Path(folder))
        if identity in seen:  # a link leads back up: walking on would not end
            subfolders.clear()
            continue
        seen.add(identity)
        paths += [Path(folder, name) for name in sorted(files) if name.lower().endswith(".md")]
    return paths, errors


def _status(path: Path, *, follow_symlinks: bool = True) -> os.stat_result | None:
    """What is at the path, or None: nothing, or nothing that we may know of.

    ``Path.is_dir`` and its like raise PermissionError where a folder above may not be searched.
    """
    try:
        return path.stat(follow_symlinks=follow_symlinks)
    except OSError:
        return None


def _is_folder(path: Path) -> bool:
    status = _status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def _is_link(path: Path) -> bool:
    status = _status(path, follow_symlinks=False)
    return status is not None and stat.S_ISLNK(status.st_mode)


def _identity(path: Path) -> tuple[int, int] | None:
    """Which folder the path leads to at present, or None."""
    status = _status(path)
    return None if status is None else (status.st_dev, status.st_ino)


def _place(error: OSError, root: Path) -> Path:
    return _printable(Path(os.fsdecode(error.filename or root)))


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a root as last read. ``agent`` is the last good version, ``error`` why it is not the current."""

    root: Root
    path: Path
    stamp: tuple[int, int, int] | None = None
    agent: Agent | None = None
    error: AgentError | None = None

    def problem(self) -> AgentProblem | None:
        if self.error is None:
            return None
        details, kept = self.error.details, self.agent
        return AgentProblem(
            kind="broken",
            path=Path(details["path"]),
            line=details["line"],
            reason=details["reason"],
            kept=kept is not None,
            agent=kept.id if kept else None,
        )


class Catalog:
    """The agents found under some roots. Reads files only in ``load`` and ``watch``.

    The same name in several roots: project before user before workspace, then the root given first.
    """

    def __init__(self, roots: Sequence[Root]) -> None:
        self._roots = sorted(roots, key=lambda root: _PRECEDENCE.index(root.source))
        self._files: dict[tuple[Root, Path], _File] = {}
        self._agents: dict[str, Agent] = {}
        self._problems: tuple[AgentProblem, ...] = ()
        self._warned = False

    def __repr__(self) -> str:
        return f"<Catalog agents={len(self._agents)} problems={len(self._problems)}>"

    def agents(self) -> list[Agent]:
        """Every agent that can be had by its id, in order of precedence."""
        return list(self._agents.values())

    def problems(self) -> list[AgentProblem]:
        """What is wrong with files of the roots now."""
        return list(self._problems)

    def get(self, name: str) -> Agent:
        """The agent with this id; a workspace's agent also by its plain name, if no other has that name.

        Raises:
            AgentNotFoundError: there is none, or the plain name is ambiguous.
        """
        if name in self._agents:
            return self._agents[name]
        same_name = [agent for agent in self._agents.values() if agent.name == name]
        if len(same_name) == 1:
            return same_name[0]
        raise self._not_found(name, same_name)

    def _not_found(self, name: str, same_name: list[Agent]) -> AgentNotFoundError:
        known = sorted(self._agents)
        reason = f"no agent is called {name!r}"
        near = difflib.get_close_matches(name, {*known, *(agent.name for agent in self._agents.values())})
        broken = [problem for problem in self._problems if problem.path.stem == name and problem.line]
        if same_name:
            reason += " alone: say " + " or ".join(repr(agent.id) for agent in same_name)
        elif broken:
            reason += f": {broken[0].path}:{broken[0].line}: {broken[0].reason}"
        elif near:
            reason += "; did you mean " + " or ".join(map(repr, near)) + "?"
        return AgentNotFoundError(reason, details={"known": known})

    def load(self) -> None:
        """Find the files under the roots and read those that changed since the last time."""
        self._scan(frozenset())

    def _scan(self, touched: frozenset[str]) -> None:
        """Read files that look changed, and those of a name in ``touched`` however they look."""
        files: dict[tuple[Root, Path], _File] = {}
        unlisted: list[AgentProblem] = []
        for root in self._roots:
            paths, errors = _markdown_files(root.path)
            problems = [_unlisted(error, root) for error in errors if not isinstance(error, FileNotFoundError)]
            unlisted += problems
            for path in [*filter(_is_meant, paths), *self._hidden(root, problems)]:
                known = self._files.get((root, path), _File(root, path))
                files[root, path] = _refresh(known, again=path.name in touched)
        self._files = files
        self._agents, shadowed = _by_id(file.agent for file in files.values() if file.agent is not None)
        broken = [problem for file in files.values() if (problem := file.problem()) is not None]
        self._problems = (*unlisted, *broken, *shadowed)

    def _hidden(self, root: Root, problems: list[AgentProblem]) -> list[Path]:
        """Known files in folders that cannot be listed now: for want of descriptors, say. They are not gone."""
        folders = [problem.path for problem in problems]
        return [path for at, path in self._files if at == root and any(map(path.is_relative_to, folders))]

    async def watch(
        self,
        *,
        on_change: Callable[[CatalogChange], None] | None = None,
        task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Keep the catalog current until cancelled; start it with ``TaskGroup.start``.

        ``on_change`` is called after each reload that changed something. A root may be created, removed or
        replaced at any time.
        """
        task_status.started()
        while True:
            surroundings = self._surroundings()
            first = True  # a file may have changed between the last look and the start of this watch
            async with aclosing(self._ticks()) as ticks:
                async for touched in ticks:
                    now = self._surroundings()
                    if first or touched or now != surroundings or self._blocked():
                        self._reload(touched, on_change)
                    if now != surroundings:
                        break
                    first = False

    def _blocked(self) -> list[Path]:
        """What could not even be read, which may end without a change to any file."""
        return [problem.path for problem in self._problems if problem.kind == "broken" and problem.line is None]

    def _reload(self, touched: frozenset[str], on_change: Callable[[CatalogChange], None] | None) -> None:
        agents, problems = self._agents, self._problems
        self._scan(touched)
        if on_change is not None and (agents != self._agents or problems != self._problems):
            on_change(_change(agents, self._agents, self._problems))

    async def _ticks(self) -> AsyncGenerator[frozenset[str], None]:
        """Names of the files touched since the last tick, every 200 ms or sooner, for as long as that works."""
        folders = [root.path for root in self._roots if _is_folder(root.path)]
        try:
            if folders:
                changes = awatch(
                    *folders,
                    watch_filter=None,
                    debounce=_TICK_MS,
                    rust_timeout=_TICK_MS,
                    yield_on_timeout=True,
                    ignore_permission_denied=True,
                )
                async with aclosing(changes):
                    async for batch in changes:
                        yield frozenset(Path(path).name for _, path in batch)
        except (OSError, RuntimeError) as error:  # a folder has just gone, or the system has no watches left
            if not self._warned:
                logger.warning("agent folders cannot be watched, looking at them instead: %s", error)
            self._warned = True
        await anyio.sleep(_TICK_MS / 1000)
        yield frozenset()

    def _surroundings(self) -> list[object]:
        """What a watch does not see: which folders the roots are, files behind links, and what is closed to us."""
        linked = [_stamp(file.path) for file in self._files.values() if _is_link(file.path)]
        return [*(_identity(root.path) for root in self._roots), *linked, *self._blocked()]


def _unlisted(error: OSError, root: Root) -> AgentProblem:
    return AgentProblem(kind="broken", path=_place(error, root.path), reason=f"cannot be listed: {error.strerror}")


def _is_meant(path: Path) -> bool:
    """Whether a markdown file in a folder of agents is meant as one: no lock file of an editor, no README."""
    return not path.name.startswith(".") and path.stem.lower() != "readme"


def _stamp(path: Path) -> tuple[int, int, int] | None:
    status = _status(path)
    return None if status is None else (status.st_mtime_ns, status.st_size, status.st_ino)


def _refresh(known: _File, *, again: bool) -> _File:
    """The file read anew if it looks changed. A file that cannot be used keeps the agent it had."""
    stamp = _stamp(known.path)
    if stamp is not None and stamp == known.stamp and not again:
        return known
    try:
        agent = read_agent(known.path, source=known.root.source, workspace=known.root.workspace)
    except AgentError as error:
        unread = error.details["line"] is None
        return replace(known, stamp=None if unread else stamp, error=error)
    return replace(known, stamp=stamp, agent=agent, error=None)


def _by_id(agents: Iterable[Agent]) -> tuple[dict[str, Agent], list[AgentProblem]]:
    """Agents by id, the first of each, and a problem for each that another one hides."""
    found: dict[str, Agent] = {}
    shadowed: list[AgentProblem] = []
    for agent in agents:
        first = found.setdefault(agent.id, agent)
        plain = found.get(agent.name)
        if first is not agent:
            shadowed.append(_shadowed(agent, f"agent {agent.id!r} is defined in {first.path} already"))
        elif plain is not None and plain is not agent:
            shadowed.append(_shadowed(agent, f"{agent.name!r} alone means {plain.path}; say {agent.id!r}"))
    return found, shadowed


def _shadowed(agent: Agent, reason: str) -> AgentProblem:
    return AgentProblem(kind="shadowed", path=agent.path, reason=reason, agent=agent.id)


def _change(before: dict[str, Agent], now: dict[str, Agent], problems: tuple[AgentProblem, ...]) -> CatalogChange:
    return CatalogChange(
        added=tuple(sorted(now.keys() - before.keys())),
        changed=tuple(sorted(key for key in now.keys() & before.keys() if now[key] != before[key])),
        removed=tuple(sorted(before.keys() - now.keys())),
        problems=problems,
    )
