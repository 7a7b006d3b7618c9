"""What a window waits for: the shim's start, with a server there and without one, its memory, and calls through it.

Each figure has a bare Python interpreter's beside it: no shim written in Python can be lighter than that.
"""

import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import psutil
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from bench.figures import Figure, median, summary

COUNT = 20
STARTS = 5
CALLS = 3000
IN_FLIGHT = 16
ROUNDS = 3
ROOT = Path(__file__).parent.parent
MAX_LINE = 10_000_000
META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientCapabilities": {},
    "io.modelcontextprotocol/clientInfo": {"name": "bench", "version": "1"},
}


def run(count: int = COUNT, starts: int = STARTS, calls: int = CALLS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Measure ``count`` shims of a running server, ``starts`` that must start one, and ``rounds`` of ``calls``."""
    with TemporaryDirectory() as folder:
        return anyio.run(_measure, Path(folder).resolve(), count, starts, calls, rounds)


async def _measure(root: Path, count: int, starts: int, calls: int, rounds: int) -> dict[str, Any]:
    (root / "home").mkdir()
    place = _Place(root, root / "data")
    async with place.server():
        beside = [(await _bare(place), await _first_answer(place)) for _ in range(count)]
        memory = [(await place.bare_memory(), await place.shim_memory()) for _ in range(min(count, 5))]
        rates = [await _calls(place, calls) for _ in range(rounds)]
        bare_rates = [await _bare_lines(place, calls) for _ in range(rounds)]
    cold = [await _cold_answer(root, n) for n in range(starts)]
    bare = median([alone for alone, _ in beside])
    warm = median([answered for _, answered in beside])
    figures = [
        Figure("a shim's start to tools/list, server running", warm * 1000, "ms", 60, note=_beside(warm, bare)),
        Figure("the same, server to be started", median(cold), "s", 1.2, note=_beside(median(cold), bare)),
        _memory_figure(memory),
        Figure(
            f"tools/list through a shim, {IN_FLIGHT} in flight",
            median([rate for rate, _ in rates]),
            "/s",
            at_least=1500,
            note=_echo(median([rate for rate, _ in rates]), median([rate for rate, _ in bare_rates])),
        ),
        _own_figure([spent for _, spent in rates], [spent for _, spent in bare_rates]),
    ]
    return {
        "figures": [figure.as_dict() for figure in figures],
        "bare_s": summary([alone for alone, _ in beside]),
        "running_s": summary([answered for _, answered in beside]),
        "cold_s": cold,
        "calls_per_s": [rate for rate, _ in rates],
        "echoes_per_s": [rate for rate, _ in bare_rates],
    }


def _beside(seconds: float, bare: float) -> str:
    return f"{seconds / bare:.1f} × python -c pass ({bare * 1000:.0f} ms)"


def _echo(rate: float, bare: float) -> str:
    return f"{rate / bare:.2f} × a bare Python that sends lines back ({bare:.0f}/s)"


def _own_figure(spent: list[float], bare: list[float]) -> Figure:
    """The rest of a call is the server's: this is what a window more or less costs."""
    ours, alone = median(spent) * 1e6, median(bare) * 1e6
    return Figure(
        "of that, the shim's own time for a call", ours, "µs", note=f"{ours / alone:.1f} × {alone:.0f} µs"
    )


def _memory_figure(memory: list[tuple[float, float]]) -> Figure:
    bare, ours = median([alone for alone, _ in memory]), median([shim for _, shim in memory])
    return Figure(
        "memory of a shim (RSS)", ours, "MB", 16, note=f"{ours / bare:.2f} × a bare Python ({bare:.1f} MB)"
    )


class _Place:
    """A data directory, and processes on it with an environment of their own."""

    def __init__(self, root: Path, data: Path) -> None:
        self.root = root
        self.data = data
        self.environ = {
            "HOME": str(root / "home"),
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "CLAUDE_PROJECT_DIR": str(root),
        }

    @property
    def argv(self) -> list[str]:
        return [sys.executable, "-m", "orchestrator", "mcp", "--data-dir", str(self.data)]

    @asynccontextmanager
    async def process(self, argv: list[str]) -> AsyncIterator[Process]:
        process = await anyio.open_process(argv, env=self.environ, cwd=self.root, stderr=subprocess.DEVNULL)
        try:
            yield process
        finally:
            with anyio.CancelScope(shield=True):
                if process.returncode is None:
                    process.kill()
                await process.aclose()

    @asynccontextmanager
    async def server(self) -> AsyncIterator[None]:
        """The server that a first shim starts, until the end of the context."""
        try:
            await _first_answer(self)
            yield
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._stop)

    def _stop(self) -> None:
        server = psutil.Process(json.loads((self.data / "server.json").read_text())["pid"])
        server.terminate()
        server.wait(20)

    async def shim_memory(self) -> float:
        """Megabytes of a shim that has answered."""
        async with self.process(self.argv) as process:
            await _Talk(process).list_tools(1)
            return _megabytes(process.pid)

    async def bare_memory(self) -> float:
        """Megabytes of a Python that has read a line."""
        program = "import sys; print(sys.stdin.readline(), flush=True); sys.stdin.readline()"
        async with self.process([sys.executable, "-c", program]) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            await process.stdin.send(b"go\n")
            await process.stdout.receive()
            return _megabytes(process.pid)


def _megabytes(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss) / 1e6


class _Talk:
    """Requests and answers of one process."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin = process.stdin
        self._stdout = BufferedByteReceiveStream(process.stdout)

    async def list_tools(self, id_: int) -> None:
        await self.ask(id_)
        answer = json.loads(await self.hear())
        assert answer["id"] == id_
        assert answer["result"]["tools"]

    async def ask(self, id_: int) -> None:
        message = {"jsonrpc": "2.0", "id": id_, "method": "tools/list", "params": {"_meta": META}}
        await self._stdin.send(json.dumps(message).encode() + b"\n")

    async def hear(self) -> bytes:
        return await self._stdout.receive_until(b"\n", MAX_LINE)


async def _bare(place: _Place) -> float:
    """Seconds a Python takes that does nothing."""
    began = time.perf_counter()
    async with place.process([sys.executable, "-c", "pass"]) as process:
        await process.wait()
        return time.perf_counter() - began


async def _first_answer(place: _Place) -> float:
    """Seconds from the start of a shim to the answer of tools/list."""
    began = time.perf_counter()
    async with place.process(place.argv) as process:
        await _Talk(process).list_tools(1)
        return time.perf_counter() - began


async def _cold_answer(root: Path, number: int) -> float:
    place = _Place(root, root / f"cold-{number}")
    began = time.perf_counter()
    async with place.server():
        return time.perf_counter() - began


async def _calls(place: _Place, calls: int) -> tuple[float, float]:
    """Answers a second through one shim, and the seconds of processor time it takes for each."""
    async with place.process(place.argv) as process:
        talk = _Talk(process)
        await talk.list_tools(0)
        return await _rate(calls, talk, process.pid)


async def _bare_lines(place: _Place, calls: int) -> tuple[float, float]:
    """The same of a Python that parses each line and sends it back."""
    program = "import json, sys\nfor line in sys.stdin.buffer:\n json.loads(line); sys.stdout.buffer.write(line)\n"
    program += " sys.stdout.buffer.flush()"
    async with place.process([sys.executable, "-c", program]) as process:
        return await _rate(calls, _Talk(process), process.pid)


async def _rate(calls: int, talk: _Talk, pid: int) -> tuple[float, float]:
    room = anyio.Semaphore(IN_FLIGHT)

    async def all_asked() -> None:
        for id_ in range(1, calls + 1):
            await room.acquire()
            await talk.ask(id_)

    spent, began = _processor_time(pid), time.perf_counter()
    async with anyio.create_task_group() as tg:
        tg.start_soon(all_asked)
        for _ in range(calls):
            await talk.hear()
            room.release()
    return calls / (time.perf_counter() - began), (_processor_time(pid) - spent) / calls


def _processor_time(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)
