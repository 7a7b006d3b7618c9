"""YAML with lines: where values are, what is refused, and that nothing makes it raise."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.yaml_lines import parse_yaml

DOCUMENT = """\
name: x
steps:
  - id: a
    prompt: |
      first
      second
  - id: b
    prompt: "one line"
"""


def test_lines_of_keys_items_and_texts() -> None:
    found = parse_yaml(DOCUMENT)
    assert found.problems == ()
    assert found.data["steps"][0]["prompt"] == "first\nsecond\n"
    assert found.line(("steps", 1)) == 7
    assert found.line(("steps", 0, "prompt")) == 4
    assert found.text_line(("steps", 0, "prompt"), 2) == 6
    assert found.text_line(("steps", 1, "prompt"), 1) == 8


def test_the_line_of_what_is_missing_is_that_of_what_should_hold_it() -> None:
    found = parse_yaml(DOCUMENT)
    assert found.line(("steps", 1, "agent")) == 7
    assert found.line(("steps", 9, "agent")) == 2
    assert found.line(("nothing",)) == 1


def test_plain_scalars_follow_yaml_1_2() -> None:
    text = "on: no\ndate: 2026-01-01\noctal: 010\nhex: 0x1F\nfloat: 1e3\nnothing:\nyes: true\nbig: 1_000"
    assert parse_yaml(text).data == {
        "on": "no",
        "date": "2026-01-01",
        "octal": 10,
        "hex": 31,
        "float": 1000.0,
        "nothing": None,
        "yes": True,
        "big": "1_000",
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", (4, "duplicate key 'c': it is already given on line 3")),
        ("a: 1\nprompt: {{ inputs.x }}\n", (2, 'a template has to be quoted: "{{ … }}"')),
        ("a: 1\n2: b\n", (2, "put 2 in quotes")),
        ("a: &a\n  - *a\n", (1, "an alias may not contain itself")),
        ("x: 1\n<<: {a: 1}\n", (2, "merge keys (<<) are not supported")),
        ("a:\n  - [1,\nb: 2", (3, "not YAML: while parsing a flow sequence")),
        ("a: 1\nb: \x01", (2, "not YAML: unacceptable character")),
        ("a: !!python/name:os.system x", (1, "is not supported")),
        ("a: !!int seven", (1, "not a number")),
        ("a: " + "9" * 5000, (1, "not a number")),
        ("--- 1\n--- 2\n", (2, "expected a single document")),
        ("[" * 3000, (1, "nested too deeply")),
        ("a: *nowhere", (1, "undefined alias 'nowhere'")),
    ],
)
def test_refused(text: str, problem: tuple[int, str]) -> None:
    [(line, message)] = parse_yaml(text).problems
    assert line == problem[0]
    assert problem[1] in message


def test_aliases_that_multiply_are_refused() -> None:
    names = [chr(ord("a") + i) for i in range(10)]
    lines = ["a: &a [" + ",".join("x" * 10) + "]"]
    lines += [f"{name}: &{name} [" + ",".join([f"*{above}"] * 10) + "]" for above, name in pairwise(names)]
    [(_, message)] = parse_yaml("\n".join(lines)).problems
    assert "too many values" in message


@given(st.text(alphabet="ab:-[]{}#&*!|>\"' \n\t0.~<%@", max_size=60))
@example("")
@example("a: >\n  x\n  y\n")
def test_never_raises_and_tells_why_there_is_no_data(text: str) -> None:
    found = parse_yaml(text)
    lines = text.count("\n") + 1
    assert all(1 <= line <= lines for line, _ in found.problems)
