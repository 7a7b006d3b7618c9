"""Frontmatter of a markdown file: split it off and read it, with the line of every key. Pure.

Agent files are written by hand and by models, and a good part of them is not valid YAML: a description with
an unquoted ``user: "…"``, tabs, text that runs on unindented, a key given twice. Such a block is read a second
time, leniently, key by key, so that one bad value does not cost the others.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from orchestrator.yaml_lines import parse_yaml

MAX_CHARS = 64 * 1024
"""Longest frontmatter read, in characters: PyYAML is slow, and the reading is done between two events."""

MAX_OPEN_BRACKETS = 50
"""Most brackets open at once: PyYAML takes seconds for a thousand, and then exhausts the stack."""

_DELIMITER = re.compile(r"---[ \t]*")
_SEPARATORS = re.compile(r"[\s_-]")
# Loose on purpose, for it only reads what is not YAML: quoted keys, a list's dash, the full-width colon.
_KEY = re.compile(
    r"(?P<indent>[ \t-]*)[\"']?(?P<key>[A-Za-z][\w -]{0,40}?)[\"']?[ \t]*[:：](?P<rest>.*)", re.DOTALL
)
_BLOCK_MARKER = re.compile(r"[|>][-+0-9]*[ \t]*(\n|$)")
_COMMENT = re.compile(r"(^|[ \t]+)#.*$", re.MULTILINE)


class FrontmatterError(Exception):
    """The file cannot be used. ``line`` counts from 1; whoever knows the path puts it in front."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line = line
        self.reason = reason


class Entry(NamedTuple):
    """One top-level key. ``value`` is plain data, as in JSON."""

    key: str
    line: int
    value: Any


class Frontmatter(NamedTuple):
    """``entries`` in file order, a repeated key repeated; ``body`` without the blank lines around it."""

    entries: tuple[Entry, ...]
    body: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Vocabulary:
    """The keys of a file format, and which other spellings mean them.

    ``prose`` keys hold free text, in which a line like ``user: hello`` is no key. ``guarded`` keys restrict
    what an agent may do: to lose one silently would widen permissions. ``aliases`` maps other names, in lower
    case and without separators, to known keys.
    """

    known: frozenset[str]
    prose: frozenset[str]
    guarded: frozenset[str]
    aliases: Mapping[str, str]

    def canonical(self, key: str) -> str | None:
        """The known key that ``key`` spells, in other case or with hyphens perhaps, or None."""
        if key in self.known:
            return key
        same = {_squeeze(known): known for known in self.known} | dict(self.aliases)
        return same.get(_squeeze(key))

    def nearest(self, key: str) -> str | None:
        """The known key that ``key`` may be a misspelling of."""
        return _closest(key, self.known, cutoff=0.75)

    def nearest_guarded(self, key: str) -> str | None:
        """The guarded key that ``key`` means, or is most likely a misspelling of."""
        canonical = self.canonical(key)
        if canonical is not None:
            return canonical if canonical in self.guarded else None
        return _closest(key, self.guarded, cutoff=0.85)

    def starts_value(self, key: str, current: str | None) -> bool:
        """Whether ``key:`` at the start of a line begins a value, rather than going on with ``current``."""
        return current not in self.prose or key in self.known or self.nearest_guarded(key) is not None


def _squeeze(key: str) -> str:
    return _SEPARATORS.sub("", key.lower())


def _closest(key: str, known: Iterable[str], cutoff: float) -> str | None:
    same = {_squeeze(candidate): candidate for candidate in known}
    found = difflib.get_close_matches(_squeeze(key), same, n=1, cutoff=cutoff)
    return same[found[0]] if found else None


def read_frontmatter(text: str, vocabulary: Vocabulary) -> Frontmatter:
    """Read the frontmatter at the start of ``text``.

    Raises:
        FrontmatterError: there is none, it does not end, it is too large, or a guarded key may be lost in it.
    """
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    start, end = _block(lines)
    block = lines[start:end]
    if sum(map(len, block)) + len(block) > MAX_CHARS:
        raise FrontmatterError(start, f"the frontmatter is larger than {MAX_CHARS // 1024} KiB")
    warnings = [] if start == 1 else [f"line {start}: the frontmatter does not start on the first line"]
    try:
        entries = _read_strictly(block, start)
    except _NotYamlError as error:
        warnings.append(f"frontmatter is not valid YAML (line {error.line}: {error.reason}); read leniently")
        entries = _read_leniently(block, start, vocabulary)
    return Frontmatter(tuple(entries), "\n".join(lines[end + 1 :]).strip(), tuple(warnings))


def _block(lines: list[str]) -> tuple[int, int]:
    """Indices of the first line between the delimiters and of the closing one."""
    first = next((number for number, line in enumerate(lines) if line.strip()), None)
    if first is None or not _DELIMITER.fullmatch(lines[first]):
        raise FrontmatterError((first or 0) + 1, "no frontmatter: the file must start with a line ---")
    for number in range(first + 1, len(lines)):
        if _DELIMITER.fullmatch(lines[number]):
            return first + 1, number
    raise FrontmatterError(first + 1, "the frontmatter is not closed: end it with a line ---")


class _NotYamlError(Exception):
    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line
        self.reason = reason.removeprefix("not YAML: ").encode("utf-8", "backslashreplace").decode()


def _read_strictly(block: list[str], offset: int) -> list[Entry]:
    """Read ``block`` as one YAML mapping without problems; its first line is line ``offset + 1`` of the file."""
    text = "\n".join(block)
    if _open_brackets(text) > MAX_OPEN_BRACKETS:
        raise _NotYamlError(offset + 1, f"more than {MAX_OPEN_BRACKETS} brackets are open at once")
    try:
        parsed = parse_yaml(text)
        # half a character, as in "\ud800", is legal YAML but no text: nothing could store or send it
        json.dumps(parsed.data, ensure_ascii=False).encode()
    except (ValueError, OverflowError):
        raise _NotYamlError(offset + 1, "an escape stands for no character") from None
    for line, reason in parsed.problems:
        raise _NotYamlError(offset + min(line, max(len(block), 1)), reason)
    if parsed.data is None:
        return []
    if not isinstance(parsed.data, dict):
        raise _NotYamlError(offset + 1, "expected lines of `key: value`")
    return [Entry(key, offset + parsed.line((key,)), value) for key, value in parsed.data.items()]


def _open_brackets(text: str) -> int:
    """The most brackets that can be open at once in ``text``; those in strings are counted too."""
    steps = (1 if char in "[{" else -1 for char in re.findall(r"[][{}]", text))
    return max(accumulate(steps), default=0)


def _read_leniently(block: list[str], offset: int, vocabulary: Vocabulary) -> list[Entry]:
    """Cut the block at lines that start a key, and read each piece alone: as YAML if it is, else as text."""
    entries = []
    for first, piece in _pieces(block, vocabulary):
        try:
            entries += _read_strictly([_spaces_for_tabs(line) for line in piece], offset + first)
        except _NotYamlError:
            entries.append(_read_by_hand(piece, offset + first + 1, vocabulary))
    _refuse_swallowed(block, offset, entries, vocabulary)
    return entries


def _pieces(block: list[str], vocabulary: Vocabulary) -> list[tuple[int, list[str]]]:
    """``(index of the first line, lines)`` of each key. Lines before the first key are dropped."""
    pieces: list[tuple[int, list[str]]] = []
    current: str | None = None
    for number, line in enumerate(block):
        match = _KEY.fullmatch(line)
        if match and not match["indent"] and vocabulary.starts_value(match["key"], current):
            current = vocabulary.canonical(match["key"]) or match["key"]
            pieces.append((number, [line]))
        elif pieces:
            pieces[-1][1].append(line)
    return pieces


def _spaces_for_tabs(line: str) -> str:
    body = line.lstrip("\t")
    return "  " * (len(line) - len(body)) + body


def _read_by_hand(piece: list[str], line: int, vocabulary: Vocabulary) -> Entry:
    match = _KEY.fullmatch("\n".join([piece[0], *(rest.strip() for rest in piece[1:])]))
    assert match is not None  # every piece starts with a line that matched
    key, text = match["key"], match["rest"].strip()
    if vocabulary.canonical(key) not in vocabulary.prose:
        text = _COMMENT.sub("", text).strip()
    text = _BLOCK_MARKER.sub("", text, count=1) if _BLOCK_MARKER.match(text) else text
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    return Entry(key, line, text or None)


def _refuse_swallowed(block: list[str], offset: int, entries: list[Entry], vocabulary: Vocabulary) -> None:
    """Refuse a guarded key that may have become part of another value, because its line is indented.

    ``description: x`` followed by an indented ``tools: Read`` would give the agent every tool.
    """
    read = {vocabulary.canonical(entry.key) for entry in entries}
    for number, line in enumerate(block):
        match = _KEY.fullmatch(line)
        guarded = vocabulary.nearest_guarded(match["key"]) if match and match["indent"] else None
        if match and guarded is not None and guarded not in read:
            reason = f"cannot tell whether {match['key']!r} is a key or text: start the line with it, or quote"
            raise FrontmatterError(offset + number + 1, f"{reason} the value it stands in")
