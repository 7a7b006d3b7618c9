"""Scenarios: what a rule matches, what it answers, and what a scenario file may say. No server, no CLI."""

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import ScenarioError
from orchestrator.testing import (
    Fault,
    Reply,
    Request,
    Rule,
    Scenario,
    Text,
    Thinking,
    ToolUse,
    Usage,
    When,
    load_scenario,
    template,
)
from orchestrator.testing.scenario import Tally, choices
from orchestrator.testing.scenario_file import parse_scenario
from orchestrator.testing.sse import body_frames, events, message_body, stream_frames

REMINDER = "<system-reminder>\nnot from the user\n</system-reminder>\n"


def request(
    content: Any = "hi", *earlier: dict[str, Any], headers: dict[str, str] | None = None, **body: Any
) -> Request:
    messages = [*earlier, {"role": "user", "content": content}]
    return Request(0, {"model": "claude-opus-5-5", "messages": messages, **body}, headers or {})


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def tool_result(value: Any, tool_use_id: str = "t1", **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": tool_use_id, "content": value, **more}


def answers(rules: list[Rule], *requests: Request) -> list[str | None]:
    """The texts that answer the requests, one after the other; None where no rule answers."""
    tallies: dict[Rule, Tally] = {}
    found: list[str | None] = []
    for item in requests:
        choice = next(choices(rules, item, tallies), None)
        found.append(None if choice is None else _text(template.render(choice, choice.reply, item)))
    return found


def _text(reply: Reply) -> str:
    return "".join(block.text for block in reply.blocks if isinstance(block, Text))


# --- requests ---------------------------------------------------------------------------------------------


def test_a_request_shows_the_users_words_without_the_clis_reminders() -> None:
    seen = request([text(REMINDER), text("do it"), text(f"{REMINDER}and well")])
    assert seen.last_user_text == "do it\nand well"
    assert seen.texts[0] == REMINDER


def test_the_last_user_message_counts_even_if_a_system_message_follows() -> None:
    body = {
        "model": "m",
        "system": [text("x-anthropic-billing-header: v1"), text("You review.")],
        "messages": [{"role": "user", "content": "go"}, {"role": "system", "content": [text("# Environment")]}],
    }
    seen = Request(0, body)
    assert seen.last_user_text == "go"
    assert seen.system == "x-anthropic-billing-header: v1\nYou review.\n# Environment"
    assert "system starts 'You review." in seen.describe()
    assert seen.texts == ["go"]


def test_tool_results_are_those_of_the_last_user_message() -> None:
    earlier = {"role": "user", "content": [tool_result("old", "t0")]}
    asked = {"role": "assistant", "content": [text("looking"), {"type": "tool_use", "id": "t1", "name": "Read"}]}
    image = {"type": "image", "source": {}}
    seen = request(
        [tool_result([text("a"), image, text("b")], is_error=True), tool_result("c", "t2")], earlier, asked
    )
    assert [(r.tool_use_id, r.text, r.is_error) for r in seen.tool_results] == [
        ("t1", "a\nb", True),
        ("t2", "c", False),
    ]
    assert [r.text for r in seen.all_tool_results] == ["old", "a\nb", "c"]
    assert seen.last_user_text == ""
    assert seen.texts == ["looking"]
    assert seen.says("a\nb")
    assert not seen.says("old")


def test_a_request_carries_model_tools_stream_and_trace() -> None:
    seen = request(headers={"traceparent": "00-1-2-01"}, tools=[{"name": "Bash"}], stream=True)
    assert (seen.model, seen.tools, seen.stream, seen.traceparent) == (
        "claude-opus-5-5",
        ["Bash"],
        True,
        "00-1-2-01",
    )


@pytest.mark.parametrize("messages", [[], ["text"], [{"role": "user"}], [{"role": "user", "content": [1, {}]}]])
def test_an_odd_history_is_read_as_empty(messages: list[Any]) -> None:
    seen = Request(0, {"messages": messages})
    assert (seen.last_user_text, seen.texts, seen.tool_results, seen.system) == ("", [], [], "")


# --- conditions -------------------------------------------------------------------------------------------

FULL = request(
    [tool_result("12 lines")],
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    system="You are the planner.",
    tools=[{"name": "Read"}, {"name": "Bash"}],
    stream=True,
    headers={"x-run": "run-7"},
)


@pytest.mark.parametrize(
    ("when", "fits", "misses"),
    [
        ({"user": r"^summ\w+"}, request("summarise"), request("please summarise")),
        ({"user_contains": "a.c"}, request("say a.c now"), request("abc")),
        ({"system": "planner"}, FULL, request(system="worker")),
        ({"model": "opus"}, FULL, Request(0, {"model": "claude-haiku", "messages": []})),
        ({"tool_result": True}, FULL, request()),
        ({"tool_result": False}, request(), FULL),
        ({"tool_result": r"\d+ lines"}, FULL, request([tool_result("no lines")])),
        ({"tools": ["Read"]}, FULL, request(tools=[{"name": "Bash"}])),
        ({"headers": {"X-Run": "^run-"}}, FULL, request()),
        ({"headers": {"x-run": "7"}}, FULL, request(headers={"x-run": "run-8"})),
        ({"history": "first answer"}, FULL, request("first answer")),
        ({"stream": True}, FULL, request()),
        ({"stream": False}, request(), FULL),
        ({"user": "hi", "system": "S"}, request(system="S"), request(system="T")),
        ({}, request(), None),
    ],
)
def test_conditions(when: dict[str, Any], fits: Request, misses: Request | None) -> None:
    conditions = When(**when)
    assert conditions.match(fits) == {}
    assert misses is None or conditions.match(misses) is None


def test_named_groups_of_all_conditions_come_together() -> None:
    when = When(user=r"read (?P<file>\S+)(?P<rest> now)?", system="You are (?P<who>[a-z]+)")
    assert when.match(request("read a.txt", system="You are ann")) == {"file": "a.txt", "rest": "", "who": "ann"}


def test_a_condition_may_be_a_function() -> None:
    rules = [Rule("long", when=lambda seen: len(seen.last_user_text) > 5), Rule("short")]
    assert answers(rules, request("x"), request("xxxxxx")) == ["short", "long"]


# --- which rule answers -----------------------------------------------------------------------------------


def test_the_first_rule_that_fits_answers() -> None:
    rules = [Rule("a", when={"user": "x"}), Rule("b", when={"user": "x|y"}), Rule("c", when={"user": "x"})]
    assert answers(rules, request("x"), request("y"), request("z")) == ["a", "b", None]


@pytest.mark.parametrize(
    ("nth", "expected"),
    [(2, ["-", "rule", "-", "-"]), ([1, 3], ["rule", "-", "rule", "-"])],
)
def test_nth_answers_only_those_matches(nth: Any, expected: list[str]) -> None:
    assert answers([Rule("rule", when={"nth": nth}), Rule("-")], *[request()] * 4) == expected


def test_nth_counts_matches_of_the_rule_and_not_requests() -> None:
    rules = [Rule("second b", when={"user": "b", "nth": 2}), Rule("-")]
    assert answers(rules, *[request(word) for word in "abab"]) == ["-", "-", "-", "second b"]


@settings(max_examples=60)
@given(replies=st.lists(st.sampled_from("abc"), min_size=1, max_size=4), times=st.none() | st.integers(1, 6))
def test_a_sequence_repeats_its_last_reply_until_times_is_used_up(replies: list[str], times: int | None) -> None:
    asked = 8
    endless = [*replies, *[replies[-1]] * asked][:asked]
    end = asked if times is None else times
    expected = [reply if position < end else "later rule" for position, reply in enumerate(endless)]
    assert answers([Rule(replies, times=times), Rule("later rule")], *[request()] * asked) == expected


def test_counts_belong_to_the_caller_so_that_a_scenario_can_be_used_again() -> None:
    rules = [Rule(["first", "second"])]
    assert answers(rules, request()) == ["first"]
    assert answers(rules, request()) == ["first"]


# --- templates --------------------------------------------------------------------------------------------


def test_templates_are_filled_in_from_the_request() -> None:
    call = ToolUse("Bash", {"command": "echo {{ match.what }}", "list": ["{{ model }}", 3], "{{ key }}": None})
    rule = Rule(
        Reply(["{{ n }}: {{ last_user_text }}", Thinking("{{ tool_results }}"), call]),
        when={"user": "(?P<what>hi)"},
    )
    seen = request([text("hi"), tool_result("r1"), tool_result("r2")])
    tallies: dict[Rule, Tally] = {}
    *_, choice = [next(choices([rule], seen, tallies)) for _ in range(2)]
    assert template.render(choice, rule.reply, seen).blocks == [
        Text("2: hi"),
        Thinking("r1\nr2"),
        ToolUse("Bash", {"command": "echo hi", "list": ["claude-opus-5-5", 3], "{{ key }}": None}),
    ]


@pytest.mark.parametrize(
    "text_", ["{{ match.nope }}", "{{ nope }}", "{{ model.__class__.__mro__ }}", "{{ 1 / 0 }}"]
)
def test_a_template_that_cannot_be_filled_in_is_an_error_and_not_an_empty_text(text_: str) -> None:
    with pytest.raises(ScenarioError, match="cannot be filled in"):
        answers([Rule(text_)], request())


def test_a_group_may_be_named_like_a_method() -> None:
    assert answers([Rule("{{ match.items }}", when={"user": "(?P<items>.+)"})], request("a b")) == ["a b"]


# --- replies on the wire ----------------------------------------------------------------------------------


@settings(max_examples=80)
@given(
    said=st.text(max_size=40),
    thought=st.text(max_size=20),
    arguments=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
    chunks=st.none() | st.integers(1, 9),
    size=st.none() | st.integers(1, 9),
)
def test_the_deltas_of_a_stream_add_up_to_the_whole_message(
    said: str, thought: str, arguments: dict[str, Any], chunks: int | None, size: int | None
) -> None:
    content = [Thinking(thought), Text(said, repeat=2), ToolUse("Bash", arguments), ToolUse("Read", arguments)]
    cut = {"chunks": chunks} if size is None else {"chunk_size": size}
    reply = Reply(content, usage=Usage(7, 9, 1, 2, 3), **cut)
    asked = request()
    whole = message_body(reply, asked)
    assert _accumulate(list(events(reply, asked))) == whole
    deltas = [event["delta"] for event in events(reply, asked) if event["type"] == "content_block_delta"]
    assert sum(delta["type"] == "input_json_delta" for delta in deltas) == 4
    if size is not None:
        assert all(len(delta.get("text", "")) <= size for delta in deltas)
    elif chunks is not None:
        assert sum(delta["type"] == "text_delta" for delta in deltas) <= chunks


def _accumulate(stream: list[dict[str, Any]]) -> dict[str, Any]:
    """A message put together from its events, the way a client does."""
    message: dict[str, Any] = stream[0]["message"]
    partial = ""
    for event in stream[1:]:
        match event:
            case {"type": "content_block_start", "content_block": block}:
                message["content"].append(dict(block))
                partial = ""
            case {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": piece}}:
                partial += piece
                if event["index"] == len(message["content"]) - 1 and _is_json(partial):
                    message["content"][-1]["input"] = json.loads(partial)
            case {"type": "content_block_delta", "delta": {"type": kind} as delta}:
                field = kind.removesuffix("_delta")
                message["content"][-1][field] += delta[field]
            case {"type": "message_delta", "delta": delta, "usage": usage}:
                message |= {**delta, "usage": usage}
    return message


def _is_json(value: str) -> bool:
    try:
        json.loads(value)
    except ValueError:
        return False
    return True


def test_ids_tell_requests_and_blocks_apart() -> None:
    asked = Request(41, {"model": "m", "messages": []})
    body = message_body(Reply([ToolUse("A"), ToolUse("B"), ToolUse("C", id="mine")]), asked)
    assert body["id"] == "msg_offline_0042"
    assert [block["id"] for block in body["content"]] == ["toolu_offline_0042_0", "toolu_offline_0042_1", "mine"]
    assert body["stop_reason"] == "tool_use"


def test_a_stop_reason_may_be_given() -> None:
    assert message_body(Reply(ToolUse("A"), stop_reason="max_tokens"), request())["stop_reason"] == "max_tokens"


def test_tool_input_given_as_text_goes_out_as_it_is() -> None:
    deltas = [e["delta"] for e in events(Reply(ToolUse("A", '{"x": ')), request()) if "delta" in e]
    assert "".join(delta.get("partial_json", "") for delta in deltas) == '{"x": '


def test_text_that_utf8_cannot_hold_is_escaped() -> None:
    frames, length, _ = body_frames(Reply("a\ud800b é"), request())
    assert len(b"".join(frames)) == length
    assert json.loads(b"".join(frames))["content"][0]["text"] == "a\ud800b é"


@pytest.mark.parametrize(
    ("fault", "good", "ending"),
    [
        (Fault(stall_at=3), 3, "stall"),
        (Fault(truncate_at=0), 0, "truncate"),
        (Fault(reset_at=99), 8, "reset"),
    ],
)
def test_a_break_comes_after_so_many_good_events(fault: Fault, good: int, ending: str) -> None:
    whole, _ = stream_frames(Reply("abc"), request())
    assert len(whole) == 8
    assert stream_frames(Reply("abc", fault=fault), request()) == (whole[:good], ending)


def test_a_malformed_event_takes_the_place_of_a_good_one() -> None:
    whole, _ = stream_frames(Reply("abc"), request())
    frames, ending = stream_frames(Reply("abc", fault=Fault(malformed_at=3)), request())
    assert ending == "complete"
    assert (frames[:3], frames[4:]) == (whole[:3], whole[4:])
    assert not _is_json(frames[3].decode().partition("data: ")[2])


def test_an_error_event_is_the_last() -> None:
    frames, ending = stream_frames(Reply(fault=Fault(error_at=2, error_type="overloaded_error")), request())
    assert (len(frames), ending) == (3, "complete")
    assert frames[2].startswith(b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"')


# --- what Python refuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Rule("x", when={"user": "("}), "not a regular expression"),
        (lambda: Rule("x", when={"usr": "a"}), "usr"),
        (lambda: Rule("x", times=0), "at least once"),
        (lambda: Rule([]), "empty"),
        (lambda: When(nth=[]), "at least 1 item"),
        (lambda: Fault(), "given: none"),
        (lambda: Fault(stall_at=1, status=500), "given: stall_at and status"),
        (lambda: Fault(status=200), "no error"),
        (lambda: Fault(status=99), "greater than or equal to 200"),
        (lambda: Reply(chunks=2, chunk_size=3), "not both"),
        (lambda: Usage(input=-1), "greater than or equal to 0"),
    ],
)
def test_wrong_arguments_are_refused(make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


# --- scenario files ---------------------------------------------------------------------------------------


def scenario(yaml: str) -> Scenario:
    return parse_scenario(textwrap.dedent(yaml), "s.yaml")


def test_a_file_becomes_rules(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        textwrap.dedent("""\
            version: 1
            defaults: {usage: {input: 50}, delay_s: 1, chunks: 3, headers: {x-a: 1}}
            rules:
              - name: planner
                when: {system: "review manager", tool_result: false, headers: {X-Run: "7"}, nth: [1, 2]}
                reply:
                  - thinking: "let me see"
                  - "Reading."
                  - tool: Read
                    input: {file_path: "README.md"}
                usage: {input: 1200, output: 80, cache_read: 400}
                delay_s: 0.5
              - when: {user: "summarise (?P<what>\\\\w+)"}
                reply: "Summary of {{ match.what }}"
                times: 3
                chunk_size: 4
              - replies:
                  - {fault: {status: 529, headers: {retry-after: 2}}, times: 2}
                  - reply: {text: ab, repeat: 3}
                    stop_reason: max_tokens
            """)
    )
    planner, summary, sequence = load_scenario(path).rules
    defaults = {"usage": Usage(input=50), "delay_s": 1.0, "chunks": 3, "headers": {"x-a": 1}}
    assert planner.name == "planner"
    assert planner.when == When(system="review manager", tool_result=False, headers={"X-Run": "7"}, nth=[1, 2])
    assert planner.reply == Reply(
        [Thinking("let me see"), Text("Reading."), ToolUse("Read", {"file_path": "README.md"})],
        **{**defaults, "usage": Usage(1200, 80, 400), "delay_s": 0.5},
    )
    assert summary.times == 3
    assert summary.reply == Reply(
        [Text("Summary of {{ match.what }}")], **{**defaults, "chunks": None, "chunk_size": 4}
    )
    overloaded = Reply(fault=Fault(status=529, headers={"retry-after": 2}), **defaults)
    assert sequence.reply == [overloaded, overloaded, Reply([Text("ab", 3)], stop_reason="max_tokens", **defaults)]


def problems(yaml: str) -> list[str]:
    with pytest.raises(ScenarioError) as caught:
        scenario(yaml)
    found: list[str] = caught.value.details["problems"]
    assert all(problem in str(caught.value) for problem in found)
    return found


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ("{reply: a, wen: {}}", "unknown key 'wen'; did you mean 'when'?"),
        ("{reply: a, when: {usr: b}}", "unknown key 'usr'; did you mean 'user'?"),
        ("{reply: a, usage: {inputs: 1}}", "unknown key 'inputs'; did you mean 'input'?"),
        ("{reply: a, colour: 1}", "unknown key 'colour'; known here: usage, "),
        ("{reply: {tool: Bash, inpt: {}}}", "unknown key 'inpt'; did you mean 'input'?"),
        ("{fault: {stat: 500}}", "unknown key 'stat'; did you mean 'status'?"),
        ("{reply: a, when: {user: '('}}", "rules[0].when.user: not a regular expression: missing )"),
        ("{reply: a, when: {tool_result: '['}}", "rules[0].when.tool_result: not a regular expression"),
        ("{reply: a, when: {headers: {x: '*'}}}", "rules[0].when.headers.x: not a regular expression"),
        ("{reply: a, when: {nth: 0}}", "rules[0].when.nth: Input should be greater than or equal to 1"),
        ("{reply: a, times: 0}", "rules[0].times: Input should be greater than or equal to 1"),
        ("{reply: a, times: true}", "rules[0].times: Input should be a valid integer"),
        ("{reply: a, delay_s: -1}", "rules[0].delay_s: Input should be greater than or equal to 0"),
        ("{reply: '{{ oops'}", "rules[0].reply: template does not compile"),
        ("{reply: '{{ modle }}'}", "template uses an unknown variable 'modle'; did you mean model?"),
        ("{reply: {tool: A, input: {a: ['{{ b }}']}}}", "template uses an unknown variable 'b'; there are match,"),
        ("{reply: '{{ match.a }}', when: {user: '(?P<b>x)'}}", "template uses match.a, which no condition names"),
        ("{replies: [{reply: '{{ match.a }}'}]}", "template uses match.a, which no condition names"),
        ("{when: {user: a}}", "rules[0]: the rule says nothing; give reply, replies or fault"),
        ("{replies: []}", "rules[0].replies: List should have at least 1 item"),
        ("{replies: [{times: 2}]}", "rules[0].replies[0]: says nothing; give reply or fault"),
        ("{replies: [{reply: a}], reply: b}", "rules[0]: replies stands alone"),
        ("{fault: {}}", "a fault is one of status, body, stall_at"),
        ("{reply: a, chunks: 1, chunk_size: 1}", "not both"),
        ("{reply: {input: {}}}", "'text' is missing"),
        ("{reply: {tool: 3}}", "rules[0].reply.tool: Input should be a valid string"),
        ("just text", "rules[0] is a mapping of keys to values"),
        ("{reply: a, reply: b}", "duplicate key 'reply'"),
    ],
)
def test_a_bad_rule_is_refused_with_line_and_reason(rule: str, problem: str) -> None:
    found = problems(f"version: 1\nrules:\n  - {rule}\n")
    assert any(line.startswith("s.yaml:3: ") and problem in line for line in found), found


@pytest.mark.parametrize(
    ("yaml", "problem"),
    [
        ("", "s.yaml:1: a scenario is a mapping"),
        ("- a", "s.yaml:1: a scenario is a mapping"),
        ("version: 1\nrules: []", "s.yaml:2: rules: List should have at least 1 item"),
        ("version: 1", "s.yaml:1: 'rules' is missing"),
        ("rules: [{reply: a}]", "s.yaml:1: 'version' is missing"),
        ("\nversion: 2\nrules: [{reply: a}]", "s.yaml:2: version: Input should be 1"),
        ("version: 1\nrules: [\n", "s.yaml:3: not YAML"),
    ],
)
def test_a_bad_file_is_refused_with_line_and_reason(yaml: str, problem: str) -> None:
    assert [line for line in problems(yaml) if line.startswith(problem)]


def test_every_problem_is_reported_in_the_order_of_lines() -> None:
    found = problems("""\
        version: 1
        defaults:
          usge: {}
        rules:
          - when:
              user: "("
              system: ")"
            reply:
              - texxt: a
              - "{{ nope }}"
          - times: 0
        """)
    lines = [int(problem.split(":")[1]) for problem in found]
    assert lines == sorted(lines)
    assert set(lines) == {3, 6, 7, 9, 10, 11}


def test_a_missing_file_is_a_scenario_error(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="cannot be read"):
        load_scenario(tmp_path / "none.yaml")
