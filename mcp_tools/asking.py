"""What runs ask of their callers: told, put into forms, and answered."""

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp_types import ElicitRequest, ElicitRequestFormParams
from pydantic import Field

from mcp_tools.context import Caller, caller_of, visible
from mcp_tools.results import compact
from mcp_tools.told import told_to_the_model
from orchestrator.asking import answer, questions_for
from orchestrator.errors import OrchestratorError, QuestionError
from orchestrator.questions import Choice, Question
from orchestrator.runtime import Runtime

_DECISION = "decision"
_REASON = "reason"
_OTHER = "_other"


class AskingTools:
    """The functions behind the tools, bound to a runtime."""

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt

    async def run_answer(
        self,
        run_id: Annotated[str, Field(description="The run that asks.")],
        question_id: Annotated[str, Field(max_length=64, description="Its question, as you were told.")],
        ctx: Context,
        allow: Annotated[bool | None, Field(description="Whether it may do what it asks for, this once.")] = None,
        answer: Annotated[
            str | dict[str, Any] | None,
            Field(description="To a question of the agent: your answer; of several, an object with one for each."),
        ] = None,
        message: Annotated[str | None, Field(description="Why not: the agent reads it.")] = None,
    ) -> str:
        """Answer a question of a run that waits for one. The run then goes on: call run_wait.

        allow=true lets it do exactly the call it asked about. Allow nothing that goes beyond its task.
        """
        with told_to_the_model():
            caller = await caller_of(self._rt, ctx)
            run = await visible(self._rt, caller, run_id)
            question = await _answer(
                self._rt, caller, run.id, question_id, allow=allow, answer=answer, message=message
            )
            said = "denied" if allow is False else "allowed" if question.kind == "permission" else "answered"
            return f"{said}; the run goes on: call run_wait({compact([run.id])})"


async def _answer(rt: Runtime, caller: Caller, run_id: str, question_id: str, **words: Any) -> Question:
    by = f"run {caller.run.id}" if caller.run else (caller.facts or {}).get("client", "a person")
    return await answer(rt, run_id, question_id, by=by, **words)


def asked(rt: Runtime, caller: Caller, run_ids: Collection[str]) -> list[Question]:
    """What the caller has to answer before these runs, and what they have started, can go on."""
    return questions_for(rt, caller.run.id if caller.run else None, run_ids)


def asking(rt: Runtime, questions: Sequence[Question]) -> str:
    """What is asked, and how to answer it."""
    lines = [
        f"run_id={each.run_id} question_id={each.id} {_name(rt, each)} asks: {rt.store.redact.text(each.text)}"
        for each in questions
    ]
    how = {each.kind: _HOW[each.kind] for each in questions}
    return "\n".join(["It waits for your answer:", *lines, *how.values()])


_HOW = {
    "permission": "Answer with run_answer(run_id, question_id, allow=true or false); nothing is allowed otherwise.",
    "question": "Answer the agent's question with run_answer(run_id, question_id, answer=…).",
}


def _name(rt: Runtime, question: Question) -> str:
    live = rt.live.get(question.run_id)
    return live.row.name if live is not None else "the agent"


# -- forms


def forms(rt: Runtime, questions: Sequence[Question]) -> dict[str, Any]:
    """Each question as an elicitation a client can show, by its id."""
    asked = {each.id: _form(rt, each) for each in questions}
    return {name: form.model_dump(by_alias=True, mode="json", exclude_none=True) for name, form in asked.items()}


def _form(rt: Runtime, question: Question) -> ElicitRequest:
    if question.kind == "question":
        fields: dict[str, Any] = {}
        for number, choice in enumerate(question.options, 1):
            fields |= _fields(f"q{number}", choice)
        schema: dict[str, Any] = {"type": "object", "properties": fields}
    else:
        decision = {"type": "string", "title": "Decision", "enum": ["allow", "deny"]}
        reason = {"type": "string", "title": "Reason", "description": "If denied: the agent reads it."}
        schema = {"type": "object", "properties": {_DECISION: decision, _REASON: reason}, "required": [_DECISION]}
    message = f"{_name(rt, question)} asks: {question.text}"
    redacted: dict[str, Any] = rt.store.redact.data({"message": message, "requested_schema": schema})
    return ElicitRequest(params=ElicitRequestFormParams(**redacted))


def _fields(name: str, choice: Choice) -> dict[str, Any]:
    """A list to choose from, if there is something, and a line for other words."""
    titles = {"title": choice.header or choice.question, "description": choice.question}
    if not choice.labels:
        return {name: {"type": "string", **titles}}
    listed = {"type": "string", "enum": list(choice.labels)}
    chosen = {"type": "array", "items": listed, **titles} if choice.several else {**listed, **titles}
    return {name: chosen, f"{name}{_OTHER}": {"type": "string", "title": "Or in other words"}}


async def take_form(rt: Runtime, caller: Caller, question: Question, response: Any) -> None:
    """Answer with what a client returned for a form. Whatever does not clearly allow it denies it.

    Nothing happens if the question was settled meanwhile.
    """
    words = _words(question, response)
    try:
        try:
            await _answer(rt, caller, question.run_id, question.id, **words)
        except QuestionError:
            await _answer(rt, caller, question.run_id, question.id, allow=False, message="It was not answered.")
    except OrchestratorError:
        return  # it ended, or somebody was quicker


def _words(question: Question, response: Any) -> dict[str, Any]:
    """The arguments of an answer that are in a response to a form."""
    content = response.get("content") if isinstance(response, Mapping) else None
    if not isinstance(content, Mapping) or response.get("action") != "accept":
        return {"allow": False}
    if question.kind == "permission":
        reason = content.get(_REASON)
        allow = content.get(_DECISION) == "allow"
        return {"allow": allow, "message": reason if isinstance(reason, str) and reason else None}
    numbered = enumerate(question.options, 1)
    return {"answer": {choice.question: _entered(content, f"q{number}") for number, choice in numbered}}


def _entered(content: Mapping[str, Any], name: str) -> Any:
    return content.get(f"{name}{_OTHER}") or content.get(name)
