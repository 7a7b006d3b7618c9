"""What a delegated run costs over the CLI alone: wall time, as a ratio within one run of this program.

    python bench/overhead.py [N]

Interleaves three ways to get one answer from the scripted model, N times each: the raw CLI (`claude -p` with
stream-json in and out), `delegate` in an open runtime, and `orchestrator delegate` as a whole process.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio

from orchestrator import Task, load_config, open_runtime
from orchestrator import delegate as run_delegate
from orchestrator.testing import Rule, running_model_server

SCENARIO = "version: 1\nrules: [{reply: ok}]\n"


def binary() -> Path:
    spec = importlib.util.find_spec("claude_agent_sdk")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "_bundled" / "claude"


async def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        (tmp / "agents").mkdir()
        (tmp / "home").mkdir()
        (tmp / "agents" / "a.md").write_text("---\nname: a\ndescription: a\ntools: Read\n---\nYou are a.\n")
        (tmp / "s.yaml").write_text(SCENARIO)
        (tmp / "orchestrator.yaml").write_text(f"data_dir: data\nclaude:\n  path: {binary()}\n")
        async with running_model_server([Rule("ok")]) as model:
            env = {
                "HOME": str(tmp / "home"),
                "PATH": "/usr/local/bin:/usr/bin:/bin",
                "ANTHROPIC_BASE_URL": model.base_url,
                "ANTHROPIC_API_KEY": "sk-ant-test-loopback",
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
                "DISABLE_AUTOUPDATER": "1",
            }
            overrides = {
                "claude.base_url": model.base_url,
                "claude.env.ANTHROPIC_API_KEY": "sk-ant-test-loopback",
                "agents.user_path": str(tmp / "none"),
            }
            config = load_config(project_dir=tmp, environ={}, overrides=overrides)

            async def raw() -> None:
                line = {"type": "user", "message": {"role": "user", "content": "hi"}, "parent_tool_use_id": None}
                flags = ["--input-format=stream-json", "--output-format=stream-json", "--verbose"]
                more = ["--tools", "Read", "--system-prompt", "You are a.", "--strict-mcp-config"]
                await anyio.run_process(
                    [str(binary()), "-p", *flags, *more], input=json.dumps(line).encode() + b"\n", env=env, cwd=tmp
                )

            async def command() -> None:
                await anyio.run_process(
                    [sys.executable, "-m", "orchestrator", "delegate", "a", "hi", "--scenario", "s.yaml"],
                    env={**env, "PYTHONPATH": str(Path(__file__).parent.parent)},
                    cwd=tmp,
                    stderr=subprocess.DEVNULL,
                )

            async with open_runtime(config, environ=env) as rt:

                async def delegated() -> None:
                    outcome = await run_delegate(rt, Task(agent="a", prompt="hi"))
                    assert outcome.ok, outcome.error

                await report({"raw CLI": raw, "delegate": delegated, "command": command}, count)


async def report(ways: dict[str, Callable[[], Awaitable[None]]], count: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(count + 1):  # the first round warms the disk and is not counted
        for name, way in ways.items():
            began = time.perf_counter()
            await way()
            times[name].append(time.perf_counter() - began)
    base = statistics.median(times["raw CLI"][1:])
    for name, all_times in times.items():
        median = statistics.median(all_times[1:])
        print(f"{name:10} {median * 1000:7.0f} ms median of {count}   {median / base:5.2f} × the raw CLI")


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 10)
