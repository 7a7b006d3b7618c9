"""Templates: what they may refer to, what they insert, and that nothing inserted acts as a template."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.errors import PlanError
from orchestrator.plans.template import Template, template

DATA: dict[str, Any] = {
    "inputs": {"n": 3, "name": "Änne Doe", "flags": [True, None], "opt": None},
    "steps": {"plan": {"output": {"items": [1, 2], "keys": "k"}, "text": "one\n\n two "}},
}


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("n is {{ inputs.n }}", "n is 3"),
        ("{{ inputs.flags }} {{ inputs.opt }} {{ true }}", "[true, null] null true"),
        ("{{ steps.plan.output }}", '{"items": [1, 2], "keys": "k"}'),
        ("{{ steps.plan.output.items }}{{ steps.plan.output.keys }}", "[1, 2]k"),
        ("{% for k, v in inputs.items() if v == 3 %}{{ k }}{% endfor %}", "n"),
        ("{% for k in steps['plan']['output'] %}{{ loop.index }}{{ k }} {% endfor %}", "1items 2keys "),
        ("{{ inputs.name | slug }}", "nne-doe"),
        ("{{ steps.plan.text | lines }}", '["one", "two"]'),
        ("{{ steps.plan.output.items | json(1) }}", "[\n 1,\n 2\n]"),
        ("{{ inputs.flags | select }} {{ range(3) }}", "[true] [0, 1, 2]"),
        ("{{ inputs.name | json }}", '"Änne Doe"'),
        ("a\n{% if inputs.n > 2 %}\nb\n{% endif %}\nc", "a\nb\nc"),
        ("<{{ '&' }}>", "<&>"),
        ("{% raw %}{{ x }}{% endraw %}", "{{ x }}"),
    ],
)
def test_render(text: str, rendered: str) -> None:
    assert Template(text).render(DATA) == rendered


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{{ inputs.flags }}", [True, None]),
        ("  {{- inputs.n -}}\n", 3),
        ("{{ -inputs.n }}", -3),
        ("{{-1}}", 1),
        ("{{ steps.plan.output }}", {"items": [1, 2], "keys": "k"}),
        ("{{ inputs.flags | select }}", [True]),
        ("{{ range(2) }}", [0, 1]),
        ("{{ (1, (2,)) }}", [1, [2]]),
        ("{{ inputs.opt }}", None),
        ("{{ '}}' }}", "}}"),
        ("{{ inputs.n }}{{ inputs.n }}", "33"),
        ("n={{ inputs.n }}", "n=3"),
        ("{# c #}{{ inputs.n }}", "3"),
        ("plain", "plain"),
    ],
)
def test_evaluate_keeps_the_type_of_a_lone_expression(text: str, value: object) -> None:
    found = Template(text).evaluate(DATA)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["{{ inputs.n }}", "\n{{ inputs.n }} \n"])
def test_is_expression(text: str) -> None:
    assert Template(text).is_expression


@pytest.mark.parametrize("text", ["", "x", "{{ a }} {{ b }}", "{{ a }}{# c #}", "{% if a %}{{ b }}{% endif %}"])
def test_is_no_expression(text: str) -> None:
    assert not Template(text).is_expression


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ nothing }}", "'nothing' is undefined"),
        ("{{ inputs.nothing }}", "no attribute 'nothing'"),
        ("{{ inputs.n / 0 }}", "division by zero"),
        ("{{ [nothing] }}", "'nothing' is undefined"),
        ("{{ [nothing] | json }}", "'nothing' is undefined"),
        ("{{ ().__class__.__bases__ }}", "unsafe"),
        ("{{ inputs.name.__init__.__globals__ }}", "unsafe"),
        ("{{ '{0.__class__}'.format(1) }}", "unsafe"),
        ("{{ inputs.flags.append(1) }}", "unsafe"),
        ("{{ inputs.pop('n') }}", "unsafe"),
        ("{{ range(10000000) }}", "Range too big"),
        ("{{ inputs.keys }}", "is not data"),
        ("{{ self }}", "is not data"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
        ("{{ inputs.flags | map('nofilter') | list }}", "No filter named 'nofilter'"),
    ],
)
@pytest.mark.parametrize("how", ["render", "evaluate"])
def test_failures_are_plan_errors(text: str, message: str, how: str) -> None:
    with pytest.raises(PlanError, match="the template failed") as caught:
        getattr(Template(text), how)(DATA)
    assert message in str(caught.value)


def test_an_expression_without_a_value_is_refused() -> None:
    with pytest.raises(PlanError, match="give its `if` an `else`"):
        Template("{{ 1 if false }}").evaluate({})


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a\n{{ b", 2, "unexpected end of template"),
        ("{% if x %}", 1, "Unexpected end of template"),
        ("a\n\n{{ b | jsn }}", 3, "no filter 'jsn'; did you mean 'json'?"),
        ("{% if x %}{{ 1 | nofilter }}{% endif %}", 1, "no filter 'nofilter'"),
        ("{{ 1 is evn }}", 1, "no test 'evn'; did you mean 'even'?"),
        ("{{ x | random }}", 1, "no filter 'random'"),
        ("\n{% include 'a' %}", 2, "cannot include or import"),
        ("{% import 'a' as b %}", 1, "cannot include or import"),
        ("{% from 'a' import b %}", 1, "cannot include or import"),
        ("{% extends 'a' %}", 1, "cannot include or import"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", 1, "nested too deeply"),
    ],
)
def test_what_is_no_template(text: str, line: int, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Template(text)
    assert message in str(caught.value)
    assert caught.value.details["line"] == line


@pytest.mark.parametrize(
    ("text", "references"),
    [
        ("{{ inputs.a }}", [("inputs", "a", None)]),
        ("{{ inputs }}", [("inputs", None, None)]),
        ("{{ steps.a.output.b.c[0] }}", [("steps", "a", "output")]),
        ("{{ steps['a-b'].text }}", [("steps", "a-b", "text")]),
        ("{{ steps[inputs.x].text }}", [("steps", None, "text"), ("inputs", "x", None)]),
        ("{{ inputs.a[steps.b.output.i] }}", [("inputs", "a", None), ("steps", "b", "output")]),
        ("{% for x in steps.a.results if x.text %}{{ steps.b.text }}{% endfor %}", None),
        ("{{ steps.a.text | replace('x', inputs.y) }}", [("steps", "a", "text"), ("inputs", "y", None)]),
        ("{{ 'steps.a' }} {# steps.a #}", []),
    ],
)
def test_references(text: str, references: list[tuple[str, str | None, str | None]] | None) -> None:
    found = [(each.root, each.name, each.attribute) for each in Template(text).references]
    expected = [("steps", "a", "results"), ("steps", "b", "text")] if references is None else references
    assert sorted(found, key=str) == sorted(expected, key=str)


def test_unbound_names_and_lines() -> None:
    found = Template(
        "{% for x in inputs.a %}\n{{ x }} {{ loop.index }}\n{% set y = z %}{{ y }}{% endfor %}\n{{ z }}"
    )
    assert found.unbound == {"inputs": 1, "z": 3}


@given(st.text())
@example("{{ 7 * 7 }}")
@example("{% for x in y %}")
@example("{# x #}")
@example("[1, 2]")
def test_what_is_inserted_is_data(text: str) -> None:
    data = {"steps": {"a": {"text": text}}}
    assert template("<{{ steps.a.text }}>").render(data) == f"<{text}>"
    assert template("{{ steps.a.text }}").evaluate(data) == text


@given(st.text(alphabet="{}%# ab.|()[]'\"\n-+", max_size=30))
@example("{{-}}")
@example("{{}}")
@example("{{ a }}{{ b }}")
def test_any_text_is_a_template_or_a_plan_error(text: str) -> None:
    line = _line_of_fault(text)
    assert line is None or 1 <= line <= text.count("\n") + 1


def _line_of_fault(text: str) -> int | None:
    """None if the text is a template that renders, or fails to, as a template may."""
    try:
        found = Template(text)
    except PlanError as error:
        return int(error.details["line"])
    with suppress(PlanError):
        assert isinstance(found.render({}), str)
    with suppress(PlanError):
        found.evaluate({})
    return None
