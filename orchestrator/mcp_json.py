"""Adding a server to the text of a client's JSON file, with everything else in it left as it stands.

Parsing and writing anew would reformat a file that people edit and review, so text is put in at one place.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import ConfigError

SERVERS = "mcpServers"

_BOM = "\ufeff"
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")


def servers_in(text: str, where: str) -> Mapping[str, Any]:
    """The servers that the file names; none for an empty file. ``where`` names the file in errors.

    Raises ConfigError with line and column if it is not JSON, or not of the form such files have.
    """
    body = text.removeprefix(_BOM)
    if not body.strip():
        return {}
    try:
        tree = json.loads(body)
    except json.JSONDecodeError as error:
        raise _broken(f"{where}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise _broken(f"{where}: nested too deeply") from None
    if not isinstance(tree, dict):
        raise _broken(f"{where}:1:1: must be an object with {SERVERS!r}, not {type(tree).__name__}")
    servers = tree.get(SERVERS, {})
    if not isinstance(servers, dict):
        raise _broken(f"{where}:{_line_of(body, SERVERS)}: {SERVERS!r} must be an object")
    return servers


def with_server(text: str, name: str, server: Mapping[str, Any], where: str) -> str:
    """``text`` with one more server; as it is if the name is taken. Raises ConfigError like ``servers_in``."""
    if name in servers_in(text, where):
        return text
    body = text.removeprefix(_BOM)
    if not body.strip():
        return json.dumps({SERVERS: {name: server}}, indent=2, ensure_ascii=False) + "\n"
    root = _skip(body, 0)
    # The last one counts, as for everyone who reads the file.
    holder = next((m for m in reversed(_object(body, root).members) if m.key == SERVERS), None)
    place = (root, SERVERS, {name: server}) if holder is None else (holder.value, name, server)
    added = _put(body, *place)
    return text[: len(text) - len(body)] + added


@dataclass(frozen=True, slots=True)
class _Member:
    """A member of an object: its key, and where in the text key and value begin and the value ends."""

    key: str
    start: int
    value: int
    end: int


@dataclass(frozen=True, slots=True)
class _Object:
    """An object in the text: its members, and where its closing brace is."""

    members: list[_Member]
    close: int


def _object(text: str, start: int) -> _Object:
    """The object whose brace is at ``start`` of a text known to be JSON."""
    members = []
    at = _skip(text, start + 1)
    while text[at] != "}":
        key, end = _DECODER.raw_decode(text, at)
        value = _skip(text, _skip(text, end) + 1)
        end = _DECODER.raw_decode(text, value)[1]
        members.append(_Member(key, at, value, end))
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return _Object(members, at)


def _put(text: str, start: int, key: str, value: Any) -> str:
    """The text with a member added at the end of the object at ``start``, in the style of its neighbours."""
    found = _object(text, start)
    newline = "\r\n" if "\r\n" in text else "\n"
    if not found.members and _in_one_line(text):
        return f"{text[: start + 1]}{json.dumps({key: value}, ensure_ascii=False)[1:-1]}{text[found.close :]}"
    if not found.members:
        outer = _indent(text, start)
        member = _rendered(key, value, outer + _unit(text), _unit(text), newline)
        return f"{text[: start + 1]}{newline}{member}{newline}{outer}{text[found.close :]}"
    last = found.members[-1]
    if not _first_on_its_line(text, last.start):
        member = f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
        return f"{text[: last.end]}, {member}{text[last.end :]}"
    member = _rendered(key, value, _indent(text, last.start), _unit(text), newline)
    return f"{text[: last.end]},{newline}{member}{text[last.end :]}"


def _rendered(key: str, value: Any, indent: str, unit: str, newline: str) -> str:
    lines = f"{json.dumps(key)}: {json.dumps(value, indent=unit, ensure_ascii=False)}".split("\n")
    return newline.join(indent + line for line in lines)


def _in_one_line(text: str) -> bool:
    """Whether the file's own members stand beside each other."""
    members = _object(text, _skip(text, 0)).members
    return bool(members) and not _first_on_its_line(text, members[0].start)


def _unit(text: str) -> str:
    """What the file indents by; two spaces where nothing shows it."""
    members = _object(text, _skip(text, 0)).members
    if not members or _in_one_line(text):
        return "  "
    return _indent(text, members[0].start) or "  "


def _indent(text: str, at: int) -> str:
    """The white space that begins the line of ``at``."""
    begin = _line_begin(text, at)
    return re.match(r"[ \t]*", text[begin:at])[0]  # type: ignore[index]  # it matches nothing at least


def _first_on_its_line(text: str, at: int) -> bool:
    begin = _line_begin(text, at)
    return begin > 0 and not text[begin:at].strip()


def _line_begin(text: str, at: int) -> int:
    return text.rfind("\n", 0, at) + 1


def _skip(text: str, at: int) -> int:
    """Past white space."""
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _line_of(text: str, key: str) -> int:
    members = _object(text, _skip(text, 0)).members
    start = next(m.start for m in reversed(members) if m.key == key)
    return text.count("\n", 0, start) + 1


def _broken(message: str) -> ConfigError:
    return ConfigError(message, advice="Correct the file there; nothing was written.")
