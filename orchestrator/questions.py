"""What a CLI asks while it works and what it is told: permission prompts, and the agent's own questions. All pure.

Whatever is not clearly allowed is denied, and a call that is allowed stays as it was asked for: the one thing an
answer can add to it are the answers to the agent's questions.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import anyio

from orchestrator.errors import QuestionError
from orchestrator.message_types import ControlRequest

Kind = Literal["permission", "question"]
#: What becomes of a question: denied at once, or put to whoever delegated.
Policy = Literal["deny", "ask"]

#: The tool with which an agent asks something of its own accord.
ASK_TOOL = "AskUserQuestion"
#: So much of a call is shown to whoever decides on it, in characters; what was cut is said.
INPUT_CHARS = 20_000

_DO_WITHOUT = "Do without this tool, or say in your answer what you needed it for."
#: Said to the CLI when its run is stopped; it then ends the turn.
STOPPED: Mapping[str, Any] = {"behavior": "deny", "message": "The run is being stopped.", "interrupt": True}


@dataclass(frozen=True, slots=True)
class Choice:
    """One thing to decide in a question of an agent. Answers need not be among the ``labels``.

    ``descriptions`` are as many as ``labels``; with ``several``, more than one label may be chosen.
    """

    question: str
    header: str
    labels: tuple[str, ...]
    descriptions: tuple[str, ...]
    several: bool


@dataclass(frozen=True, slots=True)
class Question:
    """Something the CLI of a run waits to be told.

    ``permission`` is about one call of a tool, exactly the one with this ``input``; ``question`` is the agent's
    own, with one choice of ``options`` or more. ``text`` says it to people and models. ``asked_us`` is in
    microseconds since 1970.
    """

    id: str
    run_id: str
    kind: Kind
    tool: str
    input: Mapping[str, Any]
    text: str
    options: tuple[Choice, ...]
    asked_us: int

    def data(self) -> dict[str, Any]:
        """What is recorded of it, as JSON data."""
        same = {"kind": self.kind, "tool": self.tool, "input": self.input, "text": self.text}
        return {"question_id": self.id, **same}


@dataclass(frozen=True, slots=True)
class Answer:
    """What was decided. ``chosen`` maps each question of the agent to what it is answered."""

    allow: bool
    message: str | None = None
    chosen: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class OpenQuestion:
    """A question that waits for its answer. ``by`` is who or what settled it, perhaps without an answer."""

    question: Question
    request_id: str
    settled: anyio.Event = field(default_factory=anyio.Event)
    answer: Answer | None = None
    by: str = ""

    def settle(self, answer: Answer | None, by: str) -> None:
        """The first word counts."""
        if not self.settled.is_set():
            self.answer, self.by = answer, by
            self.settled.set()


# -- from a request of the CLI


def readable(request: ControlRequest) -> bool:
    """Whether it is a question somebody can decide; nobody is asked for anything else."""
    asked = request.request
    known = request.subtype == "can_use_tool" and isinstance(asked.get("input"), dict)
    return known and isinstance(asked.get("tool_name"), str) and bool(asked["tool_name"])


def question_of(request: ControlRequest, *, question_id: str, run_id: str, now_us: int) -> Question:
    """The question in a ``readable`` request."""
    asked = request.request
    tool, given = asked["tool_name"], asked["input"]
    choices = _choices(given) if tool == ASK_TOOL else ()
    text = _choosing(choices) if choices else _permission(asked)
    kind: Kind = "question" if choices else "permission"
    return Question(question_id, run_id, kind, tool, given, text, choices, now_us)


def _choices(given: Mapping[str, Any]) -> tuple[Choice, ...]:
    """The questions in a call of ``ASK_TOOL``; none if one of them cannot be read."""
    asked = given.get("questions")
    try:
        return tuple(_choice(each) for each in asked) if isinstance(asked, list) else ()
    except (KeyError, TypeError, AttributeError):
        return ()


def _choice(asked: Mapping[str, Any]) -> Choice:
    options = asked.get("options") or []
    return Choice(
        question=str(asked["question"]),
        header=str(asked.get("header") or ""),
        labels=tuple(str(option["label"]) for option in options),
        descriptions=tuple(str(option.get("description") or "") for option in options),
        several=asked.get("multiSelect") is True,
    )


def _permission(asked: Mapping[str, Any]) -> str:
    call = json.dumps(asked["input"], ensure_ascii=False, default=str)
    if len(call) > INPUT_CHARS:
        call = f"{call[:INPUT_CHARS]} [cut here: {len(call):,} characters in all]"
    reason = asked.get("decision_reason")
    return f"may it use {asked['tool_name']} with {call}" + (f" ({reason})" if isinstance(reason, str) else "")


def _choosing(choices: Sequence[Choice]) -> str:
    said = "; ".join(f"{choice.question} {_offered(choice)}" for choice in choices)
    return " ".join(said.split())  # an agent's lines must not pass for ours


def _offered(choice: Choice) -> str:
    if not choice.labels:
        return ""
    pairs = zip(choice.labels, choice.descriptions, strict=True)
    offered = ", ".join(f"{label!r} ({about})" if about else repr(label) for label, about in pairs)
    return f"[{'any' if choice.several else 'one'} of {offered}, or words of your own]"


# -- from an answer


def answer_of(
    question: Question,
    *,
    allow: bool | None = None,
    answer: str | Mapping[str, Any] | None = None,
    message: str | None = None,
) -> Answer:
    """What somebody's words decide. ``answer`` is for questions of the agent: text, or text for each question.

    Raises QuestionError for words that do not decide it.
    """
    if allow is False:
        if answer is not None:
            raise QuestionError("to deny and to answer exclude each other", advice="Give allow=false or an answer.")
        return Answer(allow=False, message=message)
    if question.kind == "permission":
        if answer is not None or allow is None:
            raise QuestionError(
                f"the question is whether {question.tool} may be used", advice="Give allow=true or allow=false."
            )
        return Answer(allow=True)
    return Answer(allow=True, chosen=_chosen(question, answer))


def _chosen(question: Question, answer: str | Mapping[str, Any] | None) -> dict[str, str]:
    asked = [choice.question for choice in question.options]
    if isinstance(answer, str) and len(asked) == 1:
        answer = {asked[0]: answer}
    told = {name: _text(value) for name, value in answer.items()} if isinstance(answer, Mapping) else {}
    if set(told) != set(asked) or not all(told.values()):
        raise QuestionError(
            "each question needs an answer, and nothing else does",
            advice=f"Give answer as an object with text for each of: {json.dumps(asked, ensure_ascii=False)}",
        )
    return told


def _text(value: Any) -> str:
    """A label, or several of them as the CLI writes them."""
    parts = value if isinstance(value, list) else [value]
    return ", ".join(parts) if all(isinstance(part, str) for part in parts) else ""


def denied(reason: str) -> Answer:
    """A denial for a reason that is not the agent's."""
    return Answer(allow=False, message=f"{reason} {_DO_WITHOUT}")


def response(question: Question, answer: Answer) -> dict[str, Any]:
    """What the CLI is told. A call is allowed as it was asked for, or not at all."""
    if not answer.allow:
        return {"behavior": "deny", "message": answer.message or f"This was denied. {_DO_WITHOUT}"}
    if question.kind == "permission":
        return {"behavior": "allow"}
    if {choice.question for choice in question.options} != set(answer.chosen):
        return {"behavior": "deny", "message": f"This was not answered. {_DO_WITHOUT}"}
    return {"behavior": "allow", "updatedInput": {**question.input, "answers": dict(answer.chosen)}}
