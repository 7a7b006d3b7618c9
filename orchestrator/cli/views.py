"""What people see of runs: tables, trees and the live view. Rendering only; state comes in as rows and events."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from orchestrator.cli.common import duration, is_terminal, money, one_line, tokens, when
from orchestrator.store import Run

STYLES = {
    "succeeded": "green",
    "running": "cyan",
    "queued": "dim",
    "waiting": "dim",
    "failed": "bold red",
    "timed_out": "bold red",
    "interrupted": "red",
    "cancelled": "yellow",
    "skipped": "dim",
}
PIPE_WIDTH = 250

MARKS = {
    "succeeded": "✓",
    "running": "●",
    "failed": "✗",
    "timed_out": "✗",
    "interrupted": "✗",
    "cancelled": "■",
    "skipped": "–",
}


def status_text(status: str) -> Text:
    return Text(f"{MARKS.get(status, '·')} {status}", STYLES.get(status, ""))


def run_status(run: Run) -> Text:
    """The status of a run; of one that waits for the end of a usage limit, until when."""
    status = status_text(run.status)
    if run.status == "waiting" and run.resume_at_us is not None:
        status.append(f" until {when(run.resume_at_us)}")
    return status


def runs_table(runs: Sequence[Run]) -> Table:
    """A list of runs, one line each."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("run", "status", "name", "model", "tokens", "cost", "time", "started", "prompt"):
        table.add_column(
            name,
            no_wrap=True,
            overflow="ellipsis",
            justify="right" if name in ("tokens", "cost", "time") else "left",
        )
    for run in runs:
        table.add_row(
            run.id,
            run_status(run),
            ("plan " if run.kind == "plan" else "") + run.name,
            short_model(run.model_used or run.model_requested),
            tokens(run.usage.total_tokens) if run.kind == "agent" else "",
            money(run.cost_usd, run.cost_basis),
            duration(run.duration_ms),
            when(run.started_us or run.created_us),
            one_line(run.prompt, 40),
        )
    return table


def steps_table(runs: Sequence[Run], statuses: Mapping[str, str]) -> Table:
    """The steps of a plan: each job with its run; jobs that never ran only with their status."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("step", "status", "agent", "model", "session", "tokens", "cost", "time"):
        table.add_column(name, no_wrap=True, justify="right" if name in ("tokens", "cost", "time") else "left")
    ran = {run.step: run for run in runs if run.step}
    for job in dict.fromkeys([*statuses, *ran]):
        run = ran.get(job)
        if run is None:
            if not any(str(step).startswith(f"{job}[") for step in ran):
                table.add_row(job, status_text(statuses.get(job, "waiting")))
            continue
        table.add_row(
            job,
            run_status(run),
            run.name,
            short_model(run.model_used or run.model_requested),
            run.session_mode or "",
            tokens(run.usage.total_tokens),
            money(run.cost_usd, run.cost_basis),
            duration(run.duration_ms),
        )
    return table


def runs_tree(runs: Sequence[Run], root_id: str, tools: Mapping[str, Sequence[str]] | None = None) -> Tree:
    """Runs under their parents: status, agent, model, tokens, cost, duration; ``tools`` are lines below a run."""
    nodes: dict[str, Tree] = {}
    root = Tree("", hide_root=True)
    for run in runs:
        parent = nodes.get(run.parent_id or "", root) if run.id != root_id else root
        nodes[run.id] = parent.add(_node(run))
        for line in (tools or {}).get(run.id, ()):
            nodes[run.id].add(Text(line, "dim"))
    return root


def _node(run: Run) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append_text(run_status(run))
    line.append(f" {run.name}", "bold")
    line.append(f" {run.step}" if run.step else "")
    facts = [
        f"{tokens(run.usage.total_tokens)} tokens" if run.kind == "agent" else "plan",
        money(run.cost_usd, run.cost_basis),
        duration(run.duration_ms),
        short_model(run.model_used or run.model_requested),
        {"continue": "continued", "fork": "forked"}.get(run.session_mode or "", ""),
        run.id,
    ]
    line.append("  " + " · ".join(fact for fact in facts if fact), "dim")
    if run.error:
        line.append(f"\n{one_line(str(run.error.get('message')), 160)}", "red")
    return line


@dataclass(slots=True)
class LiveRow:
    """One running or finished job as events told of it."""

    job: str
    agent: str = ""
    model: str = ""
    status: str = "queued"
    activity: str = ""
    tokens: int = 0
    cost_usd: float | None = None
    started: float | None = None
    ended: float | None = None
    depth: int = 1


@dataclass(slots=True)
class LiveView:
    """The state of the live view; ``feed`` takes events, ``render`` draws it."""

    title: str
    root_id: str
    began: float = field(default_factory=time.monotonic)
    rows: dict[str, LiveRow] = field(default_factory=dict)

    def feed(self, kind: str, run_id: str, data: Mapping[str, Any]) -> str | None:
        """Take in an event of this tree of runs; returns a line for plain output, if it is worth one."""
        if kind == "run.created" and data.get("root_id") == self.root_id and data.get("kind") == "agent":
            self.rows[run_id] = LiveRow(data.get("step") or data["name"], agent=data["name"], depth=data["depth"])
        row = self.rows.get(run_id)
        if row is None:
            return None
        row.tokens = data.get("tokens") or row.tokens
        row.cost_usd = data.get("cost_usd") if data.get("cost_usd") is not None else row.cost_usd
        row.model = data.get("model") or row.model
        if kind == "run.started":
            row.status, row.started = "running", time.monotonic()
            return f"{row.job} started: {row.agent} {row.model}".rstrip()
        if kind == "run.parked":
            row.status, row.activity = "waiting", f"until {when(int(data['until'] * 1e6))}: {data['reason']} limit"
            return f"{row.job} waiting {row.activity}"
        if kind == "run.resumed":
            row.status, row.activity = "queued" if row.started is None else "running", ""
            return f"{row.job} goes on"
        if kind == "run.asked":
            row.activity = f"asks: {one_line(data['text'], 200)}"
            return f"{row.job} {row.activity}"
        if kind == "run.answered":
            row.activity = ""
            return f"{row.job} was {'allowed' if data['allowed'] else 'denied'} it by {data['by']}"
        if kind == "run.activity":
            row.activity = str(data.get("activity", ""))
        if kind == "run.ended":
            row.status, row.ended, row.activity = str(data["status"]), time.monotonic(), ""
            error = (data.get("error") or {}).get("message", "")
            said = f": {one_line(error, 200)}" if error else ""
            return f"{row.job} {row.status} in {duration(data.get('duration_ms'))}, {money(row.cost_usd)}{said}"
        return None

    def render(self) -> RenderableType:
        now = time.monotonic()
        table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
        for name in ("step", "status", "agent", "model", "time", "tokens", "cost", "activity"):
            right = name in ("time", "tokens", "cost")
            table.add_column(
                name, no_wrap=True, overflow="ellipsis", justify="right" if right else "left",
                ratio=1 if name == "activity" else None,
            )  # fmt: skip
        for row in self.rows.values():
            took = None if row.started is None else int(((row.ended or now) - row.started) * 1000)
            table.add_row(
                "  " * (row.depth - 1) + row.job,
                status_text(row.status),
                row.agent,
                short_model(row.model),
                duration(took),
                tokens(row.tokens),
                money(row.cost_usd) if row.cost_usd is not None else "",
                Text(row.activity, "dim"),
            )
        return Group(self._head(now), table)

    def _head(self, now: float) -> Text:
        done = sum(row.ended is not None for row in self.rows.values())
        spent = sum(row.cost_usd or 0 for row in self.rows.values())
        used = sum(row.tokens for row in self.rows.values())
        facts = f"  {done}/{len(self.rows)} runs ended · {tokens(used)} tokens · {money(spent)}"
        return Text.assemble(
            (self.title, "bold"), (facts + f" · {duration(int((now - self.began) * 1000))}", "dim")
        )


def console() -> Console:
    """Standard output. A pipe has no width to fit into: nothing is cut there."""
    # No markup: names and answers are data, and may hold brackets.
    return Console(highlight=False, markup=False, width=None if is_terminal() else PIPE_WIDTH)


def short_model(model: str | None) -> str:
    """``claude-sonnet-5-5`` → ``sonnet-5-5``; the full name is in --json."""
    return (model or "").removeprefix("claude-")
