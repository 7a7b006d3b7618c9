"""What is asked of an agent."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.tracing import SpanContext


class Task(BaseModel):
    """What is asked of an agent. Times are seconds, money is USD; None means the configured default.

    ``budget_usd``, ``budget_tokens``, ``max_turns`` (model requests) and ``max_runs`` (runs below) hold for the
    run and all it delegates; ``max_depth`` is how many levels they may be, the run itself included. 0 is none at
    all, and the parent's rest bounds them all.
    ``session`` is a session id to go on with; with ``fork`` a copy of it is gone on with and it stays as it is.
    The copy ends with the ``fork_turn``-th turn of the session, counted from 1; None copies all of it.
    ``parent_id`` is the run that delegates; ``parent_span`` the exact caller inside or outside of it.
    ``project_dir`` says whose agents are meant; children inherit their parent's. ``allowed_tools`` are permission
    rules granted on top of the agent's file (``Bash(git *)``), ``add_dirs`` directories its file tools may use
    beside the working directory, ``settings`` a layer of Claude Code settings for this run. ``fallback_model`` is
    used while ``model`` is overloaded. Of the runs that wait for a process, those of a higher ``priority`` go
    first; ``on_full`` says whether to be refused or to wait when so many wait that no more may. ``questions`` is
    what becomes of permission prompts and questions of the agent, and of those below it: denied, or put to whoever
    has delegated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    agent: str
    prompt: str
    session: str | None = None
    fork: bool = False
    fork_turn: int | None = Field(None, ge=1)
    model: str | None = None
    fallback_model: str | None = None
    cwd: Path | None = None
    project_dir: Path | None = None
    effort: str | None = None
    permission_mode: str | None = None
    allowed_tools: tuple[str, ...] = ()
    append_system_prompt: str | None = None
    add_dirs: tuple[Path, ...] = ()
    settings: dict[str, Any] | None = None
    output_schema: dict[str, Any] | None = None
    timeout_s: float | None = Field(None, gt=0)
    idle_timeout_s: float | None = Field(None, gt=0)
    budget_usd: float | None = Field(None, ge=0)
    budget_tokens: int | None = Field(None, ge=0)
    max_turns: int | None = Field(None, ge=0)
    max_runs: int | None = Field(None, ge=0)
    max_depth: int | None = Field(None, ge=0)
    parent_id: str | None = None
    parent_span: SpanContext | None = None
    priority: int = 0
    on_full: Literal["refuse", "wait"] = "refuse"
    questions: Literal["deny", "ask"] | None = None
    step: str | None = None
    caller: dict[str, Any] | None = None
