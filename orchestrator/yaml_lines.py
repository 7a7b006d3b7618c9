"""YAML in which every value knows its line, for loaders whose messages name ``file:line``.

The data is what JSON can say, read by the rules of YAML 1.2: ``on``, ``no`` and ``2026-01-01`` are strings, as
the author meant them, and not the booleans and dates of YAML 1.1. Duplicate keys are refused, because one of
the two would be lost silently. Aliases are followed; merge keys and explicit types are not supported.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import yaml

#: Where a value is: keys of mappings and positions in lists, from the top.
KeyPath = tuple[str | int, ...]

#: Aliases of aliases grow exponentially; no file written by hand comes near this many values.
MAX_VALUES = 200_000

_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class YamlLines:
    """A parsed document. ``problems`` are ``(line, text)`` pairs; with a syntax error, ``data`` is None.

    Lines count from 1. Where a key is repeated, the first value is kept and the repetition is a problem.
    """

    data: Any
    problems: tuple[tuple[int, str], ...]
    _keys: Mapping[KeyPath, int]
    _texts: Mapping[KeyPath, int]

    def line(self, path: Sequence[str | int]) -> int:
        """The line of the key or list item at ``path``, or of the nearest one above it that exists."""
        here = tuple(path)
        while here and here not in self._keys:
            here = here[:-1]
        return self._keys.get(here, 1)

    def text_line(self, path: Sequence[str | int], line: int = 1) -> int:
        """The file's line of line ``line`` of the string at ``path``: exact in plain and ``|`` strings."""
        start = self._texts.get(tuple(path))
        return self.line(path) if start is None else start + line - 1


def parse_yaml(text: str) -> YamlLines:
    """Parse one YAML document. Never raises for what the text holds: see ``YamlLines.problems``."""
    reader = _Reader()
    try:
        node = yaml.compose(text, Loader=_Loader)
        data = None if node is None else reader.value(node, ())
    except yaml.MarkedYAMLError as error:
        reader.problem(_mark_line(error), _syntax_text(error))
        data = None
    except yaml.YAMLError as error:  # a character YAML does not allow: it has a position and no mark
        position = getattr(error, "position", 0)
        reader.problem(text.count("\n", 0, position) + 1, f"not YAML: {str(error).splitlines()[0]}")
        data = None
    except RecursionError:
        reader.problem(1, "the document is nested too deeply")
        data = None
    return YamlLines(data, tuple(reader.problems), reader.keys, reader.texts)


class _Loader(yaml.SafeLoader):
    """Only composes nodes; recognises plain scalars by YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  PyYAML's own shape


_PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
}
for _name, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), _first)


class _Refused(yaml.MarkedYAMLError):
    """Something YAML allows and we do not."""


@dataclass
class _Reader:
    """Turns nodes into data, remembering lines."""

    problems: list[tuple[int, str]] = field(default_factory=list)
    keys: dict[KeyPath, int] = field(default_factory=dict)
    texts: dict[KeyPath, int] = field(default_factory=dict)
    _values: int = 0
    _open: list[yaml.Node] = field(default_factory=list)

    def problem(self, line: int, text: str) -> None:
        self.problems.append((line, text))

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            raise _refused("the document has too many values: do its aliases repeat each other?", node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if any(node is above for above in self._open):
            raise _refused("an alias may not contain itself", node)
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            return self._list(node, path)
        finally:
            self._open.pop()

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        value = _plain_value(node)
        if isinstance(value, str):
            # The text of a block scalar begins on the line after its `|` or `>`.
            block = node.style in ("|", ">")
            self.texts[path] = node.start_mark.line + (2 if block else 1)
        return value

    def _list(self, node: yaml.Node, path: KeyPath) -> list[Any]:
        _require_tag(node, "seq")
        values = []
        for position, child in enumerate(node.value):
            self.keys[*path, position] = _line(child)
            values.append(self.value(child, (*path, position)))
        return values

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        _require_tag(node, "map")
        values: dict[str, Any] = {}
        for key, child in self._pairs(node):
            here = (*path, key.value)
            if key.value in values:
                first = self.keys[here]
                self.problem(_line(key), f"duplicate key '{key.value}': it is already given on line {first}")
                continue
            self.keys[here] = _line(key)
            values[key.value] = self.value(child, here)
        return values

    def _pairs(self, node: yaml.MappingNode) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
        for key, child in node.value:
            if _is_text_key(key):
                yield key, child
            else:
                self.problem(_line(key), _bad_key(key))


def _is_text_key(key: yaml.Node) -> TypeGuard[yaml.ScalarNode]:
    return isinstance(key, yaml.ScalarNode) and key.tag == f"{_TAG}str" and not _is_merge(key)


def _is_merge(key: yaml.ScalarNode) -> bool:
    return key.value == "<<" and key.style is None


def _bad_key(key: yaml.Node) -> str:
    if isinstance(key, yaml.MappingNode):
        return 'a key must be a string; a template has to be quoted: "{{ … }}"'
    if isinstance(key, yaml.ScalarNode) and _is_merge(key):
        return "merge keys (<<) are not supported: write the keys out"
    written = key.value if isinstance(key, yaml.ScalarNode) else "a list"
    return f"a key must be a string: put {written} in quotes"


def _plain_value(node: yaml.ScalarNode) -> Any:
    kind, text = node.tag.removeprefix(_TAG), str(node.value)
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind not in ("int", "float"):
        raise _refused(f"the type {node.tag} is not supported", node)
    try:
        return _number(kind, text)
    except ValueError:  # an explicit tag on something else, or more digits than Python converts
        raise _refused(f"this is not a number that can be read: {text[:40]}", node) from None


def _number(kind: str, text: str) -> int | float:
    if kind == "float":
        return float(text)
    return int(text, 0 if text.startswith(("0x", "0o")) else 10)


def _require_tag(node: yaml.Node, kind: str) -> None:
    if node.tag != f"{_TAG}{kind}":
        raise _refused(f"the type {node.tag} is not supported", node)


def _refused(text: str, node: yaml.Node) -> _Refused:
    return _Refused(problem=text, problem_mark=node.start_mark)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _mark_line(error: yaml.MarkedYAMLError) -> int:
    mark = error.problem_mark or error.context_mark
    return 1 if mark is None else int(mark.line) + 1


def _syntax_text(error: yaml.MarkedYAMLError) -> str:
    if isinstance(error, _Refused):
        return str(error.problem)
    return "not YAML: " + ", ".join(part for part in (error.context, error.problem) if part)
