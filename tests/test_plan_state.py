"""The state machine of a plan: order, fan-out, failures as data, sessions, limits. No I/O, so no waiting."""

from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import RateLimitError, RunTimeoutError
from orchestrator.outcome import Outcome, RunStatus, Usage
from orchestrator.plans import PlanState, StepJob, parse_plan


def state(text: str, inputs: Mapping[str, Any] | None = None) -> PlanState:
    plan = parse_plan("version: 1\nname: x\n" + dedent(text), Path("x.yaml"))
    return PlanState(plan, plan.bind(inputs or {}), "run-1")


def ended(text: str = "", status: RunStatus = "succeeded", structured: Any = None, **more: Any) -> Outcome:
    found = structured is not None
    return Outcome(run_id="r", status=status, text=text, structured=structured, has_structured=found, **more)


FAILED = Outcome(run_id="r", status="failed", text="part", error=RateLimitError("slow down").to_dict())


def ids(jobs: list[StepJob]) -> list[str]:
    return [job.job_id for job in jobs]


def changes(running: PlanState) -> list[tuple[str, str]]:
    return [(change.id, change.status) for change in running.take_changes()]


DIAMOND = """\
    steps:
      - {id: d, agent: w, prompt: "{{ steps.b.text }}{{ steps.c.text }}", depends_on: [b, c]}
      - {id: a, agent: w, prompt: start}
      - {id: b, agent: w, prompt: "b {{ steps.a.text }}", depends_on: a}
      - {id: c, agent: w, prompt: "c {{ steps.a.text }}", depends_on: a}
      - {id: alone, agent: w, prompt: x}
"""


def test_steps_start_when_what_they_depend_on_succeeded() -> None:
    running = state(DIAMOND)
    assert running.status == "running"
    assert ids(running.ready()) == ["a", "alone"]
    assert running.ready() == [], "each job is handed out once"
    running.apply("a", ended("A"))
    first = running.ready()
    assert [(job.job_id, job.prompt) for job in first] == [("b", "b A"), ("c", "c A")]
    running.apply("c", ended("C"))
    assert running.ready() == []
    running.apply("b", ended("B"))
    assert [job.prompt for job in running.ready()] == ["BC"]
    running.apply("alone", ended())
    assert not running.done
    running.apply("d", ended())
    assert running.done
    assert running.status == "succeeded"
    assert running.error is None
    assert repr(running) == "<PlanState 'x' succeeded: 5 succeeded; 0 jobs running>"


def test_a_failure_skips_all_below_it_and_nothing_else() -> None:
    running = state(DIAMOND)
    running.ready()
    running.apply("a", FAILED)
    assert running.statuses == {
        "d": "skipped",
        "a": "failed",
        "b": "skipped",
        "c": "skipped",
        "alone": "running",
    }
    assert running.results["d"]["error"]["message"] == "skipped because step 'a' failed"
    assert not running.done
    running.apply("alone", ended())
    assert running.status == "failed"
    assert running.error is not None
    assert running.error["message"] == "step 'a' failed: slow down"
    assert running.error["retryable"] is True
    assert set(running.error["details"]["steps"]) == {"a"}, "the skipped steps are not causes"


@pytest.mark.parametrize("status", ["failed", "timed_out", "cancelled", "interrupted"])
def test_every_end_but_success_stops_dependents_and_keeps_its_name(status: RunStatus) -> None:
    running = state(DIAMOND)
    running.ready()
    running.apply("a", ended("so far", status=status))
    assert running.statuses["a"] == status
    assert running.statuses["b"] == "skipped"
    assert running.results["a"] == {
        "status": status,
        "error": running.results["a"]["error"],
        "text": "so far",
    }
    assert running.results["a"]["error"]["message"] == f"the run ended as {status}"


def test_changes_are_told_in_order() -> None:
    running = state("""\
        steps:
          - {id: a, agent: w, prompt: x, for_each: {in: [1, 2]}}
          - {id: b, agent: w, prompt: x, depends_on: a}
    """)
    running.ready()
    running.apply("a[1]", ended())
    running.apply("a[0]", FAILED)
    assert changes(running) == [
        ("a", "running"),
        ("a[0]", "running"),
        ("a[1]", "running"),
        ("a[1]", "succeeded"),
        ("a[0]", "failed"),
        ("a", "failed"),
        ("b", "skipped"),
    ]
    assert changes(running) == []


def test_a_job_carries_every_value_resolved() -> None:
    running = state(
        """\
        inputs:
          repo: {type: path}
          model: {type: string, default: opus}
        defaults: {model: "{{ inputs.model }}", timeout: 60, effort: high}
        steps:
          - id: a
            agent: w
            prompt: "{{ run.id }} in {{ inputs.repo }}"
            cwd: "{{ inputs.repo }}/src"
            idle_timeout: 5
            budget_usd: 0.5
            max_turns: 3
            permission_mode: plan
            output_schema: {type: object}
        """,
        {"repo": "/code"},
    )
    assert running.ready() == [
        StepJob(
            job_id="a",
            step_id="a",
            index=None,
            agent="w",
            prompt="run-1 in /code",
            model="opus",
            cwd="/code/src",
            timeout=60,
            idle_timeout=5,
            budget_usd=0.5,
            max_turns=3,
            effort="high",
            permission_mode="plan",
            output_schema={"type": "object"},
        )
    ]


# Fan-out ----------------------------------------------------------------------------------------------------

FAN_OUT = """\
    steps:
      - {id: plan, agent: w, prompt: x, output_schema: {type: object}}
      - id: review
        depends_on: plan
        for_each: {in: "{{ steps.plan.output.tasks }}", as: task, max_parallel: 2}
        agent: w
        prompt: "{{ index }}: {{ task }}"
      - {id: write, agent: w, depends_on: review, prompt: "{{ steps.review.outputs | json }}"}
"""


def fan_out(tasks: Any) -> PlanState:
    running = state(FAN_OUT)
    running.ready()
    running.apply("plan", ended(structured={"tasks": tasks}))
    return running


def test_one_job_per_item_within_max_parallel() -> None:
    running = fan_out(["a", {"b": 1}, "c"])
    jobs = running.ready()
    assert [(job.job_id, job.index, job.prompt) for job in jobs] == [
        ("review[0]", 0, "0: a"),
        ("review[1]", 1, '1: {"b": 1}'),
    ]
    running.apply("review[1]", ended("second"))
    assert ids(running.ready()) == ["review[2]"]
    running.apply("review[0]", ended("first", structured=[1]))
    running.apply("review[2]", ended("third"))
    result = running.results["review"]
    assert result["outputs"] == [[1], "second", "third"], "in the order of the items, not of the ends"
    assert result["results"][0] == {
        "status": "succeeded",
        "text": "first",
        "output": [1],
        "item": "a",
        "index": 0,
        "error": None,
    }
    assert running.ready()[0].prompt == '[[1], "second", "third"]'


def test_items_fail_alone_and_the_step_with_them_when_all_have_ended() -> None:
    running = fan_out(["a", "b", "c"])
    running.ready()
    running.apply("review[0]", FAILED)
    assert ids(running.ready()) == ["review[2]"], "the other items go on"
    running.apply("review[1]", ended("B"))
    running.apply("review[2]", ended("C"))
    assert running.statuses == {"plan": "succeeded", "review": "failed", "write": "skipped"}
    result = running.results["review"]
    assert [each["status"] for each in result["results"]] == ["failed", "succeeded", "succeeded"]
    assert result["results"][0]["error"]["message"] == "slow down"
    assert result["outputs"] == ["B", "C"]
    assert result["error"]["message"] == "1 of 3 runs did not succeed: review[0]: slow down"
    assert result["error"]["details"] == {"failed": ["review[0]"]}


def test_no_items_is_a_success() -> None:
    running = fan_out([])
    assert ids(running.ready()) == ["write"]
    assert running.results["review"] == {"status": "succeeded", "error": None, "results": [], "outputs": []}


@pytest.mark.parametrize(
    ("tasks", "kind"),
    [("abc", "a string"), ({"a": 1}, "an object"), (3, "a number"), (True, "a boolean"), (None, "null")],
)
def test_items_that_are_no_list_fail_the_step(tasks: Any, kind: str) -> None:
    running = fan_out(tasks)
    assert running.ready() == []
    assert running.statuses["review"] == "failed"
    message = running.results["review"]["error"]["message"]
    assert message == f"for_each needs a list, and {{{{ steps.plan.output.tasks }}}} gave {kind}"
    assert running.status == "failed"


def test_a_written_list_is_data() -> None:
    running = state('steps: [{id: a, agent: w, prompt: "{{ item.n }}", for_each: {in: [{n: 1}, {n: x}]}}]')
    assert [job.prompt for job in running.ready()] == ["1", "x"]


def test_limits_max_parallel_bounds_the_whole_plan() -> None:
    running = state("""\
        limits: {max_parallel: 2}
        steps:
          - {id: a, agent: w, prompt: x, for_each: {in: [1, 2, 3]}}
          - {id: b, agent: w, prompt: x}
    """)
    assert ids(running.ready()) == ["a[0]", "a[1]"]
    running.apply("a[0]", ended())
    assert ids(running.ready()) == ["a[2]"]
    running.apply("a[1]", ended())
    assert ids(running.ready()) == ["b"]


# Templates at run time --------------------------------------------------------------------------------------


def test_a_template_that_fails_fails_its_step_only() -> None:
    running = state("""\
        steps:
          - {id: a, agent: w, prompt: x, output_schema: {type: object}}
          - {id: b, agent: w, prompt: "{{ steps.a.output.missing }}", depends_on: a}
          - {id: c, agent: w, prompt: "{{ steps.a.output.there }}", depends_on: a}
    """)
    running.ready()
    running.apply("a", ended(structured={"there": 1}))
    assert ids(running.ready()) == ["c"]
    assert running.statuses["b"] == "failed"
    assert "no attribute 'missing'" in running.results["b"]["error"]["message"]


def test_a_template_that_fails_for_one_item_fails_that_item() -> None:
    running = state("""\
        steps:
          - {id: a, agent: w, prompt: "{{ 6 / item }}", for_each: {in: [0, 2, 0]}}
    """)
    assert ids(running.ready()) == ["a[1]"]
    assert running.statuses["a"] == "running"
    running.apply("a[1]", ended())
    assert [each["status"] for each in running.results["a"]["results"]] == ["failed", "succeeded", "failed"]
    assert running.status == "failed"


def test_what_agents_say_is_never_a_template() -> None:
    running = state("""\
        steps:
          - {id: a, agent: w, prompt: x, output_schema: {type: object}}
          - {id: b, agent: w, depends_on: a, prompt: "{{ steps.a.text }} {{ steps.a.output.x }}"}
          - {id: c, agent: w, depends_on: b, prompt: "{{ item }}", for_each: {in: "{{ [steps.b.text] }}"}}
    """)
    running.ready()
    running.apply("a", ended("{{ 7 * 7 }}", structured={"x": "{% for x in y %}"}))
    assert [job.prompt for job in running.ready()] == ["{{ 7 * 7 }} {% for x in y %}"]
    running.apply("b", ended("{{ inputs }}{# x #}"))
    assert [job.prompt for job in running.ready()] == ["{{ inputs }}{# x #}"]


# Sessions ---------------------------------------------------------------------------------------------------

SESSIONS = """\
    steps:
      - {id: a, agent: w, prompt: x}
      - {id: each, agent: w, prompt: x, for_each: {in: [1, 2]}}
      - {id: go_on, agent: w, prompt: x, depends_on: a, session: {continue: a}}
      - {id: branch, agent: w, prompt: x, depends_on: each, session: {fork: "each[1]"}}
      - {id: beyond, agent: w, prompt: x, depends_on: each, session: {fork: "each[5]"}}
      - {id: after, agent: w, prompt: x, depends_on: beyond}
"""


def test_sessions_are_handed_on() -> None:
    running = state(SESSIONS)
    assert {job.session_mode for job in running.ready()} == {"fresh"}
    running.apply("a", ended(session_id="s-a"))
    running.apply("each[0]", ended(session_id="s-0"))
    running.apply("each[1]", ended(session_id="s-1"))
    found = {job.job_id: (job.session_mode, job.session_job_id, job.session_id) for job in running.ready()}
    assert found == {"go_on": ("continue", "a", "s-a"), "branch": ("fork", "each[1]", "s-1")}
    assert running.statuses["beyond"] == "failed"
    message = running.results["beyond"]["error"]["message"]
    assert message == "there is no run 'each[5]' whose session could be used"
    assert running.statuses["after"] == "skipped"


def test_without_a_session_to_continue_a_step_fails_instead_of_starting_fresh() -> None:
    running = state(SESSIONS)
    running.ready()
    running.apply("a", ended(session_id=None))
    assert running.ready() == []
    assert running.statuses["go_on"] == "failed"
    assert running.results["go_on"]["error"]["message"] == "run 'a' left no session to use"


# Outputs and the outcome ------------------------------------------------------------------------------------

OUTPUTS = """\
    steps:
      - {id: a, agent: w, prompt: x, output_schema: {type: object}}
      - {id: b, agent: w, prompt: x}
    outputs:
      data: "{{ steps.a.output }}"
      text: "<{{ steps.b.text }}>"
"""


def test_outputs_keep_their_type() -> None:
    running = state(OUTPUTS)
    running.ready()
    running.apply("a", ended(structured={"n": [1]}, cost_usd=0.25, usage=Usage(input_tokens=3), num_turns=1))
    running.apply("b", ended("B", cost_usd=0.5, usage=Usage(input_tokens=4, output_tokens=1), num_turns=2))
    outcome = running.outcome()
    assert outcome.ok
    assert outcome.structured == {"data": {"n": [1]}, "text": "<B>"}
    assert outcome.cost_usd == 0.75
    assert outcome.usage == Usage(input_tokens=7, output_tokens=1)
    assert outcome.usage.total_tokens == 8
    assert outcome.num_turns == 3
    assert outcome.run_id == "run-1"


def test_a_failed_plan_keeps_the_outputs_it_has() -> None:
    running = state(OUTPUTS)
    running.ready()
    running.apply("a", FAILED)
    running.apply("b", ended("B"))
    outcome = running.outcome()
    assert outcome.status == "failed"
    assert outcome.structured == {"text": "<B>"}
    assert outcome.error is not None
    assert "step 'a' failed: slow down; output 'data' is missing" in outcome.error["message"]
    assert outcome.cost_usd is None, "unknown, because that of one job is"


def test_an_output_that_cannot_be_rendered_fails_the_plan() -> None:
    running = state("""\
        steps: [{id: a, agent: w, prompt: x, output_schema: {type: object}}]
        outputs: {title: "{{ steps.a.output.title }}"}
    """)
    running.ready()
    running.apply("a", ended(structured={}))
    assert running.statuses == {"a": "succeeded"}
    assert running.status == "failed"
    assert running.error is not None
    assert running.error["message"].startswith("output 'title' is missing: the template failed")


def test_a_null_answer_is_an_answer() -> None:
    running = state("""\
        steps: [{id: a, agent: w, prompt: x, output_schema: {}}]
        outputs: {a: "{{ steps.a.output }}"}
    """)
    running.ready()
    running.apply("a", Outcome(run_id="r", status="succeeded", structured=None, has_structured=True))
    assert (running.status, running.outputs) == ("succeeded", {"a": None})


# Stopping and misuse ----------------------------------------------------------------------------------------


def test_cancel_ends_everything_at_once() -> None:
    running = fan_out(["a", "b", "c"])
    running.ready()
    running.apply("review[0]", ended("A", cost_usd=1.0))
    running.take_changes()
    running.cancel("enough")
    assert running.done
    assert running.status == "cancelled"
    assert running.statuses == {"plan": "succeeded", "review": "cancelled", "write": "skipped"}
    assert changes(running) == [
        ("review[1]", "cancelled"),
        ("review[2]", "cancelled"),
        ("review", "cancelled"),
        ("write", "skipped"),
    ]
    assert running.ready() == []
    assert running.results["review"]["outputs"] == ["A"], "what was done is kept"
    assert running.error is not None
    assert (running.error["code"], running.error["message"]) == ("cancelled", "enough")


def test_after_a_stop_late_outcomes_count_and_change_nothing() -> None:
    running = state("steps: [{id: a, agent: w, prompt: x}, {id: b, agent: w, prompt: x, depends_on: a}]")
    running.ready()
    running.stop("timed_out", RunTimeoutError("too long"))
    assert running.outcome().cost_usd is None
    running.apply("a", ended("late", cost_usd=0.5))
    assert running.statuses == {"a": "cancelled", "b": "skipped"}
    assert (running.status, running.outcome().cost_usd) == ("timed_out", 0.5)
    assert running.ready() == []


def test_cancelling_what_is_done_changes_nothing() -> None:
    running = state("steps: [{id: a, agent: w, prompt: x}]")
    running.ready()
    running.apply("a", ended())
    running.cancel()
    assert running.status == "succeeded"


def test_misuse_is_refused() -> None:
    running = state("steps: [{id: a, agent: w, prompt: x}]")
    with pytest.raises(ValueError, match="job 'a' is not running"):
        running.apply("a", ended())
    running.ready()
    with pytest.raises(ValueError, match="which is not an end"):
        running.apply("a", Outcome(run_id="r", status="running"))
    running.apply("a", ended())
    with pytest.raises(ValueError, match="job 'a' is not running"):
        running.apply("a", ended())


# Properties -------------------------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Random plans as step id to its dependencies, items (None: a plain step) and parallel limit."""
    names = [f"s{i}" for i in range(draw(st.integers(1, 8)))]
    order = draw(st.permutations(names))
    found = {}
    for name in names:
        above = order[: order.index(name)]
        found[name] = {
            "needs": draw(st.lists(st.sampled_from(above), unique=True)) if above else [],
            "items": draw(st.none() | st.integers(0, 4)),
            "max_parallel": draw(st.none() | st.integers(1, 3)),
        }
    return found


def plan_text(steps: Mapping[str, Mapping[str, Any]], limit: int) -> str:
    lines = ["version: 1", "name: x", f"limits: {{max_parallel: {limit}}}", "steps:"]
    for name, step in steps.items():
        lines.append(f"  - id: {name}\n    agent: w\n    prompt: x\n    depends_on: {step['needs']}")
        if step["items"] is not None:
            parallel = step["max_parallel"] or 99
            items = list(range(step["items"]))
            lines.append(f"    for_each: {{in: {items}, max_parallel: {parallel}}}")
    return "\n".join(lines)


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(1, 4), st.data())
def test_any_plan_with_any_outcomes_ends_and_keeps_the_rules(
    steps: dict[str, dict[str, Any]], limit: int, data: st.DataObject
) -> None:
    plan = parse_plan(plan_text(steps, limit), Path("x.yaml"))
    running = PlanState(plan, {}, "r")
    seen: set[str] = set()
    now: dict[str, StepJob] = {}
    while True:
        for job in running.ready():
            assert job.job_id not in seen, "each job runs at most once"
            assert all(running.statuses[needed] == "succeeded" for needed in steps[job.step_id]["needs"])
            seen.add(job.job_id)
            now[job.job_id] = job
        assert len(now) <= limit
        for name, step in steps.items():
            mine = [job for job in now.values() if job.step_id == name]
            assert len(mine) <= (step["max_parallel"] or 99) or step["items"] is None
        if not now:
            break
        chosen = data.draw(st.sampled_from(sorted(now)))
        del now[chosen]
        running.apply(chosen, ended(status=data.draw(st.sampled_from(["succeeded", "succeeded", "failed"]))))
    assert running.done
    for name, step in steps.items():
        status = running.statuses[name]
        above = {running.statuses[needed] for needed in step["needs"]}
        assert (status == "skipped") == bool(above & {"failed", "skipped"})
        expected = {name} if step["items"] is None else {f"{name}[{i}]" for i in range(step["items"])}
        assert {each for each in seen if each.split("[")[0] == name} == (set() if status == "skipped" else expected)
    assert (running.status == "succeeded") == (set(running.statuses.values()) == {"succeeded"})
