"""A tree of runs, or one run in full, as text of a bounded length. Pure.

Nothing is cut silently. What did not fit is named with the cursor that shows it: in the tree the run that comes
next; of one run ``part`` (the list from that part on) or ``part.character`` (that part alone from there on).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from mcp_tools.results import compact, cut, facts, iso
from orchestrator.errors import ConfigError
from orchestrator.messages import ToolCall
from orchestrator.store import Run

#: The least and the most a caller may ask for, and what it gets, in characters. Claude Code puts results of more
#: than about 25,000 tokens into a file.
MIN_CHARS, DEFAULT_CHARS, MAX_CHARS = 1000, 20_000, 200_000
#: Kept free for the lines that say what was left out.
_NOTES = 250
_NAME_CHARS = 100

_CURSOR = re.compile(r"([0-9]{1,6})(?:\.([0-9]{1,12}))?")


class Part(NamedTuple):
    """A section of a run. ``share`` of the length may be used for it while there are others."""

    title: str
    body: str
    share: float


# -- the tree -----------------------------------------------------------------------------------------------


def tree_text(runs: Sequence[Run], root_id: str, max_chars: int, cursor: str | None) -> str:
    """The run and all below it, one line each, children under their parents. Raises ConfigError."""
    lines = _lines(runs, root_id)
    begin = 0
    if cursor is not None:
        begin = next((at for at, (run_id, _) in enumerate(lines) if run_id == cursor), -1)
        if begin < 0:
            raise _no_cursor(cursor)
    shown: list[str] = []
    room = max_chars - _NOTES
    for run_id, line in lines[begin:]:
        if shown and len(line) + 1 > room:
            shown.append(_go_on(f"{len(lines) - begin - len(shown)} more runs", root_id, "tree", run_id))
            break
        shown.append(line)
        room -= len(line) + 1
    return "\n".join([f"trace {runs[0].trace_id}, {len(lines)} runs", *shown])


def _lines(runs: Sequence[Run], root_id: str) -> list[tuple[str, str]]:
    """Ids and lines, each run followed by what it started, in order of creation."""
    children: dict[str | None, list[Run]] = {}
    for run in runs:
        children.setdefault(run.parent_id if run.id != root_id else None, []).append(run)
    lines: list[tuple[str, str]] = []
    waiting = [(run, 0) for run in reversed(children.get(None, []))]
    while waiting:
        run, level = waiting.pop()
        lines.append((run.id, f"{'  ' * min(level, 50)}{_node(run)}"))
        waiting += [(child, level + 1) for child in reversed(children.get(run.id, []))]
    return lines


def _node(run: Run) -> str:
    parts = [run.id, cut(run.name, _NAME_CHARS), run.status]
    parts += [
        f"{name}={cut(str(value), _NAME_CHARS)}" for name, value in _figures(run).items() if value is not None
    ]
    return " ".join(parts)


def _figures(run: Run) -> dict[str, str | int | None]:
    plan = run.kind == "plan"
    took = run.duration_ms
    return {
        "kind": "plan" if plan else None,
        "step": run.step,
        "model": run.model_used or run.model_requested,
        "tokens": run.usage.total_tokens,
        "cost": "unknown" if run.cost_usd is None else f"${run.cost_usd:.4f}",
        "took": None if took is None else f"{took / 1000:.1f}s",
        "resumes": iso(run.resume_at_us) if run.status == "waiting" and run.resume_at_us else None,
        "error": (run.error or {}).get("code"),
    }


# -- one run ------------------------------------------------------------------------------------------------


def run_text(run: Run, calls: Sequence[ToolCall], max_chars: int, cursor: str | None) -> str:
    """One run in full: facts, prompt, answer, error, and each tool call with its result. Raises ConfigError."""
    parts = _parts(run, calls)
    at, character = _position(cursor, len(parts))
    if character is not None:
        return _alone(run.id, parts[at], at, character, max_chars)
    shown: list[str] = []
    room = max_chars - _NOTES
    for number, part in enumerate(parts[at:], at):
        if not part.body:
            continue  # there is no error; the numbers of the others stay
        text = _excerpt(part, number, max_chars)
        if shown and len(text) + 1 > room:
            shown.append(_go_on(f"{len(parts) - number} more parts", run.id, "run", str(number)))
            break
        shown.append(text)
        room -= len(text) + 1
    return "\n".join(shown)


def _parts(run: Run, calls: Sequence[ToolCall]) -> list[Part]:
    said = compact(run.structured) if run.has_structured else run.text
    return [
        Part("run", _facts(run), 0.2),
        Part("prompt", run.prompt or "none", 0.15),
        Part("answer" if run.ended else "said so far", said or "nothing", 0.4),
        Part("error", compact(run.error) if run.error else "", 0.1),
        *(_call_part(number, call) for number, call in enumerate(calls, 1)),
    ]


def _facts(run: Run) -> str:
    more = {
        "agent": run.name,
        **_figures(run),
        "parent": run.parent_id,
        "started": iso(run.started_us) if run.started_us else None,
        "cwd": run.cwd,
    }
    told = " ".join(f"{name}={value}" for name, value in more.items() if value is not None and name != "cost")
    return f"{facts(run.outcome())}\n{told}"


def _call_part(number: int, call: ToolCall) -> Part:
    state = "no result" if call.result is None else "failed" if call.is_error else "ok"
    return Part(
        f"tool {number}: {cut(call.name, _NAME_CHARS)} ({state})",
        f"{compact(call.input)}\n{call.result or ''}",
        0.1,
    )


def _excerpt(part: Part, number: int, max_chars: int) -> str:
    head, limit = f"--- {part.title} ---\n", int(part.share * max_chars)
    if len(head) + len(part.body) <= limit:
        return head + part.body
    note = f'\n[{{}} more characters: cursor="{number}.{{}}"]'
    end = max(0, limit - len(head) - len(note) - 16)
    return head + part.body[:end] + note.format(len(part.body) - end, end)


def _alone(run_id: str, part: Part, number: int, begin: int, max_chars: int) -> str:
    """One part from a character on, as long as may be."""
    head = f"--- {part.title}, from character {begin} of {len(part.body)} ---\n"
    end = begin + max_chars - _NOTES - len(head)
    shown = head + part.body[begin:end]
    left = len(part.body) - end
    return f"{shown}\n{_go_on(f'{left} more characters', run_id, 'run', f'{number}.{end}')}" if left > 0 else shown


def _position(cursor: str | None, parts: int) -> tuple[int, int | None]:
    if cursor is None:
        return 0, None
    match = _CURSOR.fullmatch(cursor)
    if match is None or int(match[1]) >= parts:
        raise _no_cursor(cursor)
    return int(match[1]), int(match[2]) if match[2] is not None else None


def _go_on(left: str, run_id: str, view: str, cursor: str) -> str:
    return f"[{left}: call get_trace({compact({'run_id': run_id, 'view': view, 'cursor': cursor})})]"


def _no_cursor(cursor: str) -> ConfigError:
    return ConfigError(
        f"{cut(cursor, _NAME_CHARS)!r} is no cursor of this view", advice="Use one that get_trace gave, or none."
    )
