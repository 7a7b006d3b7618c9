"""What must not get in: refused, told in the log without the secret, and nothing given away in the answer."""

import json
import logging
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx2
import psutil
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import TextContent

from mcp_tools import open_door, open_doors
from orchestrator.config import Config
from orchestrator.delegation import delegate, submit, wait
from orchestrator.redaction import RUN_TOKEN_PREFIX
from orchestrator.runtime import Runtime, open_runtime
from orchestrator.server import serve
from orchestrator.task import Task
from orchestrator.testing import FakeConversation, FakeProcesses, ModelServer, Reply, Request, Rule, ToolUse
from tests.conftest import write_agent
from tests.test_server import Wire

Open = Callable[..., AbstractAsyncContextManager[Runtime]]
TOKEN = "the-token-of-the-test"
#: Words that nobody outside may read in an answer: they stand for what is in the record and in files.
SECRET = "the-sealed-words"


def script(conversation: FakeConversation, turn: Any) -> str | None:
    """Answers at once, but for what is told to stay."""
    return None if "stay" in turn.prompt else f"I know {SECRET}"


@pytest.fixture
async def rt(make_config: Callable[..., Config], environ: dict[str, str]) -> AsyncIterator[Runtime]:
    async with open_runtime(make_config(), environ=environ, open_process=FakeProcesses(script)) as opened:
        yield opened


@pytest.fixture
async def url(rt: Runtime) -> AsyncIterator[str]:
    async with open_doors(rt, token=TOKEN) as doors:
        yield doors.url


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What our loggers and those of the libraries say from here on, at any level and before it is redacted."""
    lines: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")

    with listening(Listening()):
        yield lines


@contextmanager
def listening(handler: logging.Handler) -> Iterator[None]:
    named = [logging.getLogger(name) for name in ("orchestrator", "mcp_tools", "uvicorn", "mcp")]
    loggers = [logging.getLogger(), *(logger for logger in named if not logger.propagate)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


# -- who may come in ----------------------------------------------------------------------------------------


@dataclass
class Knock:
    """A request that is to be refused, and how."""

    status: int
    path: str = "/mcp"
    authorization: str | None = f"Bearer {TOKEN}"
    host: str | None = None
    origin: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        given = {"authorization": self.authorization, "host": self.host, "origin": self.origin}
        return {name: value for name, value in given.items() if value is not None}


#: What each presents as a token must be in no log.
WRONG = "orch-run-almost-the-right-token-0123456789"
KNOCKS = {
    "no token": Knock(401, authorization=None),
    "a wrong token": Knock(401, authorization=f"Bearer {WRONG}"),
    "the beginning of the token": Knock(401, authorization=f"Bearer {TOKEN[:-1]}"),
    "more than the token": Knock(401, authorization=f"Bearer {TOKEN}x"),
    "two tokens": Knock(401, authorization=f"Bearer {WRONG}, Bearer {TOKEN}"),
    "another scheme": Knock(401, authorization=f"Basic {TOKEN}"),
    "in a query": Knock(401, f"/mcp?token={TOKEN}", authorization=None),
    "in a query, as OAuth once had it": Knock(401, f"/mcp?access_token={TOKEN}", authorization=None),
    "in a query of another page": Knock(401, f"/pool?authorization=Bearer%20{TOKEN}", authorization=None),
    "in the path": Knock(401, f"/mcp/{TOKEN}", authorization=None),
    "a foreign page": Knock(403, origin="http://evil.example"),
    "a page without an origin": Knock(403, origin="null"),
    "a page on another port": Knock(403, origin="http://127.0.0.1:1"),
    "a rebound name": Knock(421, host="evil.example"),
    "a rebound name that looks like ours": Knock(421, host="127.0.0.1.evil.example"),
    "no name": Knock(421, host=""),
    "a user in the name": Knock(421, host=f"{WRONG}@127.0.0.1"),
    "line breaks in the path": Knock(401, "/mcp%0d%0aWARNING%20forged", authorization=None),
}  # fmt: skip


async def test_who_is_refused(rt: Runtime, url: str, logged: list[str]) -> None:
    await delegate(rt, Task(agent="helper", prompt=f"keep {SECRET}"))
    hidden = (TOKEN, WRONG, SECRET, str(rt.config.data_path))
    async with httpx2.AsyncClient(base_url=url.removesuffix("/mcp"), timeout=10) as http:
        for name, knock in KNOCKS.items():
            logged.clear()
            for method in METHODS:
                answer = await http.request(method, knock.path, headers=knock.headers)
                assert answer.status_code == knock.status, (name, method)
                given_away = f"{answer.text} {answer.headers}"
                assert not any(secret in given_away for secret in hidden), name
                assert "access-control-allow-origin" not in answer.headers, name
            check_told(name, [line for line in logged if "mcp_tools" in line or "uvicorn" in line], knock)


METHODS = ("GET", "POST", "DELETE", "OPTIONS")


def check_told(name: str, logged: list[str], knock: Knock) -> None:
    """Each refusal is in the log, and of the secret nothing."""
    expected = f"WARNING mcp_tools.app: refused with {knock.status}: "
    assert [line.startswith(expected) for line in logged] == [True] * len(METHODS), (name, logged)
    for line in logged:
        assert "\n" not in line, "nobody writes lines of his own into the log"
        assert TOKEN not in line, name
        assert WRONG not in line, name


async def test_a_hello_with_a_wrong_token_is_told_without_it(rt: Runtime, logged: list[str]) -> None:
    async with (
        open_doors(rt, token=TOKEN) as doors,
        await anyio.connect_tcp("127.0.0.1", doors.line_port or 0) as stream,
    ):
        wire = Wire(stream)
        await wire.say({"token": WRONG})
        said = json.dumps(await wire.hear())
        await wire.last_words()
    assert TOKEN not in said
    assert WRONG not in said
    assert any(line.startswith("WARNING mcp_tools.lines: a connection was refused: wrong token") for line in logged)
    assert not any(TOKEN in line or WRONG in line for line in logged)


# -- how much -----------------------------------------------------------------------------------------------

ACCEPTS = {
    "authorization": f"Bearer {TOKEN}",
    "accept": "application/json, text/event-stream",
    "content-type": "application/json",
}


def memory() -> int:
    """What this process has in memory, in bytes."""
    return int(psutil.Process().memory_info().rss)


async def test_a_body_without_end_is_not_taken_in(
    make_config: Callable[..., Config], environ: dict[str, str]
) -> None:
    """Whether its length is told before or not: no more is read than a prompt may take."""
    config = make_config(limits__max_prompt_bytes=10_000)
    sent, before = 0, memory()

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 100_000_000:
            sent += 65_536
            yield b"x" * 65_536

    async with (
        open_runtime(config, environ=environ, open_process=FakeProcesses()) as rt,
        open_doors(rt, token=TOKEN) as doors,
        httpx2.AsyncClient(timeout=20) as http,
    ):
        known = await http.post(doors.url, content=b"x" * 2_000_000, headers=ACCEPTS)
        try:
            unknown = (await http.post(doors.url, content=body(), headers=ACCEPTS)).status_code
        except httpx2.WriteError:  # the other end has hung up while we were still talking
            unknown = 413
        assert (known.status_code, unknown) == (413, 413)
        assert memory() - before < 50_000_000, "it is not kept"
        assert (await http.get(doors.url.removesuffix("/mcp") + "/healthz")).status_code == 200


async def test_headers_without_end_are_not_taken_in(url: str) -> None:
    async with httpx2.AsyncClient(timeout=10) as http:
        for size in (100_000, 10_000_000):
            try:
                answer = await http.get(url, headers={**ACCEPTS, "x-more": "x" * size})
            except httpx2.TransportError:
                pass  # hung up in the middle
            else:
                assert answer.status_code in (400, 431)
        assert (await http.get(url.removesuffix("/mcp") + "/healthz")).status_code == 200


async def test_a_line_without_end_ends_its_connection_and_no_other(rt: Runtime, logged: list[str]) -> None:
    async with open_doors(rt, token=TOKEN) as doors:
        address = ("127.0.0.1", doors.line_port or 0)
        async with await anyio.connect_tcp(*address) as one, await anyio.connect_tcp(*address) as other:
            wire, well = Wire(one), Wire(other)
            for each in (wire, well):
                await each.say({"token": TOKEN})
                assert (await each.hear())["ok"]
            with anyio.fail_after(30), suppress(anyio.BrokenResourceError):
                for _ in range(70):
                    await one.send(b"x" * 1024 * 1024)
            assert await wire.ended()
            await well.say({"jsonrpc": "2.0", "id": 1, "method": "ping"})
            assert (await well.hear())["id"] == 1
    assert not any("a defect" in line for line in logged)


# -- whose runs ---------------------------------------------------------------------------------------------


@asynccontextmanager
async def agent_of(rt: Runtime, url: str, run_id: str, process: str = "a process") -> AsyncIterator[Client]:
    """A client that calls as the agent of a run does, with a token of its process."""
    token = rt.tokens.issue(process)
    rt.tokens.assign(process, run_id)
    async with (
        httpx2.AsyncClient(headers={"authorization": f"Bearer {token}"}, timeout=20) as http,
        Client(streamable_http_client(url, http_client=http)) as client,
    ):
        yield client


async def call(client: Client, tool: str, **arguments: Any) -> str:
    """What the caller reads."""
    with anyio.fail_after(20):
        result = await client.call_tool(tool, arguments)
    return "\n".join(block.text for block in result.content if isinstance(block, TextContent))


def code_of(text: str) -> str:
    code = json.loads(text.splitlines()[-1])["code"]
    assert isinstance(code, str)
    return code


@dataclass
class Strangers:
    """Two runs that have nothing to do with each other: the one calls, the other has something to hide."""

    calling: str
    hidden: str
    session: str


@pytest.fixture
async def strangers(rt: Runtime) -> Strangers:
    calling = await submit(rt, Task(agent="worker", prompt="stay"))
    hidden = await delegate(rt, Task(agent="helper", prompt=f"hide {SECRET}"))
    assert hidden.session_id
    return Strangers(calling, hidden.run_id, hidden.session_id)


#: Arguments that tools need beside the one that is tried.
USUAL = {"prompt": "x", "agent": "helper", "wait_s": 0}


async def asked(client: Client, values: dict[str, str]) -> dict[tuple[str, str], tuple[bool, str]]:
    """Every tool that takes one of the arguments named, called with its value: whether it was refused, and in what
    words."""
    answers: dict[tuple[str, str], tuple[bool, str]] = {}
    for tool in (await client.list_tools()).tools:
        rules, needed = tool.input_schema["properties"], tool.input_schema.get("required", [])
        for name in sorted(values.keys() & rules.keys()):
            words = {**dict.fromkeys(needed, "x"), **USUAL, **{key: values[key] for key in needed if key in values}}
            words[name] = values[name]
            given = {
                key: [word] if rules[key].get("type") == "array" else word
                for key, word in words.items()
                if key in rules
            }
            with anyio.fail_after(20):
                result = await client.call_tool(tool.name, given)
            text = "\n".join(block.text for block in result.content if isinstance(block, TextContent))
            assert "was not called" not in text, text
            answers[tool.name, name] = result.is_error is True, text
    return answers


async def test_no_tool_tells_an_agent_of_the_runs_of_others(rt: Runtime, url: str, strangers: Strangers) -> None:
    """Tools that are added later are tried too: they are asked for by the names of their arguments."""
    before = await rt.store.run(strangers.hidden)
    foreign = {
        **dict.fromkeys(("run_id", "run_ids", "parent_id", "trace_id", "root_id"), strangers.hidden),
        **dict.fromkeys(("session", "session_id"), strangers.session),
    }
    async with agent_of(rt, url, strangers.calling) as agent:
        answers = await asked(agent, foreign)
    assert {("run_wait", "run_ids"), ("run_cancel", "run_id"), ("delegate", "session")} <= answers.keys()
    for which, (refused, text) in answers.items():
        assert SECRET not in text, which
        if refused:
            assert code_of(text) in ("run_not_found", "session_not_found", "config"), (which, text)
        else:
            assert strangers.hidden not in text, which
            assert strangers.session not in text, which
    assert await rt.store.run(strangers.hidden) == before
    assert len(await rt.store.runs(session_id=strangers.session)) == 1


async def test_the_start_of_an_id_tells_an_agent_nothing(rt: Runtime, url: str, strangers: Strangers) -> None:
    """Or it could find the ids of all runs, a digit at a time."""

    def told(text: str, run_id: str) -> str:
        return text.replace(repr(run_id), "it")

    async with agent_of(rt, url, strangers.calling) as agent:
        nobody = {told(await call(agent, "run_wait", run_ids=["0" * n]), "0" * n) for n in (16, 15)}
        for length in (16, 8, 4):
            start = strangers.hidden[:length]
            assert told(await call(agent, "run_wait", run_ids=[start]), start) in nobody


async def test_the_token_of_a_run_that_has_ended(rt: Runtime, url: str, strangers: Strangers) -> None:
    """Its process may still live, kept for the next turn of the session; until then it acts for nobody."""
    async with agent_of(rt, url, strangers.calling) as agent:
        rt.tokens.assign("a process", None)
        values = dict.fromkeys(("run_id", "run_ids", "agent"), strangers.calling)
        answers = await asked(agent, values)
        answers["list_agents", ""] = True, await call(agent, "list_agents")
        runs = await rt.store.runs()
    assert answers
    for which, (refused, text) in answers.items():
        assert refused, which
        assert "works for no run" in text, which
    assert len(runs) == 2


# -- names that are paths -----------------------------------------------------------------------------------

TRICKS = [
    "../../outside",
    "..",
    "/etc/passwd",
    "agents/../../outside",
    "a\0b",
    "link",
    "%2e%2e%2foutside",
    "~",
    "\n",
]


@pytest.fixture
def outside(project: Path) -> Path:
    """A directory beside the project, with an agent file in it; and a link to it among the agents."""
    folder = project.parent / "outside"
    (folder / "agents").mkdir(parents=True)
    text = f"---\nname: outside\ndescription: {SECRET}\n---\n{SECRET}\n"
    for file in (folder / "outside.md", folder / "agents" / "outside.md", project.parent / "outside.md"):
        file.write_text(text)
    return folder


async def test_names_are_no_paths(rt: Runtime, url: str, outside: Path) -> None:
    calling = await submit(rt, Task(agent="worker", prompt="stay"))
    async with agent_of(rt, url, calling) as agent:
        for trick in TRICKS:
            await check_no_path(agent, trick)
    assert len(await rt.store.runs()) == 1


async def check_no_path(agent: Client, trick: str) -> None:
    told = {
        "agent": await call(agent, "delegate", agent=trick, prompt="x", wait_s=0),
        "session": await call(agent, "delegate", agent="helper", session=trick, prompt="x", wait_s=0),
        "fork": await call(agent, "fork_session", session_id=trick, prompt="x"),
        "run": await call(agent, "run_wait", run_ids=[trick]),
    }
    codes = {what: code_of(text) for what, text in told.items()}
    assert codes.pop("agent") in ("agent_not_found", "config"), trick
    assert set(codes.values()) <= {"session_not_found", "run_not_found", "config"}, trick
    assert not any(SECRET in text or "root:" in text for text in told.values()), trick


PLACES = ["..", "../outside", "/", "/etc", "link", "link/..", "sub/../../outside", "a\0b"]


async def test_an_agent_sends_nobody_out_of_its_project(
    rt: Runtime, url: str, project: Path, outside: Path
) -> None:
    (project / "link").symlink_to(outside)
    (project / "sub").mkdir()
    calling = await submit(rt, Task(agent="worker", prompt="stay"))
    async with agent_of(rt, url, calling) as agent:
        for cwd in PLACES:
            text = await call(agent, "delegate", agent="helper", prompt="x", cwd=cwd, wait_s=0)
            assert code_of(text) in ("reach", "config"), (cwd, text)
    assert len(await rt.store.runs()) == 1


# -- what is written down -----------------------------------------------------------------------------------


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


async def test_files_are_private_whatever_the_umask(rt: Runtime) -> None:
    """In a directory that was there before, open to all."""
    data = rt.config.data_path
    data.chmod(0o755)
    async with anyio.create_task_group() as tg:
        await tg.start(serve, rt, open_doors)
        await delegate(rt, Task(agent="helper", prompt="x"))
        files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in data.rglob("*") if path.is_file()}
        tg.cancel_scope.cancel()
    assert {"server.json", "server.token", "server.lock", "runs.db"} <= files.keys()
    private = {name: oct(mode) for name, mode in files.items() if name != "server.lock"}
    assert set(private.values()) == {"0o600"}, private


async def test_tokens_of_runs_are_written_nowhere(
    runtime: Open, model: ModelServer, project: Path, tmp_path: Path, logged: list[str]
) -> None:
    """Not even if the agent prints its own; the token it has is a real one."""
    write_agent(project, "boss", tools="mcp__orchestrator, Bash(env)", body="You are the boss.")
    printed: list[str] = []

    def answer(request: Request) -> Reply:
        printed.extend(part.text for part in request.all_tool_results)
        return Reply(f"I saw {printed[0]}")

    ask = ToolUse("mcp__orchestrator__delegate", {"agent": "helper", "prompt": "x"})
    model.rules = [
        Rule("helped", when={"system": "the helper"}),
        Rule(Reply([ToolUse("Bash", {"command": "env"}), ask]), when={"system": "the boss", "tool_result": False}),
        Rule(answer, when={"system": "the boss"}),
    ]
    with anyio.fail_after(60):
        async with runtime(open_door=open_door) as rt:
            run_id = await submit(rt, Task(agent="boss", prompt="print it"))
            outcome = await wait(rt, run_id)
            while_open = everything_in(tmp_path / "data")
            assert len(await rt.store.tree(run_id)) == 2, "the token works"
    assert outcome.ok, outcome.error
    assert f"ORCHESTRATOR_RUN_TOKEN={RUN_TOKEN_PREFIX}" in printed[0]
    [token] = {word for word in printed[0].split() if word.startswith("ORCHESTRATOR_RUN_TOKEN=")}
    secret = token.partition("=")[2]
    assert len(secret) > 40
    for where in (while_open, everything_in(tmp_path / "data"), "\n".join(logged).encode(), outcome.text.encode()):
        assert secret.encode() not in where
