"""The benches work: each runs in small and gives its figures. What these are is not asserted: machines differ."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import burst, imports, latency, many_runs, parsing, shim, throughput
from bench.__main__ import BEGIN, BENCHES, END, page_with
from bench.figures import Figure, p95, summary, table

PAGE = (Path(__file__).parent.parent / "docs" / "performance.md").read_text()

SMALL: dict[str, Callable[[], dict[str, Any]]] = {
    "latency": lambda: latency.run(1),
    "throughput": lambda: throughput.run(1, prompts=4),
    "burst": lambda: burst.run(1, prompts=3, sweep=(1, 2)),
    "many_runs": lambda: many_runs.run(20),
    "parsing": lambda: parsing.run(1),
    "imports": lambda: imports.run(1),
    "shim": lambda: shim.run(1, starts=1, calls=20, rounds=1),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_bench_gives_its_figures(name: str) -> None:
    found = SMALL[name]()
    assert found["figures"]
    assert all(figure["measured"] >= 0 and figure["what"] for figure in found["figures"])
    written = json.dumps(found)
    assert "/tmp" not in written, "results name no paths"
    assert table(found["figures"]).count("\n") == len(found["figures"]) + 2


def test_every_bench_is_tried_here() -> None:
    assert SMALL.keys() == BENCHES.keys()


def test_a_figure_knows_whether_its_bound_is_kept() -> None:
    assert [Figure("x", value, "ms", at_most=3).met for value in (2, 3, 4)] == [True, True, False]
    assert [Figure("x", value, "/s", at_least=3).met for value in (2, 3, 4)] == [False, True, True]
    assert Figure("x", 1, "ms").met is None
    assert (Figure("x", 1, "ms", at_most=3).bound, Figure("x", 1, "", at_least=2.5).bound) == ("≤ 3 ms", "≥ 2.5")


def test_the_95th_percentile_is_a_sample_that_few_are_above() -> None:
    assert p95(list(range(100))) == 95
    assert p95([3, 1, 2]) == 3
    assert summary([4, 1, 3, 2]) == {"n": 4, "median": 2.5, "p95": 4, "min": 1, "max": 4}


def test_the_page_gets_its_table_from_the_results() -> None:
    figure = Figure("how long", 1.234, "ms", at_most=3, note="one").as_dict()
    result = {"bench": "b", "machine": {"cores": 2}, "load": {"before": 0.1, "after": 0.2}, "figures": [figure]}
    page = page_with(f"# Title\n\n{BEGIN}old{END}\n\nThe rest.\n", [result])
    assert "| how long | ≤ 3 ms | 1.23 ms | yes | one |" in page
    assert "old" not in page
    assert page.startswith("# Title\n")
    assert page.endswith(f"{END}\n\nThe rest.\n")
    assert page_with(page, [result]) == page


def test_the_page_is_the_one_the_results_make() -> None:
    results = [
        json.loads(path.read_text())
        for name in BENCHES
        if (path := Path(__file__).parent.parent / "bench" / "results" / f"{name}.json").exists()
    ]
    assert results
    assert page_with(PAGE, results) == PAGE
    assert not re.search(r"/(work|tmp|root|home)\b", json.dumps(results))
