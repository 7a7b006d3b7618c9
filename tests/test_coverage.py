"""The page that says what is covered keeps its word: rows, tests and counts are those that there are."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "coverage.md").read_text("utf-8")
STATUSES = ("met", "partly", "not yet", "not built")

#: Letter → the number of its first section, and how many rows each section has.
SECTIONS = {
    "A": (0, [14, 7, 7, 8, 19, 15, 8, 11, 6, 8, 4, 5, 5, 6, 16, 5, 4, 10]),
    "B": (1, [3, 2, 1, 2, 2, 5, 3, 3, 6, 2, 3, 3]),
    "C": (0, [7, 3, 13, 7, 7, 9, 13, 2, 17, 5, 12]),
}
EXPECTED = [
    *(
        f"{letter}{section}.{row}"
        for letter, (first, counts) in SECTIONS.items()
        for section, count in enumerate(counts, first)
        for row in range(1, count + 1)
    ),
    *(f"X{row}" for row in range(1, 31)),
]

TEST = r"`(tests/\w+\.py)::(\w+(?:::\w+)?)`"


class Row(NamedTuple):
    """One row of the page."""

    id: str
    what: str
    status: str
    shown: str

    @property
    def tests(self) -> list[tuple[str, str]]:
        """File and name of each test it names."""
        return re.findall(TEST, self.shown)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table_lines() -> list[str]:
    """The lines of all tables below the head, without their headings."""
    _, _, body = PAGE.partition("\n## ")
    return [line for line in body.splitlines() if line.startswith("|") and not re.match(r"\|( row |-)", line)]


ROWS = [Row(*cells(line)) for line in table_lines()]


@cache
def defined_in(file: str) -> dict[str, bool]:
    """The tests a file defines, methods as ``Class::test``, and whether each of them always runs."""
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    scopes = [("", tree.body), *((f"{node.name}::", node.body) for node in classes)]
    return {
        prefix + node.name: not any(_may_skip(decorator) for decorator in node.decorator_list)
        for prefix, scope in scopes
        for node in scope
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def _may_skip(decorator: ast.expr) -> bool:
    return any(isinstance(node, ast.Attribute) and node.attr in _SKIPS for node in ast.walk(decorator))


_SKIPS = {"skip", "skipif", "xfail"}


def test_there_are_318_rows_to_account_for() -> None:
    letters = Counter(row_id[0] for row_id in EXPECTED)
    assert letters == {"A": 158, "B": 35, "C": 95, "X": 30}


def test_every_row_is_there_once_and_in_order() -> None:
    found = [row.id for row in ROWS]
    assert [row_id for row_id, times in Counter(found).items() if times > 1] == []
    assert set(EXPECTED) - set(found) == set()
    assert set(found) - set(EXPECTED) == set()
    assert found == EXPECTED


def test_every_row_says_what_it_is_about_and_how_it_stands() -> None:
    assert [row.id for row in ROWS if not row.what or row.status not in STATUSES] == []


@pytest.mark.parametrize("file", sorted({file for row in ROWS for file, _ in row.tests}))
def test_every_test_named_exists_and_always_runs(file: str) -> None:
    assert (ROOT / file).is_file()
    defined = defined_in(file)
    named = {(name, row.id) for row in ROWS for path, name in row.tests if path == file}
    assert sorted(each for each in named if each[0] not in defined) == []
    assert sorted(each for each in named if not defined[each[0]]) == []


def test_whatever_looks_like_a_test_is_read_as_one() -> None:
    for row in ROWS:
        assert "test_" not in re.sub(TEST, "", row.shown), row.id
        assert len(set(row.tests)) == len(row.tests), f"{row.id} names a test twice"


def test_a_met_row_names_tests_and_has_no_reservations() -> None:
    for row in ROWS:
        if row.status == "met":
            assert re.fullmatch(rf"{TEST}(, {TEST})*", row.shown), row


def test_a_partly_met_row_names_tests_and_says_what_is_missing() -> None:
    for row in ROWS:
        if row.status == "partly":
            assert re.fullmatch(rf"{TEST}(, {TEST})*; missing: .*\w.*", row.shown), row


def test_a_row_that_is_not_met_names_no_test() -> None:
    for row in ROWS:
        if row.status in ("not yet", "not built"):
            assert row.tests == [], row
            assert row.shown, row


def test_what_is_not_built_says_what_stands_in_its_place() -> None:
    for row in ROWS:
        if row.status == "not built":
            place = re.match(r"([ABCX][\d.]+): |left out on purpose$", row.shown)
            assert place, row
            assert place[1] is None or place[1] in EXPECTED, row


def test_the_counts_of_the_head_are_right() -> None:
    head, _, _ = PAGE.partition("\n## ")
    told = {status: int(count) for status, count in re.findall(r"^\| ([a-z ]+) \| (\d+) \|", head, re.MULTILINE)}
    assert told == {status: sum(row.status == status for row in ROWS) for status in STATUSES}
    assert sum(told.values()) == len(EXPECTED)
