"""What `import orchestrator` costs, alone and with every public name, and what must not come with it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.figures import Figure, median

COUNT = 20
HEAVY = ("mcp", "opentelemetry.sdk", "anthropic")
ROOT = Path(__file__).parent.parent
PROGRAM = """
import json, sys, time
began = time.perf_counter()
import orchestrator
alone = time.perf_counter() - began
names = [getattr(orchestrator, name) for name in orchestrator.__all__]
print(json.dumps([alone, time.perf_counter() - began, [name for name in {heavy!r} if name in sys.modules]]))
"""


def run(count: int = COUNT) -> dict[str, Any]:
    """Measure ``count`` new interpreters."""
    found = [_import() for _ in range(count)]
    heavy = sorted({name for _, _, names in found for name in names})
    figures = [
        Figure(
            "import orchestrator",
            median([alone for alone, _, _ in found]),
            "s",
            0.12,
            note="names load on first use",
        ),
        Figure(
            "import orchestrator, every public name",
            median([whole for _, whole, _ in found]),
            "s",
        ),
        Figure("of mcp, the OTel SDK, anthropic: loaded", len(heavy), "", 0, note=", ".join(heavy) or "none"),
    ]
    return {"figures": [figure.as_dict() for figure in figures]}


def _import() -> tuple[float, float, list[str]]:
    program = PROGRAM.format(heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True)
    alone, whole, heavy = json.loads(done.stdout)
    return alone, whole, heavy
