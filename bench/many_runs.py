"""A thousand runs through one runtime whose CLIs are fakes: what the orchestrator itself costs, and what it keeps.

    python -m bench.many_runs [COUNT] [--profile]

Everything but the CLI is real: admission, the durable rows, the messages, the pool. In a process of its own, so
that the memory is its own. ``--profile`` prints where the time goes.
"""

import cProfile
import json
import pstats
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import psutil

from bench.figures import Figure
from bench.place import AGENTS, ask, bundled_cli
from orchestrator import load_config, open_runtime
from orchestrator.testing import FakeProcesses

COUNT = 1000
AT_ONCE = 16
ROOT = Path(__file__).parent.parent


def run(count: int = COUNT) -> dict[str, Any]:
    """Measure ``count`` runs; memory is compared between the first fifth and the end."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.many_runs", str(count)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    return {"figures": [figure.as_dict() for figure in _figures(count, found)], **found}


def _figures(count: int, found: dict[str, Any]) -> list[Figure]:
    (first, *_, last), (before, *_, after) = found["rss_at"], found["rss_mb"]
    made_of = f"{AT_ONCE} at once, {found['seconds']:.2f} s, {found['cpu_s']:.2f} s of processor time"
    between = f"from run {first} to run {last}: {before} to {after} MB"
    return [
        Figure(
            f"{count} runs on fake conversations", count / found["seconds"], "runs/s", at_least=400, note=made_of
        ),
        Figure(f"{count} runs: growth of memory", after - before, "MB", 10, note=between),
    ]


async def measure(count: int) -> dict[str, Any]:
    """The runs, and the memory of this process at every fifth of them."""
    process = psutil.Process()
    marks = [count * part // 5 for part in range(1, 6)]
    rss: list[float] = []
    done = 0
    with TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        (root / "agents").mkdir()
        (root / "agents" / "full.md").write_text(AGENTS["full"])
        environ = {"HOME": str(root), "PATH": "/usr/local/bin:/usr/bin:/bin"}
        overrides = {
            "data_dir": str(root / "data"),
            "agents.user_path": str(root / "none"),
            "claude.path": str(bundled_cli()),
            "limits.max_processes": AT_ONCE,
            "telemetry.enabled": False,
        }
        config = load_config(project_dir=root, environ={}, overrides=overrides)
        async with open_runtime(config, environ=environ, open_process=FakeProcesses("done")) as rt:
            limit = anyio.CapacityLimiter(AT_ONCE)

            async def one(n: int) -> None:
                nonlocal done
                async with limit:
                    await ask(rt, f"prompt {n}")
                done += 1
                if done in marks:
                    rss.append(round(process.memory_info().rss / 1e6, 1))

            cpu, began = time.process_time(), time.perf_counter()
            async with anyio.create_task_group() as tg:
                for n in range(count):
                    tg.start_soon(one, n)
            seconds = time.perf_counter() - began
            cpu = time.process_time() - cpu
    return {"seconds": round(seconds, 3), "cpu_s": round(cpu, 3), "rss_at": marks, "rss_mb": rss}


def main() -> None:
    count = next((int(word) for word in sys.argv[1:] if word.isdecimal()), COUNT)
    if "--profile" not in sys.argv:
        print(json.dumps(anyio.run(measure, count)))
        return
    profile = cProfile.Profile()
    profile.enable()
    found = anyio.run(measure, count)
    profile.disable()
    print(found)
    stats = pstats.Stats(profile).strip_dirs()
    stats.sort_stats("tottime").print_stats(40)
    stats.sort_stats("cumulative").print_stats(
        "turn|delegation|admission|pool|store|specs|conversation|endings|process"
    )


if __name__ == "__main__":
    main()
