"""How MCP clients are told of us: arguments of ``claude mcp add``, and what other clients have in their files."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER_NAME = "orchestrator"
#: The variable that an HTTP client takes the bearer token from.
TOKEN_VARIABLE = "ORCHESTRATOR_TOKEN"  # noqa: S105  # the variable's name, not a token
#: What Claude Code accepts as the name of a server, but for those that look like an option.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")

#: Tells the stdio shim which project it works for. Clients that are no terminals start it anywhere.
_PROJECT = "CLAUDE_PROJECT_DIR"
#: In seconds. ``delegate`` waits 100 s for an answer by default, and Codex gives a call 60 s.
_CODEX_TIMEOUT = 600


def own_command(executable: Path, environ: Mapping[str, str]) -> list[str]:
    """How to start ``orchestrator`` from anywhere, whatever PATH the starter has.

    That is the script beside the interpreter that runs us, else the one on PATH, else the interpreter itself.
    """
    script = executable.with_name("orchestrator")
    if os.access(script, os.X_OK) and script.is_file():
        return [str(script)]
    if found := shutil.which("orchestrator", path=environ.get("PATH", "")):
        return [str(Path(found).absolute())]
    return [str(executable), "-m", "orchestrator"]


def stdio_server(command: Sequence[str], **more: Any) -> dict[str, Any]:
    """A stdio server as clients write it down."""
    return {"command": command[0], "args": list(command[1:]), **more}


def add_stdio(name: str, scope: str, command: Sequence[str]) -> list[str]:
    """Arguments for ``claude`` that register a stdio server."""
    return ["mcp", "add", "--scope", scope, name, "--", *command]


def add_http(name: str, scope: str, url: str) -> list[str]:
    """Arguments for ``claude`` that register an HTTP server. The token itself is in none of them.

    Claude Code puts the variable's value in when it connects. The header comes last, because that option takes
    all words after it.
    """
    bearer = f"Authorization: Bearer ${{{TOKEN_VARIABLE}}}"
    return ["mcp", "add", "--scope", scope, "--transport", "http", name, url, "--header", bearer]


@dataclass(frozen=True, slots=True)
class Client:
    """A client whose file is edited by hand: where the file is, and what goes into it.

    ``render`` takes the command that starts the stdio shim, and the project directory.
    """

    title: str
    where: str
    render: Callable[[Sequence[str], Path], str]


def _vscode(command: Sequence[str], project: Path) -> str:  # noqa: ARG001  # it starts servers in the workspace
    return _json({"servers": {SERVER_NAME: {"type": "stdio", **stdio_server(command)}}})


def _cursor(command: Sequence[str], project: Path) -> str:  # noqa: ARG001  # it knows its project itself
    server = stdio_server(command, env={_PROJECT: "${workspaceFolder}"})
    return _json({"mcpServers": {SERVER_NAME: {"type": "stdio", **server}}})


def _claude_desktop(command: Sequence[str], project: Path) -> str:
    return _json({"mcpServers": {SERVER_NAME: stdio_server(command, env={_PROJECT: str(project)})}})


def _codex(command: Sequence[str], project: Path) -> str:  # noqa: ARG001  # it starts servers where it was started
    # A JSON string is a TOML string too, and so is a list of them.
    lines = [
        f"[mcp_servers.{SERVER_NAME}]",
        f"command = {_string(command[0])}",
        f"args = [{', '.join(map(_string, command[1:]))}]",
        f"tool_timeout_sec = {_CODEX_TIMEOUT}",
    ]
    return "\n".join(lines) + "\n"


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


CLIENTS: Mapping[str, Client] = {
    "vscode": Client(
        "VS Code",
        ".vscode/mcp.json of the project; for all projects: the command `MCP: Open User Configuration`",
        _vscode,
    ),
    "cursor": Client("Cursor", ".cursor/mcp.json of the project", _cursor),
    "claude-desktop": Client(
        "Claude Desktop",
        "claude_desktop_config.json (Settings > Developer > Edit Config), then restart it."
        "\n  macOS:   ~/Library/Application Support/Claude/claude_desktop_config.json"
        "\n  Windows: %APPDATA%\\Claude\\claude_desktop_config.json"
        "\n  Linux:   ~/.config/Claude/claude_desktop_config.json",
        _claude_desktop,
    ),
    "codex": Client("Codex", "~/.codex/config.toml", _codex),
}
