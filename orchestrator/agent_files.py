"""Agent files: what a markdown file with frontmatter says about an agent. Pure but for ``read_agent``.

The format is Claude Code's own (``.claude/agents/*.md``), so that one file serves both.
"""

import hashlib
import re
import stat
import unicodedata
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from orchestrator.agent_keys import FIELDS, VOCABULARY, UnusableValueError, remarks
from orchestrator.errors import AgentError
from orchestrator.frontmatter import Entry, FrontmatterError, read_frontmatter

Source = Literal["project", "user", "workspace"]

MAX_BYTES = 1024 * 1024
"""Largest agent file read, in bytes; the CLI has the same cap."""

MAX_NAME = 256
"""Longest name, in characters; the CLI has the same cap."""

_SERVER = "mcp__orchestrator"
_DELEGATE = f"{_SERVER}__delegate"
_SUBAGENT_TOOLS = frozenset({"Agent", "Task", "Workflow"})


class Agent(BaseModel):
    """What one agent file says.

    ``tools``: None is every tool, an empty tuple none. ``model`` is an alias or an id; None leaves the choice
    to preference and config. ``mcp_servers`` maps names to configurations as in ``--mcp-config``.
    ``max_turns`` counts model turns, ``auto_compact_window`` tokens. ``sandbox`` is a key of our own: every shell
    command runs in the CLI's sandbox, or the agent does not run. ``digest`` is the SHA-256 of the file.
    ``extra`` has the keys the format does not know.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    name: str
    description: str = ""
    system_prompt: str = ""
    tools: tuple[str, ...] | None = None
    disallowed_tools: tuple[str, ...] = ()
    model: str | None = None
    effort: str | None = None
    permission_mode: str | None = None
    max_turns: int | None = None
    mcp_servers: dict[str, Any] = {}
    hooks: dict[str, Any] = {}
    skills: tuple[str, ...] = ()
    color: str | None = None
    memory: str | None = None
    background: bool = False
    isolation: str | None = None
    initial_prompt: str | None = None
    omit_claude_md: bool = False
    auto_compact_window: int | None = None
    observer: str | None = None
    observer_message: str | None = None
    observe_subagents: bool | None = None
    cache_ttl: str | None = None
    sandbox: Literal["required"] | None = None
    extra: dict[str, Any] = {}
    source: Source
    path: Path
    digest: str
    warnings: tuple[str, ...] = ()

    def may_delegate(self) -> bool:
        """Whether the agent may hand work to other agents through the orchestrator's own MCP server."""
        if any(_covers(tool, _DELEGATE) for tool in self.disallowed_tools):
            return False
        # "Every tool" does not include these: they spend, and most files were written without knowing of them.
        return any(tool.startswith(f"{_SERVER}__") or _covers(tool, _DELEGATE) for tool in self.tools or ())

    def names(self, tool: str) -> bool:
        """Whether the file's tools list has this tool: by itself, by its server, or by a pattern."""
        return any(_covers(pattern, tool) for pattern in self.tools or ())

    def may_use_subagents(self) -> bool:
        """Whether the file names the CLI's own delegation tools; "every tool" does not include them here.

        Work the CLI delegates by itself escapes our limits and budgets, so it has to be asked for.
        """
        named = {tool.partition("(")[0] for tool in self.tools or ()}
        return bool(named & _SUBAGENT_TOOLS - set(self.disallowed_tools))


def _covers(pattern: str, tool: str) -> bool:
    """Whether a rule of a tool list covers an MCP tool: by its name, its server's name, or a wildcard."""
    return tool.startswith(pattern + "__") or fnmatchcase(tool, pattern)


def parse_agent(text: str | bytes, *, path: Path, source: Source, workspace: str | None = None) -> Agent:
    """Read the text of an agent file. ``workspace`` qualifies the id: ``workspace:name``.

    Raises:
        AgentError: the file cannot be used; the message is ``path:line: reason``, and ``details`` has the
            three apart.
    """
    try:
        data = text.encode() if isinstance(text, str) else text
        return _parse(data, path, source, workspace)
    except FrontmatterError as error:
        raise agent_error(path, error.line, error.reason) from None
    except UnicodeEncodeError:
        raise agent_error(path, 1, "the text or the name of the file is not valid Unicode") from None


def agent_error(path: Path, line: int | None, reason: str) -> AgentError:
    """An AgentError whose message starts with where the trouble is, as compilers do."""
    shown = printable(path)
    where = shown if line is None else f"{shown}:{line}"
    return AgentError(f"{where}: {reason}", details={"path": shown, "line": line, "reason": reason})


def printable(path: Path) -> str:
    """The path as text that can be encoded: names on disk are bytes and need not be UTF-8."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _parse(data: bytes, path: Path, source: Source, workspace: str | None) -> Agent:
    str(path).encode()
    parsed = read_frontmatter(_decode(data), VOCABULARY)
    warnings = list(parsed.warnings)
    chosen, extra = _choose(parsed.entries, warnings)
    values = {FIELDS[key].attribute: _read(key, entry, warnings) for key, entry in chosen.items()}
    values = {attribute: value for attribute, value in values.items() if value is not None}
    name = _usable_name(values.pop("name", None), chosen.get("name"), warnings)
    if not values.get("description"):
        warnings.append("no description: the CLI itself would skip this file")
    if not parsed.body:
        warnings.append("no system prompt: there is nothing below the frontmatter")
    return Agent(
        id=f"{workspace}:{name}" if workspace else name,
        name=name,
        system_prompt=parsed.body,
        source=source,
        path=path,
        digest=hashlib.sha256(data).hexdigest(),
        extra=extra,
        warnings=tuple(warnings),
        **values,
    )


def _decode(data: bytes) -> str:
    if len(data) > MAX_BYTES:
        raise FrontmatterError(1, f"larger than {MAX_BYTES // 1024} KiB")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise FrontmatterError(1, "UTF-16 text: save it as UTF-8")
    if b"\0" in data:
        raise FrontmatterError(data[: data.index(b"\0")].count(b"\n") + 1, "not text: it has NUL bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FrontmatterError(data[: error.start].count(b"\n") + 1, "not UTF-8 text") from None


def _choose(entries: tuple[Entry, ...], warnings: list[str]) -> tuple[dict[str, Entry], dict[str, Any]]:
    """The entry that counts for each known key, and the unknown ones."""
    candidates: dict[str, list[Entry]] = {}
    unknown: list[Entry] = []
    for entry in entries:
        canonical = VOCABULARY.canonical(entry.key)
        if canonical is None:
            unknown.append(entry)
        else:
            candidates.setdefault(canonical, []).append(entry)
    chosen = {key: _choose_one(key, found, warnings) for key, found in candidates.items()}
    warnings += [_unknown_key(entry, chosen) for entry in unknown]
    return chosen, {entry.key: entry.value for entry in unknown}


def _choose_one(key: str, found: list[Entry], warnings: list[str]) -> Entry:
    """The exact spelling before others, then the first; for guarded keys there must be no choice."""
    exact = [entry for entry in found if entry.key == key] or found
    first = exact[0]
    if key in VOCABULARY.guarded and any(entry.value != first.value for entry in exact):
        raise FrontmatterError(exact[1].line, f"{key} is given twice, first on line {first.line}: keep one")
    if first.key != key:
        warnings.append(f"line {first.line}: {first.key!r} is read as {key!r}")
    warnings.extend(
        f"line {entry.line}: {entry.key!r} is ignored, line {first.line} has it already"
        for entry in found
        if entry is not first
    )
    return first


def _unknown_key(entry: Entry, chosen: dict[str, Entry]) -> str:
    """The warning for an unknown key. Raises if it may be a restriction that would be lost."""
    guarded = VOCABULARY.nearest_guarded(entry.key)
    if guarded in ("tools", "disallowedTools", "sandbox") and guarded not in chosen:
        raise FrontmatterError(entry.line, f"unknown key {entry.key!r}; did you mean {guarded!r}?")
    nearest = VOCABULARY.nearest(entry.key)
    hint = f"; did you mean {nearest!r}?" if nearest else ""
    return f"line {entry.line}: unknown key {entry.key!r:.80} is ignored{hint}"


def _read(key: str, entry: Entry, warnings: list[str]) -> Any:
    try:
        value = FIELDS[key].read(entry)
    except UnusableValueError as error:
        verdict = "is used in part" if error.kept else "is ignored"
        warnings.append(f"line {entry.line}: {key}: {entry.value!r:.80} {verdict}: {error}")
        return error.kept
    warnings.extend(f"line {entry.line}: {text}" for text in remarks(key, value))
    return value


def _usable_name(name: Any, entry: Entry | None, warnings: list[str]) -> str:
    """The name, if it can name an agent on a command line, in an id and in a path."""
    line = entry.line if entry else 1
    if not name:
        raise FrontmatterError(line, "no name: add a line `name: some-name`")
    if entry is None or not isinstance(entry.value, str):
        raise FrontmatterError(line, f"the name reads as the value {name}: put it in quotes")
    text = str(name)
    if len(text) > MAX_NAME:
        raise FrontmatterError(line, f"the name is longer than {MAX_NAME} characters")
    if any(unicodedata.category(char) in ("Cc", "Zl", "Zp") for char in text):
        raise FrontmatterError(line, "the name has line breaks or control characters")
    if text.startswith("-") or any(char in ":/\\" for char in unicodedata.normalize("NFKC", text)):
        raise FrontmatterError(line, f"name {text!r:.80}: must not start with - or contain : / \\")
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", text):
        warnings.append(f"line {line}: name {text!r}: lower-case letters, digits and hyphens are usual")
    return text


def read_agent(path: Path, *, source: Source, workspace: str | None = None) -> Agent:
    """Read and parse an agent file.

    Raises:
        AgentError: it cannot be read or cannot be used.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for its writer
            raise agent_error(path, None, "not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise agent_error(path, None, f"cannot be read: {error.strerror or error}") from None
    return parse_agent(data, path=path, source=source, workspace=workspace)
