"""The scripted model in a process of its own, as a provider is: it takes no time from the orchestrator's loop.

    python -m bench.model

Prints its address. For every line on stdin it prints the requests since the line before, as a JSON list of
``[seconds, text]``: when the request was there in full, on the monotonic clock that all processes of a machine
share, and its last user text. Ends with stdin.
"""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import PIPE
from sys import executable, stdin

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from orchestrator.testing import Request, running_model_server

ROOT = Path(__file__).parent.parent
MAX_REPORT_BYTES = 1 << 24


class Model:
    """The running server, seen from the bench."""

    def __init__(self, process: Process, base_url: str, lines: BufferedByteReceiveStream) -> None:
        self.base_url = base_url
        self._process = process
        self._lines = lines

    async def arrivals(self) -> dict[str, float]:
        """Last user text → when its first request was there in full; of the requests since the last call."""
        assert self._process.stdin is not None
        await self._process.stdin.send(b"\n")
        found: dict[str, float] = {}
        for at, text in json.loads(await self._lines.receive_until(b"\n", MAX_REPORT_BYTES)):
            found.setdefault(text, at)
        return found


@asynccontextmanager
async def running_model() -> AsyncIterator[Model]:
    """The server's process, and its end."""
    command = [executable, "-m", "bench.model"]
    async with await anyio.open_process(command, stdin=PIPE, stdout=PIPE, stderr=None, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines = BufferedByteReceiveStream(process.stdout)
        try:
            base_url = (await lines.receive_until(b"\n", 200)).decode()
            yield Model(process, base_url, lines)
        finally:
            with anyio.CancelScope(shield=True):
                await process.stdin.aclose()
                await process.wait()


async def main() -> None:
    seen: list[tuple[float, Request]] = []

    def answer(request: Request) -> str:
        seen.append((time.monotonic(), request))
        return "ok"

    async with running_model_server(answer) as server:
        print(server.base_url, flush=True)
        while await anyio.to_thread.run_sync(stdin.readline):
            print(json.dumps([(at, request.last_user_text) for at, request in seen]), flush=True)
            seen.clear()
            server.journal.clear()  # bodies of 50 KB each


if __name__ == "__main__":
    anyio.run(main)
