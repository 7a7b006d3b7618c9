"""Loading plans: what a plan may say, and every mistake told with file, line and what to do."""

import json
import re
from pathlib import Path
from textwrap import dedent

import pytest

from orchestrator.errors import PlanError
from orchestrator.plans import InputSpec, Plan, Step, load_plan, parse_plan, plan_problems
from orchestrator.plans.model import ForEach, Limits, PlanFile, Session

REVIEW = """\
version: 1
name: review_team
description: Reviews a repository
inputs:
  repo: {type: path, required: true, description: Where the code is}
  depth: {type: integer, default: 2}
defaults: {model: sonnet, timeout: 600}
limits: {budget_usd: 2, max_parallel: 8}
steps:
  - id: plan
    agent: manager
    prompt: |
      Look at {{ inputs.repo }}.
    output_schema:
      type: object
      properties: {tasks: {type: array}}
    cwd: "{{ inputs.repo }}"
    timeout: 120
  - id: review
    depends_on: [plan]
    for_each: {in: "{{ steps.plan.output.tasks }}", as: task, max_parallel: 3}
    agent: worker
    prompt: "Review {{ task.aspect }} ({{ index }})"
    timeout: null
  - id: deepen
    depends_on: [review]
    session: {continue: "review[0]"}
    agent: worker
    prompt: Go on.
  - id: write
    depends_on: [review, deepen]
    agent: writer
    prompt: "{% for r in steps.review.results %}{{ r.text }}{% endfor %}{{ steps.deepen.text }}"
outputs: {report: "{{ steps.write.text }}"}
"""
HEAD = "version: 1\nname: x\n"
PATH = Path("plans/x.yaml")


def problems(text: str, **options: object) -> list[str]:
    return plan_problems(text, PATH, **options)  # type: ignore[arg-type]  # only known_agents


def steps(text: str) -> str:
    """A plan with these steps; the first of them is on line 4."""
    return f"{HEAD}steps:\n{dedent(text)}"


def step(text: str) -> str:
    """A plan with one step 'a' on lines 4 to 6 and ``text`` from line 7 on, indented as its keys are."""
    body = "".join(f"    {line}\n" for line in dedent(text).strip("\n").splitlines())
    return f"{HEAD}steps:\n  - id: a\n    agent: w\n    prompt: hello\n{body}"


def load(text: str) -> Plan:
    return parse_plan(text, PATH)


def test_a_whole_plan() -> None:
    plan = load(REVIEW)
    assert (plan.name, plan.description, plan.path) == ("review_team", "Reviews a repository", PATH)
    assert [each.id for each in plan.steps] == ["plan", "review", "deepen", "write"]
    assert plan.limits.max_parallel == 8
    assert plan.layers() == [["plan"], ["review"], ["deepen"], ["write"]]
    assert plan.source == REVIEW
    assert problems(REVIEW, known_agents={"manager", "worker", "writer"}) == []


def test_defaults_hold_where_a_step_says_nothing() -> None:
    by_id = {each.id: each for each in load(REVIEW).steps}
    assert by_id["plan"].timeout == 120
    assert by_id["write"].timeout == 600
    assert by_id["review"].timeout is None, "null in a step means none, not the default"
    assert by_id["plan"].model == "sonnet"


def test_layers_keep_file_order_and_go_as_deep_as_dependencies() -> None:
    plan = load(
        steps("""\
            - {id: d, agent: w, prompt: x, depends_on: [b, c]}
            - {id: a, agent: w, prompt: x}
            - {id: c, agent: w, prompt: x, depends_on: a}
            - {id: b, agent: w, prompt: x}
        """)
    )
    assert plan.layers() == [["a", "b"], ["c"], ["d"]]


def test_digest_covers_the_source_and_the_included_files(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(f"{HEAD}steps:\n  - {{id: a, agent: w, prompt_file: ask.md}}\n")
    digests = set()
    for text in ("one", "two", "two"):
        (tmp_path / "ask.md").write_text(text)
        digests.add(load_plan(path).digest)
    assert len(digests) == 2
    path.write_text(path.read_text() + "# changed\n")
    assert load_plan(path).digest not in digests


def test_files_are_read_relative_to_the_plan(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/ask.md").write_text("Look at {{ run.id }}.")
    (tmp_path / "parts/a.json").write_text(json.dumps({"type": "object"}))
    (tmp_path / "parts/b.yaml").write_text("type: array\n")
    path = tmp_path / "plan.yaml"
    path.write_text(
        steps("""\
            - {id: a, agent: w, prompt_file: parts/ask.md, output_schema: parts/a.json}
            - {id: b, agent: w, prompt: x, output_schema: parts/b.yaml}
        """)
    )
    first, second = load_plan(path, known_agents=["w"]).steps
    assert first.prompt == "Look at {{ run.id }}."
    assert (first.output_schema, second.output_schema) == ({"type": "object"}, {"type": "array"})
    assert set(load_plan(path).included) == {"parts/ask.md", "parts/a.json", "parts/b.yaml"}


def test_faults_in_included_files_name_those_files(tmp_path: Path) -> None:
    (tmp_path / "ask.md").write_text("fine\n{{ inputs.nothing }}\n")
    (tmp_path / "bad.yaml").write_text("type: object\nproperties:\n  a: {type: strin}\n")
    (tmp_path / "bad.json").write_text('{\n  "type": \n}')
    (tmp_path / "latin.md").write_bytes(b"caf\xe9")
    path = tmp_path / "plan.yaml"
    path.write_text(
        steps("""\
            - {id: a, agent: w, prompt_file: ask.md, output_schema: bad.yaml}
            - {id: b, agent: w, prompt_file: gone.md, output_schema: bad.json}
            - {id: c, agent: w, prompt_file: latin.md}
        """)
    )
    with pytest.raises(PlanError) as caught:
        load_plan(path)
    found = [each.removeprefix(f"{tmp_path}/") for each in caught.value.details["problems"]]
    expected = [
        "plan.yaml:5: step 'b': cannot read 'gone.md': No such file or directory",
        "plan.yaml:6: step 'c': cannot read 'latin.md': 'utf-8' codec",
        "ask.md:2: step 'a' uses inputs.nothing, but there is no such input",
        "bad.json:3: not JSON: Expecting value",
        "bad.yaml:3: step 'a': output_schema is not a valid JSON Schema at properties.a.type: 'strin'",
    ]
    assert len(found) == 5
    for each in expected:
        assert any(problem.startswith(each) for problem in found), each


def test_a_plan_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        load_plan(tmp_path / "no.yaml")
    assert caught.value.details["problems"] == [
        f"{tmp_path}/no.yaml:1: cannot read the plan: No such file or directory"
    ]


STEP_B = "- {id: a, agent: w, prompt: x}\n"

CONTINUING = "{id: b, agent: w, prompt: x, depends_on: a, for_each: {in: [1]}, session: {continue: a}}"

MISTAKES = {
    # the document
    "empty": ("", 1, "a plan is a mapping with the keys version, name and steps"),
    "list": ("- a\n", 1, "a plan is a mapping"),
    "not yaml": (f"{HEAD}steps: [\n", 4, "not YAML"),
    "duplicate key": (step("timeout: 1\ntimeout: 2"), 8, "duplicate key 'timeout'"),
    "unquoted template": (f"{HEAD}steps:\n  - id: a\n    agent: w\n    prompt: {{{{ x }}}}\n", 6, "to be quoted"),
    # the top
    "no version": (f"name: x\nsteps:\n  {STEP_B}", 1, "'version' is required"),
    "other version": (f"version: 2\nname: x\nsteps:\n  {STEP_B}", 1, "version: must be 1"),
    "no name": (f"version: 1\nsteps:\n  {STEP_B}", 1, "'name' is required"),
    "no steps": (HEAD, 1, "'steps' is required"),
    "empty steps": (f"{HEAD}steps: []\n", 3, "a plan needs at least one step"),
    "steps are a mapping": (f"{HEAD}steps: {{a: 1}}\n", 3, "steps: must be a list"),
    "step is a string": (f"{HEAD}steps:\n  - a\n", 4, "a step is a mapping"),
    "unknown top key": (f"{HEAD}stepz: 1\nsteps:\n  {STEP_B}", 3, "unknown key 'stepz'; did you mean 'steps'?"),
    "another language": (f"{HEAD}nodes: 1\nsteps:\n  {STEP_B}", 3, "unknown key 'nodes'; did you mean 'steps'?"),
    "unknown limit": (
        f"{HEAD}limits:\n  max_paralel: 2\nsteps:\n  {STEP_B}",
        4,
        "limits: unknown key 'max_paralel'; did you mean 'max_parallel'?",
    ),
    "unknown default": (f"{HEAD}defaults:\n  prompt: 2\nsteps:\n  {STEP_B}", 4, "defaults: unknown key 'prompt'"),
    # keys of a step
    "typo": (step("promt: hi"), 7, "step 'a': unknown key 'promt'; did you mean 'prompt'?"),
    "needs": (step("needs: []"), 7, "step 'a': unknown key 'needs'; did you mean 'depends_on'?"),
    "typo in for_each": (
        step("for_each:\n  in: []\n  az: x"),
        9,
        "for_each: unknown key 'az'; known: as, in, max_parallel",
    ),
    "typo in session": (step("session: {contine: a}"), 7, "unknown key 'contine'; did you mean 'continue'?"),
    "wrong type": (step("timeout: soon"), 7, "step 'a': timeout: must be a valid number"),
    "string for number": (step('timeout: "60"'), 7, "step 'a': timeout: must be a valid number"),
    "zero": (step("timeout: 0"), 7, "step 'a': timeout: must be greater than 0"),
    "turns": (step("max_turns: 1.5"), 7, "step 'a': max_turns: must be a valid integer"),
    "no id": (steps("- {agent: w, prompt: x}"), 4, "the step without an id: 'id' is required"),
    "no agent": (steps("- {id: a, prompt: x}"), 4, "step 'a': 'agent' is required"),
    "agent template": (
        steps('- {id: a, prompt: x, agent: "{{ y }}"}'),
        4,
        "step 'a': agent: must be one word, and cannot be a template",
    ),
    "no prompt": (steps("- {id: a, agent: w}"), 4, "step 'a' needs a prompt or a prompt_file"),
    "two prompts": (step("prompt_file: x.md"), 7, "step 'a': prompt and prompt_file exclude each other"),
    "bad id": (steps("- {id: 1st, agent: w, prompt: x}"), 4, "step id '1st' may hold letters, digits"),
    "duplicate id": (steps(f"{STEP_B}{STEP_B}"), 5, "step id 'a' is already used on line 4"),
    "no for_each.in": (step("for_each: {as: x}"), 7, "for_each: 'in' is required"),
    "reserved item": (step("for_each: {in: [], as: steps}"), 7, "'steps' cannot be the name of an item"),
    "number for list": (step("for_each: {in: 3}"), 7, "must be a list, or one {{ expression }}"),
    "text for list": (step("for_each: {in: 'a {{ run.id }}'}"), 7, "one {{ expression }} and nothing else"),
    "template in a list": (step("for_each: {in: ['{{ run.id }}']}"), 7, "a written list is data"),
    # references between steps
    "unknown dependency": (
        step("depends_on:\n  - b\n") + "  - {id: bb, agent: w, prompt: x}\n",
        8,
        "step 'a' depends on unknown step 'b'; did you mean 'bb'?",
    ),
    "itself": (step("depends_on: [a]"), 7, "in a circle: a -> a; remove one"),
    "circle": (
        steps("""\
            - {id: a, agent: w, prompt: x, depends_on: [c]}
            - {id: b, agent: w, prompt: x, depends_on: [a]}
            - {id: c, agent: w, prompt: x, depends_on: [b]}
        """),
        4,
        "steps depend on each other in a circle: a -> c -> b -> a",
    ),
    "not depended on": (
        steps(f"{STEP_B}- {{id: b, agent: w, prompt: '{{{{ steps.a.text }}}}'}}"),
        5,
        "step 'b' uses steps.a but does not depend on it: add depends_on: [a]",
    ),
    "unknown step": (
        step("cwd: '{{ steps.aa.text }}'"),
        7,
        "uses steps.aa, but there is no such step",
    ),
    "own result": (step("cwd: '{{ steps.a.text }}'"), 7, "step 'a' uses steps.a, its own result"),
    "all steps": (step("cwd: '{{ steps | json }}'"), 7, "step 'a' uses `steps` as a whole"),
    "hyphen": (
        steps("- {id: a-b, agent: w, prompt: x}\n- {id: c, agent: w, prompt: '{{ steps.a-b.text }}'}"),
        5,
        "a name with a hyphen is written steps['a-b']",
    ),
    "no schema": (
        steps(f"{STEP_B}- {{id: b, agent: w, depends_on: a, prompt: '{{{{ steps.a.output }}}}'}}"),
        5,
        "uses steps.a.output, but 'a' has no output_schema",
    ),
    "unknown result": (
        steps(f"{STEP_B}- {{id: b, agent: w, depends_on: a, prompt: '{{{{ steps.a.txt }}}}'}}"),
        5,
        "uses steps.a.txt, which a step does not have; did you mean 'text'?",
    ),
    "for_each result": (
        step("for_each: {in: [1]}") + "  - {id: b, agent: w, depends_on: a, prompt: '{{ steps.a.output }}'}",
        8,
        "uses steps.a.output, but 'a' is a for_each step; did you mean 'outputs'?",
    ),
    "unknown input": (
        f"{HEAD}inputs:\n  repo: {{type: path}}\nsteps:\n  - {{id: a, agent: w, prompt: '{{{{ inputs.rpo }}}}'}}",
        6,
        "step 'a' uses inputs.rpo, but there is no such input; did you mean 'repo'?",
    ),
    "unknown name": (step("cwd: '{{ repo }}'"), 7, "step 'a' uses unknown name 'repo'; known: inputs, run, steps"),
    "item outside": (
        step("for_each: {in: '{{ item.list }}'}"),
        7,
        "step 'a' uses unknown name 'item'",
    ),
    "output of no step": (
        step("") + "outputs:\n  report: '{{ steps.b.text }}'\n",
        8,
        "output 'report' uses steps.b",
    ),
    "step in defaults": (
        f"{HEAD}defaults:\n  cwd: '{{{{ steps.a.text }}}}'\nsteps:\n  {STEP_B}",
        4,
        "defaults.cwd uses steps.a, but here only inputs and run are known",
    ),
    # templates
    "template syntax": (step("cwd: '{{ inputs. }}'"), 7, "step 'a': template: "),
    "line inside a prompt": (
        f"{HEAD}steps:\n  - id: a\n    agent: w\n    prompt: |\n      one\n      {{{{ nope }}}}\n",
        8,
        "uses unknown name 'nope'",
    ),
    "syntax inside a prompt": (
        f"{HEAD}steps:\n  - id: a\n    agent: w\n    prompt: |\n      one\n      {{% if %}}\n",
        8,
        "template: Expected an expression",
    ),
    "unknown filter": (step("cwd: '{{ run.id | slugg }}'"), 7, "there is no filter 'slugg'; did you mean 'slug'?"),
    "include": (step("cwd: '{% include \"x\" %}'"), 7, "cannot include or import"),
    # sessions
    "session word": (step("session: new"), 7, "session: must be fresh, {continue: STEP} or {fork: STEP}"),
    "session of nobody": (step("session: {fork: b}"), 7, "step 'a': session: there is no step 'b'"),
    "session reference": (step("session: {fork: 'b[x]'}"), 7, "one run of a for_each step as review[0]"),
    "session without dependency": (
        steps(f"{STEP_B}- {{id: b, agent: w, prompt: x, session: {{fork: a}}}}"),
        5,
        "step 'b': session uses step 'a' but the step does not depend on it: add depends_on: [a]",
    ),
    "index of a plain step": (
        steps(f"{STEP_B}- {{id: b, agent: w, prompt: x, depends_on: a, session: {{fork: 'a[0]'}}}}"),
        5,
        "'a' is not a for_each step: write a without an index",
    ),
    "for_each without index": (
        step("for_each: {in: [1]}") + "  - {id: b, agent: w, prompt: x, depends_on: a, session: {fork: a}}",
        8,
        "'a' is a for_each step: name one of its runs, as a[0]",
    ),
    "all items continue": (
        steps(f"{STEP_B}- {CONTINUING}"),
        5,
        "cannot all continue one session: use fork",
    ),
    "two continue at once": (
        steps("""\
            - {id: a, agent: w, prompt: x}
            - {id: b, agent: w, prompt: x, depends_on: a, session: {continue: a}}
            - {id: c, agent: w, prompt: x, depends_on: b, session: {continue: b}}
            - {id: d, agent: w, prompt: x, depends_on: b, session: {continue: a}}
        """),
        7,
        "steps 'c' and 'd' both continue the session of 'a' and could run at the same time",
    ),
    # inputs
    "input type": (
        f"{HEAD}inputs:\n  a: {{type: strin}}\nsteps:\n  {STEP_B}",
        4,
        "inputs.a.type: must be 'string'",
    ),
    "input without type": (
        f"{HEAD}inputs:\n  a: {{default: 1}}\nsteps:\n  {STEP_B}",
        4,
        "inputs.a: 'type' is required",
    ),
    "input key": (
        f"{HEAD}inputs:\n  a: {{type: path, requird: true}}\nsteps:\n  {STEP_B}",
        4,
        "inputs.a: unknown key 'requird'; did you mean 'required'?",
    ),
    "input name": (
        f"{HEAD}inputs:\n  a-b: {{type: path}}\nsteps:\n  {STEP_B}",
        4,
        "input name 'a-b' must be letters",
    ),
    "default type": (
        f"{HEAD}inputs:\n  a:\n    type: integer\n    default: x\nsteps:\n  {STEP_B}",
        6,
        "input 'a': the default must be of type integer, not \"x\"",
    ),
    "default not in enum": (
        f"{HEAD}inputs:\n  a: {{type: string, default: x, enum: [y, z]}}\nsteps:\n  {STEP_B}",
        4,
        'the default must be one of "y", "z", not "x"',
    ),
    "enum type": (
        f"{HEAD}inputs:\n  a: {{type: string, enum: [y, 2]}}\nsteps:\n  {STEP_B}",
        4,
        "every value must be",
    ),
    "required default": (
        f"{HEAD}inputs:\n  a: {{type: string, required: true, default: x}}\nsteps:\n  {STEP_B}",
        4,
        "a required input has no use for a default",
    ),
    # schemas
    "schema": (
        step("output_schema:\n  type: object\n  required: a"),
        9,
        "not a valid JSON Schema at required: 'a'",
    ),
    "schema is a list": (
        step("output_schema: [a]"),
        7,
        "output_schema must be a JSON Schema (a mapping) or the path",
    ),
    "schema file": (step("output_schema: gone.json"), 7, "step 'a': cannot read 'gone.json'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake(case: str) -> None:
    text, line, message = MISTAKES[case]
    found = problems(text)
    assert any(each.startswith(f"{PATH}:{line}: ") and message in each for each in found), found


ALONE = set(MISTAKES) - {"two prompts", "unquoted template", "empty", "typo in session", "no version", "no name"}


@pytest.mark.parametrize("case", sorted(ALONE))
def test_one_mistake_is_one_problem(case: str) -> None:
    found = problems(MISTAKES[case][0])
    expected = {"hyphen": 2}  # `steps.a-b.text` is also the unknown name `b`
    assert len(found) == expected.get(case, 1), found


def test_all_problems_are_told_at_once_in_the_order_of_lines() -> None:
    text = dedent("""\
        version: 1
        name: x
        extra: 1
        inputs:
          repo: {type: pth}
        steps:
          - id: a
            agent: wrker
            prompt: "{{ inputs.repo }} {{ inputs.nope }}"
            timeout: soon
          - id: b
            agent: worker
            promt: x
            prompt: "{{ steps.a.text }}"
          - id: c
            agent: worker
            prompt: "{{ 1 | nofilter }}"
            depends_on: [x]
        """)
    found = problems(text, known_agents=["worker"])
    assert [int(each.split(":")[1]) for each in found] == [3, 5, 8, 9, 10, 13, 14, 17, 18]
    assert "unknown agent 'wrker'; did you mean 'worker'?" in found[2]


def test_a_step_that_cannot_be_read_does_not_make_references_to_it_wrong() -> None:
    text = steps("""\
        - {id: a, agent: w, prompt: x, for_each: 3}
        - {id: b, agent: w, prompt: "{{ steps.a.outputs }}", depends_on: a}
        - {id: c, agent: w, prompt: "{{ steps.d.text }}", depends_on: a}
        - {id: d, agent: w, prompt: x}
    """)
    assert len(problems(text)) == 1


def test_the_error_carries_every_problem() -> None:
    with pytest.raises(PlanError) as caught:
        load(step("promt: x\ntimeout: -1"))
    assert len(caught.value.details["problems"]) == 2
    assert str(caught.value).startswith("the plan has 2 problems:\nplans/x.yaml:7: ")
    assert caught.value.exit_code == 2


def test_continuing_one_session_in_turn_is_allowed() -> None:
    text = steps("""\
        - {id: a, agent: w, prompt: x}
        - {id: b, agent: w, prompt: x, depends_on: a, session: {continue: a}}
        - {id: c, agent: w, prompt: x, depends_on: b, session: {continue: a}}
        - {id: d, agent: w, prompt: x, depends_on: b, session: {fork: b}}
        - {id: e, agent: w, prompt: x, session: fresh}
    """)
    modes = [(each.session.mode, str(each.session.source)) for each in load(text).steps]
    assert modes == [("fresh", "None"), ("continue", "a"), ("continue", "a"), ("fork", "b"), ("fresh", "None")]


def test_thousand_steps_load() -> None:
    lines = ["- {id: s0, agent: w, prompt: x}"]
    lines += [f"- {{id: s{i}, agent: w, prompt: x, depends_on: s{i - 1}}}" for i in range(1, 1000)]
    assert len(load(f"{HEAD}steps:\n" + "\n".join(lines)).layers()) == 1000


# Binding inputs ---------------------------------------------------------------------------------------------

INPUTS = """\
version: 1
name: x
inputs:
  repo: {type: path}
  count: {type: integer, default: 3}
  ratio: {type: number, required: false}
  fast: {type: boolean, default: false}
  kind: {type: string, default: a, enum: [a, b]}
  list: {type: array, default: []}
  table: {type: object, default: {}}
steps:
  - {id: s, agent: w, prompt: "{{ inputs.repo }}"}
"""


def test_defaults_and_optional_inputs() -> None:
    assert load(INPUTS).bind({"repo": "."}) == {
        "repo": ".",
        "count": 3,
        "ratio": None,
        "fast": False,
        "kind": "a",
        "list": [],
        "table": {},
    }


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("count", "5", 5),
        ("ratio", "5", 5),
        ("ratio", "0.5", 0.5),
        ("fast", "true", True),
        ("fast", "No", False),
        ("fast", "1", True),
        ("kind", "b", "b"),
        ("list", '["x", 1]', ["x", 1]),
        ("table", '{"x": null}', {"x": None}),
        ("repo", "5", "5"),
        ("count", 7, 7),
        ("list", [1], [1]),
    ],
)
def test_values_are_read_as_the_command_line_means_them(name: str, text: object, value: object) -> None:
    bound = load(INPUTS).bind({"repo": ".", name: text})[name]
    assert (bound, type(bound)) == (value, type(value))


def test_relative_paths_are_joined_to_the_base() -> None:
    plan = load(INPUTS)
    assert plan.bind({"repo": "../code"}, base=Path("/srv/plans"))["repo"] == "/srv/code"
    assert plan.bind({"repo": "/abs"}, base=Path("/srv/plans"))["repo"] == "/abs"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", "five", "input 'count' must be of type integer, not \"five\""),
        ("count", "5.5", "must be of type integer, not 5.5"),
        ("count", True, "must be of type integer, not true"),
        ("count", "true", "must be of type integer, not true"),
        ("ratio", "NaN", 'must be of type number, not "NaN"'),
        ("fast", "maybe", "must be of type boolean"),
        ("fast", 1, "must be of type boolean, not 1"),
        ("kind", "c", 'must be one of "a", "b", not "c"'),
        ("list", '{"a": 1}', "must be of type array"),
        ("table", "[", "must be of type object"),
        ("repo", 5, "must be of type path"),
        ("repo", None, "input 'repo' is required: give repo=VALUE (path)"),
        ("repos", "x", "unknown input 'repos'; did you mean 'repo'?"),
    ],
)
def test_wrong_values(name: str, value: object, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        load(INPUTS).bind({"repo": ".", name: value})
    assert message in str(caught.value)


def test_all_wrong_values_are_told_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        load(INPUTS).bind({"cuont": "1", "fast": "maybe"})
    assert len(caught.value.details["problems"]) == 3


def test_the_documented_plan_loads() -> None:
    docs = Path(__file__).parent.parent / "docs" / "plans.md"
    [example] = re.findall(r"```yaml\n(.*?)```", docs.read_text(encoding="utf-8"), re.DOTALL)
    assert problems(example, known_agents=["manager", "worker"]) == []


def test_every_key_is_documented() -> None:
    docs = (Path(__file__).parent.parent / "docs" / "plans.md").read_text(encoding="utf-8")
    models = (PlanFile, Step, ForEach, Session, Limits, InputSpec)
    keys = {field.alias or name for model in models for name, field in model.model_fields.items()}
    missing = {key for key in keys if not re.search(rf"\b{key}\b", docs)}
    assert missing == set()
