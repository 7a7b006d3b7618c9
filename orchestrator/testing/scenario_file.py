"""Scenarios written as YAML: read, checked, and every problem reported with its line."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from orchestrator.errors import ScenarioError
from orchestrator.testing import template
from orchestrator.testing.scenario import (
    Block,
    Fault,
    Headers,
    Positive,
    Reply,
    Rule,
    Scenario,
    Seconds,
    Text,
    Thinking,
    ToolUse,
    Usage,
    When,
)
from orchestrator.yaml_lines import KeyPath, YamlLines, parse_yaml


def _check_templates(value: Any) -> Any:
    def check(text: str) -> str:
        template.check(text)
        return text

    return template.map_strings(value, check)


Templated = Annotated[str, AfterValidator(_check_templates)]


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _TextKeys(_Keys):
    text: Templated
    repeat: Positive = 1

    def block(self) -> Block:
        return Text(self.text, self.repeat)


class _ThinkingKeys(_Keys):
    thinking: Templated
    signature: str | None = None

    def block(self) -> Block:
        return Thinking(self.thinking) if self.signature is None else Thinking(self.thinking, self.signature)


class _ToolKeys(_Keys):
    tool: str
    input: Annotated[dict[str, Any] | str, AfterValidator(_check_templates)] = Field(default_factory=dict)
    id: str | None = None

    def block(self) -> Block:
        return ToolUse(self.tool, self.input, self.id)


def _block_kind(block: Any) -> str:
    if isinstance(block, Mapping):
        return next((f"{kind} block" for kind in ("tool", "thinking") if kind in block), "text block")
    return "text block"


def _as_block(item: Any) -> Any:
    return {"text": item} if isinstance(item, str) else item


def _as_list(content: Any) -> Any:
    return content if isinstance(content, list) else [content]


_BlockKeys = Annotated[
    Annotated[_TextKeys, Tag("text block")]
    | Annotated[_ThinkingKeys, Tag("thinking block")]
    | Annotated[_ToolKeys, Tag("tool block")],
    Discriminator(_block_kind),
    BeforeValidator(_as_block),
]


class _Defaults(_Keys):
    usage: Usage | None = None
    delay_s: Seconds | None = None
    event_delay_s: Seconds | None = None
    chunks: Positive | None = None
    chunk_size: Positive | None = None
    headers: Headers | None = None

    @model_validator(mode="after")
    def _has_one_chunking(self) -> Self:
        if self.chunks is not None and self.chunk_size is not None:
            raise ValueError("give chunks (how many) or chunk_size (characters), not both")
        return self

    def given(self) -> dict[str, Any]:
        """The keys of ``Reply`` that were written."""
        names = {field.name for field in fields(Reply)} & self.model_fields_set
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class _ReplyKeys(_Defaults):
    reply: Annotated[list[_BlockKeys], BeforeValidator(_as_list)] | None = None
    stop_reason: str | None = None
    fault: Fault | None = None

    def build(self, defaults: Mapping[str, Any]) -> Reply:
        given = self.given()
        # Of the two ways to cut texts a reply's own replaces a default of the other kind.
        cut = {"chunks", "chunk_size"}
        kept = {k: v for k, v in defaults.items() if not (k in cut and cut & given.keys())}
        if self.reply is not None:
            given["content"] = [block.block() for block in self.reply]
        return Reply(**{**kept, **given})

    def says_something(self) -> bool:
        return self.reply is not None or self.fault is not None

    def groups(self) -> set[str]:
        """Named groups that the templates of the reply use."""
        found: set[str] = set()

        def collect(text: str) -> str:
            found.update(template.check(text))
            return text

        template.map_strings([block.model_dump() for block in self.reply or ()], collect)
        return found


class _SequenceKeys(_ReplyKeys):
    times: Positive = 1

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if not self.says_something():
            raise ValueError("says nothing; give reply or fault")
        return self


class _RuleKeys(_ReplyKeys):
    name: str | None = None
    when: When = Field(default_factory=When)
    replies: Annotated[list[_SequenceKeys], Field(min_length=1)] | None = None
    times: Positive | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.replies is not None:
            if self.given() or self.reply is not None:
                raise ValueError("replies stands alone: move reply, fault and their settings into its entries")
        elif not self.says_something():
            raise ValueError("the rule says nothing; give reply, replies or fault")
        return self

    @model_validator(mode="after")
    def _groups_exist(self) -> Self:
        known = {name for pattern in self.when.patterns() for name in re.compile(pattern).groupindex}
        used = set[str]().union(*(part.groups() for part in [self, *(self.replies or ())]))
        if missing := sorted(used - known):
            names = ", ".join(f"match.{name}" for name in missing)
            have = ", ".join(sorted(known)) or "none"
            raise ValueError(f"template uses {names}, which no condition names as (?P<…>); named groups: {have}")
        return self

    def build_rule(self, defaults: Mapping[str, Any]) -> Rule:
        if self.replies is None:
            return Rule(self.build(defaults), self.when, self.times, self.name)
        sequence = [part.build(defaults) for part in self.replies for _ in range(part.times)]
        return Rule(sequence, self.when, self.times, self.name)


class _FileKeys(_Keys):
    version: Literal[1]
    defaults: _Defaults = Field(default_factory=_Defaults)
    rules: Annotated[list[_RuleKeys], Field(min_length=1)]


def _keys_of(model: type[Any]) -> list[str]:
    return list(model.model_fields) if issubclass(model, BaseModel) else [field.name for field in fields(model)]


# Which keys are possible below a key, to suggest the one that was meant.
_KNOWN_KEYS: dict[str, list[str]] = {
    "": _keys_of(_FileKeys),
    "defaults": _keys_of(_Defaults),
    "rules": _keys_of(_RuleKeys),
    "replies": _keys_of(_SequenceKeys),
    "reply": [*_keys_of(_TextKeys), *_keys_of(_ThinkingKeys), *_keys_of(_ToolKeys)],
    "usage": _keys_of(Usage),
    "fault": _keys_of(Fault),
    "when": _keys_of(When),
}


def load_scenario(path: str | Path) -> Scenario:
    """The scenario in a YAML file. docs/testing.md describes the format.

    Raises:
        ScenarioError: the file cannot be read, or is wrong; ``details["problems"]`` lists every problem as
            ``file:line: reason``.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _refusal(str(path), [f"{path}:1: cannot be read: {error}"]) from error
    return parse_scenario(text, str(path))


def parse_scenario(text: str, source: str = "<scenario>") -> Scenario:
    """The scenario in a YAML text; ``source`` names it in messages.

    Raises:
        ScenarioError: as ``load_scenario``.
    """
    document = parse_yaml(text)
    problems = list(document.problems)
    # After a syntax error there is no data, and nothing more to say about it.
    if document.data is not None or not problems:
        try:
            file = _FileKeys.model_validate(document.data)
        except ValidationError as error:
            problems += _located(error.errors(), document)
    if problems:
        raise _refusal(source, [f"{source}:{line}: {reason}" for line, reason in sorted({*problems})])
    defaults = file.defaults.given()
    return Scenario([rule.build_rule(defaults) for rule in file.rules], name=source)


def _refusal(source: str, problems: list[str]) -> ScenarioError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    listing = "\n".join(f"  {problem}" for problem in problems)
    return ScenarioError(f"{source} is no usable scenario: {count}\n{listing}", details={"problems": problems})


def _located(errors: Sequence[ErrorDetails], document: YamlLines) -> Iterator[tuple[int, str]]:
    """Line and reason, in the words of the file, of each of pydantic's errors.

    Where several types are possible pydantic tells what is wrong for each of them. If a value is of one of the
    types and wrong in itself, only that is worth telling.
    """
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        by_path.setdefault(_path_in(document.data, error["loc"]), []).append(error)
    for path, here in by_path.items():
        of_value = [error for error in here if not error["type"].endswith("_type")]
        for error in of_value or here[:1]:
            yield document.line(path), _reason(error, path)


def _path_in(data: Any, loc: KeyPath) -> KeyPath:
    """``loc`` without the steps that only pydantic knows: names of union members, lists made of one item."""
    path: list[str | int] = []
    for step in loc:
        if not _has(data, step):
            continue
        data = data[step]
        path.append(step)
    return tuple(path)


def _has(data: Any, step: str | int) -> bool:
    if isinstance(data, Mapping):
        return step in data
    return isinstance(data, list) and isinstance(step, int) and step < len(data)


def _reason(problem: ErrorDetails, path: KeyPath) -> str:
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return _unknown_key(path)
    if problem["type"] == "missing":
        return f"{problem['loc'][-1]!r} is missing"
    if problem["type"] in ("model_type", "dataclass_type"):
        return f"{_dotted(path) or 'a scenario'} is a mapping of keys to values"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{_dotted(path)}: {message}" if path else message


def _unknown_key(path: KeyPath) -> str:
    key = str(path[-1])
    parent = next((str(step) for step in reversed(path[:-1]) if isinstance(step, str)), "")
    known = _KNOWN_KEYS.get(parent, [])
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(dict.fromkeys(known))}"
    return f"unknown key {key!r}; {hint}"


def _dotted(path: KeyPath) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
