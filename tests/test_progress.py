"""What is known of a turn while it goes on, from what the real CLI said."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.messages import AssistantMessage, Message, ResultMessage, StreamEvent, collect_text, parse_message
from orchestrator.outcome import Usage
from orchestrator.pricing import estimate_usd
from orchestrator.progress import Progress, describe_tool

TRANSCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("*.ndjson"))


def messages(path: Path) -> Iterator[Message]:
    """The messages of a recording; one of them holds a line that is no JSON, which the framing skips."""
    for line in path.read_text("utf-8").split("\n")[:-1]:
        if line.startswith("{"):
            yield parse_message(line)


def turns(name: str) -> list[list[Message]]:
    """The turns of the one recording whose name begins so, each up to its result."""
    (path,) = [path for path in TRANSCRIPTS if path.name.startswith((f"{name}-", f"{name}."))]
    found: list[list[Message]] = [[]]
    for message in messages(path):
        found[-1].append(message)
        if isinstance(message, ResultMessage):
            found.append([])
    return [turn for turn in found if turn]


def fed(turn: Iterable[Message]) -> Progress:
    progress = Progress()
    for message in turn:
        progress.feed(message)
    return progress


def event(kind: str, **more: Any) -> Message:
    return parse_message(json.dumps({"type": "stream_event", "event": {"type": kind, **more}, "session_id": "s"}))


def start(model: str | None = "claude-opus-5-5", **usage: Any) -> Message:
    return event(
        "message_start", message={"model": model, "usage": {"input_tokens": 100, "output_tokens": 1, **usage}}
    )


def says(text: str) -> Message:
    return event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})


def ends(output_tokens: int = 5) -> Message:
    return event("message_delta", delta={}, usage={"output_tokens": output_tokens})


def assistant(text: str, **more: Any) -> Message:
    said = {
        "id": "m",
        "model": "claude-opus-5-5",
        "content": [{"type": "text", "text": text}],
        **more.pop("message", {}),
    }
    return parse_message(json.dumps({"type": "assistant", "message": said, "session_id": "s", **more}))


# -- recordings, whole --------------------------------------------------------------------------------------

ALL_TURNS = {
    f"{path.stem}#{number}": turn
    for path in TRANSCRIPTS
    for number, turn in enumerate(turns(path.name.split(".")[0]))
}  # fmt: skip


@pytest.mark.parametrize("turn", ALL_TURNS.values(), ids=ALL_TURNS)
def test_the_text_is_what_the_model_said(turn: list[Message]) -> None:
    spoken = [message for message in turn if not is_synthetic(message)]
    assert fed(turn).text == collect_text(spoken)


def is_synthetic(message: Message) -> bool:
    return isinstance(message, AssistantMessage) and message.message.model == "<synthetic>"


def has_figures(turn: list[Message]) -> bool:
    return isinstance(turn[-1], ResultMessage) and bool(turn[-1].model_usage_since_last_result)


PRICED_TURNS = {name: turn for name, turn in ALL_TURNS.items() if has_figures(turn)}


@pytest.mark.parametrize("turn", PRICED_TURNS.values(), ids=PRICED_TURNS)
def test_cost_and_usage_are_those_of_the_cli(turn: list[Message]) -> None:
    """The sum over models, sub-agents included, since the last result; the CLI's own price."""
    progress, result = fed(turn), turn[-1]
    assert isinstance(result, ResultMessage)
    assert result.model_usage_since_last_result
    models = result.model_usage_since_last_result.values()
    assert progress.usage == Usage(
        input_tokens=sum(each.input_tokens or 0 for each in models),
        output_tokens=sum(each.output_tokens or 0 for each in models),
        cache_read_tokens=sum(each.cache_read_input_tokens or 0 for each in models),
        cache_write_tokens=sum(each.cache_creation_input_tokens or 0 for each in models),
    )
    assert progress.cost_usd == pytest.approx(sum(each.cost_usd or 0 for each in models))
    assert not progress.estimated
    assert progress.activity == "done"
    assert progress.num_turns == (result.num_turns or progress.num_turns)


# -- recordings, known ones ---------------------------------------------------------------------------------


def test_before_the_result_cost_is_the_list_price_of_what_streamed() -> None:
    (turn,) = turns("s02")
    *before, result = turn
    progress = fed(before)
    assert progress.estimated
    assert progress.usage == Usage(input_tokens=100, output_tokens=5)
    assert progress.cost_usd == estimate_usd("claude-opus-5-5", {"input_tokens": 100, "output_tokens": 5})
    after = fed([*before, result])
    assert after.cost_usd == pytest.approx(0.0005) == progress.cost_usd
    assert not after.estimated
    assert after.usage == progress.usage


def test_partial_text_is_there_while_it_streams_and_only_once() -> None:
    (turn,) = turns("s02")
    seen: list[str] = []
    progress = Progress()
    for message in turn:
        progress.feed(message)
        if not seen or seen[-1] != progress.text:
            seen.append(progress.text)
    assert seen == ["", "one t", "one two th", "one two three"]


def test_activities_of_a_streamed_answer() -> None:
    (turn,) = turns("s02")
    progress = Progress()
    activities = [progress.activity]
    for message in turn:
        progress.feed(message)
        if activities[-1] != progress.activity:
            activities.append(progress.activity)
    assert activities == ["starting", "thinking", "answering", "done"]


def test_tools_are_told_and_texts_around_them_kept() -> None:
    (turn,) = turns("s03")
    progress = Progress()
    activities = []
    for message in turn:
        progress.feed(message)
        activities.append(progress.activity)
    assert "Bash: echo out; echo err >&2; exit 3" in activities
    assert "Bash: echo two" in activities
    assert progress.text == "running\n\ndone"


def test_an_interrupted_stream_keeps_the_partial_text() -> None:
    first, second = turns("s08")
    cut = [message for message in first if isinstance(message, StreamEvent)][:6]
    assert fed(cut).text == "aaaaaaaa", "killed: nothing but deltas ever came"
    progress = fed(first)
    assert progress.text == "aaaaaaaa", "interrupted: the CLI repeats what was cut, it is not doubled"
    assert progress.cost_usd == pytest.approx(0.00046)
    assert progress.usage == Usage(input_tokens=100, output_tokens=3)
    assert fed(second).text == "next ok"


def test_a_request_costs_its_input_from_the_beginning() -> None:
    progress = fed([start(), says("aaa")])
    assert progress.usage == Usage(input_tokens=100, output_tokens=1)
    assert (progress.charge_turns, progress.num_turns) == (1, 1)
    assert progress.cost_usd == estimate_usd("claude-opus-5-5", {"input_tokens": 100, "output_tokens": 1})
    assert progress.estimated
    assert progress.text == "aaa"


def test_the_last_count_of_a_request_is_the_one_that_counts() -> None:
    progress = fed([start(), ends(5), ends(40), ends(90), start(cache_read_input_tokens=7)])
    assert progress.usage == Usage(input_tokens=200, output_tokens=91, cache_read_tokens=7)
    assert progress.charge_turns == 2


def test_after_a_result_nothing_is_added() -> None:
    (turn,) = turns("s02")
    progress = fed([*turn, start(), ends()])
    assert progress.cost_usd == pytest.approx(0.0005)
    assert progress.usage.total_tokens == 105


def test_an_attempt_that_broke_off_is_paid_for_and_not_said() -> None:
    progress = fed([start(), says("half an ans"), start(), says("the whole answer"), ends(7)])
    assert progress.text == "the whole answer"
    assert progress.usage == Usage(input_tokens=200, output_tokens=8)
    assert (progress.charge_turns, progress.num_turns) == (1, 1)


def test_sub_agents_are_paid_for_but_do_not_speak() -> None:
    (turn,) = turns("s14")
    progress = fed(turn)
    assert progress.usage.total_tokens == 420
    assert progress.cost_usd == pytest.approx(0.002)
    forwarded = turns("s15")[0]
    assert any(isinstance(m, AssistantMessage) and m.parent_tool_use_id for m in forwarded), (
        "a sub-agent's messages"
    )
    assert fed(forwarded).text == collect_text(forwarded)


@pytest.mark.parametrize(("name", "requests"), [("s14", 3), ("s15", 4)])
def test_sub_agents_requests_are_charged_as_they_are_seen(name: str, requests: int) -> None:
    """Both made four; the CLI tells of s14's last one only where it is told to forward sub-agents' text."""
    *before, result = turns(name)[0]
    tokens, seen = [0], fed([])
    for message in before:
        seen.feed(message)
        tokens.append(seen.usage.total_tokens)
    assert tokens == sorted(tokens), "an estimate only grows"
    assert seen.charge_turns == requests
    assert seen.usage.input_tokens == 100 * requests
    assert seen.estimated
    assert seen.cost_usd is not None
    final = fed([*before, result])
    assert seen.cost_usd == pytest.approx(final.cost_usd, rel=0.3)
    assert final.charge_turns == requests


def test_a_sub_agent_without_a_known_price_is_noticed() -> None:
    (turn,) = turns("s15")
    raws = [{**message.raw()} for message in turn[:-1]]
    for raw in raws:
        if raw.get("parent_tool_use_id") and raw["type"] == "assistant":
            raw["message"] = {**raw["message"], "model": "my-own-model"}
    progress = fed(parse_message(json.dumps(raw)) for raw in raws)
    assert progress.unpriced_model == "my-own-model"
    assert progress.model == "claude-opus-5-5"
    assert progress.cost_usd is not None, "what is known of it"


def test_an_answer_that_was_not_streamed_counts_by_its_length() -> None:
    """The CLI asks again without streaming when a stream breaks off."""
    usage = {"input_tokens": 300, "output_tokens": 1}
    first = assistant("x" * 200, message={"id": "m2", "usage": usage})
    second = assistant("y" * 200, message={"id": "m2", "usage": usage})
    progress = fed([start(), first, second])
    assert progress.usage == Usage(input_tokens=400, output_tokens=1 + 100)
    assert progress.charge_turns == 1, "the same request, made again"
    exact = assistant("x" * 200, message={"id": "m3", "usage": {**usage, "output_tokens": 77}})
    assert fed([exact]).usage == Usage(input_tokens=300, output_tokens=77)


def test_what_was_streamed_is_not_counted_again() -> None:
    begun = event("message_start", message={"id": "m", "model": "claude-opus-5-5", "usage": {"input_tokens": 100}})
    again = assistant("x" * 4000, message={"id": "m", "usage": {"input_tokens": 100, "output_tokens": 1}})
    progress = fed([begun, again, ends(9)])
    assert progress.usage == Usage(input_tokens=100, output_tokens=9)
    assert progress.charge_turns == 1


def test_what_was_taken_back_is_not_the_answer() -> None:
    (turn,) = turns("s20")
    progress = fed(turn)
    assert progress.text == "I can't\n\nI can't"
    assert progress.assistant_error == "invalid_request"
    assert progress.model == "claude-opus-4-8"
    assert progress.cost_usd == pytest.approx(0.001625), "two models, each at its price"


@pytest.mark.parametrize("name", ["f401", "f400", "f429", "f529", "fconnrefused", "f404_model"])
def test_what_the_cli_says_in_the_models_place_is_not_the_answer(name: str) -> None:
    (turn,) = turns(name)
    progress = fed(turn)
    assert progress.text == ""
    assert progress.assistant_error
    assert progress.cost_usd == 0.0, "known to be nothing"
    assert not progress.estimated
    assert progress.result is not None


def test_retries_are_told() -> None:
    (turn,) = turns("f401")
    progress = fed(message for message in turn if not isinstance(message, ResultMessage))
    assert progress.activity == "retry 10/10: authentication_failed"
    assert progress.last_retry is not None
    assert progress.last_retry.error_status == 401


def test_a_fallback_models_price_and_name_count() -> None:
    (turn,) = turns("f529_fallback")
    progress = fed(turn)
    assert progress.model == "claude-sonnet-5-5"
    assert progress.text == "from fallback claude-sonnet-5-5"
    assert progress.cost_usd == pytest.approx(0.00025)


def test_structured_output_needs_no_text() -> None:
    (turn,) = turns("s25")
    progress = fed(turn)
    assert progress.text == ""
    assert progress.result is not None
    assert progress.result.structured_output == {"name": "bob"}


# -- what is unknown stays unknown --------------------------------------------------------------------------


def test_nothing_is_known_at_first() -> None:
    progress = Progress()
    assert (progress.text, progress.cost_usd, progress.usage, progress.initialised) == ("", None, Usage(), False)


def test_an_unknown_model_has_no_price() -> None:
    progress = fed([start("my-own-model"), says("hi"), ends()])
    assert progress.cost_usd is None
    assert progress.unpriced
    assert progress.usage == Usage(input_tokens=100, output_tokens=5)


def result_message(**more: Any) -> Message:
    return parse_message(json.dumps({"type": "result", "subtype": "success", "is_error": False, **more}))


def test_a_guessed_price_of_the_cli_is_not_believed() -> None:
    models = {"my-own-model": {"inputTokens": 100, "outputTokens": 5, "costUSD": 0.7, "costBasis": "unknown"}}
    done = result_message(model_usage_since_last_result=models)
    progress = fed([start("my-own-model"), ends(), done])
    assert progress.cost_usd is None
    assert progress.estimated
    assert progress.unpriced
    estimated = fed([start(), ends(), done])
    assert estimated.cost_usd == estimate_usd("claude-opus-5-5", {"input_tokens": 100, "output_tokens": 5})
    assert estimated.estimated


def test_a_result_without_figures_leaves_the_estimate() -> None:
    progress = fed([start(), ends(), result_message()])
    assert progress.estimated
    assert progress.cost_usd is not None
    assert progress.usage.total_tokens == 105


def test_a_result_that_cannot_be_read_is_no_result() -> None:
    progress = fed([parse_message(json.dumps({"type": "result", "subtype": "success", "is_error": "maybe"}))])
    assert progress.result is None
    assert progress.unreadable is not None
    assert "is_error" in progress.unreadable


def test_a_synthetic_text_does_not_hide_what_was_said() -> None:
    cut = fed(
        [
            start(),
            says("half"),
            assistant("API Error: gone", error="server_error", message={"model": "<synthetic>"}),
        ]
    )
    assert cut.text == "half"
    assert cut.assistant_error == "server_error"
    assert cut.model is None


def test_messages_without_id_are_all_kept() -> None:
    assert fed([assistant("one"), assistant("two", uuid="u"), assistant("three")]).text == "one\n\ntwo\n\nthree"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)
counts = st.dictionaries(
    st.sampled_from(["input_tokens", "output_tokens", "cache_read_input_tokens", "model"]), json_values
)
events = st.fixed_dictionaries(
    {"type": st.sampled_from(["message_start", "message_delta", "content_block_delta", "message_stop", "new"])},
    optional={
        "message": json_values | st.fixed_dictionaries({"usage": counts | json_values, "model": json_values}),
        "usage": counts | json_values,
        "delta": json_values | st.fixed_dictionaries({"type": st.just("text_delta"), "text": json_values}),
    },
)


@given(st.lists(events, max_size=8))
@settings(max_examples=150, deadline=None)
def test_no_event_of_the_provider_ends_a_run(stream: list[dict[str, Any]]) -> None:
    progress = Progress()
    for each in stream:
        kind = each.pop("type")
        progress.feed(event(kind, **each))
        assert isinstance(progress.text, str)
        assert min(progress.usage.model_dump().values()) >= 0
        assert progress.charge_usd >= 0


# -- one line about a tool ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("Bash", {"command": "git log\n  -3", "description": "x"}, "Bash: git log -3"),
        ("Read", {"file_path": "/srv/a.py", "limit": 3}, "Read: /srv/a.py"),
        ("mcp__orchestrator__delegate", {"agent": "worker", "prompt": "…"}, "orchestrator.delegate: worker"),
        ("TodoWrite", {"todos": []}, "TodoWrite"),
        ("Bash", {"command": ""}, "Bash"),
        ("Bash", {"command": ["ls"]}, "Bash"),
        ("Bash", {"command": "x" * 200}, "Bash: " + "x" * 80),
    ],
)
def test_a_tool_is_told_in_one_short_line(name: str, arguments: dict[str, Any], line: str) -> None:
    assert describe_tool(name, arguments) == line
