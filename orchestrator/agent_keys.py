"""The keys of an agent file: what they are called, how each value is read, what is said about it. Pure.

The rule for values that make no sense: a key that restricts the agent (``tools``, ``disallowedTools``,
``permissionMode``, ``hooks``, ``isolation``, ``sandbox``) refuses the file, because to leave it out would give the
agent more than its author meant; any other key is left out with a warning. The CLI leaves out both without a word.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from orchestrator.frontmatter import Entry, FrontmatterError, Vocabulary

EFFORTS = ("low", "medium", "high", "xhigh", "max")
PERMISSION_MODES = ("default", "acceptEdits", "plan", "auto", "dontAsk", "bypassPermissions")
MEMORY_SCOPES = ("user", "project", "local")
ISOLATIONS = ("worktree", "remote")

_TOOL = re.compile(r"[A-Za-z_]([\w.:*/-]*[\w*])?(\(.*\))?", re.DOTALL)
_MODEL = re.compile(r"[A-Za-z0-9][\w.:/@\[\]-]*")
# Not all of them: those that files name. It only serves to spot a name in the wrong case.
BUILT_IN_TOOLS = (
    *("Agent", "Bash", "Edit", "Glob", "Grep", "NotebookEdit", "Read", "Skill", "Task", "TodoWrite"),
    *("WebFetch", "WebSearch", "Workflow", "Write"),
)
_BUILT_IN_BY_LOWER = {tool.lower(): tool for tool in BUILT_IN_TOOLS}
_MISTAKEN_TOOLS = {"all": "leave tools out to allow every tool", "none": "write tools: [] to allow none"}


class UnusableValueError(Exception):
    """A value that makes no sense and restricts nothing: only ``kept`` of it is used, with a warning."""

    def __init__(self, reason: str, kept: Any = None) -> None:
        super().__init__(reason)
        self.kept = kept


def _text(entry: Entry) -> str | None:
    if isinstance(entry.value, (dict, list)):
        raise UnusableValueError("expected text")
    return None if entry.value is None else str(entry.value).strip()


def _description(entry: Entry) -> str | None:
    text = _text(entry)
    return text and text.replace("\\n", "\n")  # written so by generators, and read so by the CLI


def _flag(entry: Entry) -> bool | None:
    values = {None: None, "true": True, "false": False}
    text = _text(entry)
    if (text and text.lower()) not in values:
        raise UnusableValueError("expected true or false")
    return values[text and text.lower()]


def _count(entry: Entry) -> int | None:
    text = _text(entry)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
        raise UnusableValueError("expected a positive whole number")
    return int(text)


def _model(entry: Entry) -> str | None:
    text = _text(entry)
    if text is None or text.lower() == "inherit":
        return None
    if not _MODEL.fullmatch(text):
        raise UnusableValueError("expected one model alias or id")
    return text


def _one_of(*allowed: str) -> Callable[[Entry], str | None]:
    def read(entry: Entry) -> str | None:
        text = _text(entry)
        if text is not None and text.lower() not in allowed:
            raise UnusableValueError(f"expected one of {', '.join(allowed)}")
        return text and text.lower()

    return read


def _isolation(entry: Entry) -> str | None:
    if entry.value in (None, False, "none"):
        return None
    if entry.value not in ISOLATIONS:
        raise FrontmatterError(entry.line, f"isolation: expected one of {', '.join(ISOLATIONS)}")
    return str(entry.value)


def _sandbox(entry: Entry) -> str | None:
    if entry.value not in (None, "required"):
        raise FrontmatterError(entry.line, "sandbox: the only value is required; leave the key out for no sandbox")
    return None if entry.value is None else "required"


def _permission_mode(entry: Entry) -> str | None:
    mode = "default" if entry.value == "manual" else entry.value
    if mode is not None and mode not in PERMISSION_MODES:
        expected = ", ".join(PERMISSION_MODES)
        raise FrontmatterError(entry.line, f"permissionMode: {entry.value!r:.80} is not one of {expected}")
    return mode


def _tools(entry: Entry) -> tuple[str, ...] | None:
    tools = _tool_list(entry)
    return None if "*" in tools else tools


def _disallowed_tools(entry: Entry) -> tuple[str, ...]:
    tools = _tool_list(entry)
    if "*" in tools:
        raise FrontmatterError(entry.line, f"{entry.key}: '*' forbids every tool; write tools: [] instead")
    return tools


def _tool_list(entry: Entry) -> tuple[str, ...]:
    """The rules of a tool list, given as text or as a list. An empty value is an empty list, as in the CLI."""
    items = entry.value if isinstance(entry.value, list) else [entry.value or ""]
    tools: list[str] = []
    for item in items:
        if not isinstance(item, str):
            raise FrontmatterError(entry.line, f"{entry.key}: expected names of tools, not {item!r:.80}")
        tools += _split_tools(item, entry)
    return tuple(dict.fromkeys(tools))


def _split_tools(text: str, entry: Entry) -> list[str]:
    """Split at commas and blanks, but not inside parentheses: ``Bash(git log *), Read`` are two."""
    tools, depth, start = [], 0, 0
    text = text.strip().removeprefix("[").removesuffix("]")
    for position, char in enumerate(text + ","):
        depth += (char == "(") - (char == ")")
        if depth == 0 and (char == "," or char.isspace()):
            tools.append(text[start:position].strip("\"'"))
            start = position + 1
    if depth != 0:
        raise FrontmatterError(entry.line, f"{entry.key}: unbalanced parentheses in {text!r:.80}")
    wrong = next((tool for tool in tools if tool and tool != "*" and not _TOOL.fullmatch(tool)), None)
    if wrong is not None:
        raise FrontmatterError(entry.line, f"{entry.key}: {wrong!r:.80} is not the name of a tool")
    return [tool for tool in tools if tool]


def _names(entry: Entry) -> tuple[str, ...]:
    items = entry.value if isinstance(entry.value, list) else re.split(r"[,\n]", _text(entry) or "")
    if not all(isinstance(item, str) for item in items):
        raise UnusableValueError("expected a list of names")
    return tuple(item.strip() for item in items if item.strip())


def _mcp_servers(entry: Entry) -> dict[str, Any]:
    items = entry.value if isinstance(entry.value, list) else [entry.value or {}]
    servers = {key: value for item in items if isinstance(item, dict) for key, value in item.items()}
    usable = {key: value for key, value in servers.items() if isinstance(value, dict) and value}
    if len(usable) < len(servers) or not all(isinstance(item, dict) for item in items):
        raise UnusableValueError("servers need their configuration, not only a name", kept=usable)
    return usable


def _hooks(entry: Entry) -> dict[str, Any]:
    if entry.value is not None and not isinstance(entry.value, dict):
        raise FrontmatterError(entry.line, "hooks: expected a mapping of events to hooks")
    return entry.value or {}


class Field(NamedTuple):
    """Where a key's value is kept on the agent, how it is read, and whether it changes anything about runs.

    ``read`` raises UnusableValueError, or FrontmatterError to refuse the file.
    """

    attribute: str
    read: Callable[[Entry], Any]
    applied: bool = True


FIELDS: dict[str, Field] = {
    "name": Field("name", _text),
    "description": Field("description", _description),
    "tools": Field("tools", _tools),
    "disallowedTools": Field("disallowed_tools", _disallowed_tools),
    "model": Field("model", _model),
    "effort": Field("effort", _one_of(*EFFORTS)),
    "permissionMode": Field("permission_mode", _permission_mode),
    "maxTurns": Field("max_turns", _count),
    "mcpServers": Field("mcp_servers", _mcp_servers),
    "hooks": Field("hooks", _hooks, applied=False),
    "skills": Field("skills", _names, applied=False),
    "color": Field("color", _text),
    "memory": Field("memory", _one_of(*MEMORY_SCOPES), applied=False),
    "background": Field("background", _flag, applied=False),
    "isolation": Field("isolation", _isolation, applied=False),
    "initialPrompt": Field("initial_prompt", _text),
    "omitClaudeMd": Field("omit_claude_md", _flag, applied=False),
    "autoCompactWindow": Field("auto_compact_window", _count, applied=False),
    "observer": Field("observer", _text, applied=False),
    "observerMessage": Field("observer_message", _text, applied=False),
    "observeSubagents": Field("observe_subagents", _flag, applied=False),
    "cacheTtl": Field("cache_ttl", _text, applied=False),
    "sandbox": Field("sandbox", _sandbox),
}

VOCABULARY = Vocabulary(
    known=frozenset(FIELDS),
    prose=frozenset({"description", "initialPrompt", "observerMessage"}),
    guarded=frozenset({"tools", "disallowedTools", "permissionMode", "hooks", "isolation", "sandbox"}),
    aliases={"allowedtools": "tools"},  # the key of skills and commands, often met in agents
)


def remarks(key: str, value: Any) -> list[str]:
    """What a reader should know about a value that is accepted."""
    if key == "permissionMode" and value == "bypassPermissions":
        return ["permissionMode: bypassPermissions lets the agent do anything without being asked"]
    if key == "tools" and value == ():
        return ["tools: is empty, so the agent has no tools; leave the key out to allow every tool"]
    if key in ("tools", "disallowedTools"):
        return [remark for tool in value or () for remark in _tool_remarks(tool)]
    if value and not FIELDS[key].applied:
        return [f"{key}: is kept, but changes nothing about runs of the orchestrator"]
    return []


def _tool_remarks(tool: str) -> list[str]:
    name = tool.partition("(")[0]
    if name.lower() in _MISTAKEN_TOOLS:
        return [f"no tool is called {name!r}: {_MISTAKEN_TOOLS[name.lower()]}"]
    meant = _BUILT_IN_BY_LOWER.get(name.lower(), name)
    return [f"no tool is called {name!r}; did you mean {meant!r}?"] if meant != name else []
