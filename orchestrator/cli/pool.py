"""``orchestrator pool``: what the running server keeps warm, lends and ends."""

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import anyio
import anyio.to_thread
import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.cli.common import as_json, config_of, duration, is_terminal, print_json, run_async
from orchestrator.cli.views import console, short_model
from orchestrator.config import Config
from orchestrator.errors import ServerUnavailableError
from orchestrator.server import ServerState, read_state

ANSWER_SECONDS = 5
WATCH_SECONDS = 1.0

PHASES = {
    "busy": ("● works", "cyan"),
    "idle": ("○ warm", "green"),
    "held": ("◐ session", "green"),
    "ending": ("■ ending", "yellow"),
}
#: What the reasons of the pool mean to a reader.
REASONS = {
    "expired": "unused for too long",
    "room": "more sessions than may be kept",
    "memory": "to free memory",
    "stale": "their files changed",
    "superseded": "their session went on elsewhere",
    "failed": "their turn failed",
    "not_kept": "none are to be kept",
    "died": "by themselves",
    "shutdown": "at shutdown",
}


@click.command("pool")
@click.option("--watch", is_flag=True, help="Go on showing it, until Ctrl-C.")
@as_json
@click.pass_context
def pool_command(ctx: click.Context, watch: bool, as_json: bool) -> None:
    """Show the CLI processes of the running server: at work, warm, holding a session; and how often that helped.

    Of the server of this data directory. Runs of `orchestrator run` and `delegate` have processes of their own.
    """
    config = config_of(ctx)
    if watch:
        with suppress(KeyboardInterrupt):  # the way to end it
            run_async(_watch, config, as_json)
        return
    report = _ask(config)
    if as_json:
        print_json(report)
    else:
        console().print(pool_view(report))


async def _watch(config: Config, as_json: bool) -> None:
    """A view that is redrawn on a terminal; JSON lines for programs, one view after the other in a pipe."""
    report = await anyio.to_thread.run_sync(_ask, config)
    if not as_json and is_terminal():
        with Live(pool_view(report), console=console(), auto_refresh=False) as live:
            while True:
                await anyio.sleep(WATCH_SECONDS)
                live.update(pool_view(await anyio.to_thread.run_sync(_ask, config)), refresh=True)
    while True:
        if as_json:
            sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n")
        else:
            console().print(pool_view(report))
        sys.stdout.flush()
        await anyio.sleep(WATCH_SECONDS)
        report = await anyio.to_thread.run_sync(_ask, config)


def _ask(config: Config) -> dict[str, Any]:
    """The server's report, with what its state file says of it. Raises ServerUnavailableError. Blocks."""
    state = read_state(config.data_path)
    if state is None:
        raise ServerUnavailableError(
            f"no server runs for {config.data_path}",
            advice="Start one with `orchestrator serve` (`orchestrator mcp` does so by itself), "
            "or name another with --data-dir.",
        )
    server = {"pid": state.pid, "url": state.url, "version": state.version, "up_s": _age(state)}
    return {"server": server, **_fetch(state)}


def _age(state: ServerState) -> float:
    return round(max(0.0, time.time() - state.started_us / 1e6), 1)


def _fetch(state: ServerState) -> dict[str, Any]:
    request = urllib.request.Request(  # noqa: S310  # the URL is our own server's
        state.url.removesuffix("/mcp") + "/pool", headers={"Authorization": f"Bearer {state.token}"}
    )
    # No proxy of the environment: it would be shown the token, and knows no way to our loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=ANSWER_SECONDS) as answer:
            report: dict[str, Any] = json.load(answer)
            return report
    except urllib.error.HTTPError as error:
        error.close()
        raise _unavailable(state, f"answered with HTTP status {error.code}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise _unavailable(state, f"does not answer: {reason}") from None


def _unavailable(state: ServerState, problem: str) -> ServerUnavailableError:
    return ServerUnavailableError(
        f"the server (process {state.pid} at {state.url}) {problem}",
        advice=f"If this lasts, restart it: kill {state.pid}, then `orchestrator serve`.",
    )


# -- what people see ----------------------------------------------------------------------------------------


def pool_view(report: Mapping[str, Any]) -> RenderableType:
    """The whole report: one line of state, the processes, what happened so far."""
    workers = report["workers"]
    parts: list[RenderableType] = [_head(report), *_trouble(report["provider"])]
    if workers:
        parts += [Text(), _workers_table(workers)]
    else:
        parts += [Text(), Text("No processes now; a run starts one when it needs it. pool.warm keeps some ready.")]
    return Group(*parts, Text(), _history(report["counters"]))


def _head(report: Mapping[str, Any]) -> Text:
    server, limits, queue = report["server"], report["limits"], report["queue"]
    # Until each has been measured, the sum is an estimate. One that is ending counts no more.
    counted = [worker["memory_mb"] for worker in report["workers"] if worker["phase"] != "ending"]
    about = "~" if None in counted else ""
    facts = [
        f"{report['working']} of {limits['max_processes']} at work",
        f"{queue['length']} waiting",
        f"{about}{report['memory_mb']:.0f} of {limits['memory_mb']:.0f} MB" if limits["memory_mb"] else "",
        f"server {server['pid']}, up {duration(int(server['up_s'] * 1000))}",
    ]
    return Text.assemble(("pool", "bold"), "  " + " · ".join(fact for fact in facts if fact))


def _trouble(provider: Mapping[str, Any]) -> Iterator[Text]:
    """What keeps runs from beginning, if anything does: nothing about the processes would say so."""
    circuit, limit, parked = provider["circuit"], provider["usage_limit"], provider["parked"]
    waiting = f"; {parked} runs wait for it" if parked != 1 else "; 1 run waits for it"
    if circuit["state"] != "closed":
        state, wait = circuit["state"].replace("_", " "), circuit["retry_after"]
        then = f"the next run may try in {duration(int(wait * 1000))}" if wait else "the next run tries it"
        yield Text(f"circuit {state} after {circuit['reason']} errors of the provider; {then}", "yellow")
    if limit is not None:
        until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(limit["resets_at"]))
        yield Text(f"usage limit {limit['kind']} reached, until {until}{waiting}", "yellow")


def _workers_table(workers: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("state", "for", "agent", "model", "run or session", "age", "MB", "pid"):
        table.add_column(
            name, no_wrap=True, overflow="ellipsis",
            justify="right" if name in ("for", "age", "MB", "pid") else "left",
        )  # fmt: skip
    for worker in sorted(workers, key=lambda worker: (list(PHASES).index(worker["phase"]), worker["id"])):
        table.add_row(
            _phase(worker),
            duration(int(worker["phase_s"] * 1000)),
            worker["agent"],
            short_model(worker["model"]),
            _use(worker),
            duration(int(worker["age_s"] * 1000)),
            "" if worker["memory_mb"] is None else f"{worker['memory_mb']:.0f}",
            str(worker["pid"] or ""),
        )
    return table


def _phase(worker: Mapping[str, Any]) -> Text:
    text, style = PHASES[worker["phase"]]
    if worker["starting"] and worker["phase"] != "ending":
        return Text(f"{text[0]} starting", style)
    return Text(text, style)


def _use(worker: Mapping[str, Any]) -> str:
    if worker["run_id"]:
        return str(worker["run_id"])
    return f"session {worker['session_id'][:8]}" if worker["session_id"] else ""


def _history(counters: Mapping[str, Any]) -> RenderableType:
    """Every counter, in words."""
    warm, own, cold = counters["hits"], counters["session_hits"], counters["cold_starts"]
    retired = [f"{count} {REASONS.get(reason, reason)}" for reason, count in counters["retired"].items()]
    table = Table.grid(padding=(0, 2))
    for name, value in (
        (
            "runs served",
            f"{warm + own + cold}: {warm} by a warm process, {own} by their session's, {cold} by a new one",
        ),
        ("had to wait", counters["waits"]),
        ("refused", counters["refused"]),
        ("started ahead", counters["refills"]),
        ("ended", ": ".join([str(sum(counters["retired"].values())), *([", ".join(retired)] if retired else [])])),
    ):
        table.add_row(Text(f"  {name}", "dim"), str(value))
    return Group(Text("since the start", "dim"), table)
