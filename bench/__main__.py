"""Take the figures, write them to bench/results, and the table of docs/performance.md from there.

python -m bench [NAME ...]      all, or those named
python -m bench --table         only the table, from the results that are there
"""

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from bench import burst, imports, latency, many_runs, parsing, shim, throughput
from bench.figures import machine, table
from bench.place import cli_version, loads

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- figures: written by `make bench` -->\n", "<!-- end of figures -->"

BENCHES: dict[str, ModuleType] = {
    "latency": latency,
    "throughput": throughput,
    "burst": burst,
    "many_runs": many_runs,
    "parsing": parsing,
    "imports": imports,
    "shim": shim,
}


def take(name: str) -> dict[str, Any]:
    """One bench's results, with the machine they are from."""
    with loads() as load:
        found = BENCHES[name].run()
    return {"bench": name, "machine": machine(os.cpu_count() or 1, cli_version()), "load": load, **found}


def page_with(page: str, results: list[dict[str, Any]]) -> str:
    """The page with its table written anew from the results."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    figures = [figure for result in results for figure in result["figures"]]
    return f"{before}{BEGIN}\n{table(figures)}\n{_made_on(results)}\n\n{END}{after}"


def _made_on(results: list[dict[str, Any]]) -> str:
    kinds = {tuple(result["machine"].items()) for result in results}
    machines = "; ".join(", ".join(f"{name} {value}" for name, value in kind) for kind in sorted(kinds))
    loads_ = ", ".join(f"{r['bench']} {r['load']['before']} → {r['load']['after']}" for r in results)
    return f"Taken on: {machines}.\nLoad average over a minute, before → after: {loads_}."


def stored() -> list[dict[str, Any]]:
    files = [RESULTS / f"{name}.json" for name in BENCHES]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def main(words: list[str]) -> int:
    names = [word for word in words if not word.startswith("-")]
    if unknown := set(names) - BENCHES.keys():
        print(f"no bench {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    for name in [] if "--table" in words else names or BENCHES:
        print(f"{name} …", flush=True)
        result = take(name)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(table(result["figures"]), flush=True)
    PAGE.write_text(page_with(PAGE.read_text(), stored()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
