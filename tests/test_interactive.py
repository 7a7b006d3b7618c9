"""Claude Code as people use it: the real CLI in a terminal, whose calls of ours become tasks in its background."""

import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pexpect
import psutil
import pyte
import pytest

from orchestrator.testing import ModelServer, Request, Rule, ToolUse
from tests.conftest import DUMMY_KEY, bundled_cli
from tests.test_claude_code import DELEGATE, Home, home, serving  # noqa: F401  # a fixture

ROWS, COLUMNS = 50, 140
SECONDS = 40


class Terminal:
    """A terminal with the CLI in it: what is on the screen, and keys."""

    def __init__(self, child: "pexpect.spawn[bytes]") -> None:
        self._child = child
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self._screen)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self._screen.display if line.strip())

    async def until(self, shown: Callable[[str], bool] | str) -> None:
        """Read until the screen shows it."""
        fits = (lambda text: shown in text) if isinstance(shown, str) else shown
        try:
            with anyio.fail_after(SECONDS):
                while not fits(self.text):
                    self._stream.feed(await anyio.to_thread.run_sync(self._read, abandon_on_cancel=True))
        except TimeoutError:
            raise AssertionError(f"not shown: {shown}; the screen:\n{self.text}") from None

    def _read(self) -> bytes:
        try:
            return self._child.read_nonblocking(65536, timeout=0.2)
        except pexpect.TIMEOUT:
            return b""

    async def say(self, words: str) -> None:
        """Type a line; it is entered once it is on the screen."""
        self._child.send(words)
        await self.until(words)
        self._child.send("\r")

    async def ended(self) -> None:
        def drained() -> None:
            self._child.expect(pexpect.EOF, timeout=SECONDS)

        await anyio.to_thread.run_sync(drained)


@asynccontextmanager
async def terminal(home: Home, *arguments: str) -> AsyncIterator[Terminal]:  # noqa: F811
    child = pexpect.spawn(
        str(bundled_cli()),
        ["--allowedTools", "mcp__orchestrator", "--system-prompt", "You are the user's Claude Code.", *arguments],
        cwd=str(home.project),
        env={**home.environ, "TERM": "xterm-256color", "PATH": "/usr/bin:/bin"},
        dimensions=(ROWS, COLUMNS),
    )
    try:
        yield Terminal(child)
    finally:
        family = psutil.Process(child.pid).children(recursive=True) if child.isalive() else []
        child.close(force=True)
        for process in family:
            if process.is_running():
                process.kill()


def registered(home: Home, server: dict[str, Any]) -> None:  # noqa: F811
    """A HOME in which the CLI has been used before: nothing is asked at its start."""
    project = {"hasTrustDialogAccepted": True, "hasCompletedProjectOnboarding": True}
    known = {
        "hasCompletedOnboarding": True,
        "theme": "dark",
        "customApiKeyResponses": {"approved": [DUMMY_KEY[-20:]], "rejected": []},
        "projects": {str(home.project): project},
        "mcpServers": {"orchestrator": server},
    }
    (Path(home.environ["HOME"]) / ".claude.json").write_text(json.dumps(known))


class Script:
    """The user's Claude delegates; the agent answers when the test lets it."""

    def __init__(self, model: ModelServer) -> None:
        self.opened = anyio.Event()
        model.rules = [
            Rule(self._agent, when={"system": "You are the helper"}),
            Rule(
                ToolUse(DELEGATE, {"agent": "helper", "prompt": "look it up"}),
                when={"user_contains": "please delegate", "tool_result": False},
            ),
            Rule("It works in the background.", when={"tool_result": True}),
            Rule(lambda request: f"Told: {told(request, 'forty-two')}."),
        ]

    async def _agent(self, _: Request) -> str:
        await self.opened.wait()
        return "It is forty-two."


def told(request: Request, words: str) -> bool:
    """Whether the words are anywhere in the conversation."""
    return words in json.dumps(request.body["messages"])


@pytest.fixture
def port() -> int:
    """A port for a server that is found again when it was started again."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        number: int = free.getsockname()[1]
    return number


def http(home: Home) -> dict[str, Any]:  # noqa: F811
    state = home.state()
    return {"type": "http", "url": state.url, "headers": {"Authorization": f"Bearer {state.token}"}}


async def test_a_call_works_in_the_background_and_reports_when_it_is_done(home: Home, model: ModelServer) -> None:  # noqa: F811
    script = Script(model)
    registered(home, home.stdio())
    async with terminal(home) as claude:
        await claude.until("❯")
        await claude.say("please delegate")
        await model.wait_for("look it up", timeout=SECONDS)
        await claude.until("It works in the background.")
        await claude.until("1 MCP task")
        script.opened.set()
        await claude.until("completed.")
        await claude.until("Told: True.")
    [run] = await home.runs()
    assert (run.status, run.text) == ("succeeded", "It is forty-two.")
    assert told(model.journal[-1], run.id), "the client names the run to its model"


async def test_a_task_outlives_the_session_and_is_picked_up_by_the_next(home: Home, model: ModelServer) -> None:  # noqa: F811
    script = Script(model)
    async with serving(home):
        registered(home, http(home))
        async with terminal(home) as claude:
            await claude.until("❯")
            await claude.say("please delegate")
            await claude.until("It works in the background.")
            await claude.say("/exit")
            await claude.ended()
        [run] = await home.runs()
        assert run.status == "running"
        script.opened.set()
        async with terminal(home, "--continue") as claude:
            await claude.until("Told: True.")
        assert (await home.runs())[0].status == "succeeded"


async def test_a_server_that_was_killed_tells_of_the_task_when_it_is_back(
    home: Home,  # noqa: F811
    model: ModelServer,
    port: int,
) -> None:
    Script(model)
    home.environ["ORCHESTRATOR_SERVER__PORT"] = str(port)
    async with serving(home) as server:
        registered(home, http(home))
        async with terminal(home) as claude:
            await claude.until("❯")
            await claude.say("please delegate")
            await claude.until("It works in the background.")
            server.kill()
            await server.wait()
            async with serving(home):
                await claude.until("Told: False.")
    [run] = await home.runs()
    assert run.status == "interrupted", run.error
    assert told(model.journal[-1], "interrupted"), "the user's Claude knows what became of it"
