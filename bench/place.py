"""Where a measurement happens: a directory, the model's process, the raw CLI, runtimes to compare it with."""

import importlib.util
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
from anyio.abc import ByteSendStream
from anyio.streams.buffered import BufferedByteReceiveStream

from bench.model import Model, running_model
from orchestrator import Outcome, Runtime, Task, delegate, keep_warm, load_config, open_runtime
from orchestrator.backends import DIALECTS
from orchestrator.config import Config
from orchestrator.conversation import Conversation, Spec, Turn
from orchestrator.messages import Message, ResultMessage
from orchestrator.process import connect_process

#: ``full`` is Claude Code as it is, ``lean`` an agent as most are: a prompt of its own and the tools it needs.
AGENTS = {
    "full": "---\nname: full\ndescription: Claude Code as it is\n---\n",
    "lean": "---\nname: lean\ndescription: reads\ntools: Read, Grep\n---\nYou look things up.\n",
}
RAW_FLAGS = ("-p", "--input-format=stream-json", "--output-format=stream-json", "--verbose")
KEY = "sk-ant-test-loopback"


def bundled_cli() -> Path:
    """The CLI inside claude_agent_sdk; the package itself is not imported."""
    spec = importlib.util.find_spec("claude_agent_sdk")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "_bundled" / "claude"


@dataclass
class Stamps:
    """When things happened last, in seconds of the monotonic clock."""

    sent: float = 0.0
    result: float = 0.0


class Stamped:
    """A conversation that notes when a prompt was written and when a result was read."""

    def __init__(self, inner: Conversation, stamps: Stamps) -> None:
        self._inner = inner
        self._stamps = stamps

    @property
    def pid(self) -> int | None:
        return getattr(self._inner, "pid", None)

    @property
    def stderr_tail(self) -> str:
        return self._inner.stderr_tail

    async def prepare(self, turn: Turn) -> None:
        await self._inner.prepare(turn)

    async def send(self, turn: Turn) -> None:
        await self._inner.send(turn)
        self._stamps.sent = time.monotonic()

    async def receive(self) -> Message:
        message = await self._inner.receive()
        if isinstance(message, ResultMessage):
            self._stamps.result = time.monotonic()
        return message

    async def interrupt(self) -> None:
        await self._inner.interrupt()


@dataclass
class Bare:
    """A CLI process without us: lines in, lines out, nothing kept."""

    stdin: ByteSendStream
    stdout: BufferedByteReceiveStream

    async def initialize(self) -> None:
        await self._send({"type": "control_request", "request_id": "1", "request": {"subtype": "initialize"}})
        await self._until("control_response")

    async def ask(self, prompt: str) -> None:
        message = {"role": "user", "content": prompt}
        await self._send({"type": "user", "message": message, "parent_tool_use_id": None})
        await self._until("result")

    async def _send(self, line: dict[str, Any]) -> None:
        await self.stdin.send(json.dumps(line).encode() + b"\n")

    async def _until(self, kind: str) -> None:
        while json.loads(await self.stdout.receive_until(b"\n", 10_000_000))["type"] != kind:
            pass


@dataclass
class Place:
    """A directory with agents, a HOME for the CLI, the model's address, the environment everything gets."""

    root: Path
    model: Model
    stamps: Stamps = field(default_factory=Stamps)

    @property
    def environ(self) -> dict[str, str]:
        return {
            "HOME": str(self.root / "home"),
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "TMPDIR": str(self.root / "tmp"),
        }

    @property
    def raw_environ(self) -> dict[str, str]:
        """For the raw CLI: what it needs to talk to the scripted model, and to nobody else."""
        return {
            **self.environ,
            "ANTHROPIC_BASE_URL": self.model.base_url,
            "ANTHROPIC_API_KEY": KEY,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
        }

    async def raw(self, prompt: str) -> None:
        """One answer from the CLI alone, from its start to its end."""
        line = {"type": "user", "message": {"role": "user", "content": prompt}, "parent_tool_use_id": None}
        await anyio.run_process(
            [str(bundled_cli()), *RAW_FLAGS],
            input=json.dumps(line).encode() + b"\n",
            env=self.raw_environ,
            cwd=self.root,
        )

    @asynccontextmanager
    async def bare(self) -> AsyncIterator["Bare"]:
        """The CLI alone, started and ready, for as many prompts as one likes. Killed in the end."""
        process = await anyio.open_process(
            [str(bundled_cli()), *RAW_FLAGS], env=self.raw_environ, cwd=self.root, stderr=subprocess.DEVNULL
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            bare = Bare(process.stdin, BufferedByteReceiveStream(process.stdout))
            await bare.initialize()
            yield bare
        finally:
            with anyio.CancelScope(shield=True):
                process.kill()
                await process.aclose()

    def config(self, **settings: Any) -> Config:
        """Settings of a runtime here; ``__`` for dots."""
        overrides = {
            "data_dir": str(self.root / "data"),
            "agents.user_path": str(self.root / "none"),
            "claude.path": str(bundled_cli()),
            "claude.base_url": self.model.base_url,
            "claude.env.ANTHROPIC_API_KEY": KEY,
            "telemetry.enabled": False,
            **{name.replace("__", "."): value for name, value in settings.items()},
        }
        return load_config(project_dir=self.root, environ={}, overrides=overrides)

    @asynccontextmanager
    async def runtime(self, **settings: Any) -> AsyncIterator[Runtime]:
        """A runtime with real CLIs, whose prompts and results leave their time in ``stamps``."""
        config = self.config(**settings)
        opened = open_runtime(config, environ=self.environ, open_process=self._open(config))
        async with opened as rt, anyio.create_task_group() as tg:
            tg.start_soon(keep_warm, rt)
            yield rt
            tg.cancel_scope.cancel()

    def _open(self, config: Config) -> Callable[..., AbstractAsyncContextManager[Conversation]]:
        @asynccontextmanager
        async def open_one(spec: Spec, on_ready: Callable[[], None]) -> AsyncIterator[Conversation]:
            async with connect_process(
                spec,
                binary=bundled_cli(),
                dialect=DIALECTS["claude"],
                max_line_bytes=config.claude.max_line_bytes,
                on_ready=on_ready,
            ) as conversation:
                yield Stamped(conversation, self.stamps)

        return open_one


@asynccontextmanager
async def open_place() -> AsyncIterator[Place]:
    """Everything set up; gone afterwards."""
    with TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        for name in ("agents", "home", "tmp"):
            (root / name).mkdir()
        for name, text in AGENTS.items():
            (root / "agents" / f"{name}.md").write_text(text)
        async with running_model() as model:
            yield Place(root, model)


async def ask(rt: Runtime, prompt: str, agent: str = "full", **more: Any) -> Outcome:
    """A run that must succeed, or there is nothing to measure."""
    outcome = await delegate(rt, Task(agent=agent, prompt=prompt, **more))
    assert outcome.ok, outcome.error
    return outcome


async def quiet(rt: Runtime, warm: Mapping[str, int]) -> None:
    """Wait until so many processes of each agent are warm and none starts or ends."""
    with anyio.fail_after(120):
        while not _is_quiet(rt, warm):  # noqa: ASYNC110  # no event tells of the last of them
            await anyio.sleep(0.01)


def _is_quiet(rt: Runtime, warm: Mapping[str, int]) -> bool:
    workers = rt.pool.state.workers.values()
    if any(worker.starting or worker.phase == "ending" for worker in workers):
        return False
    idle = [worker.agent.rpartition("/")[2] for worker in workers if worker.phase == "idle"]
    return all(idle.count(agent) >= count for agent, count in warm.items())


async def gather(jobs: int, concurrency: int, job: Callable[[int], Any]) -> float:
    """Do ``job(n)`` for every n below ``jobs``, so many at once; returns the seconds it took."""
    limit = anyio.CapacityLimiter(concurrency)

    async def one(n: int) -> None:
        async with limit:
            await job(n)

    began = time.monotonic()
    async with anyio.create_task_group() as tg:
        for n in range(jobs):
            tg.start_soon(one, n)
    return time.monotonic() - began


@contextmanager
def loads() -> Any:
    """The machine's load average over a minute, before and after."""
    found = {"before": round(os.getloadavg()[0], 2)}
    yield found
    found["after"] = round(os.getloadavg()[0], 2)


def cli_version() -> str:
    done = subprocess.run(
        [str(bundled_cli()), "--version"], capture_output=True, text=True, check=True, env={"HOME": "/nonexistent"}
    )
    return done.stdout.split()[0]
