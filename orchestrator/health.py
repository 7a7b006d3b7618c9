"""Is everything in place for agents to work? Asked without spending: no check sends a request to a model.

The CLI itself is asked for its version and its login; we never look at credentials. A login that is there may still
be refused, which only a run can find out: so the ends of the latest runs are judged too.
"""

import json
import os
import re
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import anyio
from anyio.abc import TaskStatus

from orchestrator.backends.claude import environment
from orchestrator.backends.claude_binary import find_binary
from orchestrator.config import Config
from orchestrator.errors import OrchestratorError
from orchestrator.store import Run, Store, now_us, open_store

Level = Literal["ok", "warning", "problem"]

VERSION_SECONDS = 10.0
LOGIN_SECONDS = 20.0
#: How many of the latest runs are looked at, and for how long a refusal counts as a problem.
RECENT_RUNS = 20
RECENT_SECONDS = 15 * 60.0
#: That many failures in a row, with nothing between them that worked, are more than bad luck.
STREAK = 3

#: The first version whose arguments and messages are those of ``backends.claude``.
MINIMUM_VERSION = (2, 1)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at; ``advice`` says what to do about it."""

    name: str
    level: Level
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class HealthStatus:
    """What was found. ``healthy``: nothing was a problem; a warning is none."""

    healthy: bool
    checks: tuple[Check, ...]

    @classmethod
    def of(cls, checks: Sequence[Check]) -> Self:
        return cls(all(check.level != "problem" for check in checks), tuple(checks))


@dataclass(frozen=True, slots=True)
class Said:
    """What a program answered; where ``code`` is None it did not, and ``why`` says why."""

    code: int | None = None
    out: str = ""
    err: str = ""
    why: str = ""


class HealthChecker:
    """Looks whether agents can work: the CLI, its login, the store, the latest runs.

    ``environ`` is the environment the CLI's variables are taken from. Without ``store``, the configured one is
    opened for each check. ``latest`` is what the last check found.
    """

    def __init__(self, config: Config, environ: Mapping[str, str], *, store: Store | None = None) -> None:
        self._config = config
        self._environ = environ
        self._store = store
        self.latest: HealthStatus | None = None

    def __repr__(self) -> str:
        healthy = self.latest.healthy if self.latest else "not checked"
        return f"<HealthChecker healthy={healthy}>"

    async def check(self) -> HealthStatus:
        """Look at everything once; takes half a second, and half a minute at most where a CLI hangs."""
        self.latest = HealthStatus.of([*await self._cli(), *await self._records()])
        return self.latest

    async def wait_healthy(self, timeout: float = 30.0, *, every: float = 1.0) -> HealthStatus:
        """Check until all is well, at most ``timeout`` seconds, with pauses of ``every`` seconds.

        Returns what was found last; ``healthy`` tells whether the wait was worth it.
        """
        found: HealthStatus | None = None
        with anyio.move_on_after(timeout):
            # What is waited for happens outside of this program: there is no event for it.
            while not (found := await self.check()).healthy:  # noqa: ASYNC110
                await anyio.sleep(every)
        late = Check("health check", "problem", f"gave no answer within {timeout:g} s", "Try a longer time-out.")
        return found or HealthStatus.of([late])

    async def watch(
        self,
        every: float,
        *,
        on_change: Callable[[HealthStatus], None],
        task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Check every so many seconds until cancelled, and tell when what was found is no longer the same.

        Start it with ``TaskGroup.start``: it is started when ``latest`` is there.
        """
        await self.check()
        task_status.started()
        while True:
            before = self.latest
            await anyio.sleep(every)
            if (now := await self.check()) != before:
                on_change(now)

    async def _cli(self) -> list[Check]:
        config, environ = self._config, self._environ
        home = config.resolve(config.claude.home) if config.claude.home else Path(environ.get("HOME", "/"))
        try:
            found = find_binary(config.claude_path, environ, home)
        except OrchestratorError as error:
            return [Check("Claude Code CLI", "problem", error.message, error.advice)]
        assert found.path is not None
        # Nothing of a home is wanted for that, and its PATH only by CLIs that are scripts.
        bare = {"PATH": environ.get("PATH", os.defpath), "HOME": "/nonexistent"}
        said = await _ask([str(found.path), "--version"], bare, VERSION_SECONDS)
        version = judge_version(found.path, found.origin, said)
        if version.level == "problem":
            return [version]
        try:
            return [version, await self._login(home, found.path)]
        except OrchestratorError as error:
            return [version, Check("login", "problem", error.message, error.advice)]

    async def _login(self, home: Path, binary: Path) -> Check:
        claude = self._config.claude
        base_url = {"ANTHROPIC_BASE_URL": claude.base_url} if claude.base_url else {}
        env = environment(self._environ, home=home, pass_env=claude.pass_env, extra={**base_url, **claude.env})
        said = await _ask([str(binary), "auth", "status"], env, LOGIN_SECONDS, cwd=self._config.project_dir)
        return judge_login(said, home, binary)

    async def _records(self) -> list[Check]:
        try:
            async with _opened(self._store, self._config.store_path) as store:
                # A change of no row: it takes the lock that every write takes, and leaves nothing behind.
                await store.update_run("none", num_turns=0)
                latest = await store.runs(limit=RECENT_RUNS)
        except OrchestratorError as error:
            return [Check("store", "problem", error.message, error.advice)]
        return [Check("store", "ok", str(self._config.store_path)), judge_runs(latest, now_us())]


def judge_version(binary: Path, origin: str, said: Said) -> Check:
    """Whether that is a Claude Code we know how to talk to. ``said`` is its answer to ``--version``."""
    line = said.out.strip().partition("\n")[0]
    number = re.match(r"(\d+)\.(\d+)\.\d+\b", line)
    if said.code != 0 or number is None:
        why = said.why or f"exit code {said.code}: {(line or said.err.strip())[:200]!r}"
        return Check(
            "Claude Code CLI", "problem", f"{binary} does not answer --version: {why}",
            "Name a Claude Code CLI in claude.path, or install it anew.",
        )  # fmt: skip
    found = f"{line} at {binary} (found by {origin})"
    if (int(number[1]), int(number[2])) < MINIMUM_VERSION:
        wanted = ".".join(map(str, MINIMUM_VERSION))
        return Check("Claude Code CLI", "warning", found, f"Agents need {wanted} or later: run `{binary} update`.")
    return Check("Claude Code CLI", "ok", found)


def judge_login(said: Said, home: Path, binary: Path) -> Check:
    """Whether the CLI has something to log in with. ``said`` is its answer to ``auth status``: 0 or 1, and JSON."""
    try:
        status: Any = json.loads(said.out)
    except ValueError:
        status = None
    if not isinstance(status, dict) or "loggedIn" not in status:
        why = said.why or f"exit code {said.code}: {(said.err or said.out).strip()[:200]!r}"
        return Check("login", "warning", f"`claude auth status` did not answer: {why}")
    if status["loggedIn"]:
        return Check("login", "ok", f"{status.get('authMethod')} under {home}")
    return Check(
        "login",
        "problem",
        f"the CLI has no login under {home}",
        f"Run `{binary} auth login`, or let it see a key (claude.pass_env: [ANTHROPIC_API_KEY]). "
        "Plans with a scenario run without: `orchestrator run PLAN --offline`.",
    )


def judge_runs(latest: Sequence[Run], now: int) -> Check:
    """What the ends of the latest runs, newest first, say about the next. ``now`` in microseconds since 1970.

    Whatever failed before a run that succeeded is over. A refusal by the account is a problem while it is new:
    nobody tries again to find out that it has been mended, if health is what they wait for.
    """
    ended = [run for run in latest if run.kind == "agent" and run.ended_us is not None]
    worked = next((at for at, run in enumerate(ended) if run.status == "succeeded"), len(ended))
    failures = [(run, run.error) for run in ended[:worked] if run.error]
    for run, error in failures:
        if error.get("scope") == "account":
            new = now - (run.ended_us or 0) <= RECENT_SECONDS * 1e6
            level: Level = "problem" if new and not error.get("retryable") else "warning"
            return Check("recent runs", level, _failure(run, error, now), str(error.get("advice", "")))
    outside = [(run, error) for run, error in failures if error.get("scope") in ("provider", "host")]
    if len(outside) >= STREAK:
        run, error = outside[0]
        found = f"{len(outside)} in a row failed outside of the task; {_failure(run, error, now)}"
        return Check("recent runs", "warning", found, str(error.get("advice", "")))
    return Check("recent runs", "ok", f"{len(ended)} looked at" if ended else "none yet")


def _failure(run: Run, error: Mapping[str, Any], now: int) -> str:
    minutes = max(0, now - (run.ended_us or 0)) // 60_000_000
    return f"run {run.id} failed {minutes} min ago: {error.get('code')}: {str(error.get('message'))[:200]}"


async def _ask(argv: Sequence[str], env: Mapping[str, str], seconds: float, *, cwd: Path | None = None) -> Said:
    try:
        with anyio.fail_after(seconds):
            done = await anyio.run_process(argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL, check=False)
    except TimeoutError:
        return Said(why=f"no answer within {seconds:g} s")
    except OSError as error:
        return Said(why=str(error))
    return Said(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


@asynccontextmanager
async def _opened(store: Store | None, path: Path) -> AsyncIterator[Store]:
    if store is not None:
        yield store
        return
    async with open_store(path) as opened:
        yield opened
