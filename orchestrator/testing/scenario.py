"""What the scripted model server says, and how it chooses: replies, faults, rules. No I/O."""

import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt
from pydantic import model_validator as validator
from pydantic.dataclasses import dataclass as checked

from orchestrator.testing.request import Request

# A misspelt key is a mistake, not a comment.
_STRICT = ConfigDict(extra="forbid")

# Strict, because YAML's `times: true` is a mistake too, and not a 1.
Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]
Seconds = Annotated[float, Field(strict=True, ge=0)]

FAULT_POSITIONS = ("stall_at", "truncate_at", "reset_at", "malformed_at", "error_at")


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


Regex = Annotated[str, AfterValidator(_compiles)]
Headers = dict[str, str | StrictInt | StrictFloat]


@checked(frozen=True, config=_STRICT)
class Usage:
    """Tokens a reply reports. The API counts cached tokens beside ``input``, not inside it."""

    input: Count = 100
    output: Count = 5
    cache_read: Count = 0
    cache_write_5m: Count = 0
    cache_write_1h: Count = 0


@checked(frozen=True, config=_STRICT)
class Text:
    """A text block: ``text``, ``repeat`` times over."""

    text: str
    repeat: Positive = 1


@checked(frozen=True, config=_STRICT)
class Thinking:
    """A thinking block. The signature is opaque to clients, which send it back as it is."""

    text: str
    signature: str = "c2lnbmVkLW9mZmxpbmU="


@checked(frozen=True, config=_STRICT)
class ToolUse:
    """A call of a tool. An ``input`` given as a string goes out as it is, to test JSON that is broken.

    Without ``id`` the server makes one: ``toolu_offline_NNNN_K`` for block K of request NNNN.
    """

    name: str
    input: dict[str, Any] | str = field(default_factory=dict)
    id: str | None = None


Block = Text | Thinking | ToolUse


@checked(frozen=True, config=_STRICT)
class Fault:
    """One thing that goes wrong. Exactly one kind: an HTTP answer, or a break in the stream.

    HTTP answer: ``status`` and ``headers`` with the API's error envelope made of ``error_type`` (default: what
    the API uses for that status) and ``message``; or any ``body`` with its ``content_type`` (status 200 unless
    given).

    Break in the stream: ``*_at`` is how many good events go out first, with ``message_start`` the first:
    ``stall_at``: then nothing, until the client leaves; ``truncate_at``: then the connection is closed in the
    middle of the body; ``reset_at``: then a TCP reset, with 0 before the response head; ``malformed_at``: then
    one event of broken JSON in place of the next; ``error_at``: then an ``error`` event, the last. For a
    request without streaming the body counts as two events, and ``error_at`` gives the HTTP status of
    its ``error_type`` (500 for any other).
    """

    status: Annotated[int, Field(strict=True, ge=200, le=599)] | None = None
    headers: Headers = field(default_factory=dict)
    error_type: str | None = None
    message: str | None = None
    body: str | None = None
    content_type: str = "text/html"
    stall_at: Count | None = None
    truncate_at: Count | None = None
    reset_at: Count | None = None
    malformed_at: Count | None = None
    error_at: Count | None = None

    @validator(mode="after")
    def _is_one_kind(self) -> Self:
        kinds = [name for name in FAULT_POSITIONS if getattr(self, name) is not None]
        if self.is_http:
            kinds.append("status" if self.status is not None else "body")
        if len(kinds) != 1:
            given = " and ".join(kinds) or "none"
            raise ValueError(f"a fault is one of status, body, {', '.join(FAULT_POSITIONS)}; given: {given}")
        if self.body is None and self.status is not None and self.status < 400:
            raise ValueError(f"status {self.status} is no error; give a body with it")
        return self

    @property
    def is_http(self) -> bool:
        """True if the fault is a whole HTTP answer rather than a break in a stream."""
        return self.status is not None or self.body is not None


Content = str | Block | Sequence[str | Block]


@checked(frozen=True, config=_STRICT)
class Reply:
    """What the model says to one request.

    ``content`` is a text, a block, or several. ``stop_reason`` defaults to ``tool_use`` if a tool is called,
    else ``end_turn``. ``delay_s`` seconds pass before the response head, ``event_delay_s`` before each event
    after the first. Texts are streamed in ``chunks`` pieces (default 2), or in pieces of ``chunk_size``
    characters. ``headers`` are added to the response.
    """

    content: Content = "ok"
    usage: Usage = field(default_factory=Usage)
    stop_reason: str | None = None
    delay_s: Seconds = 0.0
    event_delay_s: Seconds = 0.0
    chunks: Positive | None = None
    chunk_size: Positive | None = None
    headers: Headers = field(default_factory=dict)
    fault: Fault | None = None

    @validator(mode="after")
    def _has_one_chunking(self) -> Self:
        if self.chunks is not None and self.chunk_size is not None:
            raise ValueError("give chunks (how many) or chunk_size (characters), not both")
        return self

    @property
    def blocks(self) -> list[Block]:
        """The content as a list of blocks."""
        parts = [self.content] if isinstance(self.content, str | Block) else self.content
        return [Text(part) if isinstance(part, str) else part for part in parts]


Answer = Reply | str | Block | None
Handler = Callable[[Request], Answer | Awaitable[Answer]]


def as_reply(answer: Reply | str | Block) -> Reply:
    """A reply; a text or a block stands for a reply of just that."""
    return answer if isinstance(answer, Reply) else Reply(answer)


@checked(frozen=True, config=_STRICT)
class When:
    """Conditions on a request; all that are given must hold. Regular expressions are searched, not anchored.

    * ``user``, ``user_contains``: on the last user text (regular expression, substring)
    * ``system``, ``model``: on the system text, on the model's name
    * ``tool_result``: True if the last user message carries tool results, False if none, or a regular
      expression one of them must match
    * ``tools``: names that must be on offer
    * ``headers``: lower- or mixed-case name to regular expression; a missing header does not match
    * ``history``: on any text before the last user message
    * ``stream``: whether the answer is wanted as a stream
    * ``nth``: which matches of this rule are answered, counted from 1; the others go on to later rules
    """

    user: Regex | None = None
    user_contains: str | None = None
    system: Regex | None = None
    model: Regex | None = None
    tool_result: StrictBool | Regex | None = None
    tools: list[str] = field(default_factory=list)
    headers: dict[str, Regex] = field(default_factory=dict)
    history: Regex | None = None
    stream: StrictBool | None = None
    nth: Positive | Annotated[list[Positive], Field(min_length=1)] | None = None

    def match(self, request: Request) -> dict[str, str] | None:
        """Named groups of the regular expressions if the request fits (``nth`` aside), else None."""
        if not self._fits(request):
            return None
        groups: dict[str, str] = {}
        for pattern, texts in self._searches(request):
            found = next((m for m in (re.search(pattern, text) for text in texts) if m), None)
            if found is None:
                return None
            groups |= found.groupdict(default="")
        return groups

    def patterns(self) -> list[str]:
        """Every regular expression of these conditions."""
        fields = [self.user, self.system, self.model, self.tool_result, self.history, *self.headers.values()]
        return [pattern for pattern in fields if isinstance(pattern, str)]

    def answers(self, nth_match: int) -> bool:
        """Whether the match of that number, counted from 1, is one to answer."""
        wanted = [self.nth] if isinstance(self.nth, int) else self.nth
        return wanted is None or nth_match in wanted

    def _fits(self, request: Request) -> bool:
        return (
            (self.user_contains is None or self.user_contains in request.last_user_text)
            and (not isinstance(self.tool_result, bool) or self.tool_result == bool(request.tool_results))
            and set(self.tools) <= set(request.tools)
            and self.stream in (None, request.stream)
        )

    def _searches(self, request: Request) -> Iterator[tuple[str, list[str]]]:
        subjects: list[tuple[Any, list[str]]] = [
            (self.user, [request.last_user_text]),
            (self.system, [request.system]),
            (self.model, [request.model]),
            (self.tool_result, [result.text for result in request.tool_results]),
            (self.history, request.earlier_texts),
        ]
        for name, pattern in self.headers.items():
            subjects.append((pattern, [request.headers[key] for key in [name.lower()] if key in request.headers]))
        yield from ((pattern, texts) for pattern, texts in subjects if isinstance(pattern, str))


@dataclass(frozen=True, eq=False)
class Rule:
    """Answers requests that fit ``when`` (a ``When``, its fields as a mapping, or a function) with ``reply``.

    ``reply`` is a reply (a text or a block stands for one); a sequence of replies, for the first answer, the
    second and so on, of which the last is repeated; or a function of the request, sync or async, whose None
    passes the request on to the next rule. ``{{ … }}`` templates are filled in for replies given as data, not
    for what a function returns. ``times`` is how many answers the rule has; None means no end.

    Raises:
        ValueError: a condition is malformed, ``times`` is below 1, or a sequence of replies is empty.
    """

    reply: Reply | str | Block | Sequence[Reply | str | Block] | Handler
    when: When | Mapping[str, Any] | Callable[[Request], bool] | None = None
    times: int | None = None
    name: str | None = None
    conditions: When | Callable[[Request], bool] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        when = self.when
        conditions = when if isinstance(when, When) or callable(when) else When(**(when or {}))
        object.__setattr__(self, "conditions", conditions)
        if self.times is not None and self.times < 1:
            raise ValueError(f"times is {self.times}; a rule answers at least once")
        if isinstance(self.reply, Sequence) and not self.reply:
            raise ValueError("the sequence of replies is empty")

    def match(self, request: Request) -> dict[str, str] | None:
        """Named groups if the request fits, else None."""
        if isinstance(self.conditions, When):
            return self.conditions.match(request)
        return {} if self.conditions(request) else None

    def answers(self, tally: "Tally") -> bool:
        """Whether the rule answers the match just counted in ``tally``."""
        if self.times is not None and tally.answered >= self.times:
            return False
        return not isinstance(self.conditions, When) or self.conditions.answers(tally.matched)

    def reply_number(self, position: int) -> Reply | Handler:
        """The reply for answer ``position``, counted from 0."""
        if isinstance(self.reply, str | Reply | Block):
            return as_reply(self.reply)
        if isinstance(self.reply, Sequence):
            return as_reply(self.reply[min(position, len(self.reply) - 1)])
        return self.reply


@dataclass(frozen=True)
class Scenario:
    """Rules, tried in order, and the name that error messages call them by."""

    rules: Sequence[Rule]
    name: str = "the scenario"


@dataclass
class Tally:
    """How often a rule has matched and answered on one server."""

    matched: int = 0
    answered: int = 0


@dataclass(frozen=True)
class Choice:
    """A rule's answer to a request, with what its templates may use."""

    rule: Rule
    reply: Reply | Handler
    groups: Mapping[str, str]
    n: int


def choices(rules: Iterable[Rule], request: Request, tallies: dict[Rule, Tally]) -> Iterator[Choice]:
    """The rules that answer ``request``, first to last; taking one counts it in ``tallies``."""
    for rule in list(rules):
        groups = rule.match(request)
        if groups is None:
            continue
        tally = tallies.setdefault(rule, Tally())
        tally.matched += 1
        if rule.answers(tally):
            tally.answered += 1
            yield Choice(rule, rule.reply_number(tally.answered - 1), groups, tally.matched)


def as_scenario(source: Scenario | Sequence[Rule] | Handler) -> Scenario:
    """A scenario out of its short forms: a list of rules, or one function that answers everything."""
    if isinstance(source, Scenario):
        return source
    return Scenario(source) if isinstance(source, Sequence) else Scenario([Rule(source)], name="the function")
