"""Questions of runs at work: who is to answer them, how long they wait, and how an answer gets to its CLI."""

import secrets
import time
from collections.abc import Collection, Mapping
from typing import Any

import anyio

from orchestrator.conversation import Conversation
from orchestrator.errors import QuestionNotFoundError
from orchestrator.message_types import ControlRequest
from orchestrator.notes import note
from orchestrator.questions import Answer, OpenQuestion, Question, answer_of, denied, question_of, response
from orchestrator.runtime import LiveRun, Runtime
from orchestrator.store import Run, now_us


def open_question(live: LiveRun, request: ControlRequest) -> OpenQuestion:
    """Have the run wait for an answer to a ``readable`` request from now on."""
    question = question_of(request, question_id=secrets.token_hex(6), run_id=live.row.id, now_us=now_us())
    opened = live.questions[question.id] = OpenQuestion(question, request.request_id)
    return opened


def withdraw(live: LiveRun, request_id: str) -> None:
    """The CLI does not want to know any more."""
    for each in [each for each in live.questions.values() if each.request_id == request_id]:
        _settle(live, each, None, "the CLI, which has withdrawn it")


async def see_answered(rt: Runtime, live: LiveRun, conversation: Conversation, opened: OpenQuestion) -> None:
    """Tell everyone of an open question and its CLI of the answer. Nobody's answer is a denial.

    When it is cancelled the CLI is told nothing: who stops the turn does that.
    """
    question, patience = opened.question, rt.config.questions.timeout_s
    try:
        await note(rt, live, "run.asked", question.data())
        with anyio.move_on_after(patience):
            await opened.settled.wait()
        if not opened.settled.is_set():
            _settle(live, opened, denied(f"Nobody has answered within {patience:g} s."), "the time-out")
    finally:
        if not opened.settled.is_set():
            _settle(live, opened, None, "the end of the turn")
        with anyio.CancelScope(shield=True):
            await _note_answer(rt, live, opened)
    live.touch(time.monotonic())
    if opened.answer is not None:
        await conversation.answer(opened.request_id, response(question, opened.answer))


def _settle(live: LiveRun, opened: OpenQuestion, answer: Answer | None, by: str) -> None:
    opened.settle(answer, by)
    live.questions.pop(opened.question.id, None)
    live.settled[opened.question.id] = opened.by


async def _note_answer(rt: Runtime, live: LiveRun, opened: OpenQuestion) -> None:
    answer = opened.answer
    told: dict[str, Any] = {"question_id": opened.question.id, "by": opened.by, "allowed": False}
    if answer is not None:
        told |= {"allowed": answer.allow, "message": answer.message, "answers": dict(answer.chosen)}
    await note(rt, live, "run.answered", {name: value for name, value in told.items() if value not in (None, {})})


# -- who asks, and whom


def is_asking(rt: Runtime, live: LiveRun) -> bool:
    """Whether the run, or one below it, waits for an answer."""
    return any(run.questions and live in run.lineage() for run in rt.live.values())


def answerer(live: LiveRun) -> LiveRun | None:
    """The run whose agent is to answer what this run asks: the nearest above that works and can. None: a person."""
    _, *above = live.lineage()
    return next((run for run in above if run.answers and not run.ended.is_set()), None)


def questions_for(rt: Runtime, who: str | None, run_ids: Collection[str]) -> list[Question]:
    """What these runs and those below them ask of the agent of run ``who``, or of a person (None)."""
    above = rt.live.get(who) if who is not None else None
    if who is not None and above is None:
        return []
    return [
        opened.question
        for run in rt.live.values()
        if run.questions and answerer(run) is above and any(each.row.id in run_ids for each in run.lineage())
        for opened in run.questions.values()
    ]


# -- answering


async def answer(
    rt: Runtime,
    run_id: str,
    question_id: str,
    *,
    allow: bool | None = None,
    answer: str | Mapping[str, Any] | None = None,
    message: str | None = None,
    by: str = "a person",
) -> Question:
    """Answer a question of a run this runtime works on; the run goes on. Returns the question.

    ``allow`` decides a permission; ``answer`` is text for a question of the agent, or text for each of several;
    ``message`` tells the agent why it was denied. ``by`` is recorded.

    Raises RunNotFoundError, QuestionNotFoundError (unknown, answered before, or asked in another process) and
    QuestionError for words that do not decide it; it then still waits.
    """
    row = await rt.store.run(run_id)
    live = rt.live.get(row.id)
    if live is None:
        raise _nobody_asks(rt, row)
    opened = live.questions.get(question_id)
    if opened is None:
        raise _not_open(live, question_id)
    _settle(live, opened, answer_of(opened.question, allow=allow, answer=answer, message=message), by)
    return opened.question


def _nobody_asks(rt: Runtime, row: Run) -> QuestionNotFoundError:
    if row.ended or row.instance_id == rt.store.instance_id:
        return QuestionNotFoundError(f"run {row.id} has ended; it asks nothing any more")
    return QuestionNotFoundError(
        f"run {row.id} is worked on by another orchestrator process (instance {row.instance_id})",
        advice="Answer it there: with the server or the program that started the run.",
        details={"instance_id": row.instance_id},
    )


def _not_open(live: LiveRun, question_id: str) -> QuestionNotFoundError:
    details = {"open": list(live.questions)}
    if (by := live.settled.get(question_id)) is not None:
        return QuestionNotFoundError(f"question {question_id} was settled before, by {by}", details=details)
    return QuestionNotFoundError(f"run {live.row.id} has not asked {question_id!r}", details=details)
